"""Which replies are triplets, and why the others are not."""

import json

import pytest

from ip2p_ray.schema import triplet_key
from ip2p_ray.triplets import reply
from ip2p_ray.triplets.prompt import chat_reply, completion, completion_prompt
from ip2p_ray.triplets.reply import Reply, Triplet, parse_reply, read_reply

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
        ("Edit: a red  boat at sea, now blue\n%%\nA blue boat\nEND", reply.INSTRUCTION_IS_CAPTION),
        ("make it blue\n%%\nA red  boat at sea .\nEND", reply.UNCHANGED_CAPTION),
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


def answered(text, finish_reason="stop", **fields):
    tokens = {"prompt_tokens": 10, "completion_tokens": 5}
    return Reply(text=text, finish_reason=finish_reason, model="m", **tokens, **fields)


EDIT = chat_reply("paint it blue", "A blue boat at sea.")


@pytest.mark.parametrize(
    "text",
    [
        EDIT,
        f"```json\n{EDIT}\n```",
        f"```\n{EDIT}\n```\nIs there anything else?",
        f"Sure, {{here}} it is: {EDIT} Enjoy!",
        f"<think>\nA boat... {{'instruction'}}: maybe?\n</think>\n\n{EDIT}",
        f'{{"edit": {EDIT}}}',
        json.dumps(
            {"edited_caption": " A blue boat at sea. ", "why": 1, "instruction": "paint it blue\n"}
        ),
        completion("paint it blue", "A blue boat at sea."),
        "paint it blue\n%%\nA blue boat at sea.",
    ],
)
def test_replies_of_chat_models_are_read_in_whatever_they_are_wrapped(text):
    expected = Triplet(CAPTION, "paint it blue", "A blue boat at sea.")
    assert read_reply(CAPTION, answered(text)) == expected


def test_a_whole_object_counts_even_if_what_follows_was_cut_off():
    assert isinstance(read_reply(CAPTION, answered(EDIT + " I ho", "length")), Triplet)
    cut = completion("paint it blue", "A blue boat at sea.") + "\n##\nan"
    assert isinstance(read_reply(CAPTION, answered(cut, "length")), Triplet)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", reply.EMPTY_REPLY),
        (" \n<think>hm</think> ", reply.EMPTY_REPLY),
        ("a blue boat", reply.UNPARSEABLE),
        ('{"instruction": "paint it blue"}', reply.UNPARSEABLE),
        ('{"instruction": "paint it blue", "edited_caption": null}', reply.UNPARSEABLE),
        ('{"instruction": ["paint it blue"], "edited_caption": "A blue boat"}', reply.UNPARSEABLE),
        ('["paint it blue", "A blue boat"]', reply.UNPARSEABLE),
        ("{" * 3000, reply.UNPARSEABLE),
        ("[" * 100_000 + "{", reply.UNPARSEABLE),
        ("I'm sorry, but I can't help with that.", reply.REFUSED),
        ("I\u2019m unable to edit this.", reply.REFUSED),
        ("As an AI, I do not edit pictures", reply.REFUSED),
        ("I canter on a horse", reply.UNPARSEABLE),
        ("a\n%%\nb\n%%\nc", reply.NOT_TWO_PARTS),
        (chat_reply("", "A blue boat"), reply.EMPTY_INSTRUCTION),
        (chat_reply("paint it blue", " "), reply.EMPTY_EDITED_CAPTION),
        (chat_reply("paint it\nblue", "A blue boat"), reply.NOT_PLAIN_TEXT),
        ('{"instruction": "a \\ud800", "edited_caption": "b"}', reply.NOT_PLAIN_TEXT),
        (chat_reply("paint it blue", "a red boat at sea"), reply.UNCHANGED_CAPTION),
        (chat_reply("A red boat at sea", "A blue boat"), reply.INSTRUCTION_IS_CAPTION),
        (chat_reply("A blue boat", "A blue boat."), reply.INSTRUCTION_IS_CAPTION),
    ],
)
def test_other_replies_of_chat_models_have_a_reason(text, reason):
    assert read_reply(CAPTION, answered(text)) == reason


@pytest.mark.parametrize(
    ("text", "finish_reason", "flagged", "reason"),
    [
        (EDIT, "stop", True, reply.FLAGGED),
        (EDIT, "content_filter", None, reply.FLAGGED),
        ("No.", "refusal", None, reply.REFUSED),
        ("", "length", None, reply.EMPTY_REPLY),
        ('{"instruction": "paint', "length", None, reply.UNFINISHED),
        ("paint it blue\n%%\nA blue", "length", None, reply.UNFINISHED),
    ],
)
def test_the_end_of_a_reply_and_moderation_are_reasons_too(text, finish_reason, flagged, reason):
    assert read_reply(CAPTION, answered(text, finish_reason, flagged=flagged)) == reason


def test_what_moderation_lets_pass_is_read():
    assert isinstance(read_reply(CAPTION, answered(EDIT, flagged=False)), Triplet)


def test_chat_replies_have_to_fit_too():
    found = read_reply(CAPTION, answered(EDIT), fits=lambda text: text != "paint it blue")
    assert found == reply.TOO_MANY_TOKENS


def test_a_reply_knows_its_tokens():
    assert answered("").usage.tokens == 15
