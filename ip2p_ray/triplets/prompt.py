r"""The text form of a triplet for a language model: what it reads and what it has to write.

    caption \n##\n instruction \n%%\n edited caption \nEND    of a model fine-tuned for it
    system message, examples, caption                      of any chat model

Source: the first form is that of paper appendix A.1 and the reference's prepare_for_gpt.py and
generate_txt_dataset.py. Their frequency penalty of 0.1 is left out: local models are sampled
without one. The second form is ours.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ip2p_ray.schema import stream_seed

if TYPE_CHECKING:
    from ip2p_ray.triplets.reply import Triplet

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


SYSTEM = """\
You invent edits of pictures. You are given the caption of a picture. Think of one edit of the \
picture that a person might ask for, and answer with a JSON object of two strings:
"instruction": the edit as a short request, such as a person would type;
"edited_caption": the caption of the picture after the edit.

Change something that can be seen: the style, the medium, the season, the weather, the time of \
day, a material, a colour, the subject, the place, the era, clothing or an expression; or add or \
remove something. In the edited caption keep every word of the caption that the edit leaves true, \
in the same order, so that the two captions differ in the edit only. The instruction does not \
repeat the caption. Do not ask for another view or crop, for swapped positions, for text in the \
picture or for an exact number of things. Let the edit suit this very caption, and surprise.

Answer with the JSON object alone."""
"""What a chat model is told to do."""

REPLY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "instruction": {"type": "string"},
        "edited_caption": {"type": "string"},
    },
    "required": ["instruction", "edited_caption"],
    "additionalProperties": False,
}
"""JSON schema of a chat model's reply, in the subset that strict structured output accepts."""


def chat_messages(
    caption: str, examples: Sequence[Triplet] = (), *, shots: int = 0, seed: int = 0
) -> list[dict[str, str]]:
    """What a chat model reads: SYSTEM, `shots` of the examples as past turns, the caption.

    Which examples, and in which order, depends on the seed, the caption and the examples alone. An
    example of the caption itself is never shown; where there are fewer than `shots`, all are.
    """
    others = [example for example in examples if example.caption != caption]
    draws = random.Random(stream_seed(seed, "shots", caption))
    messages = [{"role": "system", "content": SYSTEM}]
    for _ in range(min(shots, len(others))):
        # not `sample`: of all its methods Python promises the same numbers only of `random`
        example = others.pop(int(draws.random() * len(others)))
        messages.append({"role": "user", "content": example.caption})
        answer = chat_reply(example.instruction, example.edited_caption)
        messages.append({"role": "assistant", "content": answer})
    return [*messages, {"role": "user", "content": caption}]


def chat_reply(instruction: str, edited_caption: str) -> str:
    """What a chat model should answer."""
    answer = {"instruction": instruction, "edited_caption": edited_caption}
    return json.dumps(answer, ensure_ascii=False)
