import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from ip2p_ray import evaluation
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.diffusion.sample import text_to_image
from ip2p_ray.evaluation import ANSWERS
from ip2p_ray.images import decode_image, encode_png
from ip2p_ray.miniature.scores import GENERATOR_SAMPLING
from ip2p_ray.stages.evaluation import (
    Answerers,
    AnswerQuestions,
    read_answers,
    score_answers,
    usual_answers,
)
from ip2p_ray.stages.report import write_report

pytestmark = pytest.mark.ray


@pytest.fixture(scope="session")
def answers(made):
    return read_answers(made.uri("answers"))


def test_every_question_is_answered_once(answers, made):
    counts = {}
    for row in answers:
        counts[row["answerer"]] = counts.get(row["answerer"], 0) + 1
    tasks, curve = made.questions.tasks, made.questions.curve_tasks
    assert counts == {
        "generator_only": tasks,
        "start": made.questions.shown,
        "editor": tasks + curve,
        "shipped_editor": tasks + curve,
    }
    assert len({row["question_key"] for row in answers}) == len(answers)


def test_answers_are_pictures_with_similarities(answers):
    for row in answers:
        assert decode_image(row["edited_image"]["bytes"]).size == (64, 64)
        assert -1.001 <= row["direction_similarity"] <= 1.001


def test_the_start_does_not_see_the_picture(answers, made):
    """Its new weights are zero, so with an all white picture it answers the same."""
    actor = AnswerQuestions(
        Answerers(
            editor=made.uri("editor"),
            shipped=made.preset.shipped,
            generator=made.preset.generator,
            editing=made.preset.editing,
        )
    )
    row = usual_answers(answers, evaluation.START)[0]
    white = {"bytes": encode_png(Image.new("RGB", (64, 64), "white")), "path": None}
    question = pa.Table.from_pylist([{**row, "source_image": white}], schema=ANSWERS)
    (answered,) = actor(question)
    near, there = (
        np.asarray(decode_image(picture["bytes"])).astype(int)
        for picture in (answered["edited_image"][0].as_py(), row["edited_image"])
    )
    assert np.abs(near - there).max() <= 1


def test_the_generator_answers_with_the_settings_of_its_model_card(answers, made):
    row = usual_answers(answers, evaluation.GENERATOR_ONLY)[1]
    (drawn,) = text_to_image(
        StableDiffusion.load(made.preset.generator),
        [row["edited_caption"]],
        [row["seed"]],
        height=64,
        width=64,
        **GENERATOR_SAMPLING,
    )
    there = np.asarray(decode_image(row["edited_image"]["bytes"])).astype(int)
    assert np.abs(there - drawn).max() <= 1


def test_scores_have_their_baselines(made):
    found = score_answers(made.uri("answers"), made.questions)
    assert set(found) == {"editor", "shipped_editor", "generator_only", "copy_input", "chance"}
    for scores in found.values():
        assert set(scores) == {"forced_choice_accuracy", "preservation_error"}
    assert found["copy_input"] == {"forced_choice_accuracy": 0.0, "preservation_error": 0.0}
    assert 0 < found["chance"]["forced_choice_accuracy"] < 0.2


def test_the_report_stands_alone(made):
    written = write_report(str(made.folder), made.questions, seed=0)
    metrics = json.loads(Path(written.metrics).read_text(encoding="utf-8"))
    assert list(metrics) == [
        "editor",
        "shipped_editor",
        "copy_input",
        "generator_only",
        "chance",
        "funnel",
        "seconds",
        "seed",
    ]
    assert list(metrics["funnel"]) == ["captions", "triplets", "pairs", "latents"]
    assert metrics["funnel"]["captions"] == {"in": 10, "kept": 10, "rejected": {}}
    assert set(metrics["seconds"]) == {
        "captions",
        "triplets",
        "pairs",
        "latents",
        "training",
        "evaluation",
    }
    text = Path(written.report).read_text(encoding="utf-8")
    assert "http" not in text
    assert text.count("data:image/png;base64,") > 20
    assert text.count("<svg") == 2
    assert decode_image(Path(written.example).read_bytes()).size == (64, 64)
