"""The judge's text tower becomes the generator's text encoder without change."""

from __future__ import annotations

import random
from typing import Any

import open_clip
import torch
from transformers import CLIPTokenizer

from ip2p_ray.miniature import judge
from ip2p_ray.miniature.vocabulary import TEXT_LENGTH


def test_the_text_encoder_has_the_towers_hidden_states(tokenizer: CLIPTokenizer) -> None:
    torch.manual_seed(0)
    model: Any = open_clip.CLIP(**judge.clip_config(len(tokenizer))).eval()
    texts = ["a red boat on the sea", "", "zebras, and other words"]
    ids = tokenizer(
        texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        hidden, _ = judge._text(model, ids)
        converted = judge.text_encoder(model, tokenizer)(ids)[0]
    torch.testing.assert_close(converted, hidden, atol=1e-5, rtol=0)


def test_rivals_are_those_that_describe_something_else() -> None:
    examples, wishes = judge._examples(random.Random(0), judge.JudgeConfig(batch_size=64))
    rivals = judge._rivals(examples)
    assert len(wishes) == 32
    assert torch.equal(rivals, rivals.T)
    for row, example in enumerate(examples):
        assert not rivals[row, row]
        for column, other in enumerate(examples):
            same = example.scene.described == other.scene.described
            told = example.side and other.side and example.side != other.side
            assert bool(rivals[row, column]) == (not same or bool(told))
    # The two pictures of a mirrored pair must be told apart by their sides.
    mirrored = [k for k in range(32) if examples[k].side]
    assert mirrored
    assert all(rivals[k, k + 32] for k in mirrored)
