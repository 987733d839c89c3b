import dataclasses
import json
import shutil

import pytest

from ip2p_ray import presets, storage
from ip2p_ray.answerers import EditorAnswerer
from ip2p_ray.errors import ConfigError
from ip2p_ray.generator import GeneratorWeights
from ip2p_ray.intervals import BootstrapConfig
from ip2p_ray.stages.run import Resources
from ip2p_ray.stages.trial_report import write_report
from ip2p_ray.stages.trial_tasks import DRAWN, TaskSource
from ip2p_ray.stages.trials import Contest, Judges, run_contest
from ip2p_ray.trials import ANSWERED, BASELINES, SCORED, TrialConfig

pytestmark = pytest.mark.ray

TRIALS = TrialConfig(
    curve_tasks=1, image_guidance_scales=(1.0, 2.0), strengths=(0.5,), self_replaces=(0.5,)
)
SOURCE = TaskSource(data=DRAWN, tasks=3)


@pytest.fixture(scope="module")
def contest(tiny_weights):
    preset = presets.miniature(tiny_weights)
    return Contest(
        editors={"mine": str(tiny_weights)},
        generator=GeneratorWeights(source=preset.generator),
        pairs=dataclasses.replace(preset.pairs, steps=2),
        judges=Judges(clip=preset.judge),
        trials=TRIALS,
        steps=2,
        answering=Resources(actors=1, batch_size=4),
        judging=Resources(actors=1),
        tasks_at_a_time=2,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("contest")


@pytest.fixture(scope="module")
def won(local_ray, contest, folder):
    return run_contest(SOURCE, str(folder), contest)


def test_everyone_answers_every_task_and_the_first_at_every_point(won):
    counts = {}
    for row in won.rows:
        counts.setdefault(row["answerer"], []).append(row["number"])
    assert list(counts) == ["mine", *BASELINES]
    assert sorted(counts.pop("mine")) == [0, 0, 0, 1, 2]
    assert all(sorted(numbers) == [0, 1, 2] for numbers in counts.values())


def test_the_known_answers_have_the_known_scores(won):
    by_answerer = {name: [row for row in won.rows if row["answerer"] == name] for name in BASELINES}
    assert {row["correct"] for row in by_answerer["truth"]} == {1.0}
    assert {row["correct"] for row in by_answerer["copy_input"]} == {0.0}
    for row in by_answerer["copy_input"]:
        assert row["image_similarity"] == pytest.approx(1.0, abs=1e-5)
    for row in by_answerer["another_picture"]:
        assert row["source_l1"] > 0
    assert {row["correct"] for row in by_answerer["generated_pair"]} == {None}


def test_scores_are_a_table_of_an_answer_a_row(won, folder):
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "scores.parquet")
    assert table.schema.names == SCORED.names
    assert table.num_rows == len(won.rows)


def test_another_editor_is_made_beside_what_is_there(won, contest, folder, tiny_weights):
    other = folder.parent / "other" / "editor"
    EditorAnswerer(source=str(tiny_weights), trials=TRIALS).editor().save(other)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("answers/*/_manifest.json")}
    both = dataclasses.replace(contest, editors={**contest.editors, "other": str(other)})
    found = run_contest(SOURCE, str(folder), both)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("answers/*/_manifest.json")}
    assert before.items() < after.items()
    assert len(after) == len(before) + 1
    mine = [row for row in found.rows if row["answerer"] == "mine"]
    assert mine == [row for row in won.rows if row["answerer"] == "mine"]
    # it is the same editor in another folder
    other_rows = [row for row in found.rows if row["answerer"] == "other"]
    for left, right in zip(mine, other_rows, strict=True):
        assert left["direction_similarity"] == pytest.approx(
            right["direction_similarity"], abs=0.02
        )
    metrics = write_report(
        str(folder), SOURCE, both, found, BootstrapConfig(resamples=100), shown=2
    )
    assert set(metrics["differences_to_first"]) == {"other"}


def test_two_names_of_one_editor_are_refused(contest, tiny_weights, folder):
    copy = folder.parent / "copy"
    shutil.copytree(tiny_weights, copy)
    twice = dataclasses.replace(contest, editors={**contest.editors, "copy": str(copy)})
    with pytest.raises(ConfigError, match="two of the editors are the same: mine, copy"):
        run_contest(SOURCE, str(folder), twice)


def test_a_lost_part_is_made_again_and_the_same(won, contest, folder):
    uri = storage.local_path(won.answers["mine"])
    kept = storage.read_dataset(uri, ANSWERED).sort_by("task_key").to_pylist()
    shutil.rmtree(uri)
    for path in (folder / "measured").iterdir():
        shutil.rmtree(path)
    again = run_contest(SOURCE, str(folder), contest)
    made = storage.read_dataset(uri, ANSWERED).sort_by("task_key").to_pylist()
    assert [row["task_key"] for row in made] == [row["task_key"] for row in kept]
    assert len(again.rows) == len(won.rows)
    for left, right in zip(again.rows, won.rows, strict=True):
        assert left["task_key"] == right["task_key"]
        assert left["image_similarity"] == pytest.approx(right["image_similarity"], abs=0.02)


def test_the_report_stands_alone(won, contest, folder):
    metrics = write_report(
        str(folder), SOURCE, contest, won, BootstrapConfig(resamples=100), shown=2
    )
    told = json.loads((folder / "metrics.json").read_text("utf-8"))
    assert told == metrics
    assert list(told["table"]) == ["mine", *BASELINES]
    assert told["table"]["truth"]["correct"]["mean"] == 1.0
    assert told["table"]["mine"]["correct"]["groups"] == 3
    assert [point["setting"]["image_guidance_scale"] for point in told["curves"]["mine"][0]] == [
        1.0,
        2.0,
    ]
    assert told["skipped"] == [
        "DINO: no --dino was given (a transformers folder of a ViT or DINOv2)."
    ]
    text = (folder / "report.html").read_text("utf-8")
    assert "http" not in text
    assert text.count("<svg") == 1
    assert text.count('<div class="trial">') == 2
    # the input, the editor, two baselines and the truth
    assert text.count("data:image/png;base64,") == 2 * 5
