import numpy as np
import pytest
import torch
from PIL import Image

from ip2p_ray.clip import Clip
from ip2p_ray.images import encode_png, to_pil
from ip2p_ray.measures import Measurer, Shown, difference_to
from ip2p_ray.miniature import scores
from ip2p_ray.miniature.scenes import draw
from ip2p_ray.schema import SIMILARITIES
from ip2p_ray.trials import MEASURES


@pytest.fixture(scope="module")
def clip(tiny_weights):
    return Clip.load(tiny_weights / "judge")


@pytest.fixture(scope="module")
def measurer(clip):
    return Measurer(clip)


@pytest.fixture(scope="module")
def drawn():
    return scores.edit_tasks(3, 0)


def stored(picture):
    return {"bytes": encode_png(picture), "path": None}


def task(number, drawn, **changes):
    one = drawn[number]
    return {
        "caption": one.caption,
        "edited_caption": one.edited_caption,
        "source_image": stored(to_pil(draw(one.scene))),
        "edited_image": stored(to_pil(draw(one.edit.edited))),
        **changes,
    }


def test_similarities_are_those_of_the_filter(clip, measurer, drawn):
    """Among them: what CLIP is fed has the range that it has there (METHOD T5)."""
    other = to_pil(draw(drawn[2].scene))
    (found,) = measurer.measure([task(0, drawn)], [[Shown(other)]])
    expected = clip.similarities(
        draw(drawn[0].scene)[None],
        np.array(other)[None],
        [drawn[0].caption],
        [drawn[0].edited_caption],
    ).rows()[0]
    for name in SIMILARITIES:
        assert found[0][name] == pytest.approx(expected[name], abs=1e-5)


def test_the_truth_and_the_copy_are_known(measurer, drawn):
    source, truth = (to_pil(draw(s)) for s in (drawn[0].scene, drawn[0].edit.edited))
    (found,) = measurer.measure([task(0, drawn)], [[Shown(truth), Shown(source)]], drawn[:1])
    right, copied = found
    assert set(right) == set(MEASURES)
    assert right["correct"] == 1.0
    assert right["truth_l1"] == right["truth_l2"] == right["preservation_error"] == 0.0
    assert right["truth_clip"] == pytest.approx(1.0, abs=1e-5)
    assert copied["correct"] == 0.0
    assert copied["source_l1"] == 0.0
    assert copied["image_similarity"] == pytest.approx(1.0, abs=1e-5)
    assert copied["direction_similarity"] == pytest.approx(0.0, abs=1e-5)
    assert copied["truth_l1"] > 0
    assert right["truth_dino"] is None


def test_differences_are_taken_at_the_size_of_the_truth():
    black, grey = Image.new("RGB", (4, 2)), Image.new("RGB", (2, 2), (51, 51, 51))
    assert difference_to(black, grey) == pytest.approx((0.2, 0.04))
    assert difference_to(grey, black) == pytest.approx((0.2, 0.04))


def test_what_a_task_lacks_is_not_measured(measurer, drawn):
    bare = task(0, drawn, caption=None, edited_caption=None, edited_image=None)
    half = task(1, drawn, caption=None)
    picture = Shown(to_pil(draw(drawn[2].scene)))
    (first,), (second,) = measurer.measure([bare, half], [[picture], [picture]])
    assert {name for name, value in first.items() if value is not None} == {
        "image_similarity",
        "source_l1",
    }
    assert second["direction_similarity"] is None
    assert second["caption_similarity"] is None
    assert second["edited_caption_similarity"] is not None


def test_a_pair_of_ones_own_is_held_against_its_own_source(measurer, drawn):
    source, edited = (to_pil(draw(drawn[place].scene)) for place in (1, 2))
    own, given = (
        measurer.measure([task(0, drawn)], [[shown]], drawn[:1])[0][0]
        for shown in (Shown(edited, source), Shown(edited))
    )
    assert own["image_similarity"] != pytest.approx(given["image_similarity"], abs=1e-4)
    assert own["edited_caption_similarity"] == given["edited_caption_similarity"]
    for name in ("correct", "preservation_error", "truth_l1", "truth_clip"):
        assert own[name] is None
        assert given[name] is not None


def test_answers_of_any_sizes_in_one_batch(measurer, drawn):
    small = to_pil(draw(drawn[2].scene))
    large = small.resize((96, 80))
    both, alone = (
        measurer.measure([task(0, drawn)], [shown])[0]
        for shown in ([Shown(large), Shown(small)], [Shown(small)])
    )
    assert both[1] == pytest.approx(alone[0], abs=1e-5)
    assert both[0]["truth_l1"] is not None


class _Brightness:
    """Stands in for DINO: a feature of brightness alone."""

    def encode_images(self, pictures):
        values = torch.tensor([float(np.asarray(p).mean()) for p in pictures])
        return torch.stack([values, torch.full_like(values, 100.0)], dim=-1)


def test_dino_measures_where_it_is_given(clip, drawn):
    source, truth = (to_pil(draw(s)) for s in (drawn[0].scene, drawn[0].edit.edited))
    (found,) = Measurer(clip, _Brightness()).measure([task(0, drawn)], [[Shown(source)]])
    assert found[0]["source_dino"] == pytest.approx(1.0)
    means = [float(np.asarray(picture).mean()) for picture in (source, truth)]
    vectors = [np.array([mean, 100.0]) for mean in means]
    cosine = vectors[0] @ vectors[1] / np.prod([np.linalg.norm(v) for v in vectors])
    assert found[0]["truth_dino"] == pytest.approx(cosine, abs=1e-5)
