"""Scores judged again, against judging them so from the start; no Ray is started here."""

import io
import itertools
import random
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ip2p_ray import storage
from ip2p_ray.errors import ConfigError, DatasetError, StageError
from ip2p_ray.filtering import NOT_BEST, Thresholds, select
from ip2p_ray.rules import NO_PICTURE, Rules
from ip2p_ray.schema import (
    PAIRS,
    REJECTS,
    SCORES,
    SIMILARITIES,
    caption_key,
    pair_key,
    split_of,
    triplet_key,
)
from ip2p_ray.stages import run
from ip2p_ray.stages.filtering import rejudge_pairs, stored_rules, whole_triplets
from ip2p_ray.testing import killed_at

FIRST = Rules(thresholds=Thresholds(text=0.2, image=0.75, direction=0.2), keep=2)
CANDIDATES = 6


def picture(colour):
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(stream, format="PNG")
    return {"bytes": stream.getvalue(), "path": None}


def candidates(triplets=12, seed=0):
    """All candidates with all their pictures, triplet by triplet."""
    draw = random.Random(seed)
    rows = []
    for number in range(triplets):
        texts = (f"cat {number}", "make it a dog", f"dog {number}")
        key = triplet_key(*texts)
        for index in range(CANDIDATES):
            scores = (draw.uniform(0.1, 0.4), draw.uniform(0.1, 0.4), draw.uniform(0.6, 1))
            row = dict(zip(SIMILARITIES, (*scores, draw.uniform(0.1, 0.4)), strict=True))
            row |= dict(zip(("caption", "instruction", "edited_caption"), texts, strict=True))
            row |= {"triplet_key": key, "caption_key": caption_key(texts[0]), "writer": "w"}
            row |= {"split": split_of(key, 0.3), "recipe": "r", "index": index, "seed": index}
            row |= {"self_replace": 0.5, "guidance_scale": 9.0}
            row |= {"pair_key": pair_key(key, index, "r")}
            row |= {"source_image": picture((number, index, 0))}
            rows.append(row | {"edited_image": picture((number, index, 255))})
    return rows


def judged(rows, rules):
    """The rows with the reasons that the rules give."""
    found = []
    for _, same in itertools.groupby(rows, key=lambda row: row["triplet_key"]):
        same = list(same)
        reasons = select(same, rules.thresholds, rules.keep)
        found += [row | {"reason": why} for row, why in zip(same, reasons, strict=True)]
    return found


def write(folder, dataset, schema, rows, config, shards=3):
    """The dataset with its rows spread over shards, made as the stages make theirs."""
    uri = storage.join(folder, dataset)
    size = -(-len(rows) // shards) or 1

    def build():
        for number in range(shards):
            part = rows[number * size : (number + 1) * size]
            part = [{name: row.get(name) for name in schema.names} for row in part]
            table = pa.Table.from_pylist(part, schema=schema)
            storage.write_shard(uri, f"{dataset.split('/')[0]}-{number:05d}", table)
        return []

    run.make(uri, run.Origin(dataset=dataset, config=config), build)


def write_scored(folder, rows, rules=FIRST, rejects=()):
    """What the generation of pairs leaves: all scores, the pairs that were kept, and rejects."""
    found = judged(rows, rules)
    config = {"thresholds": vars(rules.thresholds), "keep": rules.keep}
    write(folder, "scores", SCORES, found, config)
    write(folder, "pairs", PAIRS, [row for row in found if row["reason"] is None], config)
    dropped = [
        {"stage": "pairs", "key": row["pair_key"], "reason": row["reason"]}
        for row in found
        if row["reason"] is not None
    ]
    write(folder, "rejects/pairs", REJECTS, [*dropped, *rejects], config)
    return found


def read(folder, name, schema):
    return storage.read_dataset(storage.join(folder, name), schema).to_pylist()


@pytest.fixture
def folders(tmp_path):
    return str(tmp_path / "scored"), str(tmp_path / "again")


OTHERS = [
    Rules(thresholds=Thresholds(text=0.15, image=0.7, direction=0.15), keep=4),  # looser
    Rules(thresholds=Thresholds(text=0.2, image=0.75, direction=0.2), keep=1),  # fewer
    Rules(thresholds=Thresholds(text=0.2, image=0.8, direction=0.22), keep=2),  # stricter
    Rules(thresholds=Thresholds(text=0.1, image=0.6, direction=0.1), keep=None),
    FIRST,
]


@pytest.mark.parametrize("rules", OTHERS, ids=Rules.line)
def test_scores_judged_again_are_those_of_judging_so_at_once(folders, rules):
    scored, out = folders
    rows = candidates()
    before = {r["pair_key"] for r in write_scored(scored, rows) if r["reason"] is None}
    manifest = rejudge_pairs(scored, out, rules)
    # Of all candidates the best are accepted; where they have no pictures, the best that do.
    of_all = {row["pair_key"]: row["reason"] for row in judged(rows, rules)}
    pictured = judged([row for row in rows if row["pair_key"] in before], rules)
    expected = {key: reason or NO_PICTURE for key, reason in of_all.items()}
    expected |= {row["pair_key"]: row["reason"] for row in pictured}
    scores = read(out, "scores", SCORES)
    assert {row["pair_key"]: row["reason"] for row in scores} == expected
    assert len(scores) == len(rows)
    kept = {key for key, reason in expected.items() if reason is None}
    pairs = read(out, "pairs", PAIRS)
    assert {row["pair_key"] for row in pairs} == kept
    assert len(pairs) == len(kept) == manifest.rows
    stored = {row["pair_key"]: row for row in read(scored, "pairs", PAIRS)}
    assert all(row == stored[row["pair_key"]] for row in pairs)
    rejects = read(out, "rejects/pairs", REJECTS)
    assert {row["key"]: row["reason"] for row in rejects} == {
        key: reason for key, reason in expected.items() if reason is not None
    }
    [report] = manifest.reports
    assert report["rows_in"] == len(rows)
    assert report["rows_out"] == len(kept)
    assert stored_rules(out) == rules


def test_the_same_rules_again_give_the_same_funnel(folders, caplog):
    scored, out = folders
    caplog.set_level("INFO", logger="ip2p_ray")
    found = write_scored(scored, candidates())
    manifest = rejudge_pairs(scored, out, FIRST)
    before = Counter(row["reason"] for row in found if row["reason"] is not None)
    assert before[NOT_BEST]
    assert manifest.reports[0]["rejected"] == before
    assert read(out, "scores", SCORES) == read(scored, "scores", SCORES)
    assert "no pictures" not in caplog.text


def test_only_the_best_of_those_without_pictures_are_said_to_lack_them(folders):
    scored, out = folders
    rows = candidates(1)
    for row, direction in zip(rows, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4), strict=True):
        row |= {**dict.fromkeys(SIMILARITIES, 0.9), "direction_similarity": direction}
    for place in (0, 2, 4):
        rows[place]["image_similarity"] = 0.7  # so the first rules keep 1 and 3
    write_scored(scored, rows)
    rejudge_pairs(scored, out, Rules(thresholds=Thresholds(image=0.6), keep=3))
    scores = read(out, "scores", SCORES)
    assert [row["reason"] for row in scores] == [
        *(NO_PICTURE, None, NO_PICTURE, None),
        *(NOT_BEST, NOT_BEST),
    ]


def test_what_has_no_pictures_is_counted_and_told(folders, caplog):
    scored, out = folders
    caplog.set_level("INFO", logger="ip2p_ray")
    write_scored(scored, candidates())
    manifest = rejudge_pairs(scored, out, OTHERS[3])
    missing = manifest.reports[0]["rejected"][NO_PICTURE]
    assert missing == 72 - manifest.rows
    [told] = [text for text in caplog.messages if "no pictures" in text]
    assert told.startswith(f"pairs: {missing} candidates that are among the best by these rules")
    assert "generate pairs by these rules" in told


def test_a_split_stays_in_its_own_shards(folders):
    scored, out = folders
    write_scored(scored, candidates(40))
    rejudge_pairs(scored, out, FIRST)
    for split in ("train", "held_out"):
        rows = pq.read_table(f"{out}/pairs/{split}-00000.parquet")["split"].to_pylist()
        assert set(rows) == {split}


def test_candidates_that_were_never_scored_and_other_rejects_stay_as_they_are(folders):
    scored, out = folders
    rows = candidates(2)
    pruned = {**rows[3], **dict.fromkeys(SIMILARITIES), "reason": "pruned"}
    found = judged([row for row in rows if row is not rows[3]], FIRST)
    found.insert(3, pruned)
    config = {}
    write(scored, "scores", SCORES, found, config)
    write(scored, "pairs", PAIRS, [row for row in found if row["reason"] is None], config)
    others = [
        {"stage": "pairs", "key": "t1", "reason": "broken_row", "detail": "why"},
        {"stage": "pairs", "key": pruned["pair_key"], "reason": "pruned", "detail": None},
    ]
    write(scored, "rejects/pairs", REJECTS, others, config)
    manifest = rejudge_pairs(scored, out, OTHERS[0])
    assert manifest.reports[0]["rejected"]["pruned"] == 1
    assert manifest.reports[0]["rejected"]["broken_row"] == 1
    rejects = read(out, "rejects/pairs", REJECTS)
    assert [row for row in rejects if row["reason"] in ("pruned", "broken_row")] == [
        {**others[1], "detail": None},
        others[0],
    ]
    assert stored_rules(scored) is None


def test_similarities_without_captions_are_judged_by_what_there_is(folders):
    scored, out = folders
    rows = candidates(3)
    for row in rows:
        row |= dict.fromkeys(("caption_similarity", "direction_similarity", "index"))
    write_scored(scored, rows, Rules(thresholds=Thresholds(), keep=None))
    rejudge_pairs(scored, out, Rules(thresholds=Thresholds(image=0.9), keep=None))
    pairs = read(out, "pairs", PAIRS)
    assert pairs
    assert all(row["image_similarity"] >= 0.9 for row in pairs)


def test_the_same_command_again_finds_it_there_and_another_is_refused(folders, caplog):
    scored, out = folders
    caplog.set_level("INFO", logger="ip2p_ray")
    write_scored(scored, candidates())
    first = rejudge_pairs(scored, out, OTHERS[0])
    assert rejudge_pairs(scored, out, OTHERS[0]) == first
    assert "pairs: there already, " in caplog.text
    with pytest.raises(DatasetError, match="made differently"):
        rejudge_pairs(scored, out, OTHERS[1])
    with pytest.raises(DatasetError, match="made differently"):
        rejudge_pairs(scored, scored, OTHERS[1])


def test_judging_what_was_judged_again_is_judging_once(folders, tmp_path):
    scored, out = folders
    write_scored(scored, candidates())
    rejudge_pairs(scored, out, OTHERS[0])
    rejudge_pairs(out, str(tmp_path / "twice"), OTHERS[2])
    rejudge_pairs(scored, str(tmp_path / "once"), OTHERS[2])
    names = ("pair_key", "reason")
    twice, once = (
        [tuple(row[name] for name in names) for row in read(tmp_path / which, "scores", SCORES)]
        for which in ("twice", "once")
    )
    kept = {key for key, reason in twice if reason is None}
    assert kept <= {key for key, reason in once if reason is None}
    assert {key for key, why in twice if why not in (None, NO_PICTURE)} == {
        key for key, why in once if why not in (None, NO_PICTURE)
    }


@pytest.mark.slow
def test_a_kill_anywhere_loses_nothing_and_leaves_nothing_half(folders, tmp_path):
    scored, _ = folders
    write_scored(scored, candidates(4))
    truth = str(tmp_path / "truth")
    rejudge_pairs(scored, truth, OTHERS[0])
    for event in itertools.count(0, 5):
        out = str(tmp_path / f"killed-{event}")
        killed = killed_at(event, lambda out=out: rejudge_pairs(scored, out, OTHERS[0]))
        rejudge_pairs(scored, out, OTHERS[0])
        for name, schema in (("scores", SCORES), ("pairs", PAIRS), ("rejects/pairs", REJECTS)):
            assert read(out, name, schema) == read(truth, name, schema)
        if not killed:
            break
    assert event > 20


def test_nothing_accepted_says_which_threshold_it_was(folders):
    scored, out = folders
    write_scored(scored, candidates())
    strict = Rules(thresholds=Thresholds(text=-1, image=-1, direction=0.9))
    with pytest.raises(StageError, match=r"72 by direction_similarity below 0\.9") as raised:
        rejudge_pairs(scored, out, strict)
    assert f"Their scores are in {scored}/scores; " in str(raised.value)
    # It advises to lower the threshold, so that has to go in the folder that was given.
    assert rejudge_pairs(scored, out, FIRST).rows


def test_foreign_files_are_never_deleted(folders, tmp_path):
    scored, out = folders
    write_scored(scored, candidates(2))
    mine = tmp_path / "again" / "pairs" / "mine.parquet"
    mine.parent.mkdir(parents=True)
    pq.write_table(pa.table({"a": [1]}), mine)
    with pytest.raises(ConfigError, match=r"is not empty \(mine.parquet is in it\)"):
        rejudge_pairs(scored, out, FIRST)
    assert mine.exists()


def test_scores_or_pairs_that_are_missing_or_cut_are_named(folders):
    scored, out = folders
    with pytest.raises(DatasetError, match="scored/scores does not exist"):
        rejudge_pairs(scored, out, FIRST)
    write_scored(scored, candidates(2))
    shard = storage.local_path(f"{scored}/pairs/pairs-00000.parquet")
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(DatasetError, match=r"pairs-00000\.parquet is missing or changed"):
        rejudge_pairs(scored, out, FIRST)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_tables_are_cut_between_triplets(size):
    keys = [f"{number:032x}" for number in (1, 1, 2, 3, 3, 3, 3, 4)]
    whole = pa.table({"triplet_key": keys})
    tables = (whole.slice(start, size) for start in range(0, len(keys), size))
    found = [table["triplet_key"].to_pylist() for table in whole_triplets(tables, "here")]
    assert list(itertools.chain(*found)) == keys
    ends = [(left[-1], right[0]) for left, right in itertools.pairwise(found)]
    assert all(left != right for left, right in ends)


def test_a_triplet_in_two_places_is_told():
    keys = [f"{number:032x}" for number in (1, 2, 1)]
    with pytest.raises(DatasetError, match="in several places"):
        list(whole_triplets(iter([pa.table({"triplet_key": keys})]), "here"))


def test_rules_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="keep is at least 1, got 0"):
        Rules(thresholds=Thresholds(), keep=0)
    assert Rules(thresholds=Thresholds()).changed(image=0.7, keep=1) == Rules(
        thresholds=Thresholds(image=0.7), keep=1
    )
