from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ip2p_ray.errors import ConfigError
from ip2p_ray.prompt_to_prompt.alignment import (
    TokenizedCaption,
    common_words,
    refinement,
    replacement,
    tokenize_caption,
    word_positions,
)
from ip2p_ray.testing import WORDS, tiny_tokenizer

TOKENIZER = tiny_tokenizer(20)


def caption(text: str, length: int = 20) -> TokenizedCaption:
    return tokenize_caption(TOKENIZER, text, length)


def test_words_and_their_tokens() -> None:
    chinchilla = caption("A Chinchilla  sits, on the mat!")
    assert chinchilla.words == ("a", "chinchilla", "sits", ",", "on", "the", "mat", "!")
    assert chinchilla.positions == ((1,), (2, 3, 4), (5,), (6,), (7,), (8,), (9,), (10,))
    assert (chinchilla.start, chinchilla.stop, chinchilla.length) == (1, 11, 20)


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_a_caption_without_words(text: str) -> None:
    empty = caption(text)
    assert (empty.words, empty.start, empty.stop) == ((), 1, 1)
    assert torch.equal(replacement(empty, empty), torch.eye(20))
    assert torch.equal(refinement(empty, empty)[0], torch.eye(20))


def test_words_that_were_cut_off_have_no_tokens() -> None:
    cut = caption("a chinchilla on the mat", 6)
    assert cut.words == ("a", "chinchilla", "on", "the", "mat")
    assert cut.positions == ((1,), (2, 3, 4), (), (), ())
    assert cut.stop == 5


def test_replacement_where_one_token_becomes_three() -> None:
    """Cat -> chinchilla: what follows keeps reading the same words, end of text the same end."""
    mapping = replacement(caption("a cat on the mat"), caption("a chinchilla on the mat"))
    expected = torch.zeros(20, 20)
    expected[0, 0] = expected[1, 1] = 1  # begin, a
    expected[2, 2:5] = 1 / 3  # cat -> chin chi lla
    for source, target in ((3, 5), (4, 6), (5, 7), (6, 8)):  # on, the, mat, end
        expected[source, target] = 1
    for padding in range(7, 17):
        expected[padding, padding + 2] = 1
    expected[17:, 19] = 1  # the source has two more padding tokens
    torch.testing.assert_close(mapping, expected)


def test_replacement_where_three_tokens_become_one() -> None:
    mapping = replacement(caption("a chinchilla on the mat"), caption("a cat on the mat"))
    assert mapping[2:5, 2].tolist() == [1, 1, 1]
    assert mapping[8, 6] == 1  # end of text
    torch.testing.assert_close(mapping[19, 17:], torch.full((3,), 1 / 3))


def test_replacement_of_several_words() -> None:
    mapping = replacement(caption("a red cat at sea"), caption("a blue chinchilla at night"))
    assert mapping[2, 2] == 1
    torch.testing.assert_close(mapping[3, 3:6], torch.full((3,), 1 / 3))
    assert mapping[4, 6] == 1
    assert mapping[5, 7] == 1


def test_replacement_refuses_other_numbers_of_words() -> None:
    with pytest.raises(ConfigError, match=r"got 2 and 3; use refinement"):
        replacement(caption("a cat"), caption("a red cat"))


def test_refinement_of_a_longer_caption() -> None:
    mapping, share = refinement(
        caption("a cat on the mat"), caption("a red cat on the mat, sketch")
    )
    pairs = [tuple(pair) for pair in mapping.nonzero().tolist()]
    assert pairs[:6] == [(0, 0), (1, 1), (2, 3), (3, 4), (4, 5), (5, 6)]
    assert share[:10].tolist() == [1, 1, 0, 1, 1, 1, 1, 0, 0, 1]  # red; comma, sketch; end
    assert mapping[6, 9] == 1


def test_refinement_of_a_shorter_caption_reads_no_word_from_padding() -> None:
    source, target = caption("a photo of a red cat on the mat"), caption("a cat")
    mapping, share = refinement(source, target)
    assert share.tolist() == [1] * 20
    assert mapping[4, 1] == mapping[6, 2] == 1  # the cat, and the article before it
    assert mapping[:, 3].nonzero().flatten().tolist() == [source.stop]
    for place in range(target.stop, 20):
        (read,) = mapping[:, place].nonzero().flatten().tolist()
        assert read >= source.stop


def test_refinement_aligns_a_noun_with_its_own_article() -> None:
    source, target = caption("a cat on a mat"), caption("a dog and a cat on a mat")
    matches = common_words(source.words, target.words)
    assert matches == [(0, 3), (1, 4), (2, 5), (3, 6), (4, 7)]


def test_spaces_capitals_and_punctuation_do_not_matter() -> None:
    plain, spaced = caption("a cat, on the mat"), caption(" A  Cat ,  on\tthe MAT ")
    assert plain == spaced
    with_comma, share = refinement(caption("a cat on the mat"), plain)
    assert with_comma[2, 2] == 1
    assert share[3] == 0


@pytest.mark.parametrize("text", ["a caf\u00e9 cat", "a cafe\u0301 cat", "\u732b cat", "a_b cat's"])
def test_any_text_aligns_with_itself(text: str) -> None:
    same = caption(text)
    assert torch.equal(replacement(same, same), torch.eye(20))
    assert torch.equal(refinement(same, same)[0], torch.eye(20))


def test_positions_of_words_and_phrases() -> None:
    text = caption("a red cat, a blue chinchilla and a red boat")
    assert word_positions(TOKENIZER, text, "Red") == [2, 12]
    assert word_positions(TOKENIZER, text, "blue chinchilla") == [6, 7, 8, 9]
    assert word_positions(TOKENIZER, text, "cat") == [3]
    for absent in ("dog", "red chinchilla", "", "  "):
        with pytest.raises(ConfigError, match="is not in the caption"):
            word_positions(TOKENIZER, text, absent)


TEXTS = st.lists(
    st.sampled_from([*WORDS, "chinchilla", "zebra", ",", "x1", "don't"]), max_size=12
).map(" ".join)
LENGTHS = st.integers(3, 40)


@settings(deadline=None, max_examples=60)
@given(text=TEXTS, length=LENGTHS)
def test_equal_captions_align_to_the_identity(text: str, length: int) -> None:
    same = caption(text, length)
    assert torch.equal(replacement(same, same), torch.eye(length))
    mapping, share = refinement(same, same)
    assert torch.equal(mapping, torch.eye(length))
    assert torch.equal(share, torch.ones(length))


@settings(deadline=None, max_examples=100)
@given(source=TEXTS, target=TEXTS, length=LENGTHS)
def test_refinement_reads_one_token_of_the_same_kind(source: str, target: str, length: int) -> None:
    before, after = caption(source, length), caption(target, length)
    mapping, share = refinement(before, after)
    assert torch.equal(mapping.sum(0), share)
    assert set(share.tolist()) <= {0.0, 1.0}
    assert share[: after.start].min() == 1
    kinds = [kind_of(before, place) for place in range(length)]
    for place, place_after in mapping.nonzero().tolist():
        assert kinds[place] == kind_of(after, place_after)
    assert share[after.stop :].eq(1).all()


@settings(deadline=None, max_examples=100)
@given(pairs=st.lists(st.tuples(*[st.sampled_from([*WORDS, "chinchilla", "zebra"])] * 2)))
def test_replacement_loses_no_attention(pairs: list[tuple[str, str]]) -> None:
    source = caption(" ".join(before for before, _ in pairs), 70)
    target = caption(" ".join(after for _, after in pairs), 70)
    if max(source.stop, target.stop) >= 69:
        return
    mapping = replacement(source, target)
    torch.testing.assert_close(mapping.sum(1), torch.ones(70))
    kinds = [kind_of(source, place) for place in range(70)]
    for place, place_after in mapping.nonzero().tolist():
        assert (kinds[place] == "end") == (kind_of(target, place_after) == "end")
    assert mapping[source.stop, target.stop] == 1


@settings(deadline=None, max_examples=100)
@given(source=st.text("abc", max_size=6), target=st.text("abc", max_size=6))
def test_common_words_are_a_longest_common_subsequence(source: str, target: str) -> None:
    matches = common_words(source, target)
    assert all(source[i] == target[j] for i, j in matches)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in itertools.pairwise(matches))
    longest = max(
        length
        for length in range(len(source) + 1)
        for chosen in itertools.combinations(source, length)
        if _is_subsequence(chosen, target)
    )
    assert len(matches) == longest


def kind_of(text: TokenizedCaption, place: int) -> str:
    if place < text.start:
        return "start"
    if place >= text.stop:
        return "end"
    return next(
        word for word, places in zip(text.words, text.positions, strict=True) if place in places
    )


def _is_subsequence(chosen: tuple[str, ...], text: str) -> bool:
    letters = iter(text)
    return all(letter in letters for letter in chosen)
