"""A generator that sleeps and a judge that draws: the pairs stage without models.

What they make depends on the keys alone, as the real ones' does.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ip2p_ray import storage
from ip2p_ray.filtering import select
from ip2p_ray.generator import GeneratorWeights
from ip2p_ray.images import encode_png, to_pil
from ip2p_ray.pairs import PairConfig, candidate_requests
from ip2p_ray.schema import (
    CANDIDATES,
    SIMILARITIES,
    TRIPLETS,
    caption_key,
    split_of,
    stream_seed,
    triplet_key,
)

_PICTURE = encode_png(to_pil(np.full((2, 2, 3), 127, np.uint8)))


@dataclass(frozen=True, kw_only=True)
class Sleep(GeneratorWeights):
    """In place of weights: how long a candidate takes."""

    source: str = "sleep"
    seconds: float = 0.0
    """For one candidate."""
    log: str | None = None
    """File to which a line is added for each triplet that is made."""


class SleepingGenerator:
    """In place of stages.pair_actors.GenerateCandidates."""

    def __init__(self, *, weights: Sleep, config: PairConfig, recipe: str, **_: Any) -> None:
        self._weights, self._config, self._recipe = weights, config, recipe

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """A table for each triplet of the batch, after its time."""
        for row in batch.select(TRIPLETS.names).to_pylist():
            texts = (row["triplet_key"], row["caption"], row["edited_caption"])
            requests = candidate_requests(*texts, self._config, self._recipe)
            began = time.time()
            seconds = self._weights.seconds * len(requests)
            time.sleep(seconds)
            image = {"bytes": _PICTURE, "path": None}
            row["candidates"] = [
                {
                    "index": request.index,
                    "seed": request.seed,
                    "self_replace": request.self_replace,
                    "guidance_scale": request.guidance_scale,
                    "source_image": image,
                    "edited_image": image,
                }
                for request in requests
            ]
            row.update(recipe=self._recipe, status="ok", seconds=seconds)
            self._note(row["triplet_key"], began)
            yield pa.Table.from_pylist([row], schema=CANDIDATES)

    def _note(self, key: str, began: float) -> None:
        if self._weights.log is None:
            return
        line = {"key": key, "pid": os.getpid(), "began": began, "ended": time.time()}
        with Path(self._weights.log).open("a") as log:  # one short write: lines do not mix
            log.write(json.dumps(line) + "\n")


class DrawingJudge:
    """In place of stages.pair_actors.JudgeCandidates: similarities come from the seeds."""

    def __init__(self, *, config: PairConfig, **_: Any) -> None:
        self._config = config

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """A table for each triplet of the batch."""
        for row in batch.to_pylist():
            for candidate in row["candidates"]:
                for name in SIMILARITIES:
                    candidate[name] = stream_seed(candidate["seed"], name) / 2**63
            reasons = select(row["candidates"], self._config.thresholds, self._config.keep)
            for candidate, reason in zip(row["candidates"], reasons, strict=True):
                candidate["reason"] = reason
                if reason is not None:
                    candidate.update(source_image=None, edited_image=None)
            yield pa.Table.from_pylist([row], schema=CANDIDATES)


def write_triplets(uri: str, count: int) -> None:
    """A whole dataset of so many triplets."""
    rows = []
    for number in range(count):
        texts = (f"a cat on chair {number}", "make it a dog", f"a dog on chair {number}")
        key = triplet_key(*texts)
        rows.append([key, *texts, caption_key(texts[0]), split_of(key), "nobody"])
        if len(rows) == 20_000 or number == count - 1:
            columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
            table = pa.table(columns, schema=TRIPLETS)
            storage.write_shard(uri, f"triplets-{number // 20_000:05d}", table)
            rows = []
    storage.write_manifest(uri, storage.Manifest(dataset="triplets", recipe=f"{count} triplets"))


def models() -> dict[str, str]:
    """Fingerprints, by role."""
    return {"generator": "sleeping", "judge": "drawing"}
