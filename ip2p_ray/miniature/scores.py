"""Held-out questions of the miniature world, and the scores of those who answer them."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ip2p_ray.clip import Clip
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.diffusion.sample import text_to_image
from ip2p_ray.errors import ConfigError
from ip2p_ray.miniature import grammar
from ip2p_ray.miniature.oracle import alternatives, judge_edit, reads_as
from ip2p_ray.miniature.pace import Pace
from ip2p_ray.miniature.scenes import Edit, Scene, draw, edits, random_edit, random_scene
from ip2p_ray.triplets.local_writer import LocalWriter
from ip2p_ray.triplets.reply import Triplet, parse_reply

Pictures = NDArray[np.uint8]

MOST_CAPTIONS = 50_000
"""The grammar has some 200,000 captions; more than a part of them are slow to draw by chance."""


GENERATOR_SAMPLING: dict[str, Any] = {"steps": 20, "guidance_scale": 3.0, "sampler": "dpmpp_2m"}
"""How the generator is sampled wherever it is scored alone."""


@dataclass(frozen=True, kw_only=True)
class EditTask:
    """One question to an editor: a held-out scene and an edit of it, in words."""

    scene: Scene
    edit: Edit
    caption: str
    instruction: str
    edited_caption: str


def edit_tasks(count: int, seed: int) -> list[EditTask]:
    """Questions about scenes that show a held-out combination; the same for the same seed."""
    rng = random.Random(seed)
    tasks = []
    for _ in range(count):
        scene = random_scene(rng, held_out=True)
        edit = random_edit(scene, rng)
        caption, instruction, edited = grammar.triplet(scene, edit, rng)
        tasks.append(
            EditTask(
                scene=scene,
                edit=edit,
                caption=caption,
                instruction=instruction,
                edited_caption=edited,
            )
        )
    return tasks


def source_pictures(tasks: list[EditTask]) -> Pictures:
    """What the editor sees: uint8 (task, 64, 64, 3)."""
    return np.stack([draw(task.scene) for task in tasks])


def score_edits(pictures: Pictures, tasks: list[EditTask]) -> dict[str, Any]:
    """The oracle's scores of the answers, uint8 (task, 64, 64, 3).

    Keys: forced_choice_accuracy and preservation_error (means over tasks), count, and by_type,
    the accuracy of each edit type.
    """
    verdicts = [judge_edit(p, t.scene, t.edit) for p, t in zip(pictures, tasks, strict=True)]
    by_type: dict[str, list[bool]] = defaultdict(list)
    for verdict, task in zip(verdicts, tasks, strict=True):
        by_type[task.edit.type].append(verdict.correct)
    return {
        "forced_choice_accuracy": float(np.mean([v.correct for v in verdicts])),
        "preservation_error": float(np.mean([v.preservation_error for v in verdicts])),
        "count": len(tasks),
        "by_type": {kind: float(np.mean(right)) for kind, right in sorted(by_type.items())},
    }


def chance(tasks: list[EditTask]) -> float:
    """The accuracy of picking one of the pictures of the forced choice blindly."""
    return float(np.mean([1 / (1 + len(alternatives(t.scene, t.edit))) for t in tasks]))


def random_captions(count: int, seed: int) -> list[str]:
    """Different captions of scenes that are not held out.

    Raises:
        ConfigError: the grammar has hardly so many; 50,000 are to be had.
    """
    if count > MOST_CAPTIONS:
        raise ConfigError(f"at most {MOST_CAPTIONS:,} captions can be drawn, got {count:,}")
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        scene = random_scene(rng)
        found[grammar.caption(grammar.describe(scene), grammar.random_wording(rng))] = None
    return list(found)


def score_judge(clip: Clip, *, seed: int, count: int = 1024, choices: int = 64) -> float:
    """Share of held-out pictures whose own caption CLIP prefers to those of other scenes.

    Each picture is shown with `choices` captions, all of different meaning.
    """
    rng = random.Random(seed)
    right = 0
    for _ in range(count // choices):
        scenes: dict[Any, Scene] = {}
        while len(scenes) < choices:
            scene = random_scene(rng, held_out=True)
            scenes.setdefault(scene.described, scene)
        drawn = list(scenes.values())
        texts = [grammar.caption(grammar.describe(s), grammar.random_wording(rng)) for s in drawn]
        images = clip.encode_images(np.stack([draw(scene) for scene in drawn]))
        best = (images @ clip.encode_texts(texts).T).argmax(dim=-1).cpu()
        right += int((best == torch.arange(choices)).sum())
    return right / (count // choices * choices)


def score_writer(writer: LocalWriter, *, seed: int, count: int = 512) -> dict[str, float]:
    """Shares of replies to held-out captions that parse, and that are true edits by the grammar."""
    asked = [task.caption for task in edit_tasks(count, seed)]
    parsed = valid = 0
    for caption, reply in zip(asked, writer.write(asked, seed=seed), strict=True):
        triplet = parse_reply(caption, reply)
        if isinstance(triplet, Triplet):
            parsed += 1
            texts = (caption, triplet.instruction, triplet.edited_caption)
            valid += grammar.is_true_edit(*texts)
    return {"parsed": parsed / count, "true_edits": valid / count}


def score_generator(
    model: StableDiffusion,
    clip: Clip,
    *,
    seed: int,
    count: int = 256,
) -> dict[str, float]:
    """Shares of pictures of held-out captions that CLIP, the oracle, and both read as captioned.

    CLIP reads a picture as its caption when it prefers it to all captions one edit away; the
    oracle likewise, by drawing them.
    """
    tasks = edit_tasks(count, seed)
    by_clip = by_oracle = by_both = 0
    pace = Pace("generator's score", count, unit="picture")
    for start in range(0, count, 32):
        part = tasks[start : start + 32]
        pictures = text_to_image(
            model,
            [task.caption for task in part],
            [seed * count + start + k for k in range(len(part))],
            height=64,
            width=64,
            **GENERATOR_SAMPLING,
        )
        pace.tick(start + len(part))
        for picture, task in zip(pictures, part, strict=True):
            described = grammar.parse_caption(task.caption)
            assert described is not None
            clip_right = _clip_reads(clip, picture, task)
            oracle_right = reads_as(picture, described)
            by_clip += clip_right
            by_oracle += oracle_right
            by_both += clip_right and oracle_right
    return {"clip": by_clip / count, "oracle": by_oracle / count, "both": by_both / count}


def _clip_reads(clip: Clip, picture: Pictures, task: EditTask) -> bool:
    wording = grammar.Wording(0, 0, 0)
    meanings = {edit.edited.described for edit in edits(task.scene)} - {task.scene.described}
    rivals = [grammar.caption(grammar.Described(*m), wording) for m in sorted(meanings)]
    texts = clip.encode_texts([task.caption, *rivals])
    return int((texts @ clip.encode_images(picture[None])[0]).argmax()) == 0
