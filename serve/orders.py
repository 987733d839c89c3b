"""What travels between the HTTP front and whoever edits; plain data that pickles."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal, Protocol

OutputFormat = Literal["png", "jpeg", "webp"]
"""In which pictures are sent back."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """One request to the service: one picture and one instruction, for as many seeds as given."""

    image: bytes
    """The encoded file as it was uploaded; not looked at yet."""
    instruction: str
    seeds: tuple[int, ...]
    """Of each picture that is wanted."""
    mask: bytes | None = None
    """An encoded picture, transparent where to edit."""
    size: tuple[int, int] | None = None
    """(width, height); None for what suits the model and the picture."""
    steps: int | None = None
    """None, here and in the scales, for the model's own."""
    text_guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    previews: int = 0
    """How many are wanted on the way."""
    deadline_s: float | None = None
    """Seconds it may take."""
    output_format: OutputFormat = "png"
    output_compression: int | None = None
    """Quality of JPEG and WebP in [0, 100]."""


@dataclass(frozen=True, kw_only=True)
class Edited:
    """One picture that was made, or a preview of one."""

    data: bytes
    """In the order's format."""
    width: int
    height: int
    seed: int
    step: int
    """Steps taken; as many as `steps` for what was asked for, fewer for a preview."""
    steps: int
    text_guidance_scale: float
    image_guidance_scale: float

    @property
    def is_preview(self) -> bool:
        """Whether more steps follow."""
        return self.step < self.steps


Defaults = dict[str, float]
"""steps, text_guidance_scale and image_guidance_scale of a model."""


class ReplicaLostError(Exception):
    """Whoever edited is gone, twice; nothing was answered, the request may be sent again."""


class BusyError(Exception):
    """As many requests wait as may."""


class Editing(Protocol):
    """Whoever edits: an engine in this process, or replicas behind a Serve handle.

    Raises, both methods: ConfigError, ImageError, DeadlineError, BusyError, ReplicaLostError.
    """

    async def edit(self, order: Order) -> list[Edited]:
        """One picture a seed. Being cancelled frees the places that were taken."""
        ...

    def stream(self, order: Order) -> AsyncGenerator[Edited, None]:
        """Previews and at last the picture, of an order of one seed; closing it frees the place."""
        ...

    async def defaults(self) -> Defaults | None:
        """What is used where a request states nothing; None where nobody can tell now."""
        ...

    async def ready(self) -> bool:
        """Whether a request would be taken up by now."""
        ...
