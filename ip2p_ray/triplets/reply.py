"""A model's reply becomes a triplet, or the reason why it cannot.

Source: the reference's generate_txt_dataset.py accepts two parts around the delimiter whose second
differs from the caption. Stripping, and the rules on empty, unfinished, many-lined, parroted and
too long parts are ours. Moderation is the writer's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ip2p_ray.schema import triplet_key
from ip2p_ray.triplets.prompt import INSTRUCTION_END, STOP

UNFINISHED = "unfinished"
NOT_TWO_PARTS = "not_two_parts"
EMPTY_INSTRUCTION = "empty_instruction"
EMPTY_EDITED_CAPTION = "empty_edited_caption"
NOT_PLAIN_TEXT = "not_plain_text"
UNCHANGED_CAPTION = "unchanged_caption"
INSTRUCTION_IS_CAPTION = "instruction_is_caption"
TOO_MANY_TOKENS = "too_many_tokens"

REASONS = (
    UNFINISHED,
    NOT_TWO_PARTS,
    EMPTY_INSTRUCTION,
    EMPTY_EDITED_CAPTION,
    NOT_PLAIN_TEXT,
    UNCHANGED_CAPTION,
    INSTRUCTION_IS_CAPTION,
    TOO_MANY_TOKENS,
)
"""Every reason, in the order in which they are looked for."""


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
    parts = [part.strip() for part in text.split(INSTRUCTION_END)]
    if len(parts) != 2:
        return NOT_TWO_PARTS
    instruction, edited_caption = parts
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
    if fits is not None and not all(map(fits, (caption, instruction, edited_caption))):
        return TOO_MANY_TOKENS
    return Triplet(caption, instruction, edited_caption)


def normal(text: str) -> str:
    """The text as the reference compares it: without case and full stops at its ends."""
    return text.strip().strip(".!?").lower()
