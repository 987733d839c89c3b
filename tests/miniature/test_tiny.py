import pytest

from ip2p_ray.miniature import grammar, weights
from ip2p_ray.miniature.scores import random_captions
from ip2p_ray.miniature.tiny import true_edit
from ip2p_ray.triplets.local_writer import LocalWriter
from ip2p_ray.triplets.reply import Triplet, parse_reply


def test_a_caption_has_one_true_edit():
    for caption in random_captions(40, 3):
        instruction, edited = true_edit(caption)
        assert grammar.is_true_edit(caption, instruction, edited)
        assert true_edit(caption) == (instruction, edited)


def test_only_captions_of_the_grammar_have_one():
    with pytest.raises(ValueError, match="not a caption"):
        true_edit("hello")


@pytest.mark.ray
def test_the_weights_load_and_the_writer_knows_its_captions(tiny_weights):
    editor = weights.load_editor(tiny_weights)
    assert editor.settings.resolution == 64
    assert weights.pair_config(tiny_weights).candidates == 2
    captions = random_captions(8, 0)
    replies = LocalWriter.load(tiny_weights / "writer").write(captions, seed=0)
    for caption, reply in zip(captions, replies, strict=True):
        triplet = parse_reply(caption, reply)
        assert isinstance(triplet, Triplet)
        assert (triplet.instruction, triplet.edited_caption) == true_edit(caption)
