"""Everything -> metrics.json and report.html: what a run of the whole flow has to show."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ip2p_ray import evaluation, storage
from ip2p_ray.evaluation import EvaluationConfig
from ip2p_ray.gallery import ShownEdit, ShownPair, page
from ip2p_ray.images import encode_png, to_pil
from ip2p_ray.miniature import scores
from ip2p_ray.miniature.scenes import draw
from ip2p_ray.schema import PAIRS, SIMILARITIES
from ip2p_ray.stages.evaluation import read_answers, score_answers, usual_answers
from ip2p_ray.stages.training import read_metrics

SHOWN_PAIRS = 12

STAGES = {
    "captions": ("captions",),
    "triplets": ("replies", "triplets", "rejects/triplets"),
    "pairs": ("candidates", "scores", "rejects/pairs", "pairs"),
    "latents": ("latents",),
    "training": ("checkpoints",),
    "evaluation": ("questions", "answers"),
}
"""The datasets that each stage makes, in the order of the flow."""

COLUMNS = {
    evaluation.START: "the untrained start",
    evaluation.EDITOR: "trained here",
    evaluation.SHIPPED: "the shipped editor",
}


@dataclass(frozen=True, kw_only=True)
class Written:
    """What was left for the reader."""

    metrics: str
    report: str
    example: str
    """A picture to try an edit on."""
    instruction: str
    """What to ask of it."""


def write_report(folder: str, config: EvaluationConfig, *, seed: int) -> Written:
    """The files metrics.json, report.html and example.png in the folder, each whole or absent."""
    tasks = scores.edit_tasks(config.tasks, config.seed)
    written = Written(
        metrics=storage.join(folder, "metrics.json"),
        report=storage.join(folder, "report.html"),
        example=storage.join(folder, "example.png"),
        instruction=tasks[0].instruction,
    )
    answers = storage.join(folder, "answers")
    manifests = {
        stage: [storage.read_manifest(storage.join(folder, name)) for name in names]
        for stage, names in STAGES.items()
    }
    reports = [report for made in manifests.values() for each in made for report in each.reports]
    metrics: dict[str, Any] = {
        **score_answers(answers, config),
        "funnel": evaluation.funnel(reports),
        "seconds": {
            stage: round(sum(manifest.wall_seconds for manifest in made), 1)
            for stage, made in manifests.items()
        },
        "seed": seed,
    }
    rows = read_answers(answers)
    text = page(
        title="From captions to an edited picture",
        metrics=metrics,
        pairs=_shown_pairs(storage.join(folder, "pairs")),
        edits=_shown_edits(rows, tasks[: config.shown]),
        curves={
            COLUMNS[name]: evaluation.guidance_curve(rows, name, config)
            for name in (evaluation.EDITOR, evaluation.SHIPPED)
        },
        losses=[
            (noted["step"], noted["loss"])
            for noted in read_metrics(storage.join(folder, "checkpoints"))
        ],
        command=edit_command(folder, written),
    )
    example = encode_png(to_pil(draw(tasks[0].scene)))
    storage.write_bytes(written.example, example)
    storage.write_bytes(written.report, text.encode())
    storage.write_bytes(written.metrics, (json.dumps(metrics, indent=2) + "\n").encode())
    return written


def edit_command(folder: str, written: Written) -> str:
    """What to type to edit the example with the editor that was just trained."""
    python, example, editor = (
        shlex.quote(shown(place))
        for place in (str(_python()), written.example, storage.join(folder, "editor"))
    )
    asked = f'--image {example} --instruction "{written.instruction}" --model {editor}'
    return f"{python} jobs/edit.py {asked}"


def _python() -> Path:
    """The interpreter as it would be typed: by its path where it lies below this folder."""
    found = Path(sys.executable)
    return found if found.is_relative_to(Path.cwd()) else Path("python")


def shown(place: str) -> str:
    """A path, or s3://..., as it would be typed in this folder."""
    if not storage.is_local(place):
        return place
    path = storage.local_path(place)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _shown_pairs(pairs: str) -> list[ShownPair]:
    """The first pair of each triplet, of as many triplets as are shown."""
    rows = storage.read_dataset(pairs, PAIRS).sort_by("pair_key").to_pylist()
    one_each = {row["triplet_key"]: row for row in reversed(rows)}
    return [
        ShownPair(
            caption=row["caption"],
            instruction=row["instruction"],
            edited_caption=row["edited_caption"],
            source_image=row["source_image"]["bytes"],
            edited_image=row["edited_image"]["bytes"],
            similarities={name: row[name] for name in SIMILARITIES},
        )
        for _, row in sorted(one_each.items())[:SHOWN_PAIRS]
    ]


def _shown_edits(rows: list[dict[str, Any]], tasks: list[scores.EditTask]) -> list[ShownEdit]:
    found = {name: usual_answers(rows, name) for name in COLUMNS}
    return [
        ShownEdit(
            caption=task.caption,
            instruction=task.instruction,
            pictures={
                "the input": encode_png(to_pil(draw(task.scene))),
                **{
                    heading: found[name][number]["edited_image"]["bytes"]
                    for name, heading in COLUMNS.items()
                },
                "the true answer": encode_png(to_pil(draw(task.edit.edited))),
            },
        )
        for number, task in enumerate(tasks)
    ]
