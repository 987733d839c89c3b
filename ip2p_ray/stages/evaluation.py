"""editor -> metrics: questions to editors in actors, CLIP's judgement and the oracle's."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from ip2p_ray import evaluation, storage
from ip2p_ray.clip import Clip
from ip2p_ray.copies import local_folder
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.diffusion.sample import text_to_image
from ip2p_ray.editor import Editor, EditSettings
from ip2p_ray.evaluation import ANSWERS, QUESTIONS, EvaluationConfig
from ip2p_ray.images import decode_image, encode_png, to_pil
from ip2p_ray.miniature import scores, weights
from ip2p_ray.miniature.scenes import draw, edits
from ip2p_ray.miniature.scores import GENERATOR_SAMPLING, EditTask, Pictures
from ip2p_ray.report import Report
from ip2p_ray.stages import plan, run
from ip2p_ray.training.unet import widen


@dataclass(frozen=True, kw_only=True)
class Answerers:
    """Where the models are that questions are put to."""

    editor: str
    """The trained editor's folder."""
    shipped: str
    """The folder of the miniature's weights, whose editor was trained elsewhere."""
    generator: str
    """What training started from."""
    editing: EditSettings
    """Of every editor; the scales come with the question. The generator has GENERATOR_SAMPLING."""


class AnswerQuestions:
    """An actor of the plan: rows of QUESTIONS in, rows of ANSWERS that nobody has judged out."""

    def __init__(self, answerers: Answerers) -> None:
        self._answerers = answerers
        self._loaded: dict[str, Editor | StableDiffusion] = {}

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """A table for each answerer that is asked in the batch."""
        rows = batch.select(QUESTIONS.names).to_pylist()
        for answerer in sorted({row["answerer"] for row in rows}):
            asked = [row for row in rows if row["answerer"] == answerer]
            for row, picture in zip(asked, self._answer(answerer, asked), strict=True):
                row["edited_image"] = {"bytes": encode_png(picture), "path": None}
            yield pa.Table.from_pylist(asked, schema=ANSWERS)

    def _answer(self, answerer: str, rows: list[dict[str, Any]]) -> list[Image.Image]:
        if answerer not in self._loaded:
            self._loaded[answerer] = _load(answerer, self._answerers)
        model, settings = self._loaded[answerer], self._answerers.editing
        if isinstance(model, Editor):
            return model.edit_batch(
                [row["source_image"]["bytes"] for row in rows],
                [row["instruction"] for row in rows],
                [row["seed"] for row in rows],
                text_guidance_scale=[row["text_guidance_scale"] for row in rows],
                image_guidance_scale=[row["image_guidance_scale"] for row in rows],
            )
        pictures = text_to_image(
            model,
            [row["edited_caption"] for row in rows],
            [row["seed"] for row in rows],
            height=settings.resolution,
            width=settings.resolution,
            steps=GENERATOR_SAMPLING["steps"],
            guidance_scale=[row["text_guidance_scale"] for row in rows],
            sampler=GENERATOR_SAMPLING["sampler"],
        )
        return [to_pil(picture) for picture in pictures]


def _load(answerer: str, answerers: Answerers) -> Editor | StableDiffusion:
    if answerer == evaluation.SHIPPED:
        shipped = weights.load_editor(Path(local_folder(answerers.shipped)))
        return Editor(shipped.model, settings=answerers.editing)
    if answerer == evaluation.EDITOR:
        model = StableDiffusion.load(local_folder(answerers.editor))
        return Editor(model, settings=answerers.editing)
    model = StableDiffusion.load(local_folder(answerers.generator))
    if answerer == evaluation.START:
        widen(model.unet)
        return Editor(model, settings=answerers.editing)
    return model


class JudgeAnswers:
    """An actor of the plan: rows of ANSWERS in, the same with their similarities out."""

    def __init__(self, judge: str) -> None:
        self._clip = Clip.load(local_folder(judge))

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch with its four similarities."""
        rows = batch.to_pylist()
        similarities = self._clip.similarities(
            _pictures(rows, "source_image"),
            _pictures(rows, "edited_image"),
            [row["caption"] for row in rows],
            [row["edited_caption"] for row in rows],
        )
        for row, values in zip(rows, similarities.rows(), strict=True):
            row.update(values)
        return pa.Table.from_pylist(rows, schema=ANSWERS)


def evaluate_editor(
    folder: str,
    config: EvaluationConfig,
    *,
    answerers: Answerers,
    judge: str,
    models: Mapping[str, str],
    trained: storage.Manifest,
    resources: run.Resources,
) -> storage.Manifest:
    """The dataset `<folder>/answers`, to the questions in `<folder>/questions`.

    `trained` is the manifest of the checkpoints that the trained editor comes from.
    """
    questions, answers = storage.join(folder, "questions"), storage.join(folder, "answers")
    settings = {
        **asdict(config),
        "editing": asdict(answerers.editing),
        "generator": GENERATOR_SAMPLING,
    }

    def origin(dataset: str) -> run.Origin:
        sources = {"checkpoints": trained.recipe}
        return run.Origin(dataset=dataset, config=settings, models=models, sources=sources)

    def ask() -> list[Report]:
        tasks = [_row(task) for task in scores.edit_tasks(config.tasks, config.seed)]
        rows = evaluation.questions(
            tasks,
            config,
            answerers.editing,
            generator_guidance_scale=GENERATOR_SAMPLING["guidance_scale"],
        )
        storage.write_shard(
            questions, "questions-00000", pa.Table.from_pylist(rows, schema=QUESTIONS)
        )
        return []

    steps = [
        plan.Step(
            callable=AnswerQuestions, arguments={"answerers": answerers}, resources=resources
        ),
        plan.Step(
            callable=JudgeAnswers,
            arguments={"judge": judge},
            resources=run.Resources(
                batch_size=resources.batch_size, cpus=resources.cpus, custom=resources.custom
            ),
        ),
    ]

    def answer() -> list[Report]:
        plan.stream(
            plan.shards(questions),
            answers,
            key="question_key",
            schema=ANSWERS,
            steps=steps,
            unit="questions",
            rows_per_block=resources.batch_size,
        )
        return []

    run.make(questions, origin("questions"), ask)
    return run.make(answers, origin("answers"), answer)


def score_answers(answers: str, config: EvaluationConfig) -> dict[str, dict[str, float]]:
    """forced_choice_accuracy and preservation_error by who answered all tasks.

    Beside the answerers stand the copied input, and chance: the true picture of any edit.
    """
    tasks = scores.edit_tasks(config.tasks, config.seed)
    rows = read_answers(answers)

    def answered(answerer: str) -> Pictures:
        return _pictures(usual_answers(rows, answerer), "edited_image")

    pictures = {
        evaluation.EDITOR: answered(evaluation.EDITOR),
        evaluation.SHIPPED: answered(evaluation.SHIPPED),
        "copy_input": scores.source_pictures(tasks),
        evaluation.GENERATOR_ONLY: answered(evaluation.GENERATOR_ONLY),
        "chance": _guesses(tasks, config.seed),
    }
    found = {name: _two(scores.score_edits(made, tasks)) for name, made in pictures.items()}
    # Its expectation, not the luck of these guesses.
    found["chance"]["forced_choice_accuracy"] = scores.chance(tasks)
    return found


def read_answers(answers: str) -> list[dict[str, Any]]:
    """All rows of ANSWERS, by answerer, task and scale."""
    rows = storage.read_dataset(answers, ANSWERS).sort_by("question_key").to_pylist()
    return [dict(row) for row in rows]


def usual_answers(rows: list[dict[str, Any]], answerer: str) -> list[dict[str, Any]]:
    """The answers of one answerer at the scale that every answerer was asked at, by task."""
    alone = (row for row in rows if row["answerer"] == evaluation.GENERATOR_ONLY)
    scales = {row["image_guidance_scale"] for row in alone}
    return [
        row for row in rows if row["answerer"] == answerer and row["image_guidance_scale"] in scales
    ]


def _row(task: EditTask) -> dict[str, Any]:
    return {
        "caption": task.caption,
        "instruction": task.instruction,
        "edited_caption": task.edited_caption,
        "source_image": {"bytes": encode_png(to_pil(draw(task.scene))), "path": None},
    }


def _guesses(tasks: list[EditTask], seed: int) -> Pictures:
    rng = random.Random(seed)
    return np.stack([draw(rng.choice(list(edits(task.scene))).edited) for task in tasks])


def _pictures(rows: list[dict[str, Any]], column: str) -> Pictures:
    return np.stack([np.asarray(decode_image(row[column]["bytes"])) for row in rows])


def _two(found: Mapping[str, Any]) -> dict[str, float]:
    return {name: found[name] for name in ("forced_choice_accuracy", "preservation_error")}
