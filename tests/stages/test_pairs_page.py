"""The pairs' page: what is counted and what is shown; no Ray is needed."""

import numpy as np
import pyarrow as pa

from ip2p_ray import storage
from ip2p_ray.filtering import Thresholds
from ip2p_ray.gallery import Bins, histogram
from ip2p_ray.pairs import PairConfig
from ip2p_ray.schema import SCORES, SIMILARITIES
from ip2p_ray.stages import pairs_page

CONFIG = PairConfig(
    self_replace=(0.0, 1.0), thresholds=Thresholds(text=0.2, image=0.5, direction=0.3)
)


def scores(tmp_path, rows):
    uri = str(tmp_path / "scores")
    whole = [
        {
            "pair_key": f"{number:04d}",
            "triplet_key": f"{number:08x}",
            **dict.fromkeys(SIMILARITIES, 0.9),
            "self_replace": 0.5,
            "index": 0,
            **row,
        }
        for number, row in enumerate(rows)
    ]
    half = len(whole) // 2
    for name, part in (("s-0", whole[:half]), ("s-1", whole[half:])):
        storage.write_shard(uri, name, pa.Table.from_pylist(part, schema=SCORES))
    return storage.list_shards(uri)


def test_every_candidate_is_counted_once_on_its_side(tmp_path):
    shards = scores(
        tmp_path,
        [
            {"image_similarity": 0.1, "reason": "image_similarity", "self_replace": 0.05},
            {"image_similarity": 0.1, "reason": "image_similarity", "self_replace": 0.95},
            {"self_replace": 0.95},
            {"self_replace": 1.0, "direction_similarity": 1.0000001},
        ],
    )
    counts, shares = pairs_page._counted(shards, CONFIG)
    assert all(counts[name].sum(1).tolist() == [2, 2] for name in SIMILARITIES)
    assert shares[:, 0].tolist() == [1, 0]
    assert shares[:, -1].tolist() == [1, 2]
    points = pairs_page._points(shares, (0.0, 1.0))
    assert np.allclose(points, [(0.05, 0.0), (0.95, 2 / 3)])


def test_the_best_the_nearest_and_some_rejected_are_chosen(tmp_path):
    shards = scores(
        tmp_path,
        [
            {"direction_similarity": 0.31},
            {"direction_similarity": 0.8},
            {"caption_similarity": 0.22},
            {"reason": "image_similarity", "image_similarity": 0.2},
            {"reason": "not_best", "triplet_key": "f" * 32},
            {"reason": "not_best", "index": 8},  # its pictures are not kept
            {"reason": "pruned"},  # it has none
        ],
    )
    best, borderline, rejected = pairs_page._chosen(shards, CONFIG, below="80000000")
    assert best["pair_key"].to_pylist() == ["0002", "0001", "0000"]
    assert borderline["pair_key"].to_pylist() == ["0000", "0002", "0001"]
    assert rejected["pair_key"].to_pylist() == ["0003"]


def test_about_so_many_triplets_keep_their_rejected_pictures():
    keys = [f"{value:032x}" for value in range(0, 2**128, 2**128 // 10_000)]
    below = pairs_page.shown_below(10_000)
    assert 40 <= sum(key < below for key in keys) <= 56
    assert all(key < pairs_page.shown_below(10) for key in keys)


def test_a_histogram_shows_the_range_that_has_values():
    counts = np.zeros((2, 1000), np.int64)
    counts[0, 600], counts[1, 650] = 3, 5
    bins = pairs_page._coarse(counts, 0.25)
    assert sum(bins.rejected) == 3
    assert sum(bins.kept) == 5
    first = next(place for place, count in enumerate(bins.rejected) if count)
    last = next(place for place, count in enumerate(bins.kept) if count)
    assert bins.start + first * bins.width <= 0.2 < bins.start + (first + 1) * bins.width + 1e-9
    assert bins.start + last * bins.width <= 0.3 < bins.start + (last + 1) * bins.width + 1e-9
    drawn = histogram(bins, x_label="image_similarity")
    assert drawn.count("<rect") == 2
    assert "at least 0.25" in drawn
    assert ">image similarity<" in drawn


def test_a_histogram_of_nothing_is_drawn():
    bins = pairs_page._coarse(np.zeros((2, 1000), np.int64), 0.2)
    assert "<rect" not in histogram(bins, x_label="x")
    far = Bins(start=0, width=1, rejected=[0], kept=[0], threshold=9)
    assert "<svg" in histogram(far, x_label="x")
    assert "at least" not in histogram(far, x_label="x")
