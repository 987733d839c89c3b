"""The writer learns true edits of nothing held out, and of them only the reply."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ip2p_ray.miniature import grammar, writer
from ip2p_ray.miniature.scenes import Scene, Thing, is_held_out, random_layout
from ip2p_ray.miniature.vocabulary import END
from ip2p_ray.triplets.local_writer import LocalWriter
from ip2p_ray.triplets.prompt import CAPTION_END, completion, completion_prompt
from ip2p_ray.triplets.reply import Triplet, parse_reply

CONFIG = writer.WriterConfig(steps=3, batch_size=2)


def test_examples_are_true_edits_and_show_nothing_held_out() -> None:
    layout = random_layout(random.Random(0))
    for prompt, reply in writer.examples(random.Random(0), 200):
        caption = prompt.removesuffix(CAPTION_END)
        triplet = parse_reply(caption, reply)
        assert isinstance(triplet, Triplet)
        assert grammar.is_true_edit(caption, triplet.instruction, triplet.edited_caption)
        for text in (caption, triplet.edited_caption):
            described = grammar.parse_caption(text)
            assert described is not None
            things = tuple(Thing(subject, colour or "red") for subject, colour in described.things)
            scene = Scene(
                things=things, setting=described.setting, manner=described.manner, layout=layout
            )
            assert not is_held_out(scene), text


def test_prompts_and_replies_are_read_back_line_by_line(writer_words: Any) -> None:
    for prompt, reply in writer.examples(random.Random(1), 50):
        ids = writer_words(prompt + reply)["input_ids"]
        assert writer_words.decode(ids) == prompt + reply
        assert len(ids) < writer_words.model_max_length
        # Cut at the end of the prompt, the two parts are the same tokens.
        assert ids == writer_words(prompt)["input_ids"] + writer_words(reply)["input_ids"]


def test_only_the_reply_and_its_end_are_learned(writer_words: Any) -> None:
    rows = [
        (completion_prompt("a red boat on the sea"), completion("make it night", "a red boat")),
        (completion_prompt("a cat"), completion("add a dog and a big house", "a cat and a dog")),
    ]
    end = int(writer_words.convert_tokens_to_ids(END))
    ids, target = writer._pad(writer_words, rows, end)
    assert ids.shape == target.shape
    for row, (prompt, reply) in enumerate(rows):
        learned = target[row] != -100
        assert torch.equal(target[row][learned], ids[row][learned])
        assert writer_words.decode(target[row][learned]) == reply + END
        first = int(learned.int().argmax())
        assert writer_words.decode(ids[row, :first]) == prompt
        assert set(ids[row, first + int(learned.sum()) :].tolist()) <= {end}


def test_a_resumed_training_ends_as_an_undisturbed_one_and_its_writer_writes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    figures = writer.train(CONFIG, whole, seed=3, device="cpu")
    assert figures["steps"] == 3
    # The first step has one learning rate whatever comes after it.
    begun = writer.WriterConfig(steps=1, batch_size=2)
    writer.train(begun, resumed, seed=3, device="cpu")
    with caplog.at_level(logging.INFO):
        writer.train(CONFIG, resumed, seed=3, device="cpu")
    assert "writer: continues at step 1 of 3" in caplog.text
    weights = [load_file(folder / "writer" / "model.safetensors") for folder in (whole, resumed)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    replies = LocalWriter.load(whole / "writer").write(["a red boat on the sea"], seed=0)
    assert len(replies) == 1
    assert replies[0]
