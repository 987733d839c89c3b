"""The paper's step: a language model is fine-tuned on hand-written triplets, then writes the rest.

    examples --split_examples--> train --openai_finetune--> a new model at a server
                           |          `--local_finetune---> a causal LM in this process
                           `--> held out --score--> before and after

Source: paper appendix A.1 and the reference's prepare_for_gpt.py: GPT-3 Davinci, one epoch over 700
triplets, the API's defaults else. The chat form, for models that know no other, is ours.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ip2p_ray.errors import ConfigError
from ip2p_ray.schema import split_of
from ip2p_ray.triplets import reply
from ip2p_ray.triplets.prompt import chat_messages, chat_reply, completion, completion_prompt
from ip2p_ray.triplets.reply import Triplet, parse_reply

Form = Literal["completion", "chat"]

MALFORMED = (
    reply.NO_REPLY,
    reply.FLAGGED,
    reply.REFUSED,
    reply.EMPTY_REPLY,
    reply.UNFINISHED,
    reply.UNPARSEABLE,
    reply.NOT_TWO_PARTS,
)
"""The reasons by which a reply has not even the form of an edit."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What came of a writer's replies."""

    replies: int
    valid: int
    """Those that are triplets."""
    reasons: Mapping[str, int]
    """Count by reason of the others, most frequent first."""

    @property
    def parse_rate(self) -> float:
        """Share of the replies, in [0, 1], that have the form of an edit."""
        malformed = sum(self.reasons.get(reason, 0) for reason in MALFORMED)
        return (self.replies - malformed) / self.replies

    @property
    def validity(self) -> float:
        """Share of the replies, in [0, 1], that are triplets."""
        return self.valid / self.replies

    def line(self) -> str:
        """One sentence: the two shares, and why the others are no triplets."""
        text = f"{self.replies:,} replies, {100 * self.parse_rate:.0f} % parse, "
        text += f"{100 * self.validity:.0f} % are valid edits"
        counts = ", ".join(f"{reason} {count:,}" for reason, count in self.reasons.items())
        return f"{text}; {counts}" if counts else text


def split_examples(
    examples: Sequence[Triplet], held_out: float = 0.1
) -> tuple[list[Triplet], list[Triplet]]:
    """(train, held out) by the examples' keys, so that more examples never change sides.

    Raises:
        ConfigError: one side is empty.
    """
    sides: dict[str, list[Triplet]] = {"train": [], "held_out": []}
    for example in examples:
        sides[split_of(example.key, held_out)].append(example)
    if not all(sides.values()):
        raise ConfigError(
            f"of {len(examples)} examples a share of {held_out:g} leaves {len(sides['train'])} to "
            f"train on and {len(sides['held_out'])} to score with; both need some"
        )
    return sides["train"], sides["held_out"]


def training_row(example: Triplet, form: Form = "completion") -> dict[str, Any]:
    """What a server is trained on for one example."""
    if form == "chat":
        answer = chat_reply(example.instruction, example.edited_caption)
        turn = {"role": "assistant", "content": answer}
        return {"messages": [*chat_messages(example.caption), turn]}
    return {
        "prompt": completion_prompt(example.caption),
        "completion": completion(example.instruction, example.edited_caption),
    }


def training_file(examples: Sequence[Triplet], form: Form = "completion") -> bytes:
    """The rows as the JSON lines that a server takes, one an example."""
    rows = (json.dumps(training_row(row, form), ensure_ascii=False) + "\n" for row in examples)
    return "".join(rows).encode()


def score(
    write: Callable[[Sequence[str]], Sequence[str]],
    examples: Sequence[Triplet],
    *,
    read: Callable[[str, str], Triplet | str] = parse_reply,
) -> Score:
    """What `read` (caption, reply) makes of what `write` replies to the examples' captions.

    For the length of the texts to count, give `functools.partial(parse_reply, fits=...)`.

    Raises:
        ConfigError: there are no examples, or not a reply to each.
    """
    replies = write([example.caption for example in examples]) if examples else []
    if not examples or len(replies) != len(examples):
        raise ConfigError(
            f"a score needs a reply to each of at least 1 example, got {len(replies)} to "
            f"{len(examples)}"
        )
    found = [read(row.caption, text) for row, text in zip(examples, replies, strict=True)]
    reasons = Counter(reason for reason in found if isinstance(reason, str))
    return Score(
        replies=len(found),
        valid=len(found) - sum(reasons.values()),
        reasons=dict(reasons.most_common()),
    )
