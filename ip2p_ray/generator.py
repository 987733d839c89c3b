"""The generator of pairs as it is held on one device: weights, precision, batches that fit.

What the pictures are is in the model's fingerprint and in `PairConfig`; a `Holding` is only how
fast and in how much memory they are made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from ip2p_ray.clip import Clip
from ip2p_ray.diffusion.folder import read_vae
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import ConfigError, ModelError
from ip2p_ray.memory import free_bytes, gib, halved, held_bytes, is_out_of_memory
from ip2p_ray.pairs import CandidateRequest, PairConfig, Pictures, generate_candidates
from ip2p_ray.search.generator import search
from ip2p_ray.search.options import SearchConfig
from ip2p_ray.search.triplet import Searched

DTypeName = Literal["float32", "bfloat16", "float16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class GeneratorWeights:
    """Which weights make the pictures."""

    source: str
    """Diffusers folder or hub id of a Stable Diffusion."""
    dtype: DTypeName = "float32"
    """Of the weights and of the arithmetic."""
    vae: str | None = None
    """Folder or hub id of another autoencoder, a tiny one (AutoencoderTiny) too; None is the
    model's own."""

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype is one of {', '.join(_DTYPES)}, got {self.dtype!r}")

    def load(self, device: str | torch.device = "cpu") -> StableDiffusion:
        """The model on the device.

        Raises:
            ConfigError: the device is not there.
            ModelError: a part is missing or broken, or the weights do not fit; says which.
        """
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"the generator cannot go to {device}: torch sees no CUDA device")
        model = StableDiffusion.load(self.source, dtype=_DTYPES[self.dtype])
        if self.vae is not None:
            model.vae = read_vae(self.vae).to(_DTYPES[self.dtype])
        need, have = _held(model), free_bytes(device)
        if torch.device(device).type != "cpu" and need > have:
            raise ModelError(
                f"model {self.source} does not fit: its weights need {gib(need)} as {self.dtype}, "
                f"{device} has {gib(have)} free; give a smaller dtype or a larger device"
            )
        for part in (model.unet, model.vae, model.text_encoder):
            torch.nn.Module.to(part, device=device)
        return model


@dataclass(frozen=True, kw_only=True)
class Holding:
    """How a generator is held; no field changes more than the rounding of what it makes."""

    device: str = "cpu"
    """Where it computes: cpu, cuda or cuda:<number>."""
    batch_size: int = 8
    """Candidates that are made at a time; halved when they do not fit."""
    decode_batch: int | None = None
    """Pictures that are decoded at a time; None is as many as candidates."""
    channels_last: bool = False
    """Lay the weights out by pixel; in bfloat16 on an H200 that is slower (LOG.md, 2026-11-27)."""
    compile: bool = False
    """Compile the UNet, once for a batch of this size; a smaller one is filled up."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "decode_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is at least 1, got {value}")


class Batch(NamedTuple):
    """Candidates that were made together."""

    requests: Sequence[CandidateRequest]
    source: Pictures
    """uint8 (request, height, width, 3)."""
    edited: Pictures
    """uint8 (request, height, width, 3)."""
    seconds: float
    """That the device was busy with them."""


class Generator:
    """A model held as it is told, which makes any number of candidates in batches."""

    def __init__(
        self,
        model: StableDiffusion,
        holding: Holding,
        *,
        filled: Callable[[int, int], object] | None = None,
    ) -> None:
        """`filled` is told, of each batch, how many rows it has and how many it can have."""
        self._model = model
        self._holding = holding
        self._filled = filled
        self._batch_size = holding.batch_size
        if holding.channels_last:
            for part in (model.unet, model.vae):
                part.to(memory_format=torch.channels_last)
        if holding.compile:
            model.unet.compile(dynamic=False)

    @property
    def model(self) -> StableDiffusion:
        """What it holds."""
        return self._model

    @property
    def batch_size(self) -> int:
        """Candidates that it makes at a time now."""
        return self._batch_size

    def make(self, requests: Sequence[CandidateRequest], config: PairConfig) -> Iterator[Batch]:
        """The candidates in the order of their requests, a batch at a time.

        A batch that does not fit into the device's memory is halved, once and for all, and made
        again; the candidates are the same.

        Raises:
            ModelError: not even one candidate fits.
        """
        done = 0
        while done < len(requests):
            part = requests[done : done + self._batch_size]
            began = time.monotonic()
            too_large: str | None = None
            try:
                source, edited = self._made(part, config)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                too_large = str(error)
            if too_large is not None:  # out of the block, which holds on to the tensors
                self._halve(self._batch_size if self._holding.compile else len(part), too_large)
                continue
            if self._filled is not None:
                self._filled(len(part), self._batch_size)
            yield Batch(part, source, edited, time.monotonic() - began)
            done += len(part)

    def search(
        self,
        clip: Clip,
        triplets: Sequence[Mapping[str, Any]],
        config: PairConfig,
        options: SearchConfig,
        recipe: str,
        *,
        shown_below: str = "",
    ) -> Iterator[Searched]:
        """What `search.generator.search` yields, in batches that fit; see `make`.

        Triplets whose search had not ended when a batch did not fit are searched anew.

        Raises:
            ModelError: not even one candidate fits.
        """
        left = {row["triplet_key"]: row for row in triplets}
        least = -(-(1 + (options.share_source or 1)) // 2)
        while left:
            tried = self._batch_size
            too_large: str | None = None
            try:
                for found in search(
                    self._model,
                    clip,
                    [*left.values()],
                    config,
                    options,
                    recipe,
                    batch_size=tried,
                    decode_batch=self._holding.decode_batch,
                    shown_below=shown_below,
                    filled=self._filled,
                ):
                    del left[found.triplet["triplet_key"]]
                    yield found
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                too_large = str(error)
            if too_large is not None:
                self._halve(tried, too_large, least)

    def _made(
        self, requests: Sequence[CandidateRequest], config: PairConfig
    ) -> tuple[Pictures, Pictures]:
        asked = list(requests)
        if self._holding.compile:  # another shape would be compiled anew
            asked += [asked[-1]] * (self._batch_size - len(asked))
        source, edited = generate_candidates(
            self._model, asked, config, decode_batch=self._holding.decode_batch
        )
        return source[: len(requests)], edited[: len(requests)]

    def _halve(self, tried: int, told: str, least: int = 1) -> None:
        self._batch_size = halved(
            "generator",
            tried,
            told,
            self._model.device,
            least=least,
            held=_held(self._model),
        )


def _held(model: StableDiffusion) -> int:
    parts: tuple[Any, ...] = (model.unet, model.vae, model.text_encoder)
    return held_bytes(*parts)
