"""What a chat model reads: the same for a caption wherever and whenever it is asked."""

import json
from collections import Counter

import pytest

from ip2p_ray.triplets.prompt import REPLY_SCHEMA, SYSTEM, chat_messages, chat_reply
from ip2p_ray.triplets.reply import Triplet

EXAMPLES = [Triplet(f"caption {n}", f"do {n}", f"edited {n}") for n in range(20)]


def shown(caption, **options):
    messages = chat_messages(caption, EXAMPLES, **options)
    return [message["content"] for message in messages[1:-1:2]]


def test_without_examples_the_model_reads_the_rules_and_the_caption():
    assert chat_messages("a red boat") == [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "a red boat"},
    ]


def test_examples_are_past_turns():
    messages = chat_messages("a red boat", EXAMPLES[:1], shots=3)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[1]["content"] == "caption 0"
    answer = json.loads(messages[2]["content"])
    assert answer == {"instruction": "do 0", "edited_caption": "edited 0"}
    assert list(answer) == REPLY_SCHEMA["required"]


def test_which_examples_are_shown_depends_on_caption_and_seed_alone():
    assert shown("a red boat", shots=5, seed=3) == shown("a red boat", shots=5, seed=3)
    assert shown("a red boat", shots=5, seed=3) != shown("a red boat", shots=5, seed=4)
    assert shown("a red boat", shots=5, seed=3) != shown("a blue boat", shots=5, seed=3)
    assert len(set(shown("a red boat", shots=20))) == 20


def test_a_caption_is_never_its_own_example():
    assert "caption 7" not in shown("caption 7", shots=20)
    assert len(shown("caption 7", shots=20)) == 19


def test_every_example_is_shown_about_as_often():
    counts = Counter(text for n in range(1000) for text in shown(f"a boat {n}", shots=4))
    assert all(count == pytest.approx(200, abs=60) for count in counts.values())
    assert len(counts) == 20


def test_the_draw_is_pinned():
    """Another draw is another recipe: replies that were paid for would be asked for again."""
    assert shown("a red boat", shots=4) == ["caption 4", "caption 0", "caption 13", "caption 10"]


def test_answers_keep_their_letters():
    assert chat_reply("make it a caf\u00e9", "a caf\u00e9") == (
        '{"instruction": "make it a caf\u00e9", "edited_caption": "a caf\u00e9"}'
    )
