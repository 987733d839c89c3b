import re

import pytest

from ip2p_ray import storage
from ip2p_ray.images import decode_image
from ip2p_ray.schema import CANDIDATES, PAIRS, REJECTS, SCORES
from ip2p_ray.stages.run import locked
from ip2p_ray.testing import FaultyWay, WayFaults
from ip2p_ray.testing.pairs import dataset_of, write_triplets
from jobs.generate_pairs import GeneratePairs, _settings
from tests.jobs.running import Job, refused

run_job = Job("generate_pairs.py").run

FLAGS = {
    *("--triplets", "--out", "--preset", "--dry-run", "--generator", "--judge", "--dtype"),
    *("--vae", "--resolution", "--steps", "--sampler", "--candidates", "--self-replace"),
    *("--guidance-scale", "--cross-replace", "--keep", "--image-format", "--text", "--image"),
    *("--direction", "--limit", "--max-reject-share", "--actors", "--most-actors", "--gpus"),
    *("--cpus", "--batch-size", "--decode-batch", "--channels-last", "--compile"),
    *("--judge-actors", "--judge-gpus", "--judge-batch", "--stop-early", "--stop-margin"),
    *("--actor-resources", "--judge-resources"),
    *("--cpu-actors", "--cpu-actor-cpus", "--most-judges", "--judge-cpus"),
    *("--give-up", "--acceptance-prior", "--decide-every", "--share-source", "--prune-at"),
    *("--prune-text", "--prune-image", "--prune-direction"),
}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""


def test_the_flags_are_those_that_were_promised():
    done = run_job("--help")
    assert done.returncode == 0
    assert set(re.findall(r"--[a-z][a-z-]+", done.stdout)) - {"--help"} == FLAGS


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--out", "x"], "--triplets"),
        (["--triplets", "t", "--actors", "0"], "--actors is at least 1"),
        (["--triplets", "t", "--actors", "3", "--most-actors", "2"], "--most-actors is at least"),
        (["--triplets", "t", "--max-reject-share", "1.5"], "--max-reject-share lies in [0, 1]"),
        (
            ["--triplets", "t", "--give-up", "0.1", "--judge-actors", "1"],
            "--give-up needs --judge-actors 0",
        ),
        (["--triplets", "t", "--cpu-actors", "1"], "stands beside actors with --gpus"),
        (["--triplets", "t", "--actor-resources", "gen"], "gen: give NAME=AMOUNT, such as"),
        (
            ["--triplets", "t", "--judge-actors", "0", "--judge-resources", "clip=1"],
            "--judge-actors 0 judges where pictures are made",
        ),
        (["--triplets", "t", "--most-judges", "2", "--judge-actors", "3"], "--most-judges is at"),
        (["--triplets", "t", "--self-replace", "0.9", "0.1"], "self_replace must be 0 <= from"),
        (["--triplets", "t", "--text", "nan"], "text"),
        (["--triplets", "t", "--stop-early", "2"], "stop_early must lie in (0, 1)"),
        (["--triplets", "t", "--stop-margin", "0.3"], "stop_margin means nothing without"),
        (["--triplets", "https://host/t"], "a folder here or s3://bucket/folder"),
        (["--triplets", "t", "--out", "s3://"], "--out s3:// names no bucket"),
        (["--triplets", "t", "--sampler", "heun"], "--sampler"),
        (["--triplets", "t", "--candidats", "3"], "--candidats"),
    ],
)
def test_a_wrong_flag_is_told_in_a_sentence(flags, told):
    done = run_job(*flags)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_dataset_and_a_folder_in_use_end_it_before_anything_starts(tmp_path):
    done = run_job("--triplets", tmp_path / "no", "--out", tmp_path)
    assert done.returncode == 1
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr
    write_triplets(str(tmp_path / "triplets"), 3)
    with locked(tmp_path):
        done = run_job("--triplets", tmp_path / "triplets", "--out", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"generate_pairs: another run is working in {tmp_path}")


@pytest.mark.timeout(900)
def test_what_a_bucket_refuses_is_one_sentence_before_a_model_is_looked_for(bucket, tmp_path):
    write_triplets(str(tmp_path / "triplets"), 3)
    for flags, refusal, told in refused(bucket, "--triplets", tmp_path / "triplets"):
        with FaultyWay("http://127.0.0.1:9", WayFaults(refusal=refusal)) as way:
            environment = {"AWS_ENDPOINT_URL": way.url} if refusal else {}
            done = run_job(*flags, "--generator", tmp_path / "none", **environment)
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith("generate_pairs: s3://")
        assert told in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "judges"),
    [
        ({}, 1),
        ({"give_up": 0.1}, None),
        ({"preset": "paper"}, None),  # 157 MB of pixels to each triplet
        ({"preset": "fast"}, None),
        ({"preset": "paper", "judge_actors": 2}, 2),
        ({"preset": "paper", "judge_gpus": 0.25, "gpus": 0.75}, 1),
        ({"preset": "paper", "compile": True}, 1),
    ],
)
def test_pictures_too_large_to_carry_are_judged_where_they_are_made(flags, judges):
    config, making = _settings(GeneratePairs(triplets="t", **flags))
    assert (making.judges.actors if making.judges else None) == judges
    assert (making.store_bytes(config) > 0) == (judges is not None)


@pytest.fixture(scope="module")
def flags(tiny_weights):
    """Of a run on models that are random, small and quick."""
    return [
        *("--generator", tiny_weights / "generator", "--judge", tiny_weights / "judge"),
        *("--steps", 2, "--resolution", 64, "--candidates", 3, "--keep", 2, "--batch-size", 4),
        *("--text", -1, "--image", -1, "--direction", -1, "--image-format", "jpeg"),
    ]


@pytest.mark.ray
def test_a_run_tells_its_plan_makes_pairs_and_goes_on_with_other_workers(flags, tmp_path):
    write_triplets(str(tmp_path / "triplets"), 6)
    asked = ["--triplets", tmp_path / "triplets", "--out", tmp_path, *flags]
    plan = run_job(*asked, "--dry-run")
    assert plan.returncode == 0, plan.stderr
    assert "plan: 6 triplets, 18 candidates, at most 12 pairs" in plan.stdout
    assert re.search(r"4 at a time \(measured over a batch\)", plan.stdout)
    assert not (tmp_path / "candidates").exists()

    done = run_job(*asked, "--actors", 1)
    assert done.returncode == 0, done.stderr
    assert "pairs: kept 12 of 18 (67 %); rejected not_best 6" in done.stdout
    pairs = storage.read_dataset(str(tmp_path / "pairs"), PAIRS).to_pylist()
    assert len(pairs) == 12
    for row in pairs:
        assert row["edited_image"]["bytes"][:2] == b"\xff\xd8"
        assert decode_image(row["edited_image"]["bytes"]).size == (64, 64)
    scores = storage.read_dataset(str(tmp_path / "scores"), SCORES)
    assert scores.num_rows == 18
    rows = storage.read_dataset(str(tmp_path / "candidates"), CANDIDATES).to_pylist()
    seconds = sum(row["seconds"] for row in rows)
    assert seconds > 0
    told = storage.read_manifest(str(tmp_path / "pairs")).device_seconds
    assert told == pytest.approx(seconds, abs=0.01)
    assert re.search(
        r"memory at most: driver [\d.]+ .B, object store \S+ \S+, GenerateCandidates [\d.]+ .B, "
        r"JudgeCandidates [\d.]+ .B",
        done.stdout,
    )
    assert not (tmp_path / ".plan").exists()
    page = (tmp_path / "pairs.html").read_text()
    assert "12 of 18 candidates were kept" in page
    assert page.count("data:image/jpeg;base64,") == 2 * (12 + 12 + 6)

    again = run_job(*asked, "--actors", 2)
    assert again.returncode == 0, again.stderr
    assert "candidates: there already, 6 rows" in again.stdout
    assert "plan:" not in again.stdout
    other = run_job(*asked, "--steps", 3)
    assert other.returncode == 1
    assert "was made differently (steps 2 there, 3 now)" in other.stderr


@pytest.mark.ray
def test_what_is_unusable_can_be_read_though_the_plan_already_fails(flags, tmp_path):
    dataset_of(str(tmp_path / "triplets"), [("a", "b", "c"), ("a", "b", "c"), ("d", "e", "f")])
    done = run_job("--triplets", tmp_path / "triplets", "--out", tmp_path, *flags, "--dry-run")
    assert done.returncode == 1
    place = re.search(r"which, is in (\S+);", done.stderr)[1]
    rejects = storage.read_dataset(place, REJECTS).to_pylist()
    assert [(row["reason"], row["detail"]) for row in rejects] == [("duplicate", "a | b | c")]


@pytest.mark.ray
def test_a_model_that_is_not_there_is_named(flags, tmp_path):
    write_triplets(str(tmp_path / "triplets"), 2)
    flags = ["--triplets", tmp_path / "triplets", "--out", tmp_path, *flags[2:]]
    done = run_job(*flags, "--generator", tmp_path / "no")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"generate_pairs: no model folder {tmp_path / 'no'}: give a diffusers folder or a hub id"
    )


@pytest.mark.ray
def test_options_spare_work_and_are_part_of_the_recipe(flags, tmp_path):
    write_triplets(str(tmp_path / "triplets"), 5)
    asked = ["--triplets", tmp_path / "triplets", "--out", tmp_path, *flags]
    asked += ["--candidates", 12, "--judge-actors", 0, "--actors", 1]
    options = ["--share-source", 2, "--stop-early", 0.9, "--stop-margin", 0.5, "--decide-every", 6]
    done = run_job(*asked, *options)
    assert done.returncode == 0, done.stderr
    assert "plan: what the options spare comes off that" in done.stdout
    rows = storage.read_dataset(str(tmp_path / "candidates"), CANDIDATES).to_pylist()
    assert len(rows) == 5
    for row in rows:
        made = row["candidates"]
        assert row["status"] == ("enough" if len(made) == 6 else "ok")
        assert len({candidate["seed"] for candidate in made}) == len(made) / 2
        assert sum(candidate["reason"] is None for candidate in made) == 2
    assert any(row["status"] == "enough" for row in rows)
    other = run_job(*asked)
    assert other.returncode == 1
    assert "was made differently" in other.stderr
