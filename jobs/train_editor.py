"""An editor trained from latents, or from pairs, by any number of workers on CPUs or GPUs.

    python jobs/train_editor.py --latents runs/q/latents --out runs/editor --steps 600
    python jobs/train_editor.py --pairs runs/q/pairs --resolution 64 --out runs/pixels
    python jobs/train_editor.py --preset paper --latents /shared/run/latents --out /shared/editor \
        --gpus 1 --workers 8 --micro-batch 32
    ray job submit --working-dir . -- python jobs/train_editor.py --preset paper \
        --latents s3://bucket/run/latents --out s3://bucket/editor --gpus 1 --workers 8 \
        --micro-batch 32

<out>/editor comes out, a folder that diffusers' StableDiffusionInstructPix2PixPipeline loads, with
a model card; <out>/checkpoints has the run's state and metrics.jsonl, <out>/samples pictures.
First the memory that a worker needs is told; --dry-run stops there. Whenever it is stopped, the
same command goes on, with another number of workers if need be. The status is 0 when all is made, 1
for a failure and 2 for a wrong flag.

Of s3://... nodes share nothing else: each copies the data once to --cache, and maps them there; a
checkpoint counts once it is in the bucket, and training goes on from there on whatever machine.

On one GPU of 24 GiB: --preset paper --gpus 1 --micro-batch 8, which took 21.7 GB of an H200, at 40
samples/s; micro-batches of 32 take 23.1 GB, at 125. On 80 GB --gradient-checkpointing False
--micro-batch 64 takes 39 GB, at 257; --compile True makes that 333. Several workers hold 3.4 GB
more each; --lora-rank 16 --micro-batch 4 takes 6 GB, as reckoned.

--preset paper is the recipe of the paper's App. A.3: 10,000 steps of 1024 samples at 256 pixels,
AdamW 1e-4 without warm-up or clipping, 5 % each of samples without text, without image, without
both, pairs mirrored. It differs in these:
- arithmetic is bfloat16 with float32 weights, where the authors used float32 (TF32);
- from --latents pictures are not resized at random (the posterior is sampled at every visit all the
  same); --pairs resizes to 256-288 and cuts 256, as the paper does;
- latents are stored in float16, and encoded in what encode_latents --dtype says;
- the average follows optimizer steps, the authors' four micro-batches each; beyond 22,500 steps
  --ema-horizon 2500 repeats that, before them both are ruled by the same ramp;
- activations are computed twice to save memory, which changes no figure but time;
- groups are held out by a hash of their texts, 5 % of them, and not by their place in a list;
- the validation loss has fixed noise and no dropout.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.command import custom_resources, loading, require_uri

OF_THE_RECIPE = (
    *("steps", "batch_size", "learning_rate", "warmup_steps", "decay", "weight_decay"),
    *("max_grad_norm", "dropout", "min_snr_gamma", "seed", "lora_rank"),
    *("flips", "bf16", "gradient_checkpointing", "channels_last"),
)
"""Flags that take the place of what the preset has in its TrainConfig."""

POSITIVE = (
    *("workers", "most_workers", "micro_batch", "readers", "save_every", "log_every", "keep"),
    *("validate_every", "validation_groups", "sample_every", "samples", "resolution"),
    *("steps", "batch_size", "learning_rate", "max_grad_norm", "min_snr_gamma", "lora_rank"),
)


@dataclass(frozen=True, kw_only=True)
class TrainEditor:
    """A dataset of latents or pairs in, an editor out."""

    latents: str | None = None
    """Dataset of latents, as jobs/encode_latents.py makes it: a folder here or s3://..."""
    pairs: str | None = None
    """Dataset of pairs in their place: pictures are cut anew and encoded in every step."""
    out: str = "runs/editor"
    """Folder of editor/, checkpoints/ and samples/, which all nodes have to reach; or s3://..."""
    cache: Path | None = None
    """Folder of each node for copies of what lies in buckets, by default a temporary one."""
    preset: Literal["miniature", "fast", "paper"] = "miniature"
    """Model and recipe; every flag of the recipe below takes the place of one of its settings."""
    start: str | None = None
    """Diffusers folder, s3://... or hub id to start from: a generator (4 channels) or an editor (8)
    that is trained further; by default the preset's generator."""
    dry_run: bool = False
    """Only tell what memory a worker needs."""
    resolution: int | None = None
    """Of --pairs: height and width that pictures are cut to, by default the preset's."""
    steps: int | None = None
    """Optimizer steps of the whole run."""
    batch_size: int | None = None
    """Samples of a step, over all workers."""
    learning_rate: float | None = None
    """AdamW's highest."""
    warmup_steps: int | None = None
    """Steps over which it rises from 0."""
    decay: Literal["constant", "cosine"] | None = None
    """What it does after that."""
    weight_decay: float | None = None
    """AdamW's."""
    max_grad_norm: float | None = None
    """Norm that gradients are scaled down to."""
    ema_horizon: float | None = None
    """Optimizer steps that the exported average remembers, at most a ninth of those done."""
    dropout: float | None = None
    """Share of samples without text, without image, without both; each."""
    min_snr_gamma: float | None = None
    """Min-SNR weighting of the loss."""
    flips: bool | None = None
    """Mirror half of the visits."""
    seed: int | None = None
    """Of the order, noise, timesteps, dropout and flips."""
    bf16: bool | None = None
    """Compute in bfloat16 (True or False); weights and optimizer stay float32."""
    gradient_checkpointing: bool | None = None
    """Compute activations twice instead of keeping them."""
    channels_last: bool | None = None
    """Lay weights out as convolutions prefer."""
    lora_rank: int | None = None
    """Train only additions of this rank to attention, and the first layer (needs peft)."""
    workers: int = 1
    """Processes that train together."""
    most_workers: int | None = None
    """As many there may become while the cluster has room: they join and leave as nodes do."""
    gpus: float = 0.0
    """GPUs of each of them; 0 trains on the CPU."""
    cpus: float = 1.0
    """Logical CPUs of each of them."""
    worker_resources: tuple[str, ...] = ()
    """Custom resources of each of them, such as trainer=1: they stay on nodes that have some."""
    micro_batch: int = 32
    """Samples at a time of each of them, at most; they add up to the batch."""
    compile: bool = False
    """Compile the UNet: faster steps after a minute or more at each start (needs a C++ compiler on
    a CPU)."""
    readers: int = 1
    """Threads of each of them that read ahead; more for --pairs."""
    save_every: int | None = None
    """Steps between two checkpoints, by default a dozenth of all."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    keep: int = 2
    """Checkpoints that are kept."""
    mirror: str | None = None
    """s3://bucket/folder that the checkpoints of an <out> on a disk are copied to, and fetched from
    where it has none."""
    validate_every: int | None = None
    """Steps between two measurements of the loss on held-out pairs."""
    validation_groups: int = 256
    """Triplets that it is measured on, at most."""
    sample_every: int | None = None
    """Steps between two pages of sample pictures."""
    samples: int = 4
    """Pictures on a page."""
    metrics: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Where figures go besides metrics.jsonl; their libraries have to be installed."""

    def __post_init__(self) -> None:
        if (self.latents is None) == (self.pairs is None):
            raise ValueError("give either --latents or --pairs")
        if self.resolution is not None and self.pairs is None:
            raise ValueError("--resolution is for --pairs; latents have theirs")
        for name in POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} is above 0")
        if self.most_workers is not None and self.most_workers < self.workers:
            raise ValueError("--most-workers is at least --workers")
        if self.ema_horizon is not None and not self.ema_horizon >= 1:
            raise ValueError("--ema-horizon is at least 1")
        for name in ("gpus", "cpus", "warmup_steps", "weight_decay"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"--{name.replace('_', '-')} is not negative")
        if self.dropout is not None and not 0 <= self.dropout <= 1 / 3:
            raise ValueError("--dropout lies in [0, 1/3]")
        for name in ("latents", "pairs"):
            if getattr(self, name) is not None:
                require_uri(f"--{name}", getattr(self, name))
        if self.mirror is not None and not self.mirror.startswith("s3://"):
            raise ValueError(f"--mirror {self.mirror}: give s3://bucket/folder")
        custom_resources("--worker-resources", self.worker_resources)
        if self.mirror is not None and self.out.startswith("s3://"):
            raise ValueError("--mirror is for an --out on a disk; s3://... has every checkpoint")
        if self.start is not None and "://" in self.start:
            require_uri("--start", self.start)
        require_uri("--out", self.out, written=True)


def main(job: TrainEditor) -> int:
    """Train the editor, or find that it is there; returns the exit status."""
    with loading("train_editor"):
        from ip2p_ray.stages import run
    return run.guarded("train_editor", lambda: _train(job))


def _train(job: TrainEditor) -> None:
    from dataclasses import replace

    from ip2p_ray import presets, storage
    from ip2p_ray.stages import run, training
    from ip2p_ray.training.ema import ema_horizon
    from ip2p_ray.training.lora import require_peft
    from ip2p_ray.training.sinks import require_sinks

    for uri in filter(None, (job.latents, job.pairs, job.out, job.mirror, job.start)):
        storage.check(uri)
    preset = presets.by_name(job.preset)
    config, carried, source = _settings(job, preset)
    require_sinks(carried.sinks)
    if config.lora_rank is not None:
        require_peft()
    storage.require_manifest(source.uri)
    resources = run.Resources(
        actors=job.workers,
        most_actors=job.most_workers,
        gpus=job.gpus,
        cpus=job.cpus,
        custom=custom_resources("--worker-resources", job.worker_resources),
    )
    out, start = storage.absolute(job.out), job.start or preset.generator
    # one process finds out what the workers need before they are there
    with (
        run.locked(out),
        run.local_ray(workers=job.most_workers or job.workers, actors=[resources]),
    ):
        if not storage.is_local(source.uri):
            print(f"plan: {training.copy_line(source, resources)}", flush=True)
        found = training.survey(
            source,
            config,
            generator=start,
            resources=resources,
            micro_batch=min(job.micro_batch, -(-config.batch_size // job.workers)),
        )
        print(
            f"plan: {config.steps:,} steps of {config.batch_size:,} samples, "
            f"{job.workers} workers, an average over the last "
            f"{ema_horizon(config.ema_decay, config.steps):,.0f} steps or so"
        )
        print(found.memory.line(), flush=True)
        found.require_room(training.sharing_workers(resources))
        if job.dry_run:
            return
        training.train_editor(
            source,
            out,
            config,
            generator=start,
            editing=replace(preset.editing),
            models={"generator": found.fingerprint},
            resources=resources,
            carried=carried,
        )
    print(f"train_editor: {storage.join(job.out, 'editor')} is trained")


def _settings(job: TrainEditor, preset: Any) -> tuple[Any, Any, Any]:
    """The recipe with the flags in their places, how it is carried out, and the data."""
    from dataclasses import replace

    from ip2p_ray import storage
    from ip2p_ray.stages.training_run import Carried, Source

    flags = {name: getattr(job, name) for name in OF_THE_RECIPE}
    given = {name: value for name, value in flags.items() if value is not None}
    if job.ema_horizon is not None:
        given["ema_decay"] = 1 - 1 / job.ema_horizon
    carried = Carried(
        micro_batch=job.micro_batch,
        readers=job.readers,
        compile=job.compile,
        save_every=job.save_every,
        log_every=job.log_every,
        keep=job.keep,
        validate_every=job.validate_every,
        validation_groups=job.validation_groups,
        sample_every=job.sample_every,
        samples=job.samples,
        sinks=job.metrics,
        mirror=job.mirror,
    )
    usual = 64 if job.preset == "miniature" else 256
    source = Source(
        uri=storage.absolute(job.latents or job.pairs or ""),
        resolution=None if job.latents is not None else job.resolution or usual,
        cache=None if job.cache is None else str(job.cache.absolute()),
    )
    return replace(preset.training, **given), carried, source


if __name__ == "__main__":
    with loading("train_editor"):
        import tyro

        asked = tyro.cli(TrainEditor)
    sys.exit(main(asked))
