"""Speeds, sizes and survival of a run that was made, from its manifests and the times of its files.

A run does not note how many processes worked at the same time: the Cluster it was made on is given.
How long they were busy stands in the manifest of the candidates and in what attempts noted
(`notes`). A run of before there were notes tells it by the times at which its shards were written,
from the first to the last. In a bucket, or where there are too few shards, all of the wall time
counts as work; else what is left of it is fixed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ip2p_ray import notes, objects, storage
from ip2p_ray.errors import ConfigError, DatasetError
from ip2p_ray.estimate.config import EXPLODED, Cluster, Sizes, Speed, Speeds, Workload

DATASETS = {
    "captions": ("captions",),
    "triplets": ("replies", "triplets", "rejects/triplets"),
    "pairs": ("queue", "candidates", "scores", "rejects/pairs", "pairs"),
    "latents": ("latents",),
    "training": ("checkpoints",),
    "evaluation": ("questions", "answers"),
}
"""Whose wall time is that of each stage."""

NOT_BEST = "not_best"
"""Reason of a candidate that reached every threshold (`filtering.NOT_BEST`)."""

_NOTHING = Speed(seconds=0.0, source="measured as part of what is beside it")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of a run, or of as much of one as there is."""

    manifests: Mapping[str, storage.Manifest]
    """By dataset."""
    places: Mapping[str, str]
    """Where each of them is."""
    speeds: Mapping[str, Speed | None]
    """By field of Speeds, as far as the run has the stage; None where no device does it."""
    fixed: Mapping[str, float]
    start: float
    work: Mapping[str, Any]
    """By field of Workload."""
    sizes: Mapping[str, float]
    """By field of Sizes."""

    @property
    def walls(self) -> dict[str, float]:
        """Seconds of each stage that was made."""
        return {
            stage: sum(
                self.manifests[name].wall_seconds for name in names if name in self.manifests
            )
            for stage, names in DATASETS.items()
            if names[-1] in self.manifests
        }

    def speeds_or(self, other: Speeds | None) -> Speeds:
        """Those of the run, and the others' for stages that it does not have.

        Raises:
            ConfigError: a stage is in neither.
        """
        names = [each.name for each in fields(Speeds) if each.name not in ("fixed", "start")]
        missing = [name for name in names if name not in self.speeds]
        if missing and other is None:
            raise ConfigError(
                f"the run does not tell the speed of {', '.join(missing)}: give a --device too, "
                "or a further folder"
            )
        base = {} if other is None else {name: getattr(other, name) for name in missing}
        fixed = {**({} if other is None else other.fixed), **self.fixed}
        return Speeds(**{**self.speeds, **base}, fixed=fixed, start=self.start)

    def sizes_or(self, other: Sizes | None) -> Sizes:
        """As `speeds_or`.

        Raises:
            ConfigError: as there.
        """
        names = [each.name for each in fields(Sizes) if each.name != "source"]
        missing = [name for name in names if name not in self.sizes]
        if missing and other is None:
            raise ConfigError(
                f"the run does not tell the size of {', '.join(missing)}: give a --device too, "
                "or a further folder"
            )
        base = {} if other is None else {name: getattr(other, name) for name in missing}
        source = "measured" if other is None else f"measured, else {other.source}"
        return Sizes(**{**self.sizes, **base}, source=source)


def read(folders: Sequence[str], made_on: Cluster) -> Run:
    """What the folders of a run tell; each dataset is that of the first folder that has it whole.

    Raises:
        DatasetError: there is no whole dataset of the flow in any of them.
        ConfigError: one of a kind that is no path.
    """
    places: dict[str, str] = {}
    for folder in folders:
        for name in {name for names in DATASETS.values() for name in names} - set(places):
            place = storage.join(folder, *name.split("/"))
            if storage.exists(storage.join(place, storage.MANIFEST)):
                places[name] = place
    if not places:
        raise DatasetError(f"{', '.join(folders)}: no whole dataset of the flow is there")
    manifests = {name: storage.read_manifest(place) for name, place in places.items()}
    run = Run(
        manifests=manifests,
        places=places,
        speeds={},
        fixed={},
        start=_start(folders, manifests.values()),
        work={},
        sizes={},
    )
    for part in (_triplets, _pairs, _latents, _evaluation):
        run = part(run, made_on)
    return _training(_captions(run))


def _with(
    run: Run,
    *,
    stage: str,
    speeds: Mapping[str, Speed | None],
    busy: float,
    work: Mapping[str, Any],
    sizes: Mapping[str, float],
) -> Run:
    """The run with what a stage tells: `busy` seconds of its wall time are work."""
    wall = run.walls.get(stage)
    fixed = {} if wall is None else {stage: max(0.0, wall - busy)}
    return replace(
        run,
        speeds={**run.speeds, **speeds},
        fixed={**run.fixed, **fixed},
        work={**run.work, **work},
        sizes={**run.sizes, **sizes},
    )


def _captions(run: Run) -> Run:
    if "captions" not in run.manifests:
        return run
    rows = run.manifests["captions"].rows
    sizes = {"caption": _row_bytes(run, "captions")}
    return _with(run, stage="captions", speeds={}, busy=0.0, work={"captions": rows}, sizes=sizes)


def _triplets(run: Run, made_on: Cluster) -> Run:
    if "replies" not in run.manifests or "triplets" not in run.manifests:
        return run
    replies, triplets = run.manifests["replies"], run.manifests["triplets"]
    seconds, source = _steady(run, "replies", "WriteReplies", made_on.writers)
    asked = "model" in replies.config  # of an endpoint; its speed is its limits'
    speed = None if asked else Speed(seconds=seconds * made_on.writers, source=source)
    return _with(
        run,
        stage="triplets",
        speeds={"caption": speed},
        busy=0.0 if asked else seconds * replies.rows,
        work={"captions": replies.rows, "reply_share": triplets.rows / max(1, replies.rows)},
        sizes={"reply": _row_bytes(run, "replies"), "triplet": _row_bytes(run, "triplets")},
    )


def _pairs(run: Run, made_on: Cluster) -> Run:
    if not {"candidates", "scores", "pairs"} <= set(run.manifests):
        return run
    made, scores = run.manifests["candidates"], run.manifests["scores"]
    pairs, config = run.manifests["pairs"], made.config
    each = made.device_seconds / max(1, scores.rows)
    source = f"measured over {scores.rows:,} candidates"
    rejected = pairs.reports[0]["rejected"] if pairs.reports else {}
    accepted = pairs.rows + int(rejected.get(NOT_BEST, 0))
    row, pair = _row_bytes(run, "scores"), _row_bytes(run, "pairs")
    return _with(
        run,
        stage="pairs",
        speeds={
            "candidate_step": Speed(seconds=each / config["steps"], source=source),
            "candidate": _NOTHING,
            "judgement": _NOTHING,
            "score": EXPLODED,
        },
        busy=made.device_seconds / made_on.generators
        + scores.rows * EXPLODED.seconds / made_on.tasks,
        work={
            "candidates": config["candidates"],
            "steps": config["steps"],
            "keep": config["keep"],
            "acceptance": accepted / max(1, scores.rows),
        },
        sizes={
            "score": row,
            "reject": _row_bytes(run, "rejects/pairs") if "rejects/pairs" in run.places else row,
            "picture": max(0.0, (pair - row) / 2),
        },
    )


def _latents(run: Run, made_on: Cluster) -> Run:
    if "latents" not in run.manifests or "pairs" not in run.manifests:
        return run
    rows, pairs = run.manifests["latents"].rows, run.manifests["pairs"].rows
    seconds, source = _steady(run, "latents", "EncodePairs", made_on.encoders)
    return _with(
        run,
        stage="latents",
        speeds={"latent": Speed(seconds=seconds * made_on.encoders, source=source)},
        busy=seconds * rows,
        work={"held_out": 1 - rows / max(1, pairs)},
        sizes={"latent": _row_bytes(run, "latents")},
    )


def _training(run: Run) -> Run:
    if "checkpoints" not in run.manifests:
        return run
    place, config = run.places["checkpoints"], run.manifests["checkpoints"].config
    lines = _metrics(storage.join(place, "metrics.jsonl"))
    if not lines:
        raise DatasetError(f"{place}: metrics.jsonl has no line, so training's speed is not known")
    wall = device = 0.0
    before = 0
    for line in lines:
        seconds = (line["step"] - before) * config["batch_size"] / line["images_per_s"]
        wall, device, before = wall + seconds, device + seconds * line["workers"], line["step"]
    samples = before * config["batch_size"]
    source = f"measured over {before:,} steps"
    editor = storage.join(place.rstrip("/").rpartition("/")[0], "editor")
    sizes = {"editor": float(sum(size for _, size in _below(editor)))}
    checkpoints: dict[str, float] = defaultdict(float)
    for name, size in _below(place):
        if name.startswith("step-"):
            checkpoints[name.split("/")[0]] += size
    if checkpoints:
        sizes["checkpoint"] = checkpoints[max(checkpoints)]
    return _with(
        run,
        stage="training",
        speeds={"sample": Speed(seconds=device / samples, source=source)},
        busy=wall * config["steps"] / before,
        work={"train_steps": config["steps"], "batch_size": config["batch_size"]},
        sizes={name: size for name, size in sizes.items() if size},
    )


def _evaluation(run: Run, made_on: Cluster) -> Run:
    if "answers" not in run.manifests:
        return run
    answers = run.manifests["answers"]
    steps = answers.config["editing"]["steps"]
    seconds, source = _steady(run, "answers", "AnswerQuestions", made_on.editors)
    each = Speed(seconds=seconds * made_on.editors / steps, source=source)
    return _with(
        run,
        stage="evaluation",
        speeds={"answer_step": each},
        busy=seconds * answers.rows,
        work={"answers": answers.rows, "answer_steps": steps},
        sizes={"answer": _row_bytes(run, "answers")},
    )


def _steady(run: Run, name: str, actor: str, actors: int) -> tuple[float, str]:
    """Wall seconds a row of a dataset while `actors` write its blocks, and how that is known."""
    manifest, place = run.manifests[name], run.places[name]
    rows = manifest.rows
    noted = notes.read_noted(place)
    busy = noted.note.busy.get(actor, 0.0) if noted and noted.note else 0.0
    if busy > 0:
        return busy / actors / max(1, rows), f"measured over {rows:,} rows"
    if storage.is_local(place):
        folder = storage.local_path(place)
        found = sorted(
            ((folder / shard.name).stat().st_mtime, shard.rows) for shard in manifest.shards
        )
        later = found[actors:]  # the first of each actor waited for its model
        took = found[-1][0] - found[actors - 1][0] if later else 0.0
        counted = sum(count for _, count in later)
        if took > 0 and counted:
            return took / counted, f"measured over the last {counted:,} rows"
    return manifest.wall_seconds / max(1, rows), f"measured over {rows:,} rows, the start included"


def _row_bytes(run: Run, name: str) -> float:
    """Of the data of a row, without the shards' footers."""
    place, size = run.places[name], 0
    rows = run.manifests[name].rows
    for shard in run.manifests[name].shards:
        with storage.open_parquet(storage.join(place, shard.name)) as file:
            footer = file.metadata
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        size += sum(
            group.column(number).total_compressed_size
            for group in groups
            for number in range(group.num_columns)
        )
    return size / max(1, rows)


def _below(uri: str) -> Iterator[tuple[str, int]]:
    """Name below the URI and bytes of each file, or object."""
    if storage.is_local(uri):
        folder = storage.local_path(uri)
        for path in folder.rglob("*"):
            if path.is_file():
                yield path.relative_to(folder).as_posix(), path.stat().st_size
    else:
        for found in objects.listing(uri):
            yield found.name, found.bytes


def _metrics(place: str) -> list[dict[str, Any]]:
    if not storage.exists(place):
        return []
    return [json.loads(line) for line in storage.read_bytes(place).decode().splitlines()]


def _start(folders: Sequence[str], manifests: Iterable[storage.Manifest]) -> float:
    """What a run of the quickstart took beside its stages: from its lock to its last file."""
    if len(folders) != 1 or not storage.is_local(folders[0]):
        return 0.0
    folder = storage.local_path(folders[0])
    ends = [folder / ".lock", folder / "metrics.json"]
    if not all(path.is_file() for path in ends):
        return 0.0
    began, ended = (path.stat().st_mtime for path in ends)
    # of a run that went on, or was asked for again, it is not known
    return max(0.0, ended - began - sum(manifest.wall_seconds for manifest in manifests))


def workload(run: Run, **changed: Any) -> Workload:
    """The workload of the run, with what is changed in it.

    Raises:
        ConfigError: the run does not tell something that is not given either.
    """
    values = {**run.work, **{name: value for name, value in changed.items() if value is not None}}
    if "captions" not in values:
        raise ConfigError("how many captions is not known: give --captions")
    return Workload(**values)
