"""Which tokens of an edited caption correspond to which tokens of its caption.

Captions are compared word by word (a run of letters and digits, or of punctuation), words
being what the tokenizer's own normalisation makes of them; so spaces, and for CLIP capitals, do
not matter, and a word may be one token in one caption and three in the other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ip2p_ray.errors import ConfigError

WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*|(?:[^\w\s]|_)+")


@dataclass(frozen=True)
class TokenizedCaption:
    """A caption as the text encoder sees it: `length` tokens, and the words they spell."""

    words: tuple[str, ...]
    """The words in order, normalised."""
    positions: tuple[tuple[int, ...], ...]
    """For each word the positions of its tokens; none where the caption was cut before it."""
    start: int
    """How many tokens come before the first word: the begin-of-text token."""
    stop: int
    """The position of the end-of-text token, which all padding follows."""
    length: int
    """Tokens in all, with padding."""


def tokenize_caption(tokenizer: Any, caption: str, length: int) -> TokenizedCaption:
    """The words of a caption and the places of their tokens among `length` tokens.

    `tokenizer` is a transformers tokenizer that reports offsets, as CLIPTokenizer does.
    """
    encoded = tokenizer(
        caption,
        padding="max_length",
        max_length=length,
        truncation=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    spans = [match.span() for match in WORD.finditer(caption)]
    real = [
        position
        for position, special in enumerate(encoded["special_tokens_mask"])
        if not special and encoded["attention_mask"][position]
    ]
    positions: list[list[int]] = [[] for _ in spans]
    for position in real:
        first = encoded["offset_mapping"][position][0]
        for word, (begin, end) in enumerate(spans):
            if begin <= first < end:
                positions[word].append(position)
    start = real[0] if real else int(encoded["input_ids"][0] == tokenizer.bos_token_id)
    return TokenizedCaption(
        words=tuple(_normalise(tokenizer, caption[begin:end]) for begin, end in spans),
        positions=tuple(tuple(places) for places in positions),
        start=start,
        stop=real[-1] + 1 if real else start,
        length=length,
    )


def replacement(source: TokenizedCaption, target: TokenizedCaption) -> Tensor:
    """How much each target token reads of each source token, (source token, target token).

    The n-th word of one caption stands for the n-th word of the other. Words of equally many
    tokens align token by token; else every piece reads all pieces of the other word, in equal
    parts. Each source token's row sums to 1, so attention through it still sums to 1. End of
    text and padding align among themselves, what is longer sharing its last partner.

    Raises: ConfigError where the captions have different numbers of words.
    Source: Prompt-to-Prompt's word swap, without its misaligned tail after words of different
    token counts.
    """
    if len(source.words) != len(target.words):
        raise ConfigError(
            f"replacement needs as many words in both captions, got {len(source.words)} and "
            f"{len(target.words)}; use refinement"
        )
    mapping = torch.zeros(source.length, target.length)
    for before, after in zip(source.positions, target.positions, strict=True):
        _spread(mapping, before, after)
    _align_start(mapping, source, target)
    tail_before = range(source.stop, source.length)
    tail_after = range(target.stop, target.length)
    paired = min(len(tail_before), len(tail_after)) - 1
    for index in range(paired):
        mapping[tail_before[index], tail_after[index]] = 1.0
    if paired >= 0:
        _spread(mapping, tail_before[paired:], tail_after[paired:])
    return mapping


def refinement(source: TokenizedCaption, target: TokenizedCaption) -> tuple[Tensor, Tensor]:
    """The one source token that each target token reads, and whether it has one.

    Returns a mapping of zeros and ones (source token, target token) and a share (target
    token,): 1 where the token belongs to a word of the longest common subsequence of both
    captions, or to begin, end or padding, which align among themselves; 0 where it is new,
    its column of the mapping being zero.

    Source: Prompt-to-Prompt's refinement; words are aligned here and not tokens, and padding
    of a shorter target never reads a source word.
    """
    mapping = torch.zeros(source.length, target.length)
    for before, after in common_words(source.words, target.words):
        pieces = zip(source.positions[before], target.positions[after], strict=False)
        for place, place_after in pieces:
            mapping[place, place_after] = 1.0
    _align_start(mapping, source, target)
    last = source.length - 1
    for index, place_after in enumerate(range(target.stop, target.length)):
        mapping[min(source.stop + index, last), place_after] = 1.0
    return mapping, mapping.sum(0)


def common_words(source: Sequence[str], target: Sequence[str]) -> list[tuple[int, int]]:
    """Index pairs of the longest common subsequence; of equally long ones the last in source."""
    rows, columns = len(source), len(target)
    longest = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in range(rows):
        for j in range(columns):
            skip = max(longest[i][j + 1], longest[i + 1][j])
            longest[i + 1][j + 1] = longest[i][j] + 1 if source[i] == target[j] else skip
    matches: list[tuple[int, int]] = []
    i, j = rows, columns
    while i and j:
        if source[i - 1] == target[j - 1]:
            i, j = i - 1, j - 1
            matches.append((i, j))
        elif longest[i][j - 1] >= longest[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return matches[::-1]


def word_positions(tokenizer: Any, caption: TokenizedCaption, phrase: str) -> list[int]:
    """The token positions of every occurrence of a word, or of several words in a row.

    Raises: ConfigError where the caption does not have the phrase.
    """
    wanted = tuple(_normalise(tokenizer, word) for word in WORD.findall(phrase))
    count = len(wanted)
    starts = range(len(caption.words) - count + 1 if count else 0)
    found = [first for first in starts if caption.words[first : first + count] == wanted]
    if not found:
        raise ConfigError(f"{phrase!r} is not in the caption of words {' '.join(caption.words)!r}")
    places = [caption.positions[first + offset] for first in found for offset in range(count)]
    return sorted({position for word in places for position in word})


def _spread(mapping: Tensor, before: Sequence[int], after: Sequence[int]) -> None:
    """Aligns two groups of tokens: one to one, or all to all where their sizes differ."""
    if len(before) == len(after):
        for place, place_after in zip(before, after, strict=True):
            mapping[place, place_after] = 1.0
        return
    for place in before:
        for place_after in after:
            mapping[place, place_after] = 1.0 / len(after)


def _align_start(mapping: Tensor, source: TokenizedCaption, target: TokenizedCaption) -> None:
    """Aligns what comes before the first word, the same in both captions."""
    for place in range(min(source.start, target.start)):
        mapping[place, place] = 1.0


def _normalise(tokenizer: Any, word: str) -> str:
    normalizer = tokenizer.backend_tokenizer.normalizer
    return word if normalizer is None else str(normalizer.normalize_str(word))
