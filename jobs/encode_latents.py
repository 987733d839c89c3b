"""Latents of pairs: the autoencoder runs once over all of them, and never in training.

    python jobs/encode_latents.py --pairs runs/q/pairs --out runs/q
    python jobs/encode_latents.py --pairs /shared/run/pairs --out /shared/run --dry-run \
        --preset paper --gpus 1 --actors 8 --batch-size 32
    ray job submit --working-dir . -- python jobs/encode_latents.py --preset paper \
        --pairs /shared/run/pairs --out /shared/run --gpus 1 --actors 2 --most-actors 16 \
        --batch-size 32
    ray job submit --working-dir . -- python jobs/encode_latents.py --preset paper \
        --pairs s3://bucket/run/pairs --out s3://bucket/run --gpus 1 --actors 2 --batch-size 32

<out>/latents comes out, for jobs/train_editor.py --latents. Pairs are those of
jobs/generate_pairs.py or jobs/filter_pairs.py, own ones among them. First sizes, disk and time are
told, measured on a batch; --dry-run stops there. Whenever it is stopped, the same command goes on,
with other workers if need be. s3:// takes endpoint, region and credentials as in
jobs/collect_captions.py, on every node. The status is 0 when all is made, 1 for a failure and 2 for
a wrong flag.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.command import custom_resources, loading, require_uri


@dataclass(frozen=True, kw_only=True)
class EncodeLatents:
    """A dataset of pairs in, a dataset of latents out."""

    pairs: str
    """Dataset of pairs, a folder or s3://bucket/folder."""
    out: str = "runs/latents"
    """Folder in which latents/ is made; all nodes have to reach it, here or s3://."""
    preset: Literal["miniature", "fast", "paper"] = "miniature"
    """Whose model encodes."""
    model: str | None = None
    """Diffusers folder or hub id in the preset's place; training has to start from one with the
    same autoencoder and text encoder."""
    text: Literal["instruction", "tokens", "embeddings"] = "tokens"
    """What is stored of instructions beside their text; embeddings take the most room and spare
    training the text encoder's work."""
    held_out: bool = True
    """Also encode held-out pairs, for validation; they are never trained on."""
    resolution: int | None = None
    """Height and width that pictures are brought to; by default 256 with paper and fast, as the
    paper trains, and as they are with miniature."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the autoencoder's arithmetic."""
    dry_run: bool = False
    """Only measure a batch and tell what the whole will take."""
    actors: int = 1
    """Processes that encode."""
    most_actors: int | None = None
    """As many there may become while the cluster has room."""
    gpus: float = 0.0
    """GPUs of each of them; 0 encodes on the CPU."""
    cpus: float = 0.5
    """Logical CPUs of each of them."""
    actor_resources: tuple[str, ...] = ()
    """Custom resources of each of them, such as encoder=1: they stay on nodes that have some."""
    batch_size: int = 16
    """Pairs at a time of each of them."""

    def __post_init__(self) -> None:
        for name in ("actors", "batch_size", "resolution"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is at least 1")
        if self.most_actors is not None and self.most_actors < self.actors:
            raise ValueError("--most-actors is at least --actors")
        if self.gpus < 0 or self.cpus < 0:
            raise ValueError("--gpus and --cpus are not negative")
        if self.dtype == "float16" and not self.gpus:
            raise ValueError("--dtype float16 is for GPUs; on a CPU take float32 or bfloat16")
        custom_resources("--actor-resources", self.actor_resources)
        require_uri("--pairs", self.pairs)
        require_uri("--out", self.out, written=True)


def main(job: EncodeLatents) -> int:
    """Encode the pairs, or find that they are encoded; returns the exit status."""
    with loading("encode_latents"):
        from ip2p_ray.stages import run
    return run.guarded("encode_latents", lambda: _encode(job))


def _encode(job: EncodeLatents) -> None:
    from ip2p_ray import storage

    out, pairs = storage.absolute(job.out), storage.absolute(job.pairs)
    uri = storage.join(out, "latents")
    storage.require_manifest(pairs)  # before what takes long to load
    from ip2p_ray import presets
    from ip2p_ray.stages import latents, run

    resolution = job.resolution or (None if job.preset == "miniature" else 256)
    asked: dict[str, Any] = {
        "generator": job.model or presets.by_name(job.preset).generator,
        "encoding": latents.Encoding(
            text=job.text, held_out=job.held_out, resolution=resolution, dtype=job.dtype
        ),
        "resources": run.Resources(
            actors=job.actors,
            most_actors=job.most_actors,
            gpus=job.gpus,
            cpus=job.cpus,
            batch_size=job.batch_size,
            custom=custom_resources("--actor-resources", job.actor_resources),
        ),
    }
    with run.locked(out), run.local_ray(workers=job.actors, actors=[asked["resources"]]):
        if job.dry_run or not storage.any_there(uri):
            plan = latents.plan_of(pairs, out, **asked)
            for line in plan.lines():
                print(line, flush=True)
            plan.require_room(out)
        if job.dry_run:
            return
        models = {"generator": latents.fingerprint_of(asked["generator"])}
        made = latents.encode_latents(pairs, uri, models=models, **asked)
    print(f"encode_latents: {storage.join(job.out, 'latents')} has {made.rows:,} pairs")


if __name__ == "__main__":
    with loading("encode_latents"):
        import tyro

        asked = tyro.cli(EncodeLatents)
    sys.exit(main(asked))
