"""The tokenizer knows every word of the drawn world, and spells out the rest."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPTokenizer

from ip2p_ray.miniature import grammar
from ip2p_ray.miniature.scenes import WHOLE_WORLD
from ip2p_ray.miniature.vocabulary import LAYOUT_WORDS, TEXT_LENGTH, clip_tokenizer, sentences

TEXTS = [
    "a red boat on the sea",
    "a cat with the cat on the left",
    "zebras, and other Words: 42!",
    "",
]


def test_every_sentence_of_the_grammar_fits_and_its_words_are_tokens(
    tokenizer: CLIPTokenizer,
) -> None:
    for triplet in sentences(300, seed=5):
        for text in triplet:
            ids = tokenizer(text).input_ids
            assert len(ids) == len(text.split()) + 2, text
            assert len(ids) <= TEXT_LENGTH


def test_the_words_of_sides_are_tokens_too(tokenizer: CLIPTokenizer) -> None:
    assert [tokenizer.tokenize(word) for word in LAYOUT_WORDS] == [
        [word + "</w>"] for word in LAYOUT_WORDS
    ]


def test_other_words_are_spelled_out_and_read_back(tokenizer: CLIPTokenizer) -> None:
    text = "a zebra eats quinces"
    assert len(tokenizer.tokenize(text)) > len(text.split())
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_the_end_token_is_the_highest(tokenizer: CLIPTokenizer) -> None:
    """open_clip reads a text's features where the highest token stands."""
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == max(tokenizer.get_vocab().values())
    assert tokenizer.bos_token_id == tokenizer.eos_token_id - 1


def test_a_tokenizer_made_again_or_stored_gives_the_same_tokens(
    tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    expected = tokenizer(TEXTS).input_ids
    for other in (clip_tokenizer(), CLIPTokenizer.from_pretrained(tmp_path)):
        assert other.get_vocab() == tokenizer.get_vocab()
        assert other(TEXTS).input_ids == expected
        assert other.model_max_length == TEXT_LENGTH


def test_sentences_are_true_edits_over_the_whole_world() -> None:
    found = sentences(300, seed=0)
    assert found == sentences(300, seed=0)
    assert found != sentences(300, seed=1)
    assert all(grammar.is_true_edit(*triplet) for triplet in found)
    words = {word for triplet in found for text in triplet for word in text.split()}
    assert {*WHOLE_WORLD.subjects, *WHOLE_WORLD.colours} <= words
