"""Scoring the trained miniature on held-out scenes, and packing it for the package.

What is shipped is float16; the scores are those of the float32 models that are packed.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import open_clip
import torch
import transformers
from safetensors.torch import load_file, save_file

from ip2p_ray.atomic import atomic_folder
from ip2p_ray.diffusion.sample import text_to_image
from ip2p_ray.editor import Editor
from ip2p_ray.filtering import Thresholds
from ip2p_ray.images import to_pil
from ip2p_ray.miniature import editing, scores
from ip2p_ray.miniature.drawing import SIZE
from ip2p_ray.miniature.editing import EditingConfig
from ip2p_ray.miniature.weights import EDITOR_DEFAULTS, PAIRS_FILE, THRESHOLDS_FILE

logger = logging.getLogger(__name__)

EDITOR_SETTINGS: dict[str, Any] = {
    "steps": 12,
    "sampler": "dpmpp_2m",
    "text_guidance_scale": 2.0,
    "image_guidance_scale": 1.5,
    "resolution": 64,
    "max_pixels": 64 * 64,
}
"""EditSettings of the shipped editor: the paper's scales are for 512 pixels and real pictures."""


def score(
    folder: Path, config: EditingConfig, *, seed: int, tasks: int, device: str
) -> dict[str, Any]:
    """All scores of the models in `folder` on held-out scenes, with their baselines.

    `tasks` edits and as many captions are asked.
    """
    models = editing.load_models(folder, device)
    thresholds = Thresholds(**_records(folder)["calibration"]["thresholds"])
    asked = scores.edit_tasks(tasks, seed + 1)
    sources = scores.source_pictures(asked)
    editor = Editor.load(folder / "editor", device=device, batch_size=64)
    edited = editor.edit_batch(
        [to_pil(source) for source in sources],
        [task.instruction for task in asked],
        seeds=list(range(tasks)),
    )
    logger.info("scores: the editor has answered")
    alone = text_to_image(
        models.generator,
        [task.edited_caption for task in asked],
        list(range(tasks)),
        height=SIZE,
        width=SIZE,
        **scores.GENERATOR_SAMPLING,
    )
    logger.info("scores: the generator alone has answered")
    funnel = editing.held_out_funnel(
        models, config.pairs(thresholds), seed=seed + 2, count=max(1, tasks // 4)
    )
    return {
        "judge_accuracy_of_64": scores.score_judge(models.clip, seed=seed + 1),
        "writer": scores.score_writer(models.writer, seed=seed + 1, count=2 * tasks),
        "generator": scores.score_generator(
            models.generator, models.clip, seed=seed + 1, count=tasks
        ),
        "pairs_kept": editing.kept_share(funnel),
        "tasks": tasks,
        "editor": scores.score_edits(np.stack([np.asarray(p) for p in edited]), asked),
        "copy_input": scores.score_edits(sources, asked),
        "generator_only": scores.score_edits(alone, asked),
        "chance": scores.chance(asked),
    }


def ship(folder: Path, config: EditingConfig, *, command: str) -> Path:
    """Write `folder`/weights: float16 safetensors, thresholds, settings, scores, model card.

    What `folder`/notes.md says goes into the card: how the weights came about otherwise.
    """
    records = _records(folder)
    with atomic_folder(folder / "weights") as target:
        _pack(folder, target, config, records)
        own = folder / "notes.md"
        notes = own.read_text(encoding="utf-8") + "\n" if own.exists() else ""
        card = _card(records, command, target, notes)
        (target / "README.md").write_text(card, encoding="utf-8")
    return folder / "weights"


def _pack(folder: Path, target: Path, config: EditingConfig, records: dict[str, Any]) -> None:
    """Everything but the model card."""
    for part in ("writer", "judge", "generator", "editor"):
        shutil.copytree(folder / part, target / part)
    for shared in ("vae", "text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(target / "editor" / shared)
    for path in target.rglob("*.safetensors"):
        _halve(path)
    for path in target.rglob("config.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("_name_or_path", None)  # a path of the machine that trained
        _write(path, content)
    _write(target / THRESHOLDS_FILE, records["calibration"]["thresholds"])
    pairs = asdict(config.pairs(Thresholds()))
    del pairs["thresholds"]
    _write(target / PAIRS_FILE, pairs)
    _write(target / "editor" / EDITOR_DEFAULTS, EDITOR_SETTINGS)
    _write(target / "scores.json", records["scores"])


def _halve(path: Path) -> None:
    tensors = load_file(path)
    halved = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(halved, path, metadata={"format": "pt"})


def _records(folder: Path) -> dict[str, Any]:
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in (folder / "records").glob("*.json")
    }


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _card(records: dict[str, Any], command: str, folder: Path, notes: str) -> str:
    """The model card: what it is, how it was made, how well it does."""
    scores_ = records["scores"]
    pairs, calibration = records["pairs"], records["calibration"]
    megabytes = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6
    versions = ", ".join(
        f"{module.__name__} {module.__version__}"
        for module in (torch, diffusers, transformers, open_clip)
    )
    trainings = ("autoencoder", "decoder", "judge", "writer", "generator", "editor")
    steps = "\n".join(
        f"| {name} | {int(records[name]['steps']):,} | {records[name]['seconds'] / 60:.0f} "
        f"| {records[name]['device']} |"
        for name in trainings
        if name in records
    )
    rows = "\n".join(
        f"| {label} | {_percent(scores_[key]['forced_choice_accuracy'])} "
        f"| {scores_[key]['preservation_error']:.3f} |"
        for label, key in (
            ("editor", "editor"),
            ("copying the input", "copy_input"),
            ("generator from the edited caption, no image", "generator_only"),
        )
    )
    by_type = ", ".join(
        f"{kind} {_percent(share)}" for kind, share in scores_["editor"]["by_type"].items()
    )
    failing = ", ".join(f"{_percent(v)} ({k})" for k, v in calibration["mismatched_fail"].items())
    writer = scores_["writer"]
    generator = _percent(scores_["generator"]["both"])
    kept = f"{_percent(scores_['pairs_kept'])} / {_percent(editing.kept_share(pairs['funnel']))}"
    written = f"{_percent(writer['parsed'])} / {_percent(writer['true_edits'])}"
    return f"""# The miniature's weights

Four small models of a drawn world (64x64 pictures; 8 subjects, 6 colours, 4 settings, 3 manners):
a writer (Llama), a judge (open_clip), a generator (Stable Diffusion) and an editor (the same with a
UNet of twice the input channels). float16, {megabytes:.1f} MB. The editor shares the generator's
autoencoder, text encoder and tokenizer. No picture or text from outside went into them.
License: Apache-2.0, as the package.

Made by `{command}` ({versions}).

| training | steps | minutes | device |
|---|---|---|---|
{steps}

{notes}Held-out scenes show combinations of subject, colour and setting that no picture the
generator learned from has. The scores are those of the float32 models that were rounded.

| score, held-out | measured | goal |
|---|---|---|
| judge finds a picture's caption among 64 | {_percent(scores_["judge_accuracy_of_64"])} | 95 % |
| writer's replies that parse / are true edits | {written} | 95 % |
| generator's pictures that judge and oracle both read as captioned | {generator} | 85 % |
| candidates kept at the miniature's thresholds / the same of training captions | {kept} | 15 % |
| thresholds: drawn true pairs that pass | {_percent(calibration["true_pass"])} | 95 % |
| thresholds: drawn mismatched pairs that fail | {failing} | 95 % |

| {scores_["tasks"]} held-out edits | forced-choice accuracy | preservation error |
|---|---|---|
{rows}
| chance | {_percent(scores_["chance"])} | - |
| goal | 85 % | 0.050 |

The editor by type of edit: {by_type}. The forced choice is among all edits of the scene and the
unedited scene (17 to 60 pictures); preservation is the mean absolute error on [0, 1] outside the
region that the edit changes.
"""


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
