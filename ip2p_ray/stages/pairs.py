"""triplets -> candidates -> pairs: the generator and the judge in actors, then a cheap explosion.

    <folder>/queue        the triplets that can be used, each once, in parts
    <folder>/candidates   a row a triplet, its candidates nested in it, the images of the kept ones
    <folder>/pairs, scores, rejects/pairs       read off the candidates
    <folder>/pairs.html   what came out

A triplet's row stays one row, so that a killed plan goes on by the triplet. A part is one plan, of
so few blocks that the driver's memory does not grow with the number of triplets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from ip2p_ray import storage
from ip2p_ray.atomic import remove_folder
from ip2p_ray.clip import Clip
from ip2p_ray.filtering import select
from ip2p_ray.generator import Batch, Generator, GeneratorWeights, Holding
from ip2p_ray.images import decode_image, encode_image, encode_png, to_pil
from ip2p_ray.pairs import CandidateRequest, PairConfig, Pictures, candidate_requests
from ip2p_ray.report import Report
from ip2p_ray.schema import CANDIDATES, TRIPLETS, recipe
from ip2p_ray.stages import plan, run
from ip2p_ray.stages.compaction import compact
from ip2p_ray.stages.explosion import explode
from ip2p_ray.stages.pairs_page import shown_below, write_page
from ip2p_ray.stages.queue import PART_TRIPLETS, fill_queue

BLOCKS = ".blocks"
"""Folder, in that of a part, of the shards that the plan writes, each of one batch's triplets."""

_TRANSPORT_LEVEL = 1  # PNG on its way to the judge; what is kept is packed closer


@dataclass(frozen=True, kw_only=True)
class Making:
    """Who makes and judges candidates; no field changes what comes out beyond rounding."""

    generator: GeneratorWeights
    judge: str
    """Folder or open_clip name of the CLIP."""
    holding: Holding = field(default_factory=Holding)
    """How each generator is held."""
    generators: run.Resources = field(default_factory=run.Resources)
    """Their actors; `batch_size` is not read, the holding has it."""
    judges: run.Resources = field(default_factory=lambda: run.Resources(batch_size=32))
    """Theirs; `batch_size` counts candidates."""
    max_reject_share: float = 0.05
    """Share of triplets, in [0, 1], that may be unusable; above it the stage fails."""
    limit: int | None = None
    """Most triplets that are used, drawn from all; None is all."""
    part_triplets: int = PART_TRIPLETS
    """Triplets of a part."""

    def fill_queue(self, triplets: str, folder: str) -> storage.Manifest:
        """The dataset `<folder>/queue` of the triplets that are used."""
        return fill_queue(
            triplets,
            folder,
            limit=self.limit,
            max_reject_share=self.max_reject_share,
            part_triplets=self.part_triplets,
        )


class GenerateCandidates:
    """An actor of the plan: rows of TRIPLETS in, rows of CANDIDATES that nobody has judged out."""

    def __init__(
        self, weights: GeneratorWeights, holding: Holding, config: PairConfig, recipe: str
    ) -> None:
        self._generator = Generator(weights.load(holding.device), holding)
        self._config, self._recipe = config, recipe

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """A table for each triplet of the batch, as soon as its last candidate is made."""
        rows = batch.select(TRIPLETS.names).to_pylist()
        requests = [request for row in rows for request in self._requests(row)]
        waiting: list[dict[str, Any]] = []
        each = self._config.candidates
        for made in self._generator.make(requests, self._config):
            waiting += _candidates(made)
            while len(waiting) >= each:
                row, own, waiting = rows.pop(0), waiting[:each], waiting[each:]
                seconds = sum(candidate.pop("seconds") for candidate in own)
                row.update(recipe=self._recipe, status="ok", candidates=own, seconds=seconds)
                yield pa.Table.from_pylist([row], schema=CANDIDATES)

    def _requests(self, row: Mapping[str, Any]) -> list[CandidateRequest]:
        texts = (row["triplet_key"], row["caption"], row["edited_caption"])
        return candidate_requests(*texts, self._config, self._recipe)


def _candidates(made: Batch) -> list[dict[str, Any]]:
    return [
        {
            "index": request.index,
            "seed": request.seed,
            "self_replace": request.self_replace,
            "guidance_scale": request.guidance_scale,
            "source_image": _transported(made.source[row]),
            "edited_image": _transported(made.edited[row]),
            "seconds": made.seconds / len(made.requests),
        }
        for row, request in enumerate(made.requests)
    ]


class JudgeCandidates:
    """An actor of the plan: adds similarities and reasons, and drops the images of rejects."""

    def __init__(
        self,
        judge: str,
        config: PairConfig,
        device: str = "cpu",
        batch_size: int = 32,
        shown_below: str = "",
    ) -> None:
        self._clip = Clip.load(judge, device)
        self._config, self._batch_size, self._shown_below = config, batch_size, shown_below

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """A table for each triplet of the batch."""
        for row in batch.to_pylist():
            self._judge(row)
            yield pa.Table.from_pylist([row], schema=CANDIDATES)

    def _judge(self, row: dict[str, Any]) -> None:
        candidates = row["candidates"]
        for start in range(0, len(candidates), self._batch_size):
            self._score(row, candidates[start : start + self._batch_size])
        reasons = select(candidates, self._config.thresholds, self._config.keep)
        shown = row["triplet_key"] < self._shown_below
        for candidate, reason in zip(candidates, reasons, strict=True):
            candidate["reason"] = reason
            for name in ("source_image", "edited_image"):
                candidate[name] = self._stored(candidate[name]) if reason is None or shown else None

    def _score(self, row: Mapping[str, Any], candidates: list[dict[str, Any]]) -> None:
        source, edited = (
            np.stack([np.asarray(decode_image(c[name]["bytes"])) for c in candidates])
            for name in ("source_image", "edited_image")
        )
        captions = [row["caption"]] * len(candidates)
        edited_captions = [row["edited_caption"]] * len(candidates)
        scores = self._clip.similarities(source, edited, captions, edited_captions).rows()
        for candidate, values in zip(candidates, scores, strict=True):
            candidate.update(values)

    def _stored(self, image: Mapping[str, Any]) -> dict[str, Any]:
        picture = decode_image(image["bytes"])
        return {"bytes": encode_image(picture, self._config.image_format), "path": None}


def generate_pairs(
    triplets: str,
    folder: str,
    config: PairConfig,
    making: Making,
    *,
    models: Mapping[str, str],
    actors: tuple[type, type] | None = None,
) -> storage.Manifest:
    """The dataset `<folder>/pairs`, and beside it what the head of this module lists.

    `models` has the fingerprints of generator and judge. `actors` are the classes that make and
    judge, by default GenerateCandidates and JudgeCandidates; others take the same arguments.

    Raises:
        DatasetError: the triplets are not whole, or something made otherwise is in the folder.
        StageError: too many triplets are unusable, or no candidate was accepted; says why.
    """
    queue = making.fill_queue(triplets, folder)
    makers = {role: models[role] for role in ("generator", "judge")}
    origin = run.Origin(
        dataset="candidates",
        config=asdict(config),
        models=makers,
        sources={"queue": queue.recipe},
    )
    name = recipe(config, *makers.values())
    steps = _steps(
        config, making, name, queue.rows, actors or (GenerateCandidates, JudgeCandidates)
    )
    candidates = storage.join(folder, "candidates")

    def generate() -> list[Report]:
        parts = plan.shards(storage.join(folder, "queue"))
        for number, part in enumerate(parts):
            name = "candidates"
            if len(parts) > 1:
                name = f"candidates, part {number + 1} of {len(parts)}"
            _make_part(part, candidates, replace(origin, dataset=name), number, steps)
        return []

    made = run.make(candidates, origin, generate)
    pairs = explode(folder, config.thresholds, made)
    write_page(folder, config)
    return pairs


def _make_part(
    source: str, candidates: str, origin: run.Origin, number: int, steps: list[plan.Step]
) -> None:
    """The candidates of a part of the queue, in few shards in the order of the keys."""
    part = storage.join(candidates, f"part-{number:05d}")
    blocks = storage.join(part, BLOCKS)

    def generate() -> list[Report]:
        plan.stream(
            [source],
            blocks,
            name=origin.dataset,
            key="triplet_key",
            schema=CANDIDATES,
            steps=steps,
            unit="triplets",
            rows_per_block=steps[0].resources.batch_size,
        )
        shards = storage.list_shards(blocks)
        compact(shards, part, name="candidates", key="triplet_key", schema=CANDIDATES)
        return []

    run.make(part, replace(origin, sources={**origin.sources, "part": str(number)}), generate)
    remove_folder(storage.local_path(blocks))


def _steps(
    config: PairConfig, making: Making, recipe: str, triplets: int, actors: tuple[type, type]
) -> list[plan.Step]:
    # What an actor makes at a time, and so what a kill can cost it.
    rows = max(1, making.holding.batch_size // config.candidates)
    return [
        plan.Step(
            callable=actors[0],
            arguments={
                "weights": making.generator,
                "holding": making.holding,
                "config": config,
                "recipe": recipe,
            },
            resources=replace(making.generators, batch_size=rows),
        ),
        plan.Step(
            callable=actors[1],
            arguments={
                "judge": making.judge,
                "config": config,
                "device": "cuda" if making.judges.gpus else "cpu",
                "batch_size": making.judges.batch_size,
                "shown_below": shown_below(triplets),
            },
            resources=replace(making.judges, batch_size=rows),
        ),
    ]


def _transported(array: Pictures) -> dict[str, Any]:
    return {"bytes": encode_png(to_pil(array), level=_TRANSPORT_LEVEL), "path": None}
