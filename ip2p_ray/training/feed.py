"""Which sample stands where in a run, and every random number that it meets there.

Both are functions of (run seed, epoch, sample) and of nothing else: not of the rank, the world
size, the neighbours in the batch, or how often the run was stopped.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from ip2p_ray.errors import ConfigError
from ip2p_ray.schema import stream_seed

FLOAT16 = npt.NDArray[np.float16]
UINT8 = npt.NDArray[np.uint8]


class LatentRow(NamedTuple):
    """One encoded pair; the arrays are float16 (channel, height, width), unscaled."""

    instruction: str
    edited_mean: FLOAT16
    edited_std: FLOAT16
    source_mode: FLOAT16
    tokens: tuple[int, ...] | None = None
    """Of the instruction, where the dataset has them."""
    embedding: FLOAT16 | None = None
    """Of the instruction, float16 (token, channel), where the dataset has it."""


class Latents(Protocol):
    """What the loop reads: triplet groups by index, each with one or more encoded pairs."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channel, height, width) of every latent."""

    @property
    def digest(self) -> str:
        """Names the content; a run is resumed only on the dataset that it was started on."""

    def __len__(self) -> int:
        """The number of groups."""

    def key(self, index: int) -> str:
        """The triplet key of a group."""

    def read(self, index: int, *, pick: float, flip: bool) -> LatentRow:
        """One pair of a group: `pick` in [0, 1) says which, `flip` takes the mirrored one."""


class PictureRow(NamedTuple):
    """One pair as pictures, uint8 RGB (height, width, 3), both cut in the same way."""

    instruction: str
    source: UINT8
    edited: UINT8


@runtime_checkable
class Pictures(Protocol):
    """As Latents, but of pairs that are still pictures: the loop encodes them itself."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channel, height, width) of what the autoencoder makes of a picture."""

    @property
    def digest(self) -> str:
        """Names the content."""

    def __len__(self) -> int:
        """The number of groups."""

    def key(self, index: int) -> str:
        """The triplet key of a group."""

    def read_pictures(self, index: int, *, pick: float, flip: bool, crop: Crop) -> PictureRow:
        """One pair of a group, resized, cut and mirrored as told."""


class Crop(NamedTuple):
    """Three uniforms in [0, 1) that say how a picture is resized and where it is cut."""

    size: float
    top: float
    left: float


CENTRE = Crop(0.0, 0.5, 0.5)
"""No enlargement, and cut in the middle."""


class Visit(NamedTuple):
    """One group, met in one epoch."""

    epoch: int
    group: int


class Feed:
    """The order of a run: every epoch is a permutation of the groups, made from (seed, epoch).

    The epochs stand one after another and the global batches are consecutive slices of that line,
    so each group is met exactly once an epoch and no rest is dropped: the batch in which an epoch
    ends goes on with the next. A set smaller than a batch works too.
    """

    def __init__(self, groups: int, batch_size: int, seed: int) -> None:
        if groups < 1:
            raise ConfigError("the dataset holds no pairs to train on")
        self.groups, self.batch_size, self.seed = groups, batch_size, seed
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def batch(self, step: int) -> list[Visit]:
        """The global batch of an optimizer step (from 0), over all ranks and micro-batches."""
        start = step * self.batch_size
        return [self._visit(position) for position in range(start, start + self.batch_size)]

    def part(self, step: int, *, rank: int, world_size: int, parts: int) -> list[list[Visit]]:
        """One rank's micro-batches of a step: equal slices of the global batch, `parts` of them.

        Micro-batch m of rank r is slice number m * world_size + r.
        """
        batch = self.batch(step)
        size = micro_batch_size(self.batch_size, world_size, parts)
        starts = [(part * world_size + rank) * size for part in range(parts)]
        return [batch[start : start + size] for start in starts]

    def share(self, step: int, *, rank: int, world_size: int, most: int) -> list[list[Visit]]:
        """One rank's micro-batches of a step, of `most` samples at most, about equally large.

        The global batch is cut into `world_size` consecutive slices whose lengths differ by one at
        most, so that any world size goes that is no larger than the batch.
        """
        if world_size > self.batch_size or most < 1:
            raise ConfigError(
                f"every rank needs a sample of the batch and a micro-batch at least one, got "
                f"{world_size} ranks, batch_size {self.batch_size} and micro-batches of {most}"
            )
        own = _slices(self.batch(step), world_size)[rank]
        return _slices(own, -(-len(own) // most))

    def _visit(self, position: int) -> Visit:
        epoch, place = divmod(position, self.groups)
        return Visit(epoch, int(self._order(epoch)[place]))

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
            stream = random_stream(self.seed, "order", epoch)
            self._orders[epoch] = stream.permutation(self.groups)
        return self._orders[epoch]


def _slices(visits: list[Visit], count: int) -> list[list[Visit]]:
    """As many consecutive slices, their lengths differing by one at most."""
    edges = [len(visits) * place // count for place in range(count + 1)]
    return [visits[start:end] for start, end in itertools.pairwise(edges)]


def micro_batch_size(batch_size: int, world_size: int, parts: int) -> int:
    """Samples in one micro-batch of one rank.

    Raises:
        ConfigError: the global batch does not split evenly.
    """
    size, rest = divmod(batch_size, world_size * parts)
    if rest or size < 1:
        raise ConfigError(
            f"batch_size counts all ranks and must be a multiple of world size x accumulation = "
            f"{world_size} x {parts}, got {batch_size}"
        )
    return size


def random_stream(*parts: int | str) -> np.random.Generator:
    """The counter-based random stream that the parts name; the same bits on every machine."""
    return np.random.Generator(np.random.Philox(key=stream_seed("training", *parts)))


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of one sample in one epoch."""

    pick: float
    """Uniform in [0, 1): which of the group's pairs."""
    timestep: float
    """Uniform in [0, 1): the timestep, as a share of all."""
    dropout: float
    """Uniform in [0, 1): which conditions are dropped."""
    flip: float
    """Uniform in [0, 1): mirrored below 1/2."""
    normals: npt.NDArray[np.float32]
    """(2, channel, height, width): the posterior sample's noise and the diffusion's."""


def draw(seed: int, visit: Visit, key: str, shape: Sequence[int]) -> Draws:
    """Everything random about the group `key` in the visit's epoch of the run `seed`."""
    stream = random_stream(seed, visit.epoch, key)
    pick, timestep, dropout, flip = stream.random(4).tolist()
    normals = stream.standard_normal((2, *shape), dtype=np.float32)
    return Draws(pick=pick, timestep=timestep, dropout=dropout, flip=flip, normals=normals)


def draw_crop(seed: int, visit: Visit, key: str) -> Crop:
    """How the pictures of the group `key` are cut in the visit's epoch; a stream of its own."""
    return Crop(*random_stream(seed, visit.epoch, key, "crop").random(3).tolist())


Text = str | tuple[int, ...]
"""An instruction, or its token numbers."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What is drawn for the rows of a micro-batch; `row` is the leading axis."""

    posterior_noise: torch.Tensor
    """float32 (row, channel, height, width), as is the next."""
    noise: torch.Tensor
    timesteps: torch.Tensor
    """float64 (row,), uniform in [0, 1)."""
    dropout: torch.Tensor
    """float64 (row,), uniform in [0, 1)."""


@dataclass(frozen=True, kw_only=True)
class Batch(Noise):
    """One micro-batch on the CPU, conditions not dropped yet."""

    instructions: Sequence[Text]
    embeddings: torch.Tensor | None = None
    """float32 (row, token, channel) of the instructions, where the dataset has them."""
    edited_mean: torch.Tensor
    """float32 (row, channel, height, width), as are the two after it."""
    edited_std: torch.Tensor
    source_mode: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class PictureBatch(Noise):
    """One micro-batch of pictures, which the autoencoder has not seen yet."""

    instructions: Sequence[Text]
    source: torch.Tensor
    """uint8 (row, height, width, 3), as is the next."""
    edited: torch.Tensor


def read_batch(
    dataset: Latents,
    visits: Sequence[Visit],
    seed: int,
    *,
    flips: bool = True,
) -> Batch:
    """The rows of these visits, with their random numbers."""
    draws = [draw(seed, visit, dataset.key(visit.group), dataset.shape) for visit in visits]
    rows = [
        dataset.read(visit.group, pick=drawn.pick, flip=flips and drawn.flip < 0.5)
        for visit, drawn in zip(visits, draws, strict=True)
    ]
    embeddings = [row.embedding for row in rows if row.embedding is not None]
    return Batch(
        instructions=[row.instruction if row.tokens is None else row.tokens for row in rows],
        embeddings=_stack(embeddings) if embeddings else None,
        edited_mean=_stack([row.edited_mean for row in rows]),
        edited_std=_stack([row.edited_std for row in rows]),
        source_mode=_stack([row.source_mode for row in rows]),
        **_noise(draws),
    )


def read_pictures(
    dataset: Pictures, visits: Sequence[Visit], seed: int, *, flips: bool = True
) -> PictureBatch:
    """The pictures of these visits, resized and cut at random, with their random numbers."""
    keys = [dataset.key(visit.group) for visit in visits]
    draws = [draw(seed, visit, key, dataset.shape) for visit, key in zip(visits, keys, strict=True)]
    rows = [
        dataset.read_pictures(
            visit.group,
            pick=drawn.pick,
            flip=flips and drawn.flip < 0.5,
            crop=draw_crop(seed, visit, key),
        )
        for visit, drawn, key in zip(visits, draws, keys, strict=True)
    ]
    return PictureBatch(
        instructions=[row.instruction for row in rows],
        source=torch.from_numpy(np.stack([row.source for row in rows])),
        edited=torch.from_numpy(np.stack([row.edited for row in rows])),
        **_noise(draws),
    )


def _noise(draws: Sequence[Draws]) -> dict[str, torch.Tensor]:
    normals = torch.from_numpy(np.stack([drawn.normals for drawn in draws], axis=1))
    return {
        "posterior_noise": normals[0],
        "noise": normals[1],
        "timesteps": torch.tensor([drawn.timestep for drawn in draws], dtype=torch.float64),
        "dropout": torch.tensor([drawn.dropout for drawn in draws], dtype=torch.float64),
    }


def _stack(arrays: Sequence[FLOAT16]) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays).astype(np.float32))
