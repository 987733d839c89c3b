r"""The text form of a triplet for a language model: what it reads and what it has to write.

    caption \n##\n instruction \n%%\n edited caption \nEND

Source: paper appendix A.1 and the reference's prepare_for_gpt.py and generate_txt_dataset.py. Its
frequency penalty of 0.1 is left out: local models are sampled without one.
"""

from __future__ import annotations

CAPTION_END = "\n##\n"
"""Between the caption and what the model writes."""

INSTRUCTION_END = "\n%%\n"
"""Between the instruction and the edited caption."""

STOP = "\nEND"
"""Ends a whole reply. A reply without it was cut off."""

TEMPERATURE = 0.7
"""The paper's; top_p is 1, that is, no token is ruled out."""

MAX_TOKENS = 256
"""Tokens after which a reply is cut off."""


def completion_prompt(caption: str) -> str:
    """What the model reads."""
    return caption + CAPTION_END


def completion(instruction: str, edited_caption: str) -> str:
    """What the model should write, and is trained to."""
    return instruction + INSTRUCTION_END + edited_caption + STOP
