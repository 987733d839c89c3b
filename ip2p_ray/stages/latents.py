"""pairs -> latents: the autoencoder in actors, once, so that training never runs it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from ip2p_ray import storage
from ip2p_ray.copies import local_folder
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import ConfigError, DatasetError, ImageError, StageError
from ip2p_ray.images import decode_image, fit_image
from ip2p_ray.latents import TextForm, encode_instructions, encode_pairs
from ip2p_ray.report import Report, duration, size
from ip2p_ray.schema import LATENT_TEXTS, LATENTS
from ip2p_ray.stages import plan, run

_TEXTS = ("pair_key", "triplet_key", "instruction", "split")
_MOST_BLOCKS = 2_000  # the driver's memory grows with them


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What is encoded, and how; all of it is in the recipe."""

    text: TextForm = "instruction"
    """What of the instruction is stored beside it."""
    held_out: bool = False
    """Also the pairs of the held-out split, for validation; they are never trained on."""
    resolution: int | None = None
    """Height and width that pictures are brought to, cut at the centre; None leaves them."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the autoencoder's and the text encoder's arithmetic."""

    def __post_init__(self) -> None:
        if self.resolution is not None and self.resolution < 1:
            raise ConfigError(f"resolution is at least 1 or None, got {self.resolution}")

    @property
    def schema(self) -> pa.Schema:
        """The columns that come out."""
        form = {"instruction": (), "tokens": ("tokens",)}
        names = form.get(self.text, ("embedding", "embedding_shape"))
        return pa.schema([*LATENTS, *(field for field in LATENT_TEXTS if field.name in names)])

    def as_dict(self) -> dict[str, Any]:
        """For the origin; what is as usual is left out."""
        usual = asdict(Encoding())
        changed = {name: value for name, value in asdict(self).items() if value != usual[name]}
        return {"split": "all" if self.held_out else "train", **changed}


class EncodePairs:
    """An actor of the plan: rows of PAIRS in, rows of LATENTS out."""

    def __init__(
        self, generator: str, encoding: Encoding | None = None, device: str = "cpu"
    ) -> None:
        self._encoding = encoding or Encoding()
        dtype = getattr(torch, self._encoding.dtype)
        self._model = StableDiffusion.load(local_folder(generator), device=device, dtype=dtype)
        self._size: tuple[int, int] | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A row of latents for each pair of the batch.

        Raises:
            DatasetError: a picture is broken.
            ConfigError: pictures are of several sizes, or of one that the model cannot take.
        """
        rows = batch.to_pylist()
        source, edited = (self._pictures(rows, name) for name in ("source_image", "edited_image"))
        self._model.latent_size(*source.shape[1:3])
        encoded = encode_pairs(self._model, source, edited)
        texts = encode_instructions(
            self._model, [row["instruction"] for row in rows], self._encoding.text
        )
        found = [
            {**{name: row[name] for name in _TEXTS}, **arrays, **text}
            for row, arrays, text in zip(rows, encoded, texts, strict=True)
        ]
        return pa.Table.from_pylist(found, schema=self._encoding.schema)

    def _pictures(self, rows: list[dict[str, Any]], name: str) -> Any:
        side, pictures = self._encoding.resolution, []
        for row in rows:
            try:
                picture = decode_image(row[name]["bytes"])
            except ImageError as error:
                raise DatasetError(f"{name} of pair {row['pair_key']}: {error}") from error
            if side is not None and picture.size != (side, side):
                picture = fit_image(picture, (side, side))
            self._size = self._size or picture.size
            if picture.size != self._size:
                raise ConfigError(
                    f"pictures are of several sizes, such as {_told(self._size)} and "
                    f"{_told(picture.size)} (pair {row['pair_key']}): bring them to one with "
                    "--resolution"
                )
            pictures.append(np.asarray(picture))
        return np.stack(pictures)


def encode_latents(
    pairs: str,
    uri: str,
    *,
    generator: str,
    models: Mapping[str, str],
    resources: run.Resources,
    encoding: Encoding | None = None,
) -> storage.Manifest:
    """The dataset of the encoded pairs of the train split, and of the held-out one if asked for.

    Raises:
        StageError: the train split is empty.
    """
    encoding = encoding or Encoding()
    origin = run.Origin(
        dataset="latents",
        config=encoding.as_dict(),
        models={"generator": models["generator"]},
        sources={"pairs": storage.read_manifest(pairs).recipe},
    )
    sources = _sources(pairs, encoding)
    device = "cuda" if resources.gpus else "cpu"
    step = plan.Step(
        callable=EncodePairs,
        arguments={"generator": generator, "encoding": encoding, "device": device},
        resources=resources,
    )

    def encode() -> list[Report]:
        began = time.monotonic()
        _require_pairs(pairs)
        plan.stream(
            sources,
            uri,
            key="pair_key",
            schema=encoding.schema,
            steps=[step],
            unit="pairs",
            rows_per_block=max(resources.batch_size, -(-plan.count_rows(sources) // _MOST_BLOCKS)),
        )
        seconds = run.earlier_seconds(uri) + time.monotonic() - began
        reasons = (
            "held_out" if split == "held_out" and not encoding.held_out else None
            for split in _splits(pairs)
        )
        return [Report.count("latents", reasons, seconds)]

    return run.make(uri, origin, encode)


@dataclass(frozen=True, kw_only=True)
class EncodingPlan:
    """What encoding will take; measured on the first batch."""

    pairs: int
    pair_bytes: float
    """Of a pair's row."""
    seconds: float
    """Of one actor for a pair."""
    actors: int
    free_bytes: int | None
    """Of the disk that the latents are to lie on; None in a bucket."""
    shape: tuple[int, ...]
    """(channel, height, width) of a latent."""

    @property
    def bytes(self) -> float:
        """Of all rows."""
        return self.pairs * self.pair_bytes

    def lines(self) -> list[str]:
        """The plan, for people."""
        channels, height, width = self.shape
        seconds = self.pairs * self.seconds
        free = "" if self.free_bytes is None else f" ({size(self.free_bytes)} are free)"
        return [
            f"plan: {self.pairs:,} pairs, both as they are and mirrored; latents of {channels} x "
            f"{height} x {width} in float16: {size(self.pair_bytes)} a pair, {size(self.bytes)} in "
            f"all{free}",
            self._mapped(),
            f"plan: an actor takes {self.seconds:.3g} s for a pair: {duration(seconds)} of a "
            f"device, {duration(seconds / self.actors)} with {self.actors} of them, beside loading "
            "the model",
        ]

    def _mapped(self) -> str:
        if self.free_bytes is None:
            return f"plan: training maps {size(self.bytes)}, once, on the disk of each of its nodes"
        return (
            f"plan: training maps as much again, once, beside them: {size(2 * self.bytes)} of disk "
            "together"
        )

    def require_room(self, folder: str) -> None:
        """Returns if the latents fit on the disk.

        Raises:
            StageError: they do not; says the need and what there is.
        """
        if self.free_bytes is not None and self.bytes > self.free_bytes:
            raise StageError(
                f"latents: {size(self.bytes)} are needed in {folder}, {size(self.free_bytes)} are "
                "free; give another --out, or a smaller --resolution"
            )


def plan_of(
    pairs: str, folder: str, *, generator: str, encoding: Encoding, resources: run.Resources
) -> EncodingPlan:
    """The plan of `encode_latents`, measured where an actor would run, on the first pairs.

    Raises:
        ModelError: the model cannot be loaded.
        DatasetError: the pairs are not whole, or cannot be read.
        StageError: the train split is empty.
    """
    _require_pairs(pairs)
    sources = _sources(pairs, encoding)
    shard = max(sources, key=storage.count_rows)  # a full batch, whose pictures may differ in size
    with storage.open_parquet(shard) as file:
        first = pa.Table.from_batches([next(file.iter_batches(resources.batch_size))])
    seconds, row_bytes, shape = run.in_task(
        resources, _measure, generator, encoding, "cuda" if resources.gpus else "cpu", first
    )
    return EncodingPlan(
        pairs=plan.count_rows(sources),
        pair_bytes=row_bytes,
        seconds=seconds,
        actors=resources.most_actors or resources.actors,
        free_bytes=_free_bytes(folder),
        shape=tuple(shape),
    )


def _free_bytes(folder: str) -> int | None:
    if not storage.is_local(folder):
        return None
    above = storage.local_path(folder).absolute()
    while not above.exists():
        above = above.parent
    return shutil.disk_usage(above).free


def fingerprint_of(model: str) -> str:
    """What identifies a model; it is loaded once for it, on a node.

    Raises:
        ModelError: it cannot be loaded; says which.
    """
    found: str = run.in_task(run.Resources(cpus=plan.TASK_CPUS), _fingerprint, model)
    return found


def _fingerprint(model: str) -> str:
    return StableDiffusion.load(local_folder(model)).fingerprint()


def _measure(
    generator: str, encoding: Encoding, device: str, batch: pa.Table
) -> tuple[float, float, list[int]]:
    """Seconds and bytes of a pair, and the shape of its latents."""
    encode = EncodePairs(generator, encoding, device)
    encode(batch)  # memory and kernels
    began = time.monotonic()
    rows = encode(batch)
    seconds = (time.monotonic() - began) / batch.num_rows
    return seconds, rows.nbytes / rows.num_rows, rows["shape"][0].as_py()


def _sources(pairs: str, encoding: Encoding) -> list[str]:
    return plan.shards(pairs, "" if encoding.held_out else "train-")


def _require_pairs(pairs: str) -> None:
    if not plan.count_rows(plan.shards(pairs, "train-")):
        raise StageError(f"latents: no pair of {pairs} is in the train split; make more pairs")


def _splits(pairs: str) -> Iterator[str]:
    """The split of every pair, a shard in memory at a time."""
    for shard in plan.shards(pairs):
        yield from storage.read_table(shard, columns=["split"])["split"].to_pylist()


def _told(picture: tuple[int, int]) -> str:
    width, height = picture
    return f"{width} x {height}"
