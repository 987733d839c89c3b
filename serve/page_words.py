"""What the page says: advice, examples, and what an error means to whoever sees it."""

import html
import random

import numpy as np
from numpy.typing import NDArray

from ip2p_ray.errors import AccessError, EditError, ImageError, ServiceError
from ip2p_ray.miniature.grammar import (
    Wording,
    caption,
    describe,
    instruction,
    random_wording,
)
from ip2p_ray.miniature.scenes import (
    EDIT_TYPES,
    EditType,
    Layout,
    Scene,
    Thing,
    draw,
    edits,
)

IDLE = """<div class="told idle"><p><b>The edited picture appears here.</b></p>
<p>Choose a picture, say what should change, press Enter.</p></div>"""

ADVICE = """\
- **Too little changes?** Lower *Keep the picture*, or raise *Follow the sentence*.
- **Too much changes?** Raise *Keep the picture*, or lower *Follow the sentence*.
- **Not quite right?** Another seed gives another result; try a few.
- **Not understood?** Put it in other words: "turn the dog into a cat", "make it a cat", "as a cat".
- **A small face or detail gets lost?** Cut the picture so that it fills more of the frame.
- **More steps** take longer and sometimes look better.
"""
"""After the tips of the reference's README."""

DRAWN_ONLY = (
    "The small editor that is shipped knows one drawn world: houses, boats, trees, cars, cats, "
    "fish, balloons and rockets, at sea, in a meadow, in the desert or in the snow. "
    "Other pictures come back as it understands them."
)

INSTRUCTIONS = (
    "make it night",
    "put it in the snow",
    "make it a pencil sketch",
    "add a yellow balloon",
    "move it to the desert",
)
"""To click, for a picture of one's own."""

_LAYOUTS = (
    Layout(left=18, right=46, baseline=53, size=30, first_left=True, backdrop=1),
    Layout(left=18, right=46, baseline=53, size=30, first_left=False, backdrop=2),
    Layout(left=20, right=44, baseline=55, size=28, first_left=True, backdrop=3),
)


def _scene(things: str, setting: str, manner: str, layout: int) -> Scene:
    named = tuple(Thing(*reversed(words.split())) for words in things.split(", "))
    return Scene(things=named, setting=setting, manner=manner, layout=_LAYOUTS[layout])


SCENES = (
    _scene("red boat", "sea", "day", 0),
    _scene("white house, green tree", "meadow", "day", 0),
    _scene("purple cat", "snow", "day", 1),
    _scene("blue car", "desert", "day", 0),
    _scene("yellow rocket", "desert", "night", 1),
    _scene("red balloon, white cat", "meadow", "day", 2),
    _scene("green fish", "sea", "day", 1),
    _scene("red house", "snow", "night", 2),
)
"""Pictures of the drawn world to begin with."""


def drawn(scene: Scene) -> tuple[str, NDArray[np.uint8]]:
    """Its caption, and the picture: uint8 (64, 64, 3)."""
    return caption(describe(scene), Wording(0, 0, 0)), draw(scene)


def suggestions(scene: Scene, count: int = 5) -> list[str]:
    """Instructions that fit the scene, each of another kind."""
    rng = random.Random(str(scene))
    by_kind = {kind: [edit for edit in edits(scene) if edit.type == kind] for kind in EDIT_TYPES}
    order: tuple[EditType, ...] = ("manner", "swap", "recolour", "setting", "add")
    kinds = [kind for kind in order if by_kind[kind]]
    chosen = [rng.choice(by_kind[kind]) for kind in kinds[:count]]
    return [instruction(edit, random_wording(rng), rng) for edit in chosen]


def told(title: str, text: str = "") -> str:
    """What stands in the place of the picture when there is none to show."""
    more = f"<p>{html.escape(text)}</p>" if text else ""
    return f'<div class="told error" role="alert"><p><b>{html.escape(title)}</b></p>{more}</div>'


def told_error(error: Exception) -> str:
    """The error in the words of somebody who edits pictures."""
    said = str(error)
    if isinstance(error, AccessError):
        wants = "without a key" in said
        title = "The editor wants a key." if wants else "The key is not the right one."
        return told(title, "Type it into the field Key, then press Edit again.")
    if isinstance(error, ServiceError) and "no place now" in said:
        seconds = max(round(error.retry_after_s or 1.0), 1)
        return told(
            "The editor is busy.",
            f"Its queue is full at the moment. Try again in {seconds} s; your picture and sentence "
            "stay as they are.",
        )
    if isinstance(error, ServiceError):
        return told(
            "The editor does not answer.",
            "It may be starting, or somebody stopped it. Try again in a moment.",
        )
    if isinstance(error, ImageError):
        return told("This picture cannot be used.", said)
    if isinstance(error, EditError):
        return told(
            "The edit could not be finished.", "Something went wrong at the editor. Try again."
        )
    return told("The editor refuses this.", said)


def working(step: int, steps: int, picture: str | None) -> str:
    """Progress, with a `picture` on its way as a data address."""
    share = 100 * step / steps if steps else 0
    words = f"Step {step} of {steps}" if steps else "Waiting for the editor"
    shown = f'<img class="preview" src="{picture}" alt="preview">' if picture else ""
    return (
        f'<div class="working" role="status">{shown}<div class="bar" role="progressbar" '
        f'aria-valuenow="{share:.0f}" aria-valuemin="0" aria-valuemax="100" aria-label="progress">'
        f'<span style="width: {share:.0f}%"></span></div><p>{words}</p></div>'
    )
