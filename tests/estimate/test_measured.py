import json
import os
import shutil

import pytest

from ip2p_ray import filtering, notes, storage
from ip2p_ray.errors import ConfigError, DatasetError
from ip2p_ray.estimate import devices, measured
from ip2p_ray.estimate.config import EXPLODED, Cluster
from ip2p_ray.estimate.measured import read, workload
from ip2p_ray.stages import report
from tests.estimate.made_run import made_run

MADE_ON = Cluster(generators=2, judges=1, trainers=2, editors=2)


def test_the_names_are_those_of_the_stages():
    assert measured.NOT_BEST == filtering.NOT_BEST
    for stage, names in report.STAGES.items():
        # the queue is read beside what the report tells
        assert set(names) <= set(measured.DATASETS[stage])


def test_speeds_by_hand(tmp_path):
    run = read([made_run(tmp_path)], MADE_ON)
    seconds = {name: speed.seconds for name, speed in run.speeds.items()}
    assert seconds["caption"] == pytest.approx(10 / 20)
    assert seconds["candidate_step"] == pytest.approx(60 / 100 / 10)
    assert seconds["latent"] == pytest.approx(1 / 4)
    # 10 steps of 8 at 8 images/s and 10 at 16, by two workers
    assert seconds["sample"] == pytest.approx((10 + 5) * 2 / 160)
    # two actors; after the first shard of each 20 answers came in 5 s, of 4 steps each
    assert seconds["answer_step"] == pytest.approx(5 / 20 * 2 / 4)


def test_a_run_in_a_bucket_has_the_same_sizes_and_amounts(tmp_path, bucket):
    here = read([made_run(tmp_path)], MADE_ON)
    storage.upload(tmp_path, f"{bucket}/run")
    there = read([f"{bucket}/run"], MADE_ON)
    assert there.sizes == here.sizes
    assert (there.sizes["checkpoint"], there.sizes["editor"]) == (4_000, 500)
    assert workload(there, captions=7) == workload(here, captions=7)
    for name in ("candidate_step", "sample"):
        assert there.speeds[name].seconds == here.speeds[name].seconds


def test_what_is_left_of_the_wall_time_is_fixed(tmp_path):
    run = read([made_run(tmp_path)], MADE_ON)
    assert run.fixed == pytest.approx(
        {
            "captions": 1.0,
            "triplets": 26 - 40 * 0.5,
            "pairs": 41 - 60 / 2 - 100 * EXPLODED.seconds / 8,
            "latents": 9 - 36 / 4,
            "training": 30 - 15,
            "evaluation": 20.5 - 40 * 0.25,
        }
    )
    assert run.start == pytest.approx(6.0)
    assert run.walls["pairs"] == 41


def test_the_workload_is_what_was_asked_and_what_survived(tmp_path):
    run = read([made_run(tmp_path)], MADE_ON)
    work = workload(run, captions=1_000, steps=None)
    assert (work.captions, work.reply_share) == (1_000, 0.5)
    assert (work.candidates, work.steps, work.keep) == (5, 10, 4)
    assert work.acceptance == pytest.approx((40 + 10) / 100)  # ten were only not the best
    assert work.held_out == pytest.approx(4 / 40)
    assert (work.train_steps, work.batch_size) == (20, 8)
    assert (work.answers, work.answer_steps) == (40, 4)


def test_sizes_are_of_rows_and_not_of_footers(tmp_path):
    run = read([made_run(tmp_path)], MADE_ON)
    sizes = run.sizes_or(None)
    assert 100 < sizes.caption < 120
    assert sizes.score == pytest.approx(sizes.caption, rel=0.1)
    assert (sizes.checkpoint, sizes.editor) == (4_000, 500)
    assert sizes.picture < 5  # a pair's row is no larger than a score's


def test_shards_of_one_time_leave_nothing_fixed(tmp_path):
    uri = made_run(tmp_path)
    for path in (tmp_path / "replies").glob("*.parquet"):
        os.utime(path, (5.0, 5.0))
    run = read([uri], MADE_ON)
    assert run.speeds["caption"].seconds == pytest.approx(25 / 40)
    assert "the start included" in run.speeds["caption"].source
    assert run.fixed["triplets"] == pytest.approx(1.0)  # triplets and their rejects


def test_more_actors_than_shards_is_no_steady_part(tmp_path):
    run = read([made_run(tmp_path)], Cluster(editors=4, generators=2, trainers=2))
    assert "the start included" in run.speeds["answer_step"].source
    assert run.speeds["answer_step"].seconds == pytest.approx(20 / 40 * 4 / 4)


def test_what_attempts_noted_counts_before_the_times_of_files(tmp_path):
    uri = made_run(tmp_path)
    note = {"dataset": "latents", "attempts": [9.0], "now": {"busy": {"EncodePairs": 7.2}}}
    (tmp_path / "latents" / notes.ORIGIN).write_text(json.dumps(note))
    run = read([uri], MADE_ON)
    assert run.speeds["latent"].seconds == pytest.approx(7.2 / 36)
    assert run.fixed["latents"] == pytest.approx(9.0 - 7.2)
    assert "start included" not in run.speeds["latent"].source


def test_stages_of_several_folders_and_of_a_table(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    made_run(first)
    made_run(second)
    shutil.rmtree(first / "answers")
    alone = read([str(first)], MADE_ON)
    with pytest.raises(ConfigError, match="speed of answer_step: give a --device too"):
        alone.speeds_or(None)
    with pytest.raises(ConfigError, match="size of answer"):
        alone.sizes_or(None)
    table = devices.reckon("h100")
    assert alone.speeds_or(table).answer_step == table.answer_step
    assert alone.speeds_or(table).latent == alone.speeds["latent"]
    assert alone.speeds_or(table).fixed["evaluation"] == table.fixed["evaluation"]
    both = read([str(first), str(second)], MADE_ON)
    assert both.speeds_or(None).answer_step.source.startswith("measured")
    assert both.places["answers"].startswith(str(second))


def test_an_endpoint_has_no_speed_of_its_own(tmp_path):
    uri = made_run(tmp_path)
    manifest = tmp_path / "replies" / "_manifest.json"
    manifest.write_text(manifest.read_text().replace('"config": {}', '"config": {"model": "m"}'))
    run = read([uri], MADE_ON)
    assert run.speeds["caption"] is None
    assert run.fixed["triplets"] == pytest.approx(26.0)


def test_a_run_that_went_on_later_says_nothing_of_its_start(tmp_path):
    uri = made_run(tmp_path)
    os.utime(tmp_path / ".lock", (1_000_100.0, 1_000_100.0))
    assert read([uri], MADE_ON).start == 0.0


def test_nothing_there_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="no whole dataset of the flow"):
        read([str(tmp_path)], MADE_ON)


def test_training_without_metrics_is_refused(tmp_path):
    uri = made_run(tmp_path)
    (tmp_path / "checkpoints" / "metrics.jsonl").unlink()
    with pytest.raises(DatasetError, match=r"metrics\.jsonl has no line"):
        read([uri], MADE_ON)
