"""The language of the miniature world: captions, instructions in many wordings, and their parsing.

Every sentence that the grammar writes it can also read, so a writer's reply is judged exactly:
does the edited caption follow from the caption by the instruction?
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

from ip2p_ray.miniature.drawing import COLOURLESS
from ip2p_ray.miniature.scenes import WHOLE_WORLD, Edit, EditType, Scene

SETTING_PHRASES: dict[str, tuple[str, ...]] = {
    "sea": ("on the sea", "at sea"),
    "meadow": ("in a meadow", "on the grass"),
    "desert": ("in the desert", "among the dunes"),
    "snow": ("in the snow", "on a snowy plain"),
    "city": ("in the city", "on a city street"),
    "forest": ("in the forest", "in the woods"),
}
SETTING_NOUNS: dict[str, str] = {
    "sea": "the sea",
    "meadow": "a meadow",
    "desert": "the desert",
    "snow": "the snow",
    "city": "the city",
    "forest": "the forest",
}
MANNER_PREFIXES: dict[str, tuple[str, ...]] = {
    "sketch": ("a pencil sketch of ", "a pencil drawing of "),
    "black and white": ("a black and white photo of ",),
}
MANNER_SUFFIXES: dict[str, tuple[str, ...]] = {
    "night": (" at night", " under the stars"),
    "sunset": (" at sunset", " in the evening light"),
    "fog": (" in the fog", " on a foggy day"),
}
PLAIN_PREFIXES = ("", "", "", "a picture of ")

MANNER_WISHES: dict[str, tuple[str, ...]] = {
    "day": ("make it day", "make it daytime", "turn night into day", "let the sun come up"),
    "night": ("make it night", "make it night time", "turn day into night", "let night fall"),
    "sketch": (
        "make it a pencil sketch",
        "turn it into a pencil drawing",
        "draw it with a pencil",
        "as a pencil sketch",
    ),
    "sunset": ("make it sunset", "let the sun set", "put it in evening light"),
    "fog": ("make it foggy", "let fog roll in", "hide it in fog"),
    "black and white": ("make it black and white", "turn it into a black and white photo"),
}
TEMPLATES: dict[EditType, tuple[str, ...]] = {
    "swap": (
        "turn the {old} into a {new}",
        "replace the {old} with a {new}",
        "make the {old} a {new}",
        "swap the {old} for a {new}",
        "change the {old} into a {new}",
    ),
    "recolour": (
        "make the {old} {new}",
        "paint the {old} {new}",
        "turn the {old} {new}",
        "change the colour of the {old} to {new}",
        "the {old} should be {new}",
    ),
    "add": (
        "add a {new}",
        "put in a {new}",
        "add a {new} to the picture",
        "there should also be a {new}",
    ),
    "remove": (
        "remove the {old}",
        "take away the {old}",
        "erase the {old}",
        "get rid of the {old}",
    ),
}
SETTING_TEMPLATES = (
    "move it to {noun}",
    "change the background to {noun}",
    "change the place to {noun}",
    "put it {phrase}",
)


@dataclass(frozen=True)
class Described:
    """What a caption says: ((subject, colour or ""), ...), setting and manner."""

    things: tuple[tuple[str, str], ...]
    setting: str
    manner: str


def describe(scene: Scene) -> Described:
    """What a caption of the scene says."""
    return Described(*scene.described)


def _noun_phrase(subject: str, colour: str) -> str:
    words = f"{colour} {subject}" if colour else subject
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


@dataclass(frozen=True)
class Wording:
    """Which of the equivalent phrases a caption uses; an edit keeps it, as a person would."""

    plain_prefix: int
    setting: int
    manner: int


def random_wording(rng: random.Random) -> Wording:
    """One of the equivalent wordings."""
    return Wording(rng.randrange(len(PLAIN_PREFIXES)), rng.randrange(2), rng.randrange(2))


def _pick(choices: tuple[str, ...], index: int) -> str:
    return choices[index % len(choices)]


def caption(described: Described, wording: Wording) -> str:
    """The sentence for what is described, for example "a red boat on the sea at night"."""
    manner = described.manner
    if manner in MANNER_PREFIXES:
        prefix = _pick(MANNER_PREFIXES[manner], wording.manner)
    else:
        prefix = PLAIN_PREFIXES[wording.plain_prefix]
    things = " and ".join(_noun_phrase(*thing) for thing in described.things)
    setting = _pick(SETTING_PHRASES[described.setting], wording.setting)
    suffix = _pick(MANNER_SUFFIXES.get(manner, ("",)), wording.manner)
    return f"{prefix}{things} {setting}{suffix}"


def instruction(edit: Edit, wording: Wording, rng: random.Random) -> str:
    """One wording of the edit. `wording` keeps a place's phrase that of the edited caption."""
    if edit.type == "manner":
        return rng.choice(MANNER_WISHES[edit.words[0]])
    if edit.type == "setting":
        place = edit.words[0]
        return rng.choice(SETTING_TEMPLATES).format(
            noun=SETTING_NOUNS[place], phrase=_pick(SETTING_PHRASES[place], wording.setting)
        )
    template = rng.choice(TEMPLATES[edit.type])
    if edit.type == "add":
        phrase = _noun_phrase(*edit.words)
        return template.replace("a {new}", phrase)
    old = edit.words[0]
    new = edit.words[1] if len(edit.words) > 1 else ""
    return _article(template.format(old=old, new=new))


def _article(sentence: str) -> str:
    """`a` before a vowel becomes `an`."""
    return re.sub(r"\ba (?=[aeiou])", "an ", sentence)


def triplet(scene: Scene, edit: Edit, rng: random.Random) -> tuple[str, str, str]:
    """(caption, instruction, edited caption) of an edit, in wordings drawn from `rng`."""
    wording = random_wording(rng)
    return (
        caption(describe(scene), wording),
        instruction(edit, wording, rng),
        caption(describe(edit.edited), wording),
    )


def _alternatives(phrases: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {phrase.strip(): meaning for meaning, all_ in phrases.items() for phrase in all_}


_SETTING_OF = _alternatives(SETTING_PHRASES)
_SUFFIX_OF = _alternatives(MANNER_SUFFIXES)
_PREFIX_OF = _alternatives(MANNER_PREFIXES)
_WISH_OF = _alternatives(MANNER_WISHES)
_NOUN_OF = {noun: place for place, noun in SETTING_NOUNS.items()}


def _any_of(words: dict[str, str] | tuple[str, ...]) -> str:
    return "|".join(sorted((re.escape(w) for w in words), key=len, reverse=True))


_SUBJECT = f"(?:{_any_of(WHOLE_WORLD.subjects)})"
_COLOUR = f"(?:{_any_of(WHOLE_WORLD.colours)})"
_THING = re.compile(f"an? (?:({_COLOUR}) )?({_SUBJECT})")
_CAPTION = re.compile(
    f"(?:(?P<style>{_any_of(_PREFIX_OF)}) |a picture of )?"
    f"(?P<first>an? (?:{_COLOUR} )?{_SUBJECT})(?: and (?P<second>an? (?:{_COLOUR} )?{_SUBJECT}))?"
    f" (?P<setting>{_any_of(_SETTING_OF)})(?: (?P<suffix>{_any_of(_SUFFIX_OF)}))?"
)


def parse_caption(text: str) -> Described | None:
    """What a caption of this grammar says, or None when it is not one."""
    match = _CAPTION.fullmatch(text.strip())
    if match is None or (match["style"] and match["suffix"]):
        return None
    manner = "day"
    if match["style"]:
        manner = _PREFIX_OF[match["style"]]
    elif match["suffix"]:
        manner = _SUFFIX_OF[match["suffix"]]
    things = []
    for part in (match["first"], match["second"]):
        if part:
            found = _THING.fullmatch(part)
            assert found is not None
            things.append((found[2], found[1] or ""))
    subjects = {subject for subject, _ in things}
    colourless = manner in COLOURLESS
    if len(subjects) < len(things) or any(bool(colour) == colourless for _, colour in things):
        return None
    return Described(tuple(things), _SETTING_OF[match["setting"]], manner)


def _compile(template: str, kind: EditType) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}").replace(r"\ ", " ")
    pattern = pattern.replace("a {new}", "an? {new}")
    new = {"swap": _SUBJECT, "recolour": _COLOUR, "add": f"(?:{_COLOUR} )?{_SUBJECT}"}.get(kind, "")
    pattern = pattern.replace("{old}", f"(?P<old>{_SUBJECT})")
    return re.compile(pattern.replace("{new}", f"(?P<new>{new})"))


_PATTERNS = [(kind, _compile(t, kind)) for kind, templates in TEMPLATES.items() for t in templates]
_NOUN = f"(?P<noun>{_any_of(_NOUN_OF)})"
_PHRASE = f"(?P<phrase>{_any_of(_SETTING_OF)})"
_SETTING_PATTERNS = [re.compile(t.format(noun=_NOUN, phrase=_PHRASE)) for t in SETTING_TEMPLATES]


def apply_instruction(described: Described, text: str) -> Described | None:
    """What the caption must say after the instruction, or None when it asks no possible edit."""
    text = text.strip()
    if text in _WISH_OF:
        return _with_manner(described, _WISH_OF[text])
    for pattern in _SETTING_PATTERNS:
        if match := pattern.fullmatch(text):
            found = match.groupdict()
            noun = found.get("noun")
            place = _NOUN_OF[noun] if noun else _SETTING_OF[found["phrase"]]
            return None if place == described.setting else replace(described, setting=place)
    for kind, pattern in _PATTERNS:
        if match := pattern.fullmatch(text):
            groups = match.groupdict()
            return _with_things(described, kind, groups.get("old") or "", groups.get("new") or "")
    return None


def _with_manner(described: Described, manner: str) -> Described | None:
    if manner == described.manner or described.manner in COLOURLESS:
        return None
    if manner in COLOURLESS:
        described = replace(described, things=tuple((s, "") for s, _ in described.things))
    return replace(described, manner=manner)


def _with_things(described: Described, kind: EditType, old: str, new: str) -> Described | None:
    things = list(described.things)
    subjects = [subject for subject, _ in things]
    if kind == "add":
        colour, _, subject = new.rpartition(" ")
        colourless = described.manner in COLOURLESS
        if len(things) == 2 or subject in subjects or bool(colour) == colourless:
            return None
        return replace(described, things=(*things, (subject, colour)))
    if old not in subjects:
        return None
    place = subjects.index(old)
    if kind == "remove":
        return replace(described, things=(things[0],)) if place == 1 else None
    if kind == "swap":
        if new in subjects:
            return None
        things[place] = (new, things[place][1])
    else:
        if things[place][1] in ("", new):
            return None
        things[place] = (old, new)
    return replace(described, things=tuple(things))


def is_true_edit(caption_: str, instruction_: str, edited_caption: str) -> bool:
    """Whether the three parse and the edited caption says just what the instruction asks."""
    before, after = parse_caption(caption_), parse_caption(edited_caption)
    return (
        before is not None
        and after is not None
        and apply_instruction(before, instruction_) == after
    )
