"""The vector drawing of the miniature world: subjects as sprites, settings as backdrops.

Everything is drawn large with Pillow and shrunk once (anti-aliasing), then cached: composing a
scene from cached parts costs microseconds, so training never reads a picture from disk.
A manner is a palette: it changes the colours with which the same outlines are drawn, which is
what makes the true answer of every edit known exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE = 64
"""Width and height of every picture in pixels."""

SUPERSAMPLING = 8

Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (214, 40, 40),
    "yellow": (250, 205, 40),
    "green": (40, 150, 60),
    "blue": (40, 90, 215),
    "purple": (140, 50, 175),
    "white": (244, 244, 244),
    "orange": (245, 125, 25),
    "pink": (250, 140, 185),
}


@dataclass(frozen=True, kw_only=True)
class Palette:
    """The colours with which one subject is drawn."""

    body: Rgb
    shade: Rgb
    dark: Rgb
    light: Rgb
    outline: Rgb


def _mix(a: Rgb, b: Rgb, share: float) -> Rgb:
    """`a` moved towards `b` by `share` in [0, 1]."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def _night(c: Rgb) -> Rgb:
    return (round(c[0] * 0.42), round(c[1] * 0.44), round(c[2] * 0.62))


def _sunset(c: Rgb) -> Rgb:
    return _mix(c, (255, 120, 50), 0.38)


def _fog(c: Rgb) -> Rgb:
    return _mix(c, (205, 210, 215), 0.55)


def _grey(c: Rgb) -> Rgb:
    y = round(0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2])
    return (y, y, y)


TINTS: dict[str, Callable[[Rgb], Rgb]] = {
    "day": lambda c: c,
    "night": _night,
    "sunset": _sunset,
    "fog": _fog,
    "black and white": _grey,
}
"""Manners that recolour. `sketch` is the one manner that draws differently."""

COLOURLESS = frozenset({"sketch", "black and white"})
"""Manners in which a subject's colour cannot be seen, so captions do not name it."""


def palette(colour: str, manner: str) -> Palette:
    """The palette of a subject of `colour` in `manner`; colourless manners ignore the colour."""
    if manner == "sketch":
        return Palette(
            body=(226, 223, 216),
            shade=(178, 175, 170),
            dark=(96, 94, 92),
            light=(250, 248, 243),
            outline=(52, 50, 50),
        )
    base = (150, 150, 150) if manner == "black and white" else COLOURS[colour]
    tint = TINTS[manner]
    lamp: Rgb = (255, 222, 120) if manner == "night" else tint((238, 246, 252))
    return Palette(
        body=tint(base),
        shade=tint(_mix(base, (0, 0, 0), 0.30)),
        dark=tint((62, 52, 50)),
        light=lamp,
        outline=tint((38, 32, 36)),
    )


class Pen:
    """Draws in the unit square of one sprite; `y` grows downwards, the ground is y = 1."""

    def __init__(self, size: int, colours: Palette) -> None:
        self.scale = size * SUPERSAMPLING
        self.colours = colours
        self.image = Image.new("RGBA", (self.scale, self.scale), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)
        self.line_width = round(1.1 * SUPERSAMPLING)

    def _points(self, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x * self.scale, y * self.scale) for x, y in points]

    def polygon(self, points: list[tuple[float, float]], fill: Rgb) -> None:
        """A filled polygon with an outline."""
        scaled = self._points(points)
        self.draw.polygon(scaled, fill=fill)
        closed = [*scaled, scaled[0], scaled[1]]
        self.draw.line(closed, fill=self.colours.outline, width=self.line_width, joint="curve")

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Rgb) -> None:
        """A filled upright rectangle with an outline."""
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, fill: Rgb) -> None:
        """A filled ellipse with an outline."""
        (a, b), (c, d) = self._points([(x0, y0), (x1, y1)])
        self.draw.ellipse(
            (a, b, c, d), fill=fill, outline=self.colours.outline, width=self.line_width
        )

    def dot(self, x: float, y: float, radius: float, fill: Rgb) -> None:
        """A filled circle without an outline."""
        (a, b), (c, d) = self._points([(x - radius, y - radius), (x + radius, y + radius)])
        self.draw.ellipse((a, b, c, d), fill=fill)

    def line(self, points: list[tuple[float, float]], fill: Rgb, width: float = 1.0) -> None:
        """A line through points; `width` in outlines."""
        self.draw.line(self._points(points), fill=fill, width=round(self.line_width * width))


def _house(pen: Pen) -> None:
    c = pen.colours
    pen.box(0.70, 0.10, 0.82, 0.40, c.dark)
    pen.box(0.14, 0.46, 0.86, 0.98, c.body)
    pen.polygon([(0.03, 0.48), (0.50, 0.06), (0.97, 0.48)], c.shade)
    pen.box(0.42, 0.66, 0.60, 0.98, c.dark)
    pen.box(0.21, 0.58, 0.35, 0.73, c.light)
    pen.box(0.67, 0.58, 0.80, 0.73, c.light)


def _boat(pen: Pen) -> None:
    c = pen.colours
    pen.line([(0.48, 0.04), (0.48, 0.72)], c.outline, 1.8)
    pen.polygon([(0.54, 0.06), (0.54, 0.64), (0.94, 0.64)], c.light)
    pen.polygon([(0.42, 0.16), (0.42, 0.64), (0.12, 0.64)], c.light)
    pen.polygon([(0.02, 0.70), (0.98, 0.70), (0.80, 0.98), (0.20, 0.98)], c.body)


def _tree(pen: Pen) -> None:
    c = pen.colours
    pen.box(0.43, 0.66, 0.57, 0.98, c.dark)
    pen.polygon([(0.10, 0.76), (0.50, 0.38), (0.90, 0.76)], c.shade)
    pen.polygon([(0.17, 0.54), (0.50, 0.20), (0.83, 0.54)], c.body)
    pen.polygon([(0.25, 0.32), (0.50, 0.02), (0.75, 0.32)], c.body)


def _car(pen: Pen) -> None:
    c = pen.colours
    pen.polygon([(0.22, 0.60), (0.34, 0.36), (0.68, 0.36), (0.82, 0.60)], c.light)
    pen.line([(0.51, 0.36), (0.51, 0.60)], c.outline)
    pen.polygon(
        [(0.02, 0.62), (0.20, 0.58), (0.84, 0.58), (0.98, 0.66), (0.98, 0.84), (0.02, 0.84)], c.body
    )
    for x in (0.25, 0.75):
        pen.ellipse(x - 0.13, 0.73, x + 0.13, 0.99, c.dark)
        pen.dot(x, 0.86, 0.05, c.light)


def _cat(pen: Pen) -> None:
    c = pen.colours
    pen.line([(0.66, 0.88), (0.90, 0.80), (0.92, 0.52)], c.outline, 4.0)
    pen.line([(0.66, 0.88), (0.90, 0.80), (0.92, 0.54)], c.shade, 2.2)
    pen.ellipse(0.24, 0.50, 0.76, 0.99, c.body)
    pen.polygon([(0.22, 0.30), (0.22, 0.02), (0.44, 0.16)], c.body)
    pen.polygon([(0.78, 0.30), (0.78, 0.02), (0.56, 0.16)], c.body)
    pen.ellipse(0.18, 0.10, 0.82, 0.62, c.body)
    for x in (0.38, 0.62):
        pen.dot(x, 0.32, 0.07, c.light)
        pen.dot(x, 0.33, 0.035, c.outline)
    pen.polygon([(0.46, 0.44), (0.54, 0.44), (0.50, 0.49)], c.dark)


def _fish(pen: Pen) -> None:
    c = pen.colours
    pen.polygon([(0.70, 0.62), (0.98, 0.38), (0.98, 0.88)], c.shade)
    pen.polygon([(0.34, 0.44), (0.52, 0.24), (0.66, 0.46)], c.shade)
    pen.ellipse(0.02, 0.38, 0.80, 0.88, c.body)
    pen.line([(0.34, 0.46), (0.40, 0.63), (0.34, 0.80)], c.outline)
    pen.dot(0.20, 0.58, 0.07, c.light)
    pen.dot(0.20, 0.58, 0.035, c.outline)


def _balloon(pen: Pen) -> None:
    c = pen.colours
    pen.line([(0.34, 0.60), (0.42, 0.84)], c.outline)
    pen.line([(0.66, 0.60), (0.58, 0.84)], c.outline)
    pen.ellipse(0.12, 0.02, 0.88, 0.72, c.body)
    pen.ellipse(0.36, 0.02, 0.64, 0.72, c.light)
    pen.box(0.38, 0.82, 0.62, 0.99, c.dark)


def _rocket(pen: Pen) -> None:
    c = pen.colours
    pen.polygon([(0.34, 0.56), (0.12, 0.92), (0.36, 0.84)], c.shade)
    pen.polygon([(0.66, 0.56), (0.88, 0.92), (0.64, 0.84)], c.shade)
    pen.polygon([(0.40, 0.84), (0.60, 0.84), (0.50, 0.99)], (250, 170, 40) if _lit(c) else c.light)
    pen.polygon([(0.32, 0.30), (0.68, 0.30), (0.68, 0.86), (0.32, 0.86)], c.light)
    pen.polygon([(0.31, 0.32), (0.50, 0.02), (0.69, 0.32)], c.body)
    pen.box(0.32, 0.62, 0.68, 0.86, c.body)
    pen.ellipse(0.40, 0.38, 0.60, 0.58, c.dark)


def _mushroom(pen: Pen) -> None:
    c = pen.colours
    pen.polygon([(0.38, 0.46), (0.62, 0.46), (0.68, 0.98), (0.32, 0.98)], c.light)
    pen.polygon([(0.04, 0.52), (0.14, 0.24), (0.50, 0.06), (0.86, 0.24), (0.96, 0.52)], c.body)
    for x, y in ((0.32, 0.32), (0.56, 0.22), (0.70, 0.38)):
        pen.dot(x, y, 0.06, c.light)


def _umbrella(pen: Pen) -> None:
    c = pen.colours
    pen.line([(0.50, 0.06), (0.50, 0.90), (0.60, 0.96), (0.68, 0.88)], c.outline, 1.8)
    pen.polygon([(0.02, 0.52), (0.18, 0.22), (0.50, 0.08), (0.82, 0.22), (0.98, 0.52)], c.body)
    pen.polygon([(0.34, 0.52), (0.50, 0.09), (0.66, 0.52)], c.shade)


def _flower(pen: Pen) -> None:
    c = pen.colours
    pen.line([(0.50, 0.50), (0.50, 0.98)], c.outline, 2.0)
    for x, y in ((0.50, 0.16), (0.72, 0.28), (0.66, 0.52), (0.34, 0.52), (0.28, 0.28)):
        pen.ellipse(x - 0.15, y - 0.15, x + 0.15, y + 0.15, c.body)
    pen.ellipse(0.39, 0.25, 0.61, 0.47, c.light)


def _bird(pen: Pen) -> None:
    c = pen.colours
    pen.line([(0.44, 0.80), (0.44, 0.98)], c.outline, 1.4)
    pen.line([(0.56, 0.80), (0.56, 0.98)], c.outline, 1.4)
    pen.polygon([(0.70, 0.52), (0.98, 0.42), (0.92, 0.66)], c.shade)
    pen.ellipse(0.22, 0.38, 0.82, 0.86, c.body)
    pen.polygon([(0.02, 0.34), (0.16, 0.26), (0.16, 0.40)], c.dark)
    pen.ellipse(0.12, 0.12, 0.50, 0.50, c.body)
    pen.polygon([(0.44, 0.54), (0.76, 0.52), (0.56, 0.74)], c.shade)
    pen.dot(0.26, 0.28, 0.05, c.light)
    pen.dot(0.26, 0.28, 0.025, c.outline)


def _lit(c: Palette) -> bool:
    return max(c.body) - min(c.body) > 20


SUBJECTS: dict[str, Callable[[Pen], None]] = {
    "house": _house,
    "boat": _boat,
    "tree": _tree,
    "car": _car,
    "cat": _cat,
    "fish": _fish,
    "balloon": _balloon,
    "rocket": _rocket,
    "mushroom": _mushroom,
    "umbrella": _umbrella,
    "flower": _flower,
    "bird": _bird,
}


@lru_cache(maxsize=8192)
def sprite(subject: str, colour: str, manner: str, size: int) -> NDArray[np.float32]:
    """One subject on nothing: float32 (size, size, 4), premultiplied RGB and alpha, in [0, 1]."""
    pen = Pen(size, palette(colour, manner))
    SUBJECTS[subject](pen)
    large = np.asarray(pen.image, dtype=np.float32) / 255.0
    large[..., :3] *= large[..., 3:]
    blocks = large.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 4)
    return blocks.mean(axis=(1, 3), dtype=np.float32)
