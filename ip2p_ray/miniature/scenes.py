"""The miniature world: scenes, their pictures, and every edit that can be asked of a scene.

A scene says what is drawn (one or two things, a setting, a manner) and how it is laid out. Its
caption tells the first and not the second, as captions of photographs do. An edit changes what is
drawn and keeps the layout, so the true edited picture is known exactly.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ip2p_ray.miniature.backdrops import VARIANTS, backdrop
from ip2p_ray.miniature.drawing import COLOURLESS, SIZE, sprite

EditType = Literal["swap", "recolour", "setting", "manner", "add", "remove"]
EDIT_TYPES: tuple[EditType, ...] = ("swap", "recolour", "setting", "manner", "add", "remove")


@dataclass(frozen=True, kw_only=True)
class World:
    """The words in use; drawing knows more than a trained world has to learn."""

    subjects: tuple[str, ...]
    colours: tuple[str, ...]
    settings: tuple[str, ...]
    manners: tuple[str, ...]
    two_things: float = 0.35
    """Share of scenes with two things, in [0, 1]."""


WORLD = World(
    subjects=("house", "boat", "tree", "car", "cat", "fish", "balloon", "rocket"),
    colours=("red", "yellow", "green", "blue", "purple", "white"),
    settings=("sea", "meadow", "desert", "snow"),
    manners=("day", "night", "sketch"),
)
"""The world of the shipped weights."""

WHOLE_WORLD = World(
    subjects=(*WORLD.subjects, "mushroom", "umbrella", "flower", "bird"),
    colours=(*WORLD.colours, "orange", "pink"),
    settings=(*WORLD.settings, "city", "forest"),
    manners=(*WORLD.manners, "sunset", "fog", "black and white"),
)
"""Everything that the drawing code knows."""


@dataclass(frozen=True)
class Thing:
    """One subject in one colour."""

    subject: str
    colour: str


LEFT = (16, 17, 18, 19, 20)
RIGHT = (44, 45, 46, 47, 48)
BASELINES = (50, 51, 52, 53, 54, 55, 56)
SIZES = (24, 26, 28, 30)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where things stand, in pixels; no caption mentions it."""

    left: int
    right: int
    """Centres of the two places; see LEFT and RIGHT."""
    baseline: int
    size: int
    first_left: bool
    """Whether the first thing stands on the left; a second one takes the other place."""
    backdrop: int


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is drawn and where. `things` holds one or two of different subjects."""

    things: tuple[Thing, ...]
    setting: str
    manner: str
    layout: Layout

    @property
    def colourless(self) -> bool:
        """Whether the manner hides the colours of things."""
        return self.manner in COLOURLESS

    @property
    def described(self) -> tuple[tuple[tuple[str, str], ...], str, str]:
        """All that a caption tells: ((subject, colour or ""), ...), setting, manner."""
        things = tuple((t.subject, "" if self.colourless else t.colour) for t in self.things)
        return things, self.setting, self.manner


def draw(scene: Scene) -> NDArray[np.uint8]:
    """The picture of a scene: uint8 (64, 64, 3)."""
    layout = scene.layout
    picture = backdrop(scene.setting, scene.manner, layout.backdrop).copy()
    places = (layout.left, layout.right) if layout.first_left else (layout.right, layout.left)
    for thing, centre in zip(scene.things, places, strict=False):
        part = sprite(thing.subject, thing.colour, scene.manner, layout.size)
        top, start = layout.baseline - layout.size, centre - layout.size // 2
        x0, x1 = max(start, 0), min(start + layout.size, SIZE)
        part = part[:, x0 - start : x1 - start]
        region = picture[top : layout.baseline, x0:x1]
        region *= 1.0 - part[..., 3:]
        region += part[..., :3]
    return np.rint(picture * 255.0).clip(0, 255).astype(np.uint8)


def random_layout(rng: random.Random) -> Layout:
    """Any layout."""
    return Layout(
        left=rng.choice(LEFT),
        right=rng.choice(RIGHT),
        baseline=rng.choice(BASELINES),
        size=rng.choice(SIZES),
        first_left=rng.random() < 0.5,
        backdrop=rng.randrange(VARIANTS),
    )


def random_scene(rng: random.Random, world: World = WORLD, *, held_out: bool = False) -> Scene:
    """A scene with (`held_out`) or without any held-out combination of thing and setting."""
    while True:
        count = 2 if rng.random() < world.two_things else 1
        subjects = rng.sample(world.subjects, count)
        scene = Scene(
            things=tuple(Thing(subject, rng.choice(world.colours)) for subject in subjects),
            setting=rng.choice(world.settings),
            manner=_random_manner(rng, world),
            layout=random_layout(rng),
        )
        if is_held_out(scene) == held_out:
            return scene


def _random_manner(rng: random.Random, world: World) -> str:
    """`day` as often as all other manners together: most pictures have no special manner."""
    if rng.random() < 0.5:
        return world.manners[0]
    return rng.choice(world.manners[1:])


def is_held_out(scene: Scene) -> bool:
    """Whether the scene shows a combination of subject, colour and setting kept from training.

    One combination in twelve, spread evenly over subjects, colours and settings. A colourless
    scene never shows one: its colours cannot be seen.
    """
    if scene.colourless:
        return False
    return any(_combination_held_out(t, scene.setting) for t in scene.things)


def _combination_held_out(thing: Thing, setting: str) -> bool:
    words = WHOLE_WORLD
    s = words.subjects.index(thing.subject)
    c = words.colours.index(thing.colour)
    p = words.settings.index(setting)
    return (5 * s + 7 * c + 3 * p) % 12 == 1


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change of a scene; `words` are what an instruction must name."""

    type: EditType
    words: tuple[str, ...]
    edited: Scene


def edits(scene: Scene, world: World = WORLD) -> Iterator[Edit]:
    """Every edit that the world allows of the scene, in a fixed order.

    Colours come back from no colourless picture, so such a scene cannot be recoloured or change
    its manner, and what is added to it has no colour to name.
    """
    present = {t.subject for t in scene.things}
    for place, thing in enumerate(scene.things):
        for subject in world.subjects:
            if subject not in present:
                swapped = _with_thing(scene, place, Thing(subject, thing.colour))
                yield Edit(type="swap", words=(thing.subject, subject), edited=swapped)
        if not scene.colourless:
            for colour in world.colours:
                if colour != thing.colour:
                    painted = _with_thing(scene, place, Thing(thing.subject, colour))
                    yield Edit(type="recolour", words=(thing.subject, colour), edited=painted)
    for setting in world.settings:
        if setting != scene.setting:
            yield Edit(type="setting", words=(setting,), edited=replace(scene, setting=setting))
    if not scene.colourless:
        for manner in world.manners:
            if manner != scene.manner:
                yield Edit(type="manner", words=(manner,), edited=replace(scene, manner=manner))
    if len(scene.things) == 1:
        colours = world.colours[:1] if scene.colourless else world.colours
        for subject in world.subjects:
            for colour in colours:
                if subject not in present:
                    both = replace(scene, things=(*scene.things, Thing(subject, colour)))
                    named = "" if scene.colourless else colour
                    yield Edit(type="add", words=(subject, named), edited=both)
    else:
        # Only the second thing can go: the one that stays keeps its place in the layout.
        kept = replace(scene, things=scene.things[:1])
        yield Edit(type="remove", words=(scene.things[1].subject,), edited=kept)


def _with_thing(scene: Scene, place: int, thing: Thing) -> Scene:
    things = list(scene.things)
    things[place] = thing
    return replace(scene, things=tuple(things))


def random_edit(scene: Scene, rng: random.Random, world: World = WORLD) -> Edit:
    """One edit of the scene: first its type, evenly, then one of that type, evenly."""
    by_type: dict[str, list[Edit]] = {}
    for edit in edits(scene, world):
        by_type.setdefault(edit.type, []).append(edit)
    return rng.choice(by_type[rng.choice(sorted(by_type))])
