"""One request as the engine holds it: its latents, its levels, its own random stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from ip2p_ray.diffusion.noise import row_noise
from ip2p_ray.diffusion.sample import Progress, Sampler, move
from ip2p_ray.editor import Editor, Guidance, guided
from ip2p_ray.engine.request import Ticket


@dataclass(eq=False, kw_only=True)
class Row:
    """A request that is ready for its first step, or beyond it."""

    ticket: Ticket
    picture: Image.Image
    """The source as it is edited."""
    mask: Image.Image | None
    """Of the picture's size, mode L, 255 where it is edited; None for everywhere."""
    text: torch.Tensor
    """(1, token, channel)."""
    image_latents: torch.Tensor
    """Unscaled, (1, channel, height, width)."""
    editable: torch.Tensor | None
    """bool (1, 1, height, width) of latents; None for everywhere."""
    sigmas: torch.Tensor
    """(steps + 1,) on the CPU."""
    generator: torch.Generator
    """Before its first draw for a step."""
    progress: Progress
    """Of one row."""
    cost: float
    """Pixels by those of a picture of the editor's usual size, at least 1."""
    step: int = 0
    """Steps that were taken."""
    noise: torch.Tensor | None = None
    """Of the step that is being taken; kept where that fails, as a stream is drawn from once."""
    since: float = field(default_factory=time.monotonic)
    """When the stage it is in began."""

    @property
    def arrived(self) -> bool:
        """Whether it took its last step."""
        return self.step == len(self.sigmas) - 1

    @property
    def wants_preview(self) -> bool:
        """Whether what the last step found is to be shown."""
        return self.step in self.ticket.request.preview_steps()

    def finished_picture(self, edited: Image.Image) -> Image.Image:
        """The edited picture, with the source's own pixels wherever the mask says so."""
        if self.mask is None:
            return edited
        return Image.composite(edited, self.picture, self.mask)


class Batch:
    """Rows of one size of latents that take their steps together."""

    def __init__(self, editor: Editor, null_text: torch.Tensor, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self._editor = editor
        self._sampler: Sampler = editor.settings.sampler
        self._device = editor.model.device
        self._progress = Progress.join([row.progress for row in self.rows])
        requests = [row.ticket.request for row in self.rows]
        self._guidance = Guidance(
            null_text=null_text,
            text=torch.cat([row.text for row in self.rows]),
            image_latents=torch.cat([row.image_latents for row in self.rows]),
            text_scale=torch.tensor([float(each.text_guidance_scale) for each in requests]),
            image_scale=torch.tensor([float(each.image_guidance_scale) for each in requests]),
            rescale=editor.settings.guidance_rescale,
        )
        self._editable = self._masks()

    def _masks(self) -> torch.Tensor | None:
        if all(row.editable is None for row in self.rows):
            return None
        shape = (1, 1, *self._guidance.image_latents.shape[2:])
        everywhere = torch.ones(shape, dtype=torch.bool, device=self._device)
        masks = [everywhere if row.editable is None else row.editable for row in self.rows]
        return torch.cat(masks)

    def advance(self) -> None:
        """One step of every row, each between its own noise levels.

        What is masked is drawn to the source: there the model's guess is replaced by the source's
        latents, so that the sampler, whichever it is, ends in them.
        """
        model = self._editor.model
        # blocking: a few numbers, and nothing may overwrite them while they travel
        levels = torch.stack([row.sigmas[row.step : row.step + 2] for row in self.rows])
        sigma, sigma_next = levels.to(self._device).unbind(1)
        denoised = guided(model, self._guidance, self._progress.x, sigma)
        if self._editable is not None:
            source = self._guidance.image_latents * model.scaling_factor
            denoised = torch.where(self._editable, denoised, source)
        noise = self._noise() if self._sampler == "euler_ancestral" else None
        self._progress = move(
            self._progress, denoised, sigma, sigma_next, sampler=self._sampler, noise=noise
        )
        for row in self.rows:
            row.step += 1
            row.noise = None

    def _noise(self) -> torch.Tensor:
        """A draw of each row's own stream; the last step takes none."""
        shape = self._progress.x.shape[1:]
        for row in self.rows:
            last = row.step == len(row.sigmas) - 2
            if row.noise is None:
                row.noise = torch.zeros(1, *shape) if last else row_noise([row.generator], shape)
        return torch.cat([row.noise for row in self.rows if row.noise is not None])

    def scatter(self) -> list[Row]:
        """The rows, each with its own progress again; takes no memory."""
        for index, row in enumerate(self.rows):
            row.progress = Progress(
                *(part[index : index + 1] for part in vars(self._progress).values())
            )
        return self.rows

    def guess(self, row: Row) -> torch.Tensor:
        """What the last step took for a row's clean latents, (1, channel, height, width)."""
        index = self.rows.index(row)
        return self._progress.denoised[index : index + 1]


def latent_mask(mask: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Which latents have a pixel behind them that may change, bool (1, 1, height, width).

    `mask` is of mode L with sides that are multiples of `size`, the latents' (height, width).
    """
    pixels = torch.from_numpy(np.array(mask, dtype=np.float32))[None, None]
    return torch.nn.functional.adaptive_max_pool2d(pixels, size) > 0
