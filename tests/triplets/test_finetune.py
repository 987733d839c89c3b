"""Splits, training rows and scores: what both ways of fine-tuning share."""

import json
from functools import partial

import pytest

from ip2p_ray.errors import ConfigError
from ip2p_ray.schema import split_of
from ip2p_ray.triplets import finetune, reply
from ip2p_ray.triplets.examples import load_examples
from ip2p_ray.triplets.finetune import Score, score, split_examples, training_file, training_row
from ip2p_ray.triplets.prompt import SYSTEM, chat_reply, completion
from ip2p_ray.triplets.reply import Reply, Triplet, parse_reply, read_reply

BOAT = Triplet("a red boat", "make it blue", "a blue boat")


@pytest.fixture(scope="module")
def examples():
    return load_examples()


def test_a_split_is_by_key_and_more_examples_do_not_move_any(examples):
    train, held_out = split_examples(examples)
    assert sorted(map(str, train + held_out)) == sorted(map(str, examples))
    assert all(split_of(example.key, 0.1) == "held_out" for example in held_out)
    assert 10 <= len(held_out) <= 50
    fewer, held_of_fewer = split_examples(examples[::-1][:150])
    assert set(fewer) < set(train)
    assert set(held_of_fewer) < set(held_out)


@pytest.mark.parametrize("held_out", [0.0, 1.0])
def test_a_side_without_examples_is_refused(examples, held_out):
    with pytest.raises(ConfigError, match="both need some"):
        split_examples(examples, held_out)


def test_the_completion_form_is_the_papers():
    assert training_row(BOAT) == {
        "prompt": "a red boat\n##\n",
        "completion": "make it blue\n%%\na blue boat\nEND",
    }


def test_the_chat_form_is_what_a_writer_asks_without_examples():
    assert training_row(BOAT, "chat") == {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": "a red boat"},
            {"role": "assistant", "content": chat_reply("make it blue", "a blue boat")},
        ]
    }


@pytest.mark.parametrize("form", ["completion", "chat"])
def test_a_training_file_has_a_line_an_example(examples, form):
    lines = training_file([*examples, Triplet("caf\u00e9", "a\u2028b", "c")], form).split(b"\n")
    assert lines.pop() == b""
    assert len(lines) == len(examples) + 1
    assert json.loads(lines[0]) == training_row(examples[0], form)


def test_what_a_model_is_trained_to_write_is_read_as_the_example(examples):
    for example in examples:
        written = training_row(example)["completion"]
        assert parse_reply(example.caption, written) == example


def test_a_score_counts_replies_by_their_reasons():
    replies = ["what?", "a\nEND", completion("", "a blue boat"), completion("x", "A red boat.")]
    replies += [completion("make it blue", "a blue boat"), "nothing"]
    found = score(lambda captions: replies[: len(captions)], [BOAT] * 6)
    assert found == Score(
        replies=6,
        valid=1,
        reasons={
            reply.UNFINISHED: 2,
            reply.NOT_TWO_PARTS: 1,
            reply.EMPTY_INSTRUCTION: 1,
            reply.UNCHANGED_CAPTION: 1,
        },
    )
    assert (found.parse_rate, found.validity) == (0.5, 1 / 6)
    assert found.line() == (
        "6 replies, 50 % parse, 17 % are valid edits; unfinished 2, not_two_parts 1, "
        "empty_instruction 1, unchanged_caption 1"
    )


def test_hand_written_replies_are_all_valid(examples):
    written = [completion(example.instruction, example.edited_caption) for example in examples]
    found = score(lambda captions: written, examples)
    assert (found.parse_rate, found.validity, found.reasons) == (1.0, 1.0, {})
    assert found.line().endswith("replies, 100 % parse, 100 % are valid edits")


def test_a_score_may_read_chat_replies_and_count_lengths():
    def read(caption, text):
        options = {"finish_reason": "stop", "model": "m"}
        tokens = {"prompt_tokens": 1, "completion_tokens": 1}
        return read_reply(caption, Reply(text=text, **options, **tokens))

    def write(captions):
        return [chat_reply("make it blue", "a blue boat"), "I cannot help with that"]

    found = score(write, [BOAT, BOAT], read=read)
    assert (found.parse_rate, found.validity) == (0.5, 0.5)
    short = partial(parse_reply, fits=lambda text: len(text) < 11)
    found = score(lambda _: [completion("x", "a blue boat")], [BOAT], read=short)
    assert found.reasons == {reply.TOO_MANY_TOKENS: 1}
    assert found.parse_rate == 1.0


@pytest.mark.parametrize("replies", [[], ["a", "b"]])
def test_a_reply_to_each_example_is_needed(replies):
    with pytest.raises(ConfigError, match="a reply to each of at least 1 example"):
        score(lambda _: replies, [BOAT])
    with pytest.raises(ConfigError, match="at least 1 example"):
        score(lambda _: replies, [])


def test_every_malformed_reason_is_one_of_the_replies():
    assert set(finetune.MALFORMED) < set(reply.REASONS)
