"""What an editor is worth: its edits beside those of baselines, judged, with intervals.

    python jobs/evaluate_editor.py --editor runs/quickstart/editor --out runs/evaluation
    python jobs/evaluate_editor.py --editor runs/a/editor --compare runs/b/editor runs/c/editor \
        --data runs/q/pairs --out runs/evaluation
    ray job submit --working-dir . -- python jobs/evaluate_editor.py --preset paper \
        --editor s3://bucket/run/editor --data /shared/MagicBrush/test --turns multi \
        --judge ViT-B-32/openai --dino s3://bucket/models/dino-vits16 \
        --out s3://bucket/run/evaluation --dtype bfloat16 --gpus 1 --actors 8 --batch-size 16

<out>/report.html, <out>/metrics.json and <out>/scores.parquet come out, the edits beside them. Rows
for the copied input, another picture, SDEdit, Prompt-to-Prompt and the generator's own pair are
always there. Whenever it is stopped, the same command goes on; another editor, judge or scale with
the same --out makes only what is new. The status is 0 when all is made, 1 for a failure and 2 for a
wrong flag.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.command import custom_resources, loading, require_uri

DRAWN_TASKS = 256
TEXT_GUIDANCE_SCALE = 7.5
"""Of Stable Diffusion, as an editor (section 4 of the paper) and as the generator that it was."""


@dataclass(frozen=True, kw_only=True)
class EvaluateEditor:
    """Editors and tasks in; scores and a report out."""

    editor: str | None = None
    """Diffusers folder, s3://... or hub id of the editor; by default the miniature's, that of the
    package."""
    compare: tuple[str, ...] = ()
    """More editors, answered and judged alike, each with its differences to the first."""
    data: str = "miniature"
    """What is asked: "miniature" for scenes of the drawn world with the oracle's truth; a pairs
    dataset, whose held-out pairs are taken; or a set as MagicBrush, Emu Edit, PIE-Bench or ImgEdit
    distribute theirs, or a table of pairs. Of s3://... a set is copied once, with its pictures."""
    turns: Literal["single", "multi"] = "single"
    """Of MagicBrush: each turn on its true input, or all turns of a session one after the other."""
    out: str = "runs/evaluation"
    """Folder for everything that is made, which all nodes have to reach; or s3://..."""
    preset: Literal["miniature", "fast", "paper"] = "miniature"
    """Generator of the baselines, its sampling, and judge; flags below take their place."""
    tasks: int | None = None
    """Most tasks, drawn from all; by default all, of the miniature 256."""
    curve_tasks: int | None = None
    """The first of them, asked at every point of the curves; by default all."""
    text_guidance_scale: float | None = None
    """Of the table; by default each editor's own."""
    image_guidance_scale: float | None = None
    """Of the table; by default each editor's own."""
    text_guidance_scales: tuple[float, ...] = ()
    """Of the curves, one for each, the same for all editors; by default one: at 7.5 (the paper's)
    with --preset paper and fast, else at --text-guidance-scale, else at the first editor's own."""
    image_guidance_scales: tuple[float, ...] = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2)
    """The points of the editors' curves."""
    strengths: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """The points of SDEdit's curve; the middle one is the table's."""
    self_replaces: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """The points of Prompt-to-Prompt's curve; the middle one is the table's."""
    steps: int | None = None
    """Sampling steps of editors and baselines; by default their own."""
    generator: str | None = None
    """Diffusers folder, s3://... or hub id of the baselines' Stable Diffusion."""
    judge: str | None = None
    """Folder, s3://... or open_clip name of the CLIP that judges; another than the filter's is
    fairer."""
    dino: str | None = None
    """transformers folder, here or s3://..., of a ViT or DINOv2 for the DINO measures; without it
    there are none."""
    generator_guidance_scale: float | None = None
    """Of SDEdit and Prompt-to-Prompt; by default 7.5, with --preset miniature the middle of the
    range that its pairs are made with."""
    resolution: int | None = None
    """Pixels of the longer side of the baselines' pictures; an editor has its own."""
    seed: int = 0
    """Of the tasks that are taken, of their noise and of the resampling."""
    resamples: int = 2000
    """Of the bootstrap."""
    shown: int = 24
    """Tasks in the report's gallery, the worst first."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the editors' and the generator's weights and arithmetic."""
    actors: int = 2
    """Processes that make pictures, and that judge them."""
    gpus: float = 0.0
    """GPUs of each of them; 0 computes on the CPU."""
    cpus: float = 0.5
    """Logical CPUs of each of them."""
    actor_resources: tuple[str, ...] = ()
    """Custom resources of each of them, such as editor=1: they stay on nodes that have some."""
    batch_size: int = 8
    """Pictures at a time of each of them."""
    tasks_at_a_time: int = 4
    """Tasks that each takes at a time, and that a kill can cost it."""

    def __post_init__(self) -> None:
        for name in ("tasks", "steps", "resolution", "actors", "batch_size", "tasks_at_a_time"):
            _at_least_1(name, getattr(self, name))
        if self.curve_tasks is not None and self.curve_tasks < 0:
            raise ValueError("--curve-tasks is not negative")
        if self.gpus < 0 or self.cpus < 0 or self.shown < 0:
            raise ValueError("--gpus, --cpus and --shown are not negative")
        if self.resamples < 100:
            raise ValueError("--resamples is at least 100")
        if not 0 <= self.seed < 2**31:
            raise ValueError("--seed lies in [0, 2**31)")
        if not self.strengths or not all(0 < value <= 1 for value in self.strengths):
            raise ValueError("--strengths lie in (0, 1]")
        if not self.self_replaces or not all(0 <= value <= 1 for value in self.self_replaces):
            raise ValueError("--self-replaces lie in [0, 1]")
        if not self.image_guidance_scales:
            raise ValueError("--image-guidance-scales needs a number")
        given = (self.text_guidance_scale or 0.0, self.image_guidance_scale or 0.0)
        numbers = (*given, *self.text_guidance_scales, *self.image_guidance_scales)
        if not all(math.isfinite(value) for value in numbers):
            raise ValueError("guidance scales are finite numbers")
        own = self.generator_guidance_scale
        if own is not None and not (math.isfinite(own) and own >= 0):
            raise ValueError("--generator-guidance-scale is a finite number and not negative")
        if self.editor is None and self.preset != "miniature":
            raise ValueError(f"--preset {self.preset} needs an --editor")
        if self.data == "miniature" and self.preset != "miniature":
            raise ValueError(
                f"--preset {self.preset} needs --data: drawn scenes are for miniatures"
            )
        if self.turns == "multi" and self.data == "miniature":
            raise ValueError("--turns multi needs --data with turns, as MagicBrush's")
        custom_resources("--actor-resources", self.actor_resources)
        for flag, place in self.places:
            require_uri(flag, place)
        require_uri("--out", self.out, written=True)

    @property
    def places(self) -> list[tuple[str, str]]:
        """Each flag that may name something in a bucket, with what it names; --out apart."""
        named = {
            name: getattr(self, name) for name in ("editor", "data", "generator", "judge", "dino")
        }
        found = [(f"--{name}", place) for name, place in named.items() if place is not None]
        return [*found, *(("--compare", place) for place in self.compare)]


def _at_least_1(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"--{name.replace('_', '-')} is at least 1")


def main(job: EvaluateEditor) -> int:
    """Evaluate, or do what is left of it; returns the exit status."""
    with loading("evaluate_editor"):
        from ip2p_ray.stages import run
    return run.guarded("evaluate_editor", lambda: _evaluate(job))


def _evaluate(job: EvaluateEditor) -> None:
    from ip2p_ray import storage
    from ip2p_ray.intervals import BootstrapConfig
    from ip2p_ray.stages import run
    from ip2p_ray.stages.trial_report import write_report
    from ip2p_ray.stages.trials import run_contest

    for place in (job.out, *(place for _, place in job.places)):
        storage.check(place)
    source, contest = _settings(job)
    out = storage.absolute(job.out)
    with run.locked(out), run.local_ray(workers=job.actors, actors=(contest.answering,)):
        made = run_contest(source, out, contest)
    config = BootstrapConfig(resamples=job.resamples, seed=job.seed)
    metrics = write_report(out, source, contest, made, config, shown=job.shown)
    for line in _lines(metrics):
        print(f"evaluate_editor: {line}")
    root = job.out.rstrip("/")
    print(f"evaluate_editor: see {root}/report.html; numbers are in {root}/metrics.json")


def _settings(job: EvaluateEditor) -> tuple[Any, Any]:
    """What is asked, and who answers and judges."""
    from dataclasses import replace

    from ip2p_ray import presets
    from ip2p_ray.generator import GeneratorWeights
    from ip2p_ray.stages.run import Resources
    from ip2p_ray.stages.trial_tasks import DRAWN, TaskSource
    from ip2p_ray.stages.trials import Contest, Judges
    from ip2p_ray.trials import TrialConfig, told_apart

    preset = presets.by_name(job.preset)
    pairs = preset.pairs
    if job.steps is not None:
        pairs = replace(pairs, steps=job.steps)
    if job.resolution is not None:
        pairs = replace(pairs, resolution=job.resolution)
    trials = TrialConfig(**{name: getattr(job, name) for name in TrialConfig.__dataclass_fields__})
    guidance_scale = job.generator_guidance_scale
    if job.preset != "miniature":
        if not trials.text_guidance_scales:
            trials = replace(trials, text_guidance_scales=(TEXT_GUIDANCE_SCALE,))
        if guidance_scale is None:
            guidance_scale = TEXT_GUIDANCE_SCALE
    default = DRAWN_TASKS if job.data == DRAWN else None
    source = TaskSource(
        data=job.data if job.data == DRAWN else _absolute(job.data),
        tasks=job.tasks or default,
        turns=job.turns,
        seed=job.seed,
    )
    editors = [_absolute(job.editor or str(preset.shipped)), *map(_absolute, job.compare)]
    names = told_apart(editors)
    if job.editor is None:
        names[0] = "shipped editor"
    held = Resources(
        actors=job.actors,
        gpus=job.gpus,
        cpus=job.cpus,
        batch_size=job.batch_size,
        custom=custom_resources("--actor-resources", job.actor_resources),
    )
    contest = Contest(
        editors=dict(zip(names, editors, strict=True)),
        generator=GeneratorWeights(
            source=_absolute(job.generator or preset.generator), dtype=job.dtype
        ),
        pairs=pairs,
        guidance_scale=guidance_scale,
        judges=Judges(
            clip=_absolute(job.judge or preset.judge),
            dino=_absolute(job.dino) if job.dino else None,
            device="cuda" if job.gpus else "cpu",
        ),
        trials=trials,
        steps=job.steps,
        dtype=job.dtype,
        answering=held,
        judging=held,
        tasks_at_a_time=job.tasks_at_a_time,
    )
    return source, contest


def _absolute(place: str) -> str:
    """A local path as actors in other folders name it; hub ids and names stay."""
    return str(Path(place).absolute()) if Path(place).exists() else place


def _lines(metrics: dict[str, Any]) -> list[str]:
    """Each answerer's most telling means, for the terminal."""
    told = ("correct", "preservation_error", "direction_similarity", "image_similarity")
    told = (*told, "truth_l1", "truth_clip", "truth_dino")
    found = []
    for name, means in metrics["table"].items():
        some = [f"{measure} {means[measure]['mean']:.3f}" for measure in told if measure in means]
        found.append(f"{name}: {', '.join(some)}")
    return [*found, *metrics["skipped"]]


if __name__ == "__main__":
    with loading("evaluate_editor"):
        import tyro

        asked = tyro.cli(EvaluateEditor)
    sys.exit(main(asked))
