"""The miniature's CLIP tokenizer, made from sentences of its grammar; other text still encodes."""

from __future__ import annotations

import random
from typing import Any

from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

from ip2p_ray.miniature import grammar
from ip2p_ray.miniature.scenes import WHOLE_WORLD, random_edit, random_scene

TEXT_LENGTH = 32
"""Tokens of a caption or instruction, start and end included; the longest sentence has 27."""

LAYOUT_WORDS = ("with", "the", "on", "left", "right")
"""The judge also learns captions that say where a thing stands."""

START, END = "<|startoftext|>", "<|endoftext|>"


def sentences(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Triplets over the whole world, so that a larger world needs no new tokenizer."""
    rng = random.Random(seed)
    scenes = [random_scene(rng, WHOLE_WORLD) for _ in range(count)]
    return [grammar.triplet(scene, random_edit(scene, rng, WHOLE_WORLD), rng) for scene in scenes]


def clip_tokenizer(seed: int = 0) -> CLIPTokenizer:
    """A CLIP tokenizer whose words are single tokens; the end token has the highest id."""
    found = {w for t in sentences(4_000, seed) for text in t for w in text.split()}
    words = sorted({*found, *LAYOUT_WORDS})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.setdefault((pieces[-2], pieces[-1]))
            pieces[-2:] = [pieces[-2] + pieces[-1]]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    options: dict[str, Any] = {"vocab": vocabulary, "merges": list(merges)}
    return CLIPTokenizer(**options, model_max_length=TEXT_LENGTH)
