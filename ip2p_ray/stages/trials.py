"""tasks -> answers -> measures: the baselines, then each editor, then the judges, a plan each.

    <folder>/tasks              what is asked; `stages.trial_tasks`
    <folder>/answers/<digest>   a row a task, the pictures of an editor or of all baselines in it
    <folder>/measured/<digest>  a row a task and answerer, the measures of its pictures in it
    <folder>/scores.parquet     all of them, a row an answer
    <folder>/metrics.json, report.html

<digest> is that of all that makes the dataset, so another editor, another judge or other scales
are made beside what is there, and pictures that two commands have in common are made once. The last
three files are of the last command.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import pyarrow as pa

from ip2p_ray import storage
from ip2p_ray.answerers import Answerer, Answering, EditorAnswerer, GeneratorAnswerer
from ip2p_ray.clip import Clip
from ip2p_ray.copies import local_folder
from ip2p_ray.dino import Dino
from ip2p_ray.errors import ConfigError, StageError
from ip2p_ray.generator import DTypeName, GeneratorWeights
from ip2p_ray.images import decode_image
from ip2p_ray.measures import Measurer, Shown
from ip2p_ray.memory import is_out_of_memory
from ip2p_ray.miniature import scores
from ip2p_ray.pairs import PairConfig
from ip2p_ray.report import Report
from ip2p_ray.stages import plan, run
from ip2p_ray.stages.models import fingerprint, local_weights
from ip2p_ray.stages.trial_tasks import TaskSource, make_tasks
from ip2p_ray.trials import (
    ANSWERED,
    MEASURED,
    PICTURE_OF,
    SCORED,
    Setting,
    TrialConfig,
    answer_key,
    flat,
)

SCORES = "scores"
GENERATOR = "baselines"
"""What the answerer is called that makes all baselines of a generator."""

_OF_BASELINES = ("strengths", "self_replaces")
_OF_SAMPLING = (
    *("resolution", "steps", "sampler", "spacing"),
    *("guidance_scale", "cross_replace"),
)


@dataclass(frozen=True, kw_only=True)
class Judges:
    """Who measures."""

    clip: str
    """Folder or open_clip name."""
    dino: str | None = None
    """transformers folder of a DINO, or None for no measure of it."""
    device: str = "cpu"

    def load(self, batch_size: int) -> Measurer:
        """Ready to judge so many pictures at a time."""
        dino = Dino.load(local_folder(self.dino), self.device) if self.dino else None
        clip = Clip.load(local_folder(self.clip), self.device)
        return Measurer(clip, dino, at_a_time=batch_size)


@contextmanager
def fitting(what: str, device: str, batch_size: int | None = None) -> Iterator[None]:
    """Tells in one sentence that the memory ran out in the block.

    Raises:
        StageError: it did; says on which device, with how many pictures at a time, and what to do.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip() or "no more is known").splitlines()[0]
        many = f" with {batch_size} pictures at a time" if batch_size is not None else ""
        lower = "--batch-size" if batch_size is not None and batch_size > 1 else "--dtype"
        raise StageError(
            f"{what}{many}, the memory of {device} ran out: give a lower {lower} or fewer --actors "
            f"({reason})"
        ) from None


class AnswerTasks:
    """An actor of the plan: rows of TASKS in, rows of ANSWERED out."""

    def __init__(self, answerer: Answerer, digest: str, device: str, batch_size: int) -> None:
        self._answerer, self._digest = answerer, digest
        self._device, self._batch_size = device, batch_size

    @cached_property
    def _answering(self) -> Answering:
        """Loaded in a call: what a constructor raises arrives from Ray as a traceback only."""
        with fitting("loading a model", self._device):
            return _here(self._answerer).load(self._device, self._batch_size)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch with the answers of each task."""
        tasks = batch.to_pylist()
        answering = self._answering
        with fitting("making pictures", self._device, self._batch_size):
            answers = answering.answer(tasks)
        rows = [
            {
                **task,
                "answers": own,
                "answerer": self._digest,
                "answer_key": answer_key(task["task_key"], self._digest),
            }
            for task, own in zip(tasks, answers, strict=True)
        ]
        return pa.Table.from_pylist(rows, schema=ANSWERED)


class MeasureAnswers:
    """An actor of the plan: rows of ANSWERED in, rows of MEASURED out.

    Rows of the answerer `baselines` are also those of the baselines that need no model.
    """

    def __init__(
        self,
        judges: Judges,
        baselines: str,
        drawn: tuple[int, int] | None = None,
        batch_size: int = 8,
    ) -> None:
        self._judges, self._batch_size = judges, batch_size
        self._baselines = baselines
        self._drawn = scores.edit_tasks(*drawn) if drawn else None

    @cached_property
    def _measurer(self) -> Measurer:
        """Loaded in a call, as `AnswerTasks` does."""
        with fitting("loading the judges", self._judges.device):
            return self._judges.load(self._batch_size)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """A table for each row of the batch."""
        for row in batch.to_pylist():
            if row["answerer"] == self._baselines:
                row["answers"] += [
                    {"kind": kind, **asdict(Setting()), "picture": row[name], "own_source": None}
                    for kind, name in PICTURE_OF.items()
                    if row[name] is not None
                ]
            yield pa.Table.from_pylist([self._measured(row)], schema=MEASURED)

    def _measured(self, task: dict[str, Any]) -> dict[str, Any]:
        shown = [
            Shown(
                decode_image(answer["picture"]["bytes"]),
                decode_image(answer["own_source"]["bytes"]) if answer["own_source"] else None,
            )
            for answer in task["answers"]
        ]
        drawn = None if self._drawn is None else [self._drawn[task["number"]]]
        measurer = self._measurer
        with fitting("judging pictures", self._judges.device, self._batch_size):
            (found,) = measurer.measure([task], [shown], drawn)
        kept = ("kind", *vars(Setting()))
        answers = [
            {**{name: answer[name] for name in kept}, **values}
            for answer, values in zip(task["answers"], found, strict=True)
        ]
        return {**{name: task[name] for name in MEASURED.names[:-1]}, "answers": answers}


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Who answers, who judges, and with which machines."""

    editors: Mapping[str, str]
    """Folder, s3://... or hub id of each editor by its name; the first is compared with."""
    generator: GeneratorWeights
    """Of the baselines."""
    pairs: PairConfig
    """How the generator is sampled."""
    guidance_scale: float | None = None
    """Of the generator's edits of a picture; None is the middle of the pairs' range."""
    judges: Judges
    trials: TrialConfig
    """Where no text_guidance_scales are stated, all editors' curves are at the table's, else at
    that of the first editor."""
    steps: int | None = None
    """Of an editor's sampler; None is each editor's own."""
    dtype: DTypeName = "float32"
    """Of the editors."""
    answering: run.Resources = field(default_factory=run.Resources)
    """Actors that make pictures; `batch_size` is that of pictures."""
    judging: run.Resources = field(default_factory=run.Resources)
    """Actors that measure."""
    tasks_at_a_time: int = 4
    """Tasks that an actor takes, and that a kill can cost it."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a contest made."""

    rows: list[dict[str, Any]]
    """Of SCORED, sorted by answerer and task."""
    trials: TrialConfig
    """The contest's, with the text_guidance_scales of its curves."""
    tasks: storage.Manifest
    answers: Mapping[str, str]
    """The dataset of each editor's pictures by what it is called, and of the BASELINES'."""
    models: Mapping[str, str]
    """Fingerprints, by what each is called."""


def run_contest(source: TaskSource, folder: str, contest: Contest) -> Made:
    """Everything up to `<folder>/scores.parquet`; what is there is not made again.

    Every model is loaded once before anything is made, so that a wrong one is told now.

    Raises:
        Ip2pError: a model or the data cannot be used; says which.
    """
    contest = _surveyed(contest)
    models: dict[str, str] = run.in_task(contest.answering, _fingerprints, contest)
    if len({models[name] for name in contest.editors}) != len(contest.editors):
        raise ConfigError(f"two of the editors are the same: {', '.join(contest.editors)}")
    tasks = make_tasks(source, folder)
    origins = {
        name: run.Origin(
            dataset=f"answers of {name}",
            config=_config(answerer, contest.trials),
            models={"model": models[name]},
            sources={"tasks": tasks.recipe},
        )
        for name, answerer in _answerers(contest).items()
    }
    places = {
        name: storage.join(folder, "answers", origin.digest) for name, origin in origins.items()
    }
    for name, answerer in _answerers(contest).items():
        _answer(places[name], folder, origins[name], answerer, contest)
    digests = {name: origin.digest for name, origin in origins.items()}
    measured = run.Origin(
        dataset="measures",
        config={"baselines": digests[GENERATOR], "compared": "at the answer's aspect"},
        models={role: models[role] for role in ("judge", "dino") if role in models},
        sources={digest: digest for digest in sorted(digests.values())},
    )
    place = storage.join(folder, "measured", measured.digest)
    _measure(place, list(places.values()), measured, source, contest)
    found = storage.read_dataset(place, MEASURED).to_pylist()
    rows = flat(found, {digests[name]: name for name in contest.editors})
    storage.write_shard(folder, SCORES, pa.Table.from_pylist(rows, schema=SCORED))
    return Made(rows=rows, trials=contest.trials, tasks=tasks, answers=places, models=models)


def _surveyed(contest: Contest) -> Contest:
    """The contest with the text scale of its curves, once every model of pictures was loaded.

    They are loaded where their actors will be, one after the other, in the CPU's memory.
    """
    own: list[float] = run.in_task(contest.answering, _survey, list(_answerers(contest).values()))
    trials = contest.trials
    if trials.text_guidance_scales:
        return contest
    scale = own[0] if trials.text_guidance_scale is None else trials.text_guidance_scale
    return replace(contest, trials=replace(trials, text_guidance_scales=(scale,)))


def _survey(answerers: Sequence[Answerer]) -> list[float]:
    """The editors' own text scales."""
    found = []
    for answerer in answerers:
        with fitting("loading a model", "cpu"):
            here = _here(answerer)
            if isinstance(here, EditorAnswerer):
                found.append(here.editor().settings.text_guidance_scale)
            else:
                here.load("cpu", 1)
    return found


def _answerers(contest: Contest) -> dict[str, Answerer]:
    """All that need a model, by name."""
    generator = GeneratorAnswerer(
        weights=contest.generator,
        pairs=contest.pairs,
        trials=contest.trials,
        guidance_scale=contest.guidance_scale,
    )
    return {
        GENERATOR: generator,
        **{
            name: EditorAnswerer(
                source=editor, trials=contest.trials, steps=contest.steps, dtype=contest.dtype
            )
            for name, editor in contest.editors.items()
        },
    }


def _config(answerer: Answerer, trials: TrialConfig) -> dict[str, Any]:
    """What of an answerer changes its pictures, beside its model."""
    settings = asdict(trials)
    if isinstance(answerer, EditorAnswerer):
        used = {name: settings[name] for name in settings if name not in _OF_BASELINES}
        return {**used, "steps": answerer.steps, "dtype": answerer.dtype}
    assert isinstance(answerer, GeneratorAnswerer)
    pairs = asdict(answerer.pairs)
    return {
        **{name: settings[name] for name in ("curve_tasks", "seed", *_OF_BASELINES)},
        **{name: pairs[name] for name in _OF_SAMPLING},
        "edit_guidance_scale": answerer.edit_scale,
        "dtype": answerer.weights.dtype,
    }


def _fingerprints(contest: Contest) -> dict[str, str]:
    """Of all models; the judges are loaded for it."""
    found = {name: fingerprint(editor) for name, editor in contest.editors.items()}
    weights = contest.generator
    found[GENERATOR] = fingerprint(weights.source)
    if weights.vae is not None:
        found[GENERATOR] += fingerprint(weights.vae)
    found["judge"] = Clip.load(local_folder(contest.judges.clip)).fingerprint()
    if contest.judges.dino is not None:
        Dino.load(local_folder(contest.judges.dino))  # told now, not after hours
        found["dino"] = fingerprint(contest.judges.dino)
    return found


def _here(answerer: Answerer) -> Answerer:
    """The same, with its model on this machine."""
    if isinstance(answerer, EditorAnswerer):
        return replace(answerer, source=local_folder(answerer.source))
    if isinstance(answerer, GeneratorAnswerer):
        return replace(answerer, weights=local_weights(answerer.weights))
    return answerer


def _answer(
    uri: str, folder: str, origin: run.Origin, answerer: Answerer, contest: Contest
) -> None:
    held = contest.answering
    step = plan.Step(
        callable=AnswerTasks,
        arguments={
            "answerer": answerer,
            "digest": origin.digest,
            "device": "cuda" if held.gpus else "cpu",
            "batch_size": held.batch_size,
        },
        resources=replace(held, batch_size=contest.tasks_at_a_time),
    )

    def build() -> list[Report]:
        plan.stream(
            plan.shards(storage.join(folder, "tasks")),
            uri,
            name=origin.dataset,
            key="task_key",
            schema=ANSWERED,
            steps=[step],
            unit="tasks",
            rows_per_block=contest.tasks_at_a_time,
            patient=True,
        )
        return []

    run.make(uri, origin, build)


def _measure(
    uri: str, answers: Sequence[str], origin: run.Origin, source: TaskSource, contest: Contest
) -> None:
    step = plan.Step(
        callable=MeasureAnswers,
        arguments={
            "judges": contest.judges,
            "baselines": origin.config["baselines"],
            "drawn": source.drawn,
            "batch_size": contest.judging.batch_size,
        },
        resources=replace(contest.judging, batch_size=contest.tasks_at_a_time),
    )

    def build() -> list[Report]:
        plan.stream(
            [shard for place in answers for shard in plan.shards(place)],
            uri,
            name=origin.dataset,
            key="answer_key",
            schema=MEASURED,
            steps=[step],
            unit="tasks and answerers",
            rows_per_block=4 * contest.tasks_at_a_time,
        )
        return []

    run.make(uri, origin, build)
