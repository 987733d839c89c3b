import numpy as np
import pytest
import torch
from PIL import Image

from ip2p_ray.clip import Clip
from ip2p_ray.images import encode_png, fit_image, to_pil
from ip2p_ray.measures import Measurer, Shown, difference_to, seen
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


def ramp(width, height):
    """A picture that gets brighter to the right and bluer downwards, so that no cut hides."""
    across = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    down = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([across, across, down], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 128)])
@pytest.mark.parametrize("picture", [ramp(160, 100), ramp(75, 200)])
def test_what_an_editor_was_never_shown_does_not_count(measurer, drawn, size, picture):
    """An editor that cuts to its size and then does just what is true."""
    answer = fit_image(picture, size)
    known = task(0, drawn, source_image=stored(picture), edited_image=stored(picture))
    (found,) = measurer.measure([known], [[Shown(answer), Shown(picture)]])
    edited, copied = found
    for name in ("truth_l1", "source_l1"):
        assert edited[name] < 0.01
        assert copied[name] == 0.0
    stretched, _ = difference_to(picture, answer)  # to what the editor did not see
    assert stretched > 3 * edited["truth_l1"]
    for name in ("truth_clip", "image_similarity"):
        assert edited[name] == pytest.approx(1.0, abs=0.01)


def test_what_is_seen_is_cut_on_both_sides():
    picture = ramp(101, 50)
    assert seen(picture, (202, 100)) is picture
    assert seen(picture, (100, 50)).size == (100, 50)
    square = seen(picture, (32, 32))
    assert square.size == (50, 50)
    middle = np.asarray(picture)[:, 25:76].mean()
    assert np.asarray(square).mean() == pytest.approx(middle, abs=1.0)
    assert seen(picture, (1, 1000)).size == (1, 50)


def test_so_many_pictures_as_are_allowed_are_judged_together(clip, drawn):
    class Counting:
        most = 0

        def encode_images(self, pictures):
            self.most = max(self.most, len(pictures))
            return torch.ones(len(pictures), 2)

    judge = Counting()
    shown = [Shown(to_pil(draw(one.scene))) for one in drawn]
    tasks = [task(number, drawn) for number in range(3)]
    Measurer(clip, judge, at_a_time=2).measure(tasks, [shown] * 3)
    assert judge.most == 2
