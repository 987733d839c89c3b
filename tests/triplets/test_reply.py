"""Which replies are triplets, and why the others are not."""

import pytest

from ip2p_ray.schema import triplet_key
from ip2p_ray.triplets import reply
from ip2p_ray.triplets.prompt import completion, completion_prompt
from ip2p_ray.triplets.reply import Triplet, parse_reply

CAPTION = "A red boat at sea."


def test_the_text_form_is_the_references():
    assert completion_prompt("a cat") == "a cat\n##\n"
    assert completion("make it a dog", "a dog") == "make it a dog\n%%\na dog\nEND"


def test_what_a_writer_should_write_is_a_triplet():
    triplet = parse_reply(CAPTION, completion("paint it blue", "A blue boat at sea."))
    assert triplet == Triplet(CAPTION, "paint it blue", "A blue boat at sea.")
    assert triplet.key == triplet_key(CAPTION, "paint it blue", "A blue boat at sea.")


def test_parts_are_stripped_and_what_follows_the_stop_is_ignored():
    text = " paint it blue \n%%\n\n A blue boat \nEND\n##\na\n%%\nb"
    assert parse_reply(CAPTION, text) == Triplet(CAPTION, "paint it blue", "A blue boat")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", reply.UNFINISHED),
        ("paint it blue\n%%\nA blue boat", reply.UNFINISHED),
        ("A blue boat\nEND", reply.NOT_TWO_PARTS),
        ("a\n%%\nb\n%%\nc\nEND", reply.NOT_TWO_PARTS),
        ("\n%%\nA blue boat\nEND", reply.EMPTY_INSTRUCTION),
        (" \n%%\n \nEND", reply.EMPTY_INSTRUCTION),
        ("paint it blue\n%%\n \nEND", reply.EMPTY_EDITED_CAPTION),
        ("paint it\nblue\n%%\nA blue boat\nEND", reply.NOT_PLAIN_TEXT),
        ("paint it blue\n%%\nA \x00 boat\nEND", reply.NOT_PLAIN_TEXT),
        ("paint it blue\n%%\nA \ud800 boat\nEND", reply.NOT_PLAIN_TEXT),
        ("paint it blue\n%%\na RED boat at sea!\nEND", reply.UNCHANGED_CAPTION),
        ("a red boat at sea\n%%\nA blue boat\nEND", reply.INSTRUCTION_IS_CAPTION),
        ("A blue boat!\n%%\na blue boat\nEND", reply.INSTRUCTION_IS_CAPTION),
    ],
)
def test_other_replies_have_a_reason(text, reason):
    assert parse_reply(CAPTION, text) == reason


@pytest.mark.parametrize("long", [0, 1, 2])
def test_each_of_the_three_texts_has_to_fit(long):
    texts = ["short", "brief", "small"]
    texts[long] = "much too long"
    text = completion(texts[1], texts[2])
    assert parse_reply(texts[0], text, fits=lambda part: len(part) < 9) == reply.TOO_MANY_TOKENS
    assert isinstance(parse_reply(texts[0], text), Triplet)


def test_reasons_are_listed_once_and_in_snake_case():
    assert len(set(reply.REASONS)) == len(reply.REASONS)
    assert all(reason.replace("_", "").islower() for reason in reply.REASONS)
