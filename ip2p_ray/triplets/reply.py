"""A model's reply becomes a triplet, or the reason why it cannot.

Source: the reference's generate_txt_dataset.py accepts two parts around the delimiter whose second
differs from the caption. Stripping, the rules on empty, unfinished, many-lined, parroted and too
long parts, and replies in JSON are ours. After a flag it asks again; here that is a reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from ip2p_ray.schema import triplet_key
from ip2p_ray.triplets.limits import Usage
from ip2p_ray.triplets.prompt import INSTRUCTION_END, REPLY_SCHEMA, STOP

NO_REPLY = "no_reply"
FLAGGED = "flagged"
REFUSED = "refused"
EMPTY_REPLY = "empty_reply"
UNPARSEABLE = "unparseable"
UNFINISHED = "unfinished"
NOT_TWO_PARTS = "not_two_parts"
EMPTY_INSTRUCTION = "empty_instruction"
EMPTY_EDITED_CAPTION = "empty_edited_caption"
NOT_PLAIN_TEXT = "not_plain_text"
UNCHANGED_CAPTION = "unchanged_caption"
INSTRUCTION_IS_CAPTION = "instruction_is_caption"
TOO_MANY_TOKENS = "too_many_tokens"
DUPLICATE = "duplicate_triplet"
"""Not of one reply: its caption and instruction are those of another row of the dataset."""

REASONS = (
    NO_REPLY,
    FLAGGED,
    REFUSED,
    EMPTY_REPLY,
    UNFINISHED,
    UNPARSEABLE,
    NOT_TWO_PARTS,
    EMPTY_INSTRUCTION,
    EMPTY_EDITED_CAPTION,
    NOT_PLAIN_TEXT,
    UNCHANGED_CAPTION,
    INSTRUCTION_IS_CAPTION,
    TOO_MANY_TOKENS,
)
"""Every reason of a reply by itself, in the order in which they are looked for.

NO_REPLY is a stage's: `ReplyError`.
"""

_MANY_WORDS = 4  # an instruction may well name a thing that a shorter caption is
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_REFUSAL = re.compile(
    r"\A\W*(i['\u2019]?m sorry|i am sorry|sorry|i can['\u2019]?t|i cannot|i can not|"
    r"i['\u2019]?m (not able|unable)|i am (not able|unable)|i won['\u2019]?t|as an ai)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Triplet:
    """A caption, the instruction to change it, and what it then says."""

    caption: str
    instruction: str
    edited_caption: str

    @property
    def key(self) -> str:
        """`schema.triplet_key` of the three texts."""
        return triplet_key(self.caption, self.instruction, self.edited_caption)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model answered to one caption."""

    text: str
    """As it was written; in the text form with STOP at its end if it is finished."""
    finish_reason: str
    """The server's word: "stop", "length" if cut off, "content_filter"; or "refusal"."""
    model: str
    """The name under which it answered."""
    prompt_tokens: int
    """That it read, as the server counts; estimated where it does not."""
    completion_tokens: int
    """That it wrote, likewise."""
    attempts: int = 1
    """Requests that were sent, the answered one included."""
    flagged: bool | None = None
    """What moderation said of caption and reply; None if it was not asked."""

    @property
    def usage(self) -> Usage:
        """The tokens."""
        return Usage(self.prompt_tokens, self.completion_tokens)


def read_reply(
    caption: str, reply: Reply, *, fits: Callable[[str], bool] | None = None
) -> Triplet | str:
    """The triplet of a reply in JSON, in fenced JSON or in the text form, or one of REASONS.

    `fits` is as in `parse_reply`.
    """
    if reply.flagged or reply.finish_reason == "content_filter":
        return FLAGGED
    if reply.finish_reason == "refusal":
        return REFUSED
    text = _THOUGHTS.sub("", reply.text).strip()
    if not text:
        return EMPTY_REPLY
    parts = _json_parts(text)
    if (
        parts is None
        and INSTRUCTION_END in text
        and (STOP in text or reply.finish_reason == "stop")
    ):
        parts = _delimited_parts(text.partition(STOP)[0])
    if parts is not None:
        return _triplet(caption, parts, fits)
    if reply.finish_reason == "length":
        return UNFINISHED
    return REFUSED if _REFUSAL.match(text) else UNPARSEABLE


def parse_reply(
    caption: str, reply: str, *, fits: Callable[[str], bool] | None = None
) -> Triplet | str:
    """The triplet of a reply to a caption, or one of REASONS.

    A writer leaves STOP at the end of a finished reply; whatever follows it is ignored. `fits` says
    whether an encoder reads a whole text (`Clip.fits`); without it no text is too long.
    """
    text, stop, _ = reply.partition(STOP)
    if not stop:
        return UNFINISHED
    return _triplet(caption, _delimited_parts(text), fits)


def _delimited_parts(text: str) -> list[str]:
    return text.split(INSTRUCTION_END)


def _json_parts(text: str) -> list[str] | None:
    """Instruction and edited caption of the first JSON object in the text that has both."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            found, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            parts = [found.get(name) for name in REPLY_SCHEMA["required"]]
            texts = [part for part in parts if isinstance(part, str)]
            if len(texts) == len(parts):
                return texts
        start = text.find("{", start + 1)
    return None


def _triplet(caption: str, parts: list[str], fits: Callable[[str], bool] | None) -> Triplet | str:
    """The triplet of instruction and edited caption, or what is wrong with them."""
    if len(parts) != 2:
        return NOT_TWO_PARTS
    instruction, edited_caption = (part.strip() for part in parts)
    if not instruction:
        return EMPTY_INSTRUCTION
    if not edited_caption:
        return EMPTY_EDITED_CAPTION
    if not (instruction + edited_caption).isprintable():
        return NOT_PLAIN_TEXT
    if normal(edited_caption) == normal(caption):
        return UNCHANGED_CAPTION
    if normal(instruction) in (normal(caption), normal(edited_caption)):
        return INSTRUCTION_IS_CAPTION
    if len(caption.split()) >= _MANY_WORDS and normal(caption) in normal(instruction):
        return INSTRUCTION_IS_CAPTION
    if fits is not None and not all(map(fits, (caption, instruction, edited_caption))):
        return TOO_MANY_TOKENS
    return Triplet(caption, instruction, edited_caption)


def encodable(text: str) -> str:
    """The text with a question mark for each lone surrogate, which no table or request can hold."""
    return text.encode("utf-8", "replace").decode()


def normal(text: str) -> str:
    """The text as the reference compares it, without case and full stops at its ends.

    That the spaces between its words do not matter either is ours.
    """
    return " ".join(text.split()).strip(".!?").strip().lower()
