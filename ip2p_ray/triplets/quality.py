"""What a set of triplets is like: verbs, kinds of edit, lengths, and some to read.

A kind is guessed from the words of the instruction, by lists that are ours; the tests say how often
the guess is that of the hand-written examples. It is for looking at, no triplet is dropped for it.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ip2p_ray.schema import stream_seed
from ip2p_ray.triplets.reply import Triplet

SHOWN = 50
"""Triplets that are drawn for reading."""

OTHER = "other"
"""The kind of an instruction that none of the lists knows."""

_POLITE = re.compile(
    r"\A\W*((please|kindly|now|just|can you|could you|would you|let['\u2019]s|let us|i want you to)"
    r"\W+)*",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")

_COLOURS = (
    "red|orange|yellow|green|blue|purple|violet|pink|brown|black|white|gray|grey|gold|silver|teal|"
    "turquoise|crimson|scarlet|lavender|beige|navy|maroon|magenta|cyan|blond|blonde|lilac|mint|"
    "colou?rs?|colou?rful|pastel"
)
_CLOTHES = (
    "wear|wears|wearing|dress|dressed|hat|cap|coat|jacket|suit|tuxedo|uniform|boots|shoes|sneakers|"
    "scarf|gown|robe|kimono|sunglasses|glasses|costume|armou?r|shirt|t-shirt|sweater|jumper|jeans|"
    "skirt|helmet|cape|clothes|outfit|apron|raincoat|bow tie|tie|crown|hoodie|pajamas|pyjamas"
)
_MATERIALS = (
    r"made of|made out of|made from|out of (wood|glass|gold|ice|stone|paper|metal|marble)|wooden|"
    "wood|bronze|marble|glass|crystal|stone|granite|porcelain|ceramic|velvet|leather|concrete|brick|"
    "copper|steel|metal|chrome|lego|wool|yarn|felt|clay|wicker|bamboo|jade|ice|chocolate|gingerbread|"
    "denim|silk|rust|rusty|cardboard|origami|paper|plastic|knitted|terracotta|obsidian|straw"
)
_KINDS: tuple[tuple[str, str], ...] = (
    (
        "removal",
        r"\A(remove|delete|erase|take (away|out|off|down)|get rid|lose|clear|without|no)\b",
    ),
    (
        "expression",
        r"\b(smil\w*|laugh\w*|cry|crying|cries|frown\w*|angry|sad|happy|happier|surprised|scared|"
        r"afraid|bored|grin\w*|scowl\w*|yawn\w*|wink\w*|sleepy|asleep|eyes|worried|proud|expression|"
        r"shocked|furious|grumpy|tears|excited|serious|astonished|amused|annoyed|delighted|shy|"
        r"disgusted|embarrassed|snarl\w*|pout\w*|confused|tired|terrified|sulk\w*|cheerful|nervous)\b",
    ),
    (
        "medium",
        r"\b(watercolou?r|oil paint\w*|acrylic|charcoal|pencil|sketch|drawing|etching|engraving|"
        r"woodcut|linocut|lithograph|mosaic|fresco|tapestry|embroider\w*|quilt|sculpture|statue|"
        r"photograph|photo|polaroid|daguerreotype|crayon|chalk|pastels|ink|mural|graffiti|collage|"
        r"papercut|claymation|3d render|screen ?print|blueprint|cross-stitch|carving|gouache|"
        r"risograph|cyanotype|woodblock|stamp|figurine|puppet|diorama|relief|needlepoint|doodle|"
        r"pen and wash|hologram|sand art|scratchboard|batik|silhouette)\b",
    ),
    (
        "style",
        r"\b(style|impressionis\w*|cubis\w*|surreal\w*|art deco|art nouveau|pop art|anime|manga|"
        r"cartoon|comic|pixel art|noir|van gogh|monet|picasso|dali|ukiyo-e|renaissance|baroque|"
        r"gothic|minimalis\w*|vaporwave|steampunk|cyberpunk|poster|painting|paint it|illustration|"
        r"painted|stained glass|expressionis\w*|pointillis\w*|bauhaus|still life|pixar|disney|"
        r"aesthetic|rustic|abstract|psychedelic|look like a|in the manner of|as if by)\b",
    ),
    (
        "season",
        r"\b(winter|spring|summer|autumn|fall|autumnal|wintry|blossoms?|season)\b",
    ),
    (
        "time_of_day",
        r"\b(night|nighttime|midnight|noon|midday|dawn|dusk|sunset|sunrise|morning|evening|twilight|"
        r"moonlight|moonlit|golden hour|daytime|daylight|after dark|blue hour|starlit|sundown)\b",
    ),
    (
        "weather",
        r"\b(rain|raining|rainy|snow|snowing|snowy|fog|foggy|mist|misty|storm|stormy|thunder\w*|"
        r"lightning|wind|windy|cloudy|clouds|overcast|sunny|hail|blizzard|rainbow|tornado|drizzle|"
        r"frost|weather|haze|hazy|downpour|sandstorm|gale|sleet|sun)\b",
    ),
    (
        "era",
        r"\b((\d{2,4}|twenties|thirties|forties|fifties|sixties|seventies|eighties|nineties)s?|"
        r"century|medieval|middle ages|victorian|ancient|roman|stone age|futur\w*|prehistoric|"
        r"colonial|retro|old-fashioned|edwardian|egypt|wild west|bronze age|ice age|regency|era|"
        r"jazz age|antique|tudor)\b",
    ),
    ("clothing", rf"\b({_CLOTHES})\b"),
    (
        "place",
        r"\b(move|moved|take (it|them|her|him)|set (it|this|the scene)|"
        r"(put|set|place|have) (it|them) (in|on|at)|in (the )?(desert|city|forest|mountains|space|"
        r"tokyo|paris|venice|new york|london)|on (the )?(moon|mars|beach)|underwater|background|"
        r"location|to (a|an|the) (beach|desert|city|forest|mountain|moon|library|castle)|"
        r"relocate\w*|somewhere|sea|jungle)\b",
    ),
    ("addition", r"\A(add|put|place|insert|include|hang|give|plant|set|draw|scatter|light|let)\b"),
    ("colour", rf"\b({_COLOURS})\b"),
    ("material", rf"\b({_MATERIALS})\b"),
    (
        "subject_swap",
        r"\b(swap|replace|exchange|instead of|turn|change|make|trade|switch|substitute|become\w*|"
        r"transform|into)\b",
    ),
)
_RULES = tuple((kind, re.compile(rule, re.IGNORECASE)) for kind, rule in _KINDS)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What a set of triplets is like."""

    triplets: int
    verbs: Mapping[str, int]
    """Count by first word of the instruction, most frequent first."""
    kinds: Mapping[str, int]
    """Count by `kind_of` the instruction, most frequent first."""
    lengths: Mapping[str, Mapping[int, int]]
    """For each of the three texts, how many have so many words; shortest first."""
    instructions: int
    """Different instructions, but for capitals."""
    shown: Sequence[Triplet]
    """SHOWN of them, drawn by their keys."""


class Tally:
    """Triplets told one after the other; in memory are counts and those to be shown."""

    def __init__(self, shown: int = SHOWN) -> None:
        self._most = shown
        self._count = 0
        self._verbs, self._kinds = Counter[str](), Counter[str]()
        self._lengths: dict[str, Counter[int]] = {
            name: Counter() for name in Triplet.__dataclass_fields__
        }
        self._instructions: set[int] = set()
        self._shown: list[tuple[int, str, Triplet]] = []

    def add(self, triplet: Triplet) -> None:
        """One more."""
        self._count += 1
        self._verbs[verb_of(triplet.instruction)] += 1
        self._kinds[kind_of(triplet.instruction)] += 1
        for name, counts in self._lengths.items():
            counts[len(getattr(triplet, name).split())] += 1
        self._instructions.add(stream_seed("instruction", triplet.instruction.casefold()))
        entry = (-stream_seed("shown", triplet.key), triplet.key, triplet)
        if len(self._shown) < self._most:
            heapq.heappush(self._shown, entry)
        elif self._shown:
            heapq.heappushpop(self._shown, entry)

    def quality(self) -> Quality:
        """Of all so far."""
        return Quality(
            triplets=self._count,
            verbs=dict(self._verbs.most_common()),
            kinds=dict(self._kinds.most_common()),
            lengths={name: dict(sorted(counts.items())) for name, counts in self._lengths.items()},
            instructions=len(self._instructions),
            shown=[triplet for _, _, triplet in sorted(self._shown, reverse=True)],
        )


def verb_of(instruction: str) -> str:
    """The first word that is no courtesy, in small letters; "" where there is none."""
    found = _WORD.search(_POLITE.sub("", instruction))
    return found.group().lower() if found else ""


def kind_of(instruction: str) -> str:
    """One of `examples.KINDS` but "mix", or OTHER: the first whose words are in it."""
    text = _POLITE.sub("", instruction)
    return next((kind for kind, rule in _RULES if rule.search(text)), OTHER)
