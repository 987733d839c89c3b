"""`jobs/benchmark.py options`: flags, triplets and report; heavy imports wait for `run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ip2p_ray.command import require_place

if TYPE_CHECKING:
    from ip2p_ray.benchmark.comparison import Measured


@dataclass(frozen=True, kw_only=True)
class Options:
    """What each option of the pair search saves and loses, beside full generation."""

    preset: str = "miniature"
    """Models and settings: miniature, fast or paper."""
    triplets: Path | None = None
    """A file of triplets; by default held-out ones of the drawn world, else the examples."""
    prompts: int = 20
    """Triplets that are measured."""
    pilots: int = 10
    """Other triplets, which the acceptance prior and the margins of pruning are read off."""
    candidates: int = 24
    """Candidates of each triplet."""
    stop_early: float = 0.5
    """Chance of a better pair below which a triplet is stopped."""
    stop_margin: float = 0.05
    """Cosine by which a pair has to be better."""
    give_up: float = 0.5
    """Chance of any further accepted candidate below which a triplet is given up."""
    lose: float = 0.05
    """Share of the pilots' accepted candidates that pruning may lose; its margins follow."""
    batch_size: int = 8
    """Candidates in a batch; each is four rows of the UNet."""
    device: str = "cpu"
    """Where everything is computed, for example cuda."""
    json: Path | None = None
    """Where the figures go as JSON, besides the table."""

    def __post_init__(self) -> None:
        for name in ("prompts", "pilots", "candidates", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is at least 1")
        for name in ("stop_early", "give_up", "lose"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} lies between 0 and 1")
        if not 0 <= self.stop_margin <= 2:
            raise ValueError("--stop-margin lies in [0, 2]")
        if self.batch_size < 3:
            raise ValueError("--batch-size is at least 3: 4 candidates and their source, 5 rows")
        if self.triplets is not None and not self.triplets.is_file():
            raise ValueError(f"--triplets {self.triplets} is no file")
        if self.json is not None:
            require_place("--json", self.json, folder=False)


def run(job: Options) -> str:
    """The table; the JSON file is written.

    Raises:
        Ip2pError: a preset, a model, a device or the triplets cannot be used.
    """
    import torch

    from ip2p_ray import presets
    from ip2p_ray.benchmark.comparison import FULL, table
    from ip2p_ray.benchmark.options import Levels, measure_options
    from ip2p_ray.clip import Clip
    from ip2p_ray.diffusion.model import StableDiffusion
    from ip2p_ray.errors import ConfigError
    from ip2p_ray.schema import recipe

    preset = presets.by_name(job.preset)
    rows = _triplets(job)
    if job.device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"--device {job.device}: torch finds no such device here")
    model = StableDiffusion.load(preset.generator, device=job.device)
    clip = Clip.load(preset.judge, device=job.device)
    config = replace(preset.pairs, candidates=job.candidates)
    levels = Levels(
        stop_early=job.stop_early,
        stop_margin=job.stop_margin,
        give_up=job.give_up,
        lose=job.lose,
    )
    measured = measure_options(
        model,
        clip,
        rows[job.pilots :],
        rows[: job.pilots],
        config,
        levels,
        recipe=recipe(config, model.fingerprint(), clip.fingerprint()),
        batch_size=job.batch_size,
    )
    if job.json is not None:
        _write(job, config, measured)
    head = (
        f"{job.prompts} triplets of {job.candidates} candidates, {config.steps} steps, keep "
        f"{config.keep}; {job.pilots} other triplets as pilots; {_device(job.device)}, torch "
        f"{torch.__version__}; ratios to {FULL}"
    )
    return f"{head}\n\n{table(measured)}"


def _triplets(job: Options) -> list[dict[str, str]]:
    """Pilots first, then those that are measured; no triplet twice."""
    from ip2p_ray.errors import ConfigError
    from ip2p_ray.miniature.scores import edit_tasks
    from ip2p_ray.schema import triplet_key
    from ip2p_ray.triplets.examples import load_examples

    wanted = job.pilots + job.prompts
    drawn = job.triplets is None and job.preset == "miniature"
    # the grammar repeats itself now and then
    texts = edit_tasks(2 * wanted, seed=0) if drawn else load_examples(job.triplets)
    rows = {triplet_key(one.caption, one.instruction, one.edited_caption): one for one in texts}
    if len(rows) < wanted:
        raise ConfigError(f"{wanted} triplets are wanted, there are {len(rows)} different ones")
    return [
        {"triplet_key": key, "caption": one.caption, "edited_caption": one.edited_caption}
        for key, one in list(rows.items())[:wanted]
    ]


def _write(job: Options, config: Any, measured: Mapping[str, Measured]) -> None:
    import json

    import torch

    from ip2p_ray.atomic import atomic_file
    from ip2p_ray.benchmark.comparison import QUANTILES
    from ip2p_ray.benchmark.measure import facts

    content = {
        "benchmark": "options",
        "preset": job.preset,
        **facts(torch.device(job.device)),
        "pairs": asdict(config),
        "prompts": job.prompts,
        "pilots": job.pilots,
        "batch_size": job.batch_size,
        "quantiles": QUANTILES,
        "options": {name: asdict(one) for name, one in measured.items()},
    }
    text = json.dumps(content, indent=2) + "\n"
    assert job.json is not None
    with atomic_file(job.json) as new:
        new.write_text(text, encoding="utf-8")


def _device(name: str) -> str:
    import platform

    import torch

    if name != "cpu":
        return str(torch.cuda.get_device_name(name))
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
