"""What an engine is asked for, and what whoever asked holds meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypeAlias

from PIL import Image

from ip2p_ray.editor import EditRequest
from ip2p_ray.errors import ConfigError

Preview: TypeAlias = Callable[[int, int, Image.Image], None]
"""Called with the steps done, the steps in all, and what the picture looks like by then."""


@dataclass(frozen=True, kw_only=True)
class EngineRequest(EditRequest):
    """One edit, with whatever may differ from its neighbours in the batch."""

    steps: int
    """Denoising steps."""
    size: tuple[int, int] | None = None
    """(width, height) at which it is edited, each a multiple of `Editor.size_multiple`; None for
    what the editor's settings give."""
    mask: Image.Image | bytes | None = None
    """A picture of the source's size, transparent where to edit; elsewhere nothing changes."""
    previews: int = 0
    """How many previews, at equal distances; fewer where there are not as many steps."""
    deadline_s: float | None = None
    """Seconds from submission after which it is given up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("steps", 1), ("previews", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
                raise ConfigError(f"{name} is a whole number of at least {least}, got {value!r}")
        if self.mask is not None and not isinstance(self.mask, Image.Image | bytes):
            raise ConfigError(f"mask is a PIL image or bytes, got {type(self.mask).__name__}")
        if self.deadline_s is not None and not (
            isinstance(self.deadline_s, Real) and 0 < self.deadline_s < math.inf
        ):
            raise ConfigError(f"deadline_s is a number above 0, got {self.deadline_s!r}")

    def preview_steps(self) -> set[int]:
        """After which steps a preview is shown; never after the last."""
        among = range(1, self.previews + 1)
        return {k * self.steps // (self.previews + 1) for k in among} - {0, self.steps}


class Ticket:
    """The edit that was asked for, while it is made. For any thread."""

    def __init__(self, request: EngineRequest, on_preview: Preview | None) -> None:
        self.request = request
        self.on_preview = on_preview
        self.future: Future[Image.Image] = Future()
        """Of the edited picture; `concurrent.futures.wait` and `asyncio.wrap_future` take it."""
        self.submitted = time.monotonic()
        self.expires = self.submitted + (request.deadline_s or math.inf)

    def result(self, timeout: float | None = None) -> Image.Image:
        """The edited picture, RGB.

        Raises:
            ImageError: the image or the mask cannot be used.
            ConfigError: the size is not one the model edits.
            DeadlineError: it took longer than `deadline_s`.
            CancelledError: it was cancelled, or the engine closed.
            TimeoutError: not done after `timeout` seconds; it goes on.
        """
        return self.future.result(timeout)

    def cancel(self) -> bool:
        """Gives the place up at the next step; False where the picture was there already."""
        return self.future.cancel()
