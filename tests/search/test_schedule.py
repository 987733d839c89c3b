from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest

from ip2p_ray.errors import ConfigError
from ip2p_ray.filtering import Thresholds, rejection, select
from ip2p_ray.pairs import CandidateRequest, PairConfig, candidate_requests
from ip2p_ray.rules import SHOWN_CANDIDATES
from ip2p_ray.search.options import SearchConfig
from ip2p_ray.search.rules import chance_of_any, chance_of_better, hopeless
from ip2p_ray.search.schedule import schedule
from ip2p_ray.search.triplet import PRUNED, Searched
from ip2p_ray.testing import ScriptedGenerator

CONFIG = PairConfig(
    candidates=20, steps=10, keep=3, thresholds=Thresholds(text=0.2, image=0.2, direction=0.3)
)
TRIPLETS = [
    {"triplet_key": f"key {n}", "caption": f"a cat {n}", "edited_caption": "a dog", "more": n}
    for n in range(9)
]


def number(*parts: object) -> float:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest) / 2**32


def score(request: CandidateRequest) -> dict[str, float]:
    """Uniform in [0, 1], from the candidate alone; triplets 0 and 5 are hopeless."""
    least = 0.0 if request.triplet_key in ("key 0", "key 5") else 1.0
    names = ("caption_similarity", "edited_caption_similarity", "image_similarity")
    scores = {name: 0.2 + 0.8 * number(name, request.seed, request.index) for name in names}
    direction = least * number("direction", request.seed, request.index)
    return {**scores, "direction_similarity": direction}


def blurred(request: CandidateRequest) -> dict[str, float]:
    """A prediction: wrong by up to 0.15."""
    return {
        name: value + 0.3 * (number(name, request.seed, "blur") - 0.5)
        for name, value in score(request).items()
    }


def searched(
    options: SearchConfig,
    *,
    batch_size: int = 8,
    triplets: list[dict[str, Any]] = TRIPLETS,
    config: PairConfig = CONFIG,
    shown_below: str = "",
) -> tuple[dict[str, Searched], ScriptedGenerator]:
    generator = ScriptedGenerator(score, blurred)
    found = schedule(
        generator,
        triplets,
        config,
        options,
        "recipe",
        batch_size=batch_size,
        shown_below=shown_below,
    )
    by_key = {one.triplet["triplet_key"]: one for one in found}
    assert len(by_key) == len(triplets)
    return by_key, generator


def facts(found: dict[str, Searched]) -> dict[str, Any]:
    """All that may not depend on batches and order."""
    return {
        key: (
            one.ended,
            one.never_made,
            [(c.request, c.reason, c.similarities, c.predicted) for c in one.candidates],
        )
        for key, one in found.items()
    }


EVERYTHING = SearchConfig(
    stop_early=0.3, stop_margin=0.05, give_up=0.3, decide_every=4, share_source=2, prune_at=0.5
)
ONE_BY_ONE = [
    SearchConfig(),
    SearchConfig(stop_early=0.3, stop_margin=0.05),
    SearchConfig(give_up=0.3, decide_every=4),
    SearchConfig(share_source=3),
    SearchConfig(prune_at=0.5),
    EVERYTHING,
]


def test_with_all_options_off_every_candidate_is_made_and_selected() -> None:
    found, generator = searched(SearchConfig())
    for row in TRIPLETS:
        one = found[row["triplet_key"]]
        texts = (row["triplet_key"], row["caption"], row["edited_caption"])
        requests = candidate_requests(*texts, CONFIG, "recipe")
        assert one.triplet is row
        assert [c.request for c in one.candidates] == requests
        assert [c.similarities for c in one.candidates] == [score(r) for r in requests]
        reasons = select([score(request) for request in requests], CONFIG.thresholds, CONFIG.keep)
        assert [c.reason for c in one.candidates] == reasons
        assert {c.predicted for c in one.candidates} == {None}
        assert (one.ended, one.never_made) == ("all", 0)
    assert generator.predicted == []
    assert [len(batch) for batch in generator.finished] == [8] * 22 + [4]


@pytest.mark.parametrize("options", ONE_BY_ONE)
def test_only_kept_candidates_have_pictures_and_each_its_own(options: SearchConfig) -> None:
    found, _ = searched(options)
    candidates = [c for one in found.values() for c in one.candidates]
    assert sum(c.reason is None for c in candidates) > 3 * 3
    for c in candidates:
        assert (c.source_image is not None) == (c.edited_image is not None) == (c.reason is None)
        if c.source_image is not None and c.edited_image is not None:
            assert c.source_image[0, 0, 0] == c.request.index
            assert c.edited_image[0, 0, 0] == c.request.index + 100
            assert c.source_image.base is None  # not a view that holds a whole batch


@pytest.mark.parametrize("options", ONE_BY_ONE)
def test_what_is_made_does_not_depend_on_batches_or_order(options: SearchConfig) -> None:
    expected, _ = searched(options)
    for batch_size in (2, 5, 64):
        for order in (TRIPLETS, TRIPLETS[::-1], TRIPLETS[4:] + TRIPLETS[:4]):
            found, _ = searched(options, batch_size=batch_size, triplets=order)
            assert facts(found) == facts(expected)
    alone, _ = searched(options, triplets=TRIPLETS[3:4])
    assert facts(alone)["key 3"] == facts(expected)["key 3"]


@pytest.mark.parametrize("options", ONE_BY_ONE)
def test_batches_are_full_until_no_triplet_is_left_to_begin(options: SearchConfig) -> None:
    begun: list[int] = []
    generator = ScriptedGenerator(score, blurred)

    def coming() -> Any:
        for n in range(200):
            begun.append(len(generator.rows))
            yield {**TRIPLETS[0], "triplet_key": f"one of many {n}"}

    config = replace(CONFIG, candidates=18)
    for _ in schedule(generator, coming(), config, options, "recipe", batch_size=8):
        pass
    before = generator.rows[: begun[-1]]
    group = 1 + (options.share_source or 1)
    assert len(before) > 50
    assert all(16 - group < rows <= 16 for rows in before)
    assert max(generator.rows) <= 16


@pytest.mark.parametrize("options", ONE_BY_ONE)
def test_no_more_triplets_are_begun_than_fill_a_batch(options: SearchConfig) -> None:
    taken, ended, most = 0, 0, 0

    def coming() -> Any:
        nonlocal taken
        for n in range(300):
            taken += 1
            yield {**TRIPLETS[1], "triplet_key": f"one of many {n}"}

    generator = ScriptedGenerator(score, blurred)
    for _ in schedule(generator, coming(), CONFIG, options, "recipe", batch_size=8):
        ended += 1
        most = max(most, taken - ended)
    assert (taken, ended) == (300, 300)
    assert most <= 20


def test_a_triplet_that_is_unlikely_to_improve_is_stopped() -> None:
    full, _ = searched(SearchConfig())
    found, _ = searched(SearchConfig(stop_early=0.5, stop_margin=0.3, decide_every=4))
    ended = {key: one.ended for key, one in found.items()}
    assert set(ended.values()) == {"enough", "all"}
    assert {ended["key 0"], ended["key 5"]} == {"all"}
    for key, one in found.items():
        made = len(one.candidates)
        assert made + one.never_made == CONFIG.candidates
        assert (one.never_made > 0) == (one.ended == "enough")
        if one.never_made:
            assert made % 4 == 0
            assert sum(c.reason is None for c in one.candidates) == CONFIG.keep
        mine = [(c.request, c.similarities) for c in one.candidates]
        assert mine == [(c.request, c.similarities) for c in full[key].candidates[:made]]


def test_a_futile_triplet_is_given_up_when_the_stated_chance_falls_below_the_level() -> None:
    options = SearchConfig(give_up=0.3, decide_every=2, acceptance_prior=(0.2, 0.8))
    found, _ = searched(options)
    assert {key for key, one in found.items() if one.ended == "futile"} >= {"key 0", "key 5"}
    made = len(found["key 0"].candidates)
    chances = [
        chance_of_any(accepted=0, made=n, left=20 - n, prior=(0.2, 0.8)) for n in range(2, 20, 2)
    ]
    first = next(2 * (n + 1) for n, chance in enumerate(chances) if chance < 0.3)
    assert made == first < 20
    assert found["key 0"].never_made == 20 - made


def test_candidates_of_one_source_count_once_for_the_decision_to_stop() -> None:
    """Twins say nothing new: two decisions of 8 candidates know 4 sources, not 16 candidates."""
    options = SearchConfig(
        give_up=0.45, decide_every=8, share_source=4, acceptance_prior=(0.5, 0.5)
    )
    config = replace(CONFIG, candidates=40)
    found, _ = searched(options, config=config)
    alone, _ = searched(replace(options, share_source=None), config=config)
    chances = {
        made: chance_of_any(accepted=0, made=made // 4, left=10 - made // 4, prior=(0.5, 0.5))
        for made in range(8, 40, 8)
    }
    stop = next(made for made, chance in chances.items() if chance < 0.45)
    assert len(found["key 0"].candidates) == stop
    assert found["key 0"].ended == alone["key 0"].ended == "futile"
    assert chances[8] > chance_of_any(accepted=0, made=8, left=2, prior=(0.5, 0.5))
    assert {one.ended for one in found.values()} == {"futile", "all"}


def test_the_best_of_each_source_is_what_further_sources_are_predicted_from() -> None:
    """One source in two is excellent, with all its candidates; that is no reason to stop."""

    def by_source(request: CandidateRequest) -> dict[str, float]:
        direction = 0.9 if request.index // 4 % 2 else 0.4
        return {**score(request), "direction_similarity": direction + request.index / 1e4}

    options = SearchConfig(stop_early=0.3, stop_margin=0.02, decide_every=4, share_source=4)
    config = replace(CONFIG, candidates=40, thresholds=Thresholds(text=0, image=0, direction=0))
    generator = ScriptedGenerator(by_source)
    (one,) = schedule(generator, TRIPLETS[1:2], config, options, "recipe", batch_size=8)
    made = len(one.candidates)
    assert made > 12  # three sources at the least
    sources = [
        0.9 + (n + 3) / 1e4 if n // 4 % 2 else 0.4 + (n + 3) / 1e4 for n in range(0, made, 4)
    ]
    kept = sorted(by_source(c.request)["direction_similarity"] for c in one.candidates)[-3]
    chance = chance_of_better(
        sources, bar=kept + 0.02, made=made // 4, left=10 - made // 4, prior=(0.5, 0.5)
    )
    assert (chance < 0.3) == (one.ended == "enough")


def test_pruned_candidates_are_not_finished_and_the_rest_is_as_without() -> None:
    options = SearchConfig(prune_at=0.5)
    full, _ = searched(SearchConfig())
    found, generator = searched(options)
    finished = {r for batch in generator.finished for r in batch}
    assert sum(map(len, generator.predicted)) == 9 * 20
    lost = kept = 0
    for key, one in found.items():
        assert (one.ended, one.never_made) == ("all", 0)
        for mine, theirs in zip(one.candidates, full[key].candidates, strict=True):
            predicted = blurred(mine.request)
            assert mine.predicted == predicted
            pruned = hopeless(predicted, CONFIG.thresholds, options)
            assert (mine.reason == PRUNED) == pruned == (mine.request not in finished)
            assert mine.similarities == (None if pruned else theirs.similarities)
            right = rejection(score(mine.request), CONFIG.thresholds) is None
            lost += pruned and right
            kept += right and not pruned
    assert 0 < lost < 0.2 * kept  # wrong by more than the margin of 0.1, which is rare


def test_a_triplet_of_nothing_but_pruned_candidates_ends() -> None:
    found, generator = searched(SearchConfig(prune_at=0.5, prune_direction=0.0), batch_size=4)
    assert {c.reason for c in found["key 0"].candidates} == {PRUNED}
    assert generator.finished


def test_groups_of_one_source_stay_together() -> None:
    found, generator = searched(SearchConfig(share_source=3), batch_size=4)
    for batch in generator.finished:
        sources = {(r.triplet_key, r.seed) for r in batch}
        assert len(batch) + len(sources) <= 8
    groups = [(r.triplet_key, r.seed) for batch in generator.finished for r in dict.fromkeys(batch)]
    assert len(set(groups)) == 9 * 7  # 6 groups of 3 and one of 2
    assert [len(one.candidates) for one in found.values()] == [20] * 9
    with pytest.raises(ConfigError, match="too few for share_source 8"):
        searched(SearchConfig(share_source=8), batch_size=4)


def test_some_rejected_pictures_of_triplets_to_be_shown_come_too() -> None:
    options = SearchConfig(prune_at=0.5)
    found, _ = searched(options)
    shown, _ = searched(options, shown_below="l")  # all keys begin with a k
    assert facts(found) == facts(shown)
    for key, one in shown.items():
        for before, after in zip(found[key].candidates, one.candidates, strict=True):
            finished = after.similarities is not None
            kept = before.source_image is not None
            assert (after.source_image is not None) == (
                kept or (finished and after.request.index < SHOWN_CANDIDATES)
            )
            if after.source_image is not None:
                assert after.source_image.item(0) == after.request.index


def test_no_triplet_gives_nothing() -> None:
    found, generator = searched(EVERYTHING, triplets=[])
    assert found == {}
    assert generator.rows == []


def test_the_same_triplet_twice_is_searched_twice() -> None:
    generator = ScriptedGenerator(score, blurred)
    twice = [TRIPLETS[2], TRIPLETS[2]]
    first, second = schedule(generator, twice, CONFIG, EVERYTHING, "recipe", batch_size=8)
    assert facts({"one": first}) == facts({"one": second})


def test_what_was_begun_is_what_is_finished() -> None:
    one, other = candidate_requests("key", "a cat", "a dog", replace(CONFIG, candidates=2), "")
    with pytest.raises(ValueError, match="begun were"):
        ScriptedGenerator(score).finish([[one]], [[other]])
