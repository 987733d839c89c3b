"""pairs -> latents: the autoencoder in actors, once, so that training never runs it."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from ip2p_ray import storage
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import StageError
from ip2p_ray.images import decode_image
from ip2p_ray.latents import encode_pairs
from ip2p_ray.report import Report
from ip2p_ray.schema import LATENTS, PAIRS
from ip2p_ray.stages import plan, run

_TEXTS = ("pair_key", "triplet_key", "instruction", "split")


class EncodePairs:
    """An actor of the plan: rows of PAIRS in, rows of LATENTS out."""

    def __init__(self, generator: str) -> None:
        self._model = StableDiffusion.load(generator)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A row of latents for each pair of the batch."""
        rows = batch.to_pylist()
        source, edited = (
            np.stack([np.asarray(decode_image(row[name]["bytes"])) for row in rows])
            for name in ("source_image", "edited_image")
        )
        encoded = encode_pairs(self._model, source, edited)
        found = [
            {**{name: row[name] for name in _TEXTS}, **arrays}
            for row, arrays in zip(rows, encoded, strict=True)
        ]
        return pa.Table.from_pylist(found, schema=LATENTS)


def encode_latents(
    pairs: str,
    uri: str,
    *,
    generator: str,
    models: Mapping[str, str],
    resources: run.Resources,
) -> storage.Manifest:
    """The dataset of the encoded pairs of the train split.

    Raises:
        StageError: the train split is empty.
    """
    origin = run.Origin(
        dataset="latents",
        config={"split": "train"},
        models={"generator": models["generator"]},
        sources={"pairs": storage.read_manifest(pairs).recipe},
    )
    sources = plan.shards(pairs, "train-")
    step = plan.Step(callable=EncodePairs, arguments={"generator": generator}, resources=resources)

    def encode() -> list[Report]:
        began = time.monotonic()
        if not plan.count_rows(sources):
            raise StageError(f"latents: no pair of {pairs} is in the train split; make more pairs")
        plan.stream(
            sources,
            uri,
            key="pair_key",
            schema=LATENTS,
            steps=[step],
            unit="pairs",
            rows_per_block=resources.batch_size,
        )
        seconds = run.earlier_seconds(uri) + time.monotonic() - began
        reasons = ["held_out" if split == "held_out" else None for split in _splits(pairs)]
        return [Report.count("latents", reasons, seconds)]

    return run.make(uri, origin, encode)


def _splits(pairs: str) -> list[str]:
    """The split of every pair."""
    column: list[str] = storage.read_dataset(pairs, PAIRS, columns=["split"])["split"].to_pylist()
    return column
