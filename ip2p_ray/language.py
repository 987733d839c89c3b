"""Whether a short text is English, by its script and its little words.

No model and no dictionary, so it says only what these two can: a text in another script is not
English, nor one in which the little words of other languages (German, French, Spanish, Italian,
Portuguese, Dutch) are common and outnumber the English ones. Titles without any little word, such
as "Vintage Ledersofa Braun", pass as English whatever they are, and an English caption of foreign
names, such as "Plaza de la Constitucion", may not pass.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

MIN_LATIN = 0.9
"""Share of the letters that are Latin in an English text; names may bring a few others."""

MIN_FOREIGN = 0.2
"""Share of the words, and at least two of them, from which foreign little words count."""

_ENGLISH = (
    "a an and are as at be behind beside between by for from has he her his in into is it its near "
    "next of off on onto or out over she some that the their them these they this through to under "
    "up was were which while who with without you your"
)
# None of them is an English word, nor common in English names of one word.
_FOREIGN = (
    "aan auf aus avec bei con cui da dal das de degli dei del della delle der des di dos du een "
    "ein eine einem einen einer el en es est et gli het il ist je la las le les los lo mit nach "
    "nel nella nicht och oder om ou para por que quelle sich sie sono sul sur te um uma und une "
    "uno una voor vom von vor y zu zum zur"
)
_ENGLISH_WORDS, _FOREIGN_WORDS = frozenset(_ENGLISH.split()), frozenset(_FOREIGN.split())
_WORD = re.compile(r"[^\W\d_]+")


def is_english(text: str) -> bool:
    """Whether nothing speaks against the text being English."""
    letters = [character for character in text if character.isalpha()]
    if sum(map(_is_latin, letters)) < MIN_LATIN * len(letters):
        return False
    words = [word.lower() for word in _WORD.findall(text)]
    english = sum(word in _ENGLISH_WORDS for word in words)
    foreign = sum(word in _FOREIGN_WORDS for word in words)
    return foreign <= max(english, 1) or foreign < MIN_FOREIGN * len(words)


@lru_cache(maxsize=4096)
def _is_latin(letter: str) -> bool:
    return letter.isascii() or unicodedata.name(letter, "").startswith("LATIN")
