import pytest

from ip2p_ray import evaluation
from ip2p_ray.editor import EditSettings
from ip2p_ray.errors import ConfigError
from ip2p_ray.evaluation import CurvePoint, EvaluationConfig, guidance_curve, questions
from ip2p_ray.report import Report

CONFIG = EvaluationConfig(tasks=3, shown=2, curve_tasks=2, image_guidance_scales=(1.0, 1.5, 2.0))
SETTINGS = EditSettings(image_guidance_scale=1.5, text_guidance_scale=7.5)
TASKS = [
    {
        "caption": f"caption {number}",
        "instruction": "edit",
        "edited_caption": f"edited {number}",
        "source_image": {"bytes": b"", "path": None},
    }
    for number in range(3)
]


def asked(answerer, **facts):
    return [
        row
        for row in questions(TASKS, CONFIG, SETTINGS, generator_guidance_scale=3.0)
        if row["answerer"] == answerer and all(row[name] == facts[name] for name in facts)
    ]


def test_everyone_is_asked_at_the_usual_scale_and_editors_on_the_curve():
    assert [row["task"] for row in asked("start")] == [0, 1]
    assert [row["task"] for row in asked("generator_only")] == [0, 1, 2]
    for answerer in ("editor", "shipped_editor"):
        assert [row["task"] for row in asked(answerer, image_guidance_scale=1.5)] == [0, 1, 2]
        for scale in (1.0, 2.0):
            assert [row["task"] for row in asked(answerer, image_guidance_scale=scale)] == [0, 1]


def test_the_generator_has_a_guidance_scale_of_its_own():
    for answerer, scale in (("generator_only", 3.0), ("start", 7.5), ("editor", 7.5)):
        assert {row["text_guidance_scale"] for row in asked(answerer)} == {scale}


def test_questions_have_keys_of_their_own_and_noise_of_their_task():
    rows = questions(TASKS, CONFIG, SETTINGS, generator_guidance_scale=3.0)
    assert len({row["question_key"] for row in rows}) == len(rows)
    seeds = {row["task"]: row["seed"] for row in rows}
    assert len(set(seeds.values())) == 3
    assert all(row["seed"] == seeds[row["task"]] for row in rows)
    assert all(row["caption"] == f"caption {row['task']}" for row in rows)
    assert set(rows[0]) == set(evaluation.QUESTIONS.names)


def answer(task, scale, direction, image, answerer="editor"):
    return {
        "answerer": answerer,
        "task": task,
        "image_guidance_scale": scale,
        "direction_similarity": direction,
        "image_similarity": image,
    }


def test_a_curve_has_a_mean_for_each_scale_over_the_same_tasks():
    rows = [
        answer(0, 2.0, 0.1, 0.9),
        answer(1, 2.0, 0.3, 0.7),
        answer(0, 1.0, 0.4, 0.5),
        answer(1, 1.0, 0.6, 0.3),
        answer(2, 1.0, 9.0, 9.0),  # not one of the curve's tasks
        answer(0, 1.0, 9.0, 9.0, answerer="start"),
    ]
    low, high = guidance_curve(rows, "editor", CONFIG)
    assert low == CurvePoint(1.0, pytest.approx(0.5), pytest.approx(0.4), 2)
    assert high == CurvePoint(2.0, pytest.approx(0.2), pytest.approx(0.8), 2)


def test_means_need_an_answer():
    with pytest.raises(ConfigError):
        evaluation.mean_similarities([])


def test_the_funnel_counts_by_stage_and_reason():
    reports = [
        Report(stage="triplets", rows_in=4, rows_out=3, rejected={"unfinished": 1}, seconds=1.0),
        Report(stage="pairs", rows_in=6, rows_out=6, rejected={}, seconds=1.0),
    ]
    assert evaluation.funnel(report.as_dict() for report in reports) == {
        "triplets": {"in": 4, "kept": 3, "rejected": {"unfinished": 1}},
        "pairs": {"in": 6, "kept": 6, "rejected": {}},
    }


@pytest.mark.parametrize("name", ["tasks", "shown", "curve_tasks"])
def test_nothing_to_ask_is_refused(name):
    with pytest.raises(ConfigError, match=name):
        EvaluationConfig(**{name: 0})
