"""Pairs of pictures from triplets: Prompt-to-Prompt makes candidates, CLIP keeps the good ones.

    python jobs/generate_pairs.py --triplets runs/q/triplets --out runs/q
    python jobs/generate_pairs.py --triplets /shared/run/triplets --out /shared/run --dry-run \
        --preset paper --dtype bfloat16 --gpus 1 --actors 8 --batch-size 16
    ray job submit --working-dir . -- python jobs/generate_pairs.py --preset fast \
        --triplets /shared/run/triplets --out /shared/run --dtype bfloat16 \
        --gpus 1 --actors 2 --most-actors 16 --batch-size 16
    ray job submit --working-dir . -- python jobs/generate_pairs.py --preset fast \
        --triplets s3://bucket/run/triplets --out s3://bucket/run --dtype bfloat16 \
        --gpus 1 --actors 2 --most-actors 16 --batch-size 16

<out>/pairs comes out, with candidates, scores and rejects beside it and the page <out>/pairs.html.
First a batch is measured and what the rest will take is told; --dry-run stops there. Whenever it is
stopped, the same command goes on, with other workers if need be. s3:// takes endpoint, region and
credentials as in jobs/collect_captions.py, on every node. The status is 0 when all is made, 1 for a
failure and 2 for a wrong flag.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.command import custom_resources, loading, require_uri

OF_THE_PAIRS = (
    *("resolution", "steps", "sampler", "candidates", "self_replace", "guidance_scale"),
    *("cross_replace", "keep", "image_format"),
)
"""Flags that take the place of what the preset has in its PairConfig."""

OF_THE_SEARCH = (
    *("stop_early", "stop_margin", "give_up", "acceptance_prior", "decide_every"),
    *("share_source", "prune_at", "prune_text", "prune_image", "prune_direction"),
)
"""Flags of what is spared, those of SearchConfig."""


@dataclass(frozen=True, kw_only=True)
class GeneratePairs:
    """A dataset of triplets in, a dataset of pairs out."""

    triplets: str
    """Dataset of triplets, as jobs/write_triplets.py or jobs/collect_captions.py makes it; here or
    s3://."""
    out: str = "runs/pairs"
    """Folder for the datasets; all nodes have to reach it, here or s3://."""
    preset: Literal["miniature", "fast", "paper"] = "miniature"
    """Models and settings; every flag below takes the place of one of them."""
    dry_run: bool = False
    """Only measure a batch and tell what the whole will take."""
    generator: str | None = None
    """Diffusers folder or hub id of a Stable Diffusion."""
    judge: str | None = None
    """Folder or open_clip name of a CLIP; another CLIP needs other thresholds."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the generator's weights and arithmetic."""
    vae: str | None = None
    """Folder or hub id of another autoencoder, for example a tiny one."""
    resolution: int | None = None
    """Height and width of the pictures."""
    steps: int | None = None
    """Sampling steps."""
    sampler: Literal["euler", "euler_ancestral", "dpmpp_2m"] | None = None
    """How the steps are taken."""
    candidates: int | None = None
    """Candidates of each triplet."""
    self_replace: tuple[float, float] | None = None
    """Range of the fraction of steps that take the source's self-attention."""
    guidance_scale: tuple[float, float] | None = None
    """Range of the guidance scale."""
    cross_replace: float | None = None
    """Fraction of steps that take the source's cross-attention; the paper takes none."""
    keep: int | None = None
    """Most pairs of a triplet."""
    image_format: Literal["png", "jpeg"] | None = None
    """How pictures are stored; JPEG has no chroma subsampling."""
    text: float | None = None
    """Least similarity of a picture with its caption."""
    image: float | None = None
    """Least similarity of the two pictures."""
    direction: float | None = None
    """Least similarity of the change of pictures with the change of captions."""
    limit: int | None = None
    """Most triplets; those of a smaller limit are among those of a larger."""
    max_reject_share: float = 0.05
    """Share of triplets that may be unusable; above it the job fails and says why."""
    actors: int = 2
    """Processes that generate."""
    most_actors: int | None = None
    """As many there may become while the cluster has room."""
    gpus: float = 0.0
    """GPUs of each of them; 0 computes on the CPU."""
    cpus: float = 0.5
    """Logical CPUs of each of them."""
    batch_size: int = 8
    """Candidates at a time of each of them; halved when they do not fit."""
    decode_batch: int | None = None
    """Pictures decoded at a time; by default all of a batch."""
    channels_last: bool = False
    """Lay weights out by pixel: on an H200 12 % slower."""
    compile: bool = False
    """Compile the UNet for the batch size, which takes minutes: on an H200 1.4 times as fast."""
    cpu_actors: int = 0
    """Further processes that generate without a GPU, beside those with one."""
    cpu_actor_cpus: float = 4.0
    """Logical CPUs of each of those."""
    actor_resources: tuple[str, ...] = ()
    """Custom resources of each process that generates, such as generator=1: it stays on nodes that
    have them."""
    judge_actors: int | None = None
    """Processes that judge; 0 judges in the processes that generate, so that pictures of rejects go
    nowhere. By default 0 where an option below wants it, or a triplet's pictures are too large to
    be carried about, and 1 otherwise."""
    most_judges: int | None = None
    """As many judges there may become while candidates wait for them."""
    judge_cpus: float = 0.5
    """Logical CPUs of each of them."""
    judge_gpus: float = 0.0
    """GPUs of each of them, a fraction where they share one."""
    judge_resources: tuple[str, ...] = ()
    """Custom resources of each of them, such as clip=1."""
    judge_batch: int = 32
    """Candidates that each of them judges at a time."""
    stop_early: float | None = None
    """End a triplet once a better pair than its worst kept one is less probable than this."""
    stop_margin: float | None = None
    """Cosine by which it would have to be better, by default 0.02."""
    give_up: float | None = None
    """End a triplet once any further pair is less probable than this."""
    acceptance_prior: tuple[float, float] | None = None
    """Beta prior of the share of accepted candidates, by default 0.5 0.5."""
    decide_every: int | None = None
    """Candidates of a triplet between two decisions to end it, by default 8."""
    share_source: int | None = None
    """Make one source picture for so many candidates, which differ in self_replace only."""
    prune_at: float | None = None
    """Judge candidates after this fraction of their steps and drop the hopeless."""
    prune_text: float | None = None
    """Cosine below the text threshold that is hopeless then, by default 0.1."""
    prune_image: float | None = None
    """The same below the image threshold."""
    prune_direction: float | None = None
    """The same below the direction threshold."""

    def __post_init__(self) -> None:
        for name in ("actors", "batch_size", "judge_batch", "decode_batch"):
            _at_least_1(name, getattr(self, name))
        for name in ("limit", "candidates", "steps", "keep", "resolution"):
            _at_least_1(name, getattr(self, name))
        if self.most_actors is not None and self.most_actors < self.actors:
            raise ValueError("--most-actors is at least --actors")
        if (self.judge_actors or 0) < 0:
            raise ValueError("--judge-actors is not negative")
        if self.most_judges is not None and self.most_judges < max(1, self.judge_actors or 0):
            raise ValueError("--most-judges is at least 1 and at least --judge-actors")
        if self.cpu_actors < 0 or (self.cpu_actors and not self.gpus):
            raise ValueError("--cpu-actors is not negative, and stands beside actors with --gpus")
        options = [name for name in OF_THE_SEARCH if getattr(self, name) is not None]
        if self.judge_actors and options:
            flag = f"--{options[0].replace('_', '-')}"
            raise ValueError(f"{flag} needs --judge-actors 0: what is spared, the judge decides")
        of_judges = self.judge_gpus or self.most_judges or self.judge_resources
        if self.judge_actors == 0 and (of_judges or self.compile):
            raise ValueError("--judge-actors 0 judges where pictures are made, and cannot compile")
        if min(self.gpus, self.judge_gpus, self.cpus, self.cpu_actor_cpus, self.judge_cpus) < 0:
            raise ValueError("GPUs and CPUs of processes are not negative")
        custom_resources("--actor-resources", self.actor_resources)
        custom_resources("--judge-resources", self.judge_resources)
        if not 0 <= self.max_reject_share <= 1:
            raise ValueError("--max-reject-share lies in [0, 1]")
        require_uri("--triplets", self.triplets)
        require_uri("--out", self.out, written=True)


def _at_least_1(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"--{name.replace('_', '-')} is at least 1")


def main(job: GeneratePairs) -> int:
    """Make the pairs, or find that they are there; returns the exit status."""
    with loading("generate_pairs"):
        from ip2p_ray.errors import ConfigError
        from ip2p_ray.stages import run
    try:
        config, making = _settings(job)
    except ConfigError as error:
        sys.stderr.write(f"generate_pairs: {error}\n")
        return 2
    return run.guarded("generate_pairs", lambda: _generate(job, config, making))


def _generate(job: GeneratePairs, config: Any, making: Any) -> None:
    from ip2p_ray import storage
    from ip2p_ray.stages import run
    from ip2p_ray.stages.forecast import fingerprints, forecast_of
    from ip2p_ray.stages.pairs import generate_pairs

    out, triplets = storage.absolute(job.out), storage.absolute(job.triplets)
    storage.require_manifest(triplets)
    resources = {"actors": making.actors, "store_bytes": making.store_bytes(config)}
    with run.locked(out), run.local_ray(workers=job.actors, **resources):
        if job.dry_run or not storage.any_there(storage.join(out, "candidates")):
            queue = storage.join(out, ".plan")  # so that --limit binds no later run
            storage.remove_all(queue)
            plan = forecast_of(triplets, queue, config, making)
            storage.remove_all(queue)  # but its rejects stay where they end the run
            for line in plan.lines():
                print(line, flush=True)
        if job.dry_run:
            return
        models = fingerprints(making)
        made = generate_pairs(triplets, out, config, making, models=models)
    pairs, page = (storage.join(job.out, name) for name in ("pairs", "pairs.html"))
    print(f"generate_pairs: {pairs} has {made.rows:,} pairs; see {page}")


def _settings(job: GeneratePairs) -> tuple[Any, Any]:
    """The preset's settings with the flags in their places: how pairs are made, and by whom."""
    from dataclasses import replace

    from ip2p_ray import presets
    from ip2p_ray.generator import GeneratorWeights, Holding
    from ip2p_ray.search.options import SearchConfig
    from ip2p_ray.stages.pairs import Making, triplet_bytes
    from ip2p_ray.stages.plan import BLOCK_BYTES
    from ip2p_ray.stages.run import Resources

    preset = presets.by_name(job.preset)
    flags = {name: getattr(job, name) for name in OF_THE_PAIRS}
    limits = {name: getattr(job, name) for name in ("text", "image", "direction")}
    config = replace(
        preset.pairs,
        thresholds=replace(preset.pairs.thresholds, **_given(limits)),
        **_given(flags),
    )
    options = SearchConfig(**_given({name: getattr(job, name) for name in OF_THE_SEARCH}))
    judge_actors = job.judge_actors
    if judge_actors is None:
        wanted = job.compile or job.judge_gpus or job.most_judges or job.judge_resources
        carried = triplet_bytes(config) <= BLOCK_BYTES
        judge_actors = 1 if wanted or (carried and options == SearchConfig()) else 0
    judges = Resources(
        actors=max(1, judge_actors),
        most_actors=job.most_judges,
        cpus=job.judge_cpus,
        gpus=job.judge_gpus,
        batch_size=job.judge_batch,
        custom=custom_resources("--judge-resources", job.judge_resources),
    )
    making = Making(
        generator=GeneratorWeights(
            source=job.generator or preset.generator, dtype=job.dtype, vae=job.vae
        ),
        judge=job.judge or preset.judge,
        holding=Holding(
            device="cuda" if job.gpus else "cpu",
            batch_size=job.batch_size,
            decode_batch=job.decode_batch,
            channels_last=job.channels_last,
            compile=job.compile,
        ),
        generators=Resources(
            actors=job.actors,
            most_actors=job.most_actors,
            gpus=job.gpus,
            cpus=job.cpus,
            cpu_actors=job.cpu_actors,
            cpu_actor_cpus=job.cpu_actor_cpus,
            custom=custom_resources("--actor-resources", job.actor_resources),
        ),
        judges=judges if judge_actors else None,
        options=options,
        limit=job.limit,
        max_reject_share=job.max_reject_share,
    )
    return config, making


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


if __name__ == "__main__":
    with loading("generate_pairs"):
        import tyro

        asked = tyro.cli(GeneratePairs, config=(tyro.conf.FlagCreatePairsOff,))
    sys.exit(main(asked))
