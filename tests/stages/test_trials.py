import dataclasses
import json
import shutil

import pytest
import torch

from ip2p_ray import presets, storage
from ip2p_ray.answerers import EditorAnswerer
from ip2p_ray.errors import ConfigError, ModelError, StageError
from ip2p_ray.generator import GeneratorWeights
from ip2p_ray.intervals import BootstrapConfig
from ip2p_ray.stages import plan
from ip2p_ray.stages.run import Resources, own_error
from ip2p_ray.stages.trial_report import write_report
from ip2p_ray.stages.trial_tasks import DRAWN, TaskSource
from ip2p_ray.stages.trials import AnswerTasks, Contest, Judges, MeasureAnswers, run_contest
from ip2p_ray.trials import ANSWERED, BASELINES, SCORED, TASKS, TrialConfig

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


@pytest.mark.parametrize("place", ["editors", "generator"])
@pytest.mark.parametrize("wrong", ["no/such", "/no/such/folder", "channels"])
def test_a_wrong_model_is_told_before_anything_is_made(
    local_ray, contest, tiny_weights, tmp_path, place, wrong
):
    told = wrong
    if wrong == "channels":
        told = {"editors": "an editor's UNet takes", "generator": "is an editor"}[place]
        wrong = contest.generator.source
        if place == "generator":
            wrong = str(tmp_path / "editor")
            EditorAnswerer(source=str(tiny_weights), trials=TRIALS).editor().save(wrong)
    changes = {"generator": GeneratorWeights(source=wrong)}
    if place == "editors":
        changes = {"editors": {**contest.editors, "wrong": wrong}}
    with pytest.raises(ModelError, match=told):
        run_contest(SOURCE, str(tmp_path / "out"), dataclasses.replace(contest, **changes))
    assert not (tmp_path / "out").exists()


def test_curves_are_at_one_text_scale_though_editors_have_their_own(
    local_ray, contest, tiny_weights, tmp_path
):
    own = EditorAnswerer(source=str(tiny_weights), trials=TRIALS).editor()
    scale = own.settings.text_guidance_scale
    own.settings = dataclasses.replace(own.settings, text_guidance_scale=scale + 1)
    own.save(tmp_path / "other")
    both = dataclasses.replace(
        contest, editors={**contest.editors, "other": str(tmp_path / "other")}
    )
    found = run_contest(TaskSource(data=DRAWN, tasks=2), str(tmp_path / "out"), both)
    assert found.trials.text_guidance_scales == (scale,)
    rows = [row for row in found.rows if row["answerer"] == "other"]
    assert {row["text_guidance_scale"] for row in rows if row["usual"]} == {scale + 1}
    assert {row["text_guidance_scale"] for row in rows if not row["usual"]} == {scale}
    metrics = write_report(
        str(tmp_path / "out"),
        SOURCE,
        both,
        found,
        BootstrapConfig(resamples=100),
        shown=0,
    )
    for name in both.editors:
        (line,) = metrics["curves"][name]
        assert {point["setting"]["text_guidance_scale"] for point in line} == {scale}
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert f"of every editor at text_guidance_scale {scale:g}, over 1 tasks" in page


class Full:
    """Whoever it is of, the memory does not do."""

    def __init__(self, error):
        self.error = error

    def load(self, *_):
        return self

    def answer(self, tasks):
        raise self.error

    def measure(self, *_):
        raise self.error

    device = "cuda"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore of it"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 3 GB"),
    ],
)
def test_where_the_memory_does_not_do_it_is_told_in_a_sentence(won, folder, error):
    tasks = storage.read_dataset(str(folder / "tasks"), TASKS)
    answers = storage.read_dataset(won.answers["mine"], ANSWERED)
    making, judging = (
        AnswerTasks(Full(error), "0", "cuda", 4),
        MeasureAnswers(Full(error), "baselines", batch_size=4),
    )
    for told, work in (
        ("making pictures", lambda: making(tasks)),
        ("judging pictures", lambda: list(judging(answers))),
    ):
        with pytest.raises(StageError) as caught:
            work()
        assert str(caught.value).startswith(
            f"{told} with 4 pictures at a time, the memory of cuda ran out: give a lower "
            "--batch-size"
        )
        assert "\n" not in str(caught.value)


def test_another_error_is_not_taken_for_it(won, folder):
    tasks = storage.read_dataset(str(folder / "tasks"), TASKS)
    with pytest.raises(RuntimeError, match="shapes"):
        AnswerTasks(Full(RuntimeError("shapes differ")), "0", "cpu", 4)(tasks)


@pytest.mark.parametrize("loads", [True, False])
def test_the_sentence_arrives_from_an_actor(won, folder, tmp_path, loads):
    class Large:  # of the function, so that it travels to the actor by value
        def load(self, device, batch_size):
            if not loads:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self

        def answer(self, tasks):
            raise torch.OutOfMemoryError("CUDA out of memory")

    arguments = {"answerer": Large(), "digest": "0", "device": "cpu", "batch_size": 2}
    step = plan.Step(callable=AnswerTasks, arguments=arguments, resources=Resources(batch_size=2))
    with pytest.raises(Exception) as caught:  # noqa: PT011 - Ray's, whatever it is
        plan.stream(
            plan.shards(str(folder / "tasks")),
            str(tmp_path / "answers"),
            key="task_key",
            schema=ANSWERED,
            steps=[step],
            unit="tasks",
            rows_per_block=2,
        )
    assert "the memory of cpu ran out" in str(own_error(caught.value))


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
