"""The settings of the miniature world, drawn behind its subjects.

A backdrop is a place (sea, meadow, ...) in a manner (day, night, ...). Each has a few variants that
no caption tells apart, so that pictures of one caption differ in more than position.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ip2p_ray.miniature.drawing import SIZE, TINTS, Rgb

SUPERSAMPLING = 4
VARIANTS = 4
"""How many variants each backdrop has; a layout's `backdrop` is one of them."""

PAPER: Rgb = (247, 244, 236)
PENCIL: Rgb = (150, 147, 142)


class Canvas:
    """Draws in pixel coordinates of the finished picture; `y` grows downwards."""

    def __init__(self, manner: str) -> None:
        self.manner = manner
        self.sketched = manner == "sketch"
        self.image = Image.new("RGB", (SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def _tint(self, colour: Rgb) -> Rgb:
        return TINTS[self.manner](colour)

    def area(self, points: list[tuple[float, float]], fill: Rgb) -> None:
        """A filled polygon; a sketch has its outline."""
        scaled = [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points]
        if self.sketched:
            self.draw.polygon(scaled, fill=PAPER)
            self.draw.line([*scaled, scaled[0]], fill=PENCIL, width=SUPERSAMPLING)
        else:
            self.draw.polygon(scaled, fill=self._tint(fill))

    def disc(self, x: float, y: float, radius: float, fill: Rgb, *, glow: bool = False) -> None:
        """A filled circle; one that glows keeps its colour at night."""
        s = SUPERSAMPLING
        box = ((x - radius) * s, (y - radius) * s, (x + radius) * s, (y + radius) * s)
        if self.sketched:
            self.draw.ellipse(box, outline=PENCIL, width=s)
        else:
            self.draw.ellipse(box, fill=fill if glow else self._tint(fill))

    def stroke(self, points: list[tuple[float, float]], fill: Rgb, width: float = 1.0) -> None:
        """A line through points, `width` in pixels."""
        scaled = [(x * SUPERSAMPLING, y * SUPERSAMPLING) for x, y in points]
        colour = PENCIL if self.sketched else self._tint(fill)
        self.draw.line(scaled, fill=colour, width=round(width * SUPERSAMPLING))

    def sky(self, colour: Rgb, horizon: float) -> None:
        """What is above the horizon, with sun, or moon and stars."""
        self.area([(-1, -1), (SIZE, -1), (SIZE, horizon), (-1, horizon)], colour)
        if self.manner == "night":
            self.disc(52, 9, 5, (245, 240, 205), glow=True)
            for x, y in ((6, 7), (16, 14), (27, 5), (36, 15), (42, 6), (10, 22), (58, 20)):
                self.disc(x, y, 0.9, (235, 235, 245), glow=True)
        elif not self.sketched:
            self.disc(52, 9, 5, (255, 226, 110))
        else:
            self.disc(52, 9, 5, PAPER)

    def ground(self, colour: Rgb, horizon: float) -> None:
        """What is below the horizon."""
        self.area([(-1, horizon), (SIZE, horizon), (SIZE, SIZE), (-1, SIZE)], colour)


def _wave(y: float, phase: float) -> list[tuple[float, float]]:
    return [(x, y + 1.3 * np.sin(x / 3.4 + phase)) for x in range(-2, SIZE + 3)]


def _sea(canvas: Canvas, variant: int) -> None:
    horizon = 36 + variant
    canvas.sky((170, 215, 245), horizon)
    canvas.ground((35, 115, 185), horizon)
    for row, y in enumerate((horizon + 6, horizon + 13, horizon + 20)):
        canvas.stroke(_wave(y, 1.7 * row + variant), (120, 185, 230), 1.4)


def _meadow(canvas: Canvas, variant: int) -> None:
    horizon = 37 + variant
    canvas.sky((165, 210, 245), horizon)
    canvas.ground((120, 190, 80), horizon)
    for k in range(7):
        x = (9 * k + 5 * variant) % SIZE
        y = horizon + 5 + (7 * k + 3 * variant) % 20
        canvas.stroke([(x, y), (x + 1.5, y - 3), (x + 3, y)], (60, 125, 45), 1.2)


def _desert(canvas: Canvas, variant: int) -> None:
    horizon = 39 + variant
    canvas.sky((250, 225, 175), horizon)
    canvas.ground((228, 178, 105), horizon)
    peak = 10 + 6 * variant
    canvas.area([(peak - 16, horizon), (peak, horizon - 13), (peak + 18, horizon)], (205, 145, 80))
    canvas.stroke([(0, horizon + 9), (20, horizon + 6), (44, horizon + 11), (64, horizon + 8)],
                  (200, 145, 80), 1.3)  # fmt: skip


def _snow(canvas: Canvas, variant: int) -> None:
    horizon = 38 + variant
    canvas.sky((195, 212, 228), horizon)
    for k, height in enumerate((14, 20, 12)):
        x = 8 + 22 * k + 3 * variant
        canvas.area([(x - 14, horizon), (x, horizon - height), (x + 14, horizon)], (135, 155, 180))
        canvas.area(
            [(x - 5, horizon - height + 7), (x, horizon - height), (x + 5, horizon - height + 7)],
            (245, 248, 252),
        )
    canvas.ground((240, 245, 250), horizon)


def _city(canvas: Canvas, variant: int) -> None:
    horizon = 44
    canvas.sky((200, 215, 225), horizon)
    for k, height in enumerate((22, 30, 17, 26, 20)):
        x = 13 * k - 3 + variant
        canvas.area(
            [(x, horizon), (x, horizon - height), (x + 11, horizon - height), (x + 11, horizon)],
            (125, 125, 140),
        )
        for row in range(height // 6):
            y = horizon - height + 4 + 6 * row
            canvas.stroke([(x + 3, y), (x + 8, y)], (225, 215, 150), 1.3)
    canvas.ground((95, 95, 100), horizon)
    canvas.stroke([(0, 57), (64, 57)], (220, 220, 210), 1.2)


def _forest(canvas: Canvas, variant: int) -> None:
    horizon = 42
    canvas.sky((190, 215, 200), horizon)
    for k in range(8):
        x = 9 * k - 2 + 2 * variant
        height = 22 + (5 * k + 3 * variant) % 12
        canvas.area([(x - 6, horizon), (x, horizon - height), (x + 6, horizon)], (50, 105, 70))
    canvas.ground((95, 85, 50), horizon)


SETTINGS: dict[str, Callable[[Canvas, int], None]] = {
    "sea": _sea,
    "meadow": _meadow,
    "desert": _desert,
    "snow": _snow,
    "city": _city,
    "forest": _forest,
}


@lru_cache(maxsize=512)
def backdrop(setting: str, manner: str, variant: int) -> NDArray[np.float32]:
    """An empty scene: float32 (64, 64, 3) in [0, 1]. `variant` counts from 0 below VARIANTS."""
    canvas = Canvas(manner)
    SETTINGS[setting](canvas, variant)
    large = np.asarray(canvas.image, dtype=np.float32) / 255.0
    blocks = large.reshape(SIZE, SUPERSAMPLING, SIZE, SUPERSAMPLING, 3)
    return blocks.mean(axis=(1, 3), dtype=np.float32)
