"""The last two trainings of the miniature: the pairs its generator makes, and the editor from them.

Everything here is the library's own method on the miniature's models: the writer's triplets,
Prompt-to-Prompt candidates, CLIP's judgement, encoded latents, the training loop. No drawn picture
reaches the editor.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch.nn.parallel import DistributedDataParallel

from ip2p_ray import parquet
from ip2p_ray.atomic import atomic_file
from ip2p_ray.checkpoint import (
    export_editor,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from ip2p_ray.clip import Clip
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.filtering import NOT_BEST, Thresholds, select
from ip2p_ray.latents import LatentDataset, encode_pairs
from ip2p_ray.miniature import parallel
from ip2p_ray.miniature.calibration import NAMES
from ip2p_ray.miniature.pace import Pace
from ip2p_ray.miniature.scores import edit_tasks, random_captions
from ip2p_ray.pairs import PairConfig, candidate_requests, generate_candidates
from ip2p_ray.schema import LATENTS, pair_key, recipe
from ip2p_ray.training.loop import TrainConfig, start, train
from ip2p_ray.triplets.local_writer import LocalWriter
from ip2p_ray.triplets.reply import Triplet, parse_reply

CHUNK = 16
"""Triplets a chunk of pairs; a kill loses at most the chunk that was being made."""


@dataclass(frozen=True, kw_only=True)
class EditingConfig:
    """How pairs are made and the editor is trained from them."""

    triplets: int = 3_600
    """Captions given to the writer; most replies become triplets."""
    candidates: int = 2
    """Candidates of each triplet."""
    sampling_steps: int = 12
    guidance_scale: tuple[float, float] = (2.0, 4.0)
    self_replace: tuple[float, float] = (0.0, 0.8)
    steps: int = 4_500
    """Optimizer steps of the editor."""
    batch_size: int = 64
    learning_rate: float = 5e-4
    save_every: int = 200
    """Steps between checkpoints of the editor's training."""

    def pairs(self, thresholds: Thresholds) -> PairConfig:
        """The miniature's preset of making pairs."""
        return PairConfig(
            resolution=64,
            steps=self.sampling_steps,
            sampler="dpmpp_2m",
            candidates=self.candidates,
            self_replace=self.self_replace,
            guidance_scale=self.guidance_scale,
            keep=4,
            thresholds=thresholds,
        )


@dataclass(frozen=True)
class Models:
    """What makes pairs, loaded once."""

    writer: LocalWriter
    generator: StableDiffusion
    clip: Clip


def load_models(folder: Path, device: str) -> Models:
    """The trained models in `folder`."""
    return Models(
        LocalWriter.load(folder / "writer", device),
        StableDiffusion.load(folder / "generator", device=device),
        Clip.load(folder / "judge", device),
    )


def make_pairs(
    models: Models,
    config: EditingConfig,
    thresholds: Thresholds,
    folder: Path,
    *,
    seed: int,
) -> None:
    """Write every chunk of `folder`/pairs that is not there yet; processes share the chunks."""
    captions = random_captions(config.triplets, seed)
    chunks = [captions[k : k + CHUNK] for k in range(0, len(captions), CHUNK)]
    (folder / "pairs").mkdir(parents=True, exist_ok=True)
    own = range(parallel.rank(), len(chunks), parallel.count())
    todo = [k for k in own if not _chunk(folder, k).exists()]
    pace = Pace("pairs", len(todo), unit="chunk")
    for done, number in enumerate(todo, start=1):
        table, funnel = _make_chunk(models, config.pairs(thresholds), chunks[number], seed)
        metadata = {b"funnel": json.dumps(funnel).encode()}
        with atomic_file(_chunk(folder, number)) as new:
            pq.write_table(table.replace_schema_metadata(metadata), new)
        pace.tick(done, str(funnel))


def _chunk(folder: Path, number: int) -> Path:
    return folder / "pairs" / f"{number:05d}.parquet"


def _make_chunk(
    models: Models, config: PairConfig, captions: list[str], seed: int
) -> tuple[pa.Table, dict[str, int]]:
    """(kept pairs as rows of schema.LATENTS, how many fell for which reason)."""
    funnel: Counter[str] = Counter(captions=len(captions))
    triplets: list[Triplet] = []
    for caption, reply in zip(captions, models.writer.write(captions, seed=seed), strict=True):
        answer = parse_reply(caption, reply)
        if isinstance(answer, Triplet):
            triplets.append(answer)
        else:
            funnel[answer] += 1
    name = recipe(config, "miniature")
    rows: list[dict[str, Any]] = []
    requests = [
        r
        for t in triplets
        for r in candidate_requests(t.key, t.caption, t.edited_caption, config, name)
    ]
    if requests:
        source, edited = generate_candidates(models.generator, requests, config)
        scores = models.clip.similarities(
            source, edited, [r.caption for r in requests], [r.edited_caption for r in requests]
        ).rows()
        encoded = encode_pairs(models.generator, source, edited)
        for number, triplet in enumerate(triplets):
            own = slice(number * config.candidates, (number + 1) * config.candidates)
            reasons = select(scores[own], config.thresholds, config.keep)
            funnel.update(reason or "kept" for reason in reasons)
            for index, reason in enumerate(reasons):
                if reason is None:
                    rows.append(
                        {
                            "pair_key": pair_key(triplet.key, index, name),
                            "triplet_key": triplet.key,
                            "instruction": triplet.instruction,
                            "split": "train",
                            **encoded[own.start + index],
                        }
                    )
    return pa.Table.from_pylist(rows, schema=LATENTS), dict(funnel)


def held_out_funnel(models: Models, config: PairConfig, *, seed: int, count: int) -> dict[str, int]:
    """The funnel of pairs of held-out captions; the pairs themselves are not kept."""
    total: Counter[str] = Counter()
    captions = [task.caption for task in edit_tasks(count, seed)]
    pace = Pace("held-out pairs", count, unit="caption")
    for done in range(0, count, CHUNK):
        total.update(_make_chunk(models, config, captions[done : done + CHUNK], seed)[1])
        pace.tick(min(done + CHUNK, count))
    return dict(total)


def kept_share(funnel: dict[str, int]) -> float:
    """Share of the judged candidates that were kept."""
    judged = sum(funnel.get(name, 0) for name in (*NAMES, NOT_BEST, "kept"))
    return funnel.get("kept", 0) / max(judged, 1)


def pair_funnel(folder: Path) -> dict[str, int]:
    """How many captions, rejections by reason, and kept pairs all chunks count together."""
    total: Counter[str] = Counter()
    for path in sorted((folder / "pairs").glob("*.parquet")):
        total.update(json.loads(parquet.read_schema(path).metadata[b"funnel"]))
    return dict(total)


def train_editor(
    config: EditingConfig, folder: Path, defaults: dict[str, Any], *, seed: int, device: str
) -> dict[str, float]:
    """Train (or resume) the editor from `folder`/pairs and save `folder`/editor, whole.

    `defaults` are the EditSettings that travel with it.
    """
    rank = parallel.rank()
    model = StableDiffusion.load(folder / "generator", device=device)
    dataset = _latents(folder)
    training = TrainConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=100,
        decay="cosine",
        max_grad_norm=1.0,
        ema_decay=0.998,
        flips=True,
        seed=seed,
        channels_last=True,
    )
    state = start(model, training)
    checkpoints = folder / "state" / "editor"
    found = latest_checkpoint(checkpoints)
    if found is not None:
        load_checkpoint(found, state)
    clock = _Clock(folder / "state" / "editor-seconds.json", state.step)
    pace = Pace("editor", config.steps, unit="step", done=state.step)
    losses: list[float] = []
    for metrics in train(
        model,
        dataset,
        training,
        rank=rank,
        world_size=parallel.count(),
        wrap=DistributedDataParallel if parallel.count() > 1 else None,
        state=state,
    ):
        losses = [*losses[-99:], metrics.loss]
        due = metrics.step % config.save_every == 0 or metrics.step == config.steps
        if due and not rank:
            save_checkpoint(checkpoints, state, keep=2)
            clock.note()
        pace.tick(metrics.step, f"loss {sum(losses) / len(losses):.4f}, epoch {metrics.epoch:.1f}")
    if not rank:
        export_editor(model, state.ema, folder / "editor", defaults)
    return {"steps": config.steps, "pairs": dataset.pairs, "seconds": clock.seconds()}


def _latents(folder: Path) -> LatentDataset:
    """The pairs' latents; the first process makes their cache for all."""
    if parallel.rank():
        parallel.meet()
    dataset = LatentDataset(sorted((folder / "pairs").glob("*.parquet")), cache=folder / "state")
    if not parallel.rank():
        parallel.meet()
    return dataset


class _Clock:
    """Seconds of a training, those up to the checkpoint that it continues from included."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self._before = json.loads(path.read_text()) if step and path.exists() else 0.0
        self._began = time.monotonic()

    def seconds(self) -> float:
        return round(self._before + time.monotonic() - self._began, 1)

    def note(self) -> None:
        with atomic_file(self.path) as new:
            new.write_text(json.dumps(self.seconds()))
