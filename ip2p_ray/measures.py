"""The measures of answers: CLIP's, DINO's, plain differences, and the oracle's.

Cosines are of the pictures as they are, in the preprocessing that `clip` and `dino` state. For
differences an answer is brought to the size of what it is compared with (bicubic), as in
MagicBrush's own evaluation. Scores of another harness, with other preprocessing or another CLIP,
are not comparable with these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ip2p_ray.clip import Clip
from ip2p_ray.dino import Dino
from ip2p_ray.images import decode_image
from ip2p_ray.miniature.oracle import judge_edit
from ip2p_ray.miniature.scores import EditTask
from ip2p_ray.trials import MEASURES

_AT_A_TIME = 64  # pictures in one pass of a judge

Encode = Callable[[Sequence[Image.Image]], torch.Tensor]


@dataclass(frozen=True)
class Shown:
    """One answer, decoded."""

    picture: Image.Image
    own_source: Image.Image | None = None
    """What it was made from where that is not the task's picture."""


@dataclass(frozen=True)
class _Features:
    """Unit-length features of some pictures, by their place in the list that was encoded."""

    rows: torch.Tensor
    places: Mapping[int, int]
    """From id() of a picture to its row."""

    def of(self, picture: Image.Image | None) -> torch.Tensor | None:
        return None if picture is None else self.rows[self.places[id(picture)]]


class Measurer:
    """Measures answers with one CLIP and, where there is one, a DINO."""

    def __init__(self, clip: Clip, dino: Dino | None = None) -> None:
        self._clip, self._dino = clip, dino

    def measure(
        self,
        tasks: Sequence[Mapping[str, Any]],
        answers: Sequence[Sequence[Shown]],
        drawn: Sequence[EditTask] | None = None,
    ) -> list[list[dict[str, float | None]]]:
        """All of MEASURES of each answer, None where the task lacks what a measure takes.

        `tasks` are rows of `trials.TASKS`, `answers` as many lists; `drawn` says which scenes and
        edits they are where the tasks are the miniature's.
        """
        sources = [_decoded(task["source_image"]) for task in tasks]
        truths = [_decoded(task["edited_image"]) for task in tasks]
        shown = [one for some in answers for one in some]
        pictures = [
            picture
            for picture in (*sources, *truths, *(s.picture for s in shown))
            if picture is not None
        ]
        pictures += [one.own_source for one in shown if one.own_source is not None]
        clip = _encoded(pictures, self._encode_clip)
        dino = _encoded(pictures, self._dino.encode_images) if self._dino else None
        texts = self._texts(tasks)
        found = []
        for place, (task, source, truth) in enumerate(zip(tasks, sources, truths, strict=True)):
            assert source is not None
            found.append(
                [
                    {
                        **dict.fromkeys(MEASURES),
                        **_similarities(one, source, truth, clip, texts, task),
                        **_differences(one, source, truth),
                        **(_of_dino(one, source, truth, dino) if dino else {}),
                        **(_oracle(one, drawn[place]) if drawn is not None else {}),
                    }
                    for one in answers[place]
                ]
            )
        return found

    def _encode_clip(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """Features of pictures of any sizes, those of one size together."""
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place, picture in enumerate(pictures):
            by_size[picture.size].append(place)
        rows: list[torch.Tensor] = [torch.empty(0)] * len(pictures)
        for places in by_size.values():
            # uint8: what range CLIP is fed is its own module's business
            batch = np.stack([np.asarray(pictures[place]) for place in places])
            for place, feature in zip(places, self._clip.encode_images(batch), strict=True):
                rows[place] = feature
        return torch.stack(rows)

    def _texts(self, tasks: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        wanted = {task[name] for task in tasks for name in ("caption", "edited_caption")} - {None}
        texts = sorted(wanted)
        if not texts:
            return {}
        return dict(zip(texts, self._clip.encode_texts(texts).cpu(), strict=True))


def _similarities(
    one: Shown,
    source: Image.Image,
    truth: Image.Image | None,
    clip: _Features,
    texts: Mapping[str, torch.Tensor],
    task: Mapping[str, Any],
) -> dict[str, float | None]:
    """Of CLIP; the same cosines as `Clip.similarities`."""
    before, after = clip.of(one.own_source or source), clip.of(one.picture)
    text, edited_text = texts.get(task["caption"]), texts.get(task["edited_caption"])
    assert before is not None
    assert after is not None
    direction = None
    if text is not None and edited_text is not None:
        direction = _cosine(after - before, edited_text - text)
    return {
        "direction_similarity": direction,
        "image_similarity": _cosine(before, after),
        "caption_similarity": _cosine(before, text),
        "edited_caption_similarity": _cosine(after, edited_text),
        "truth_clip": None if one.own_source else _cosine(after, clip.of(truth)),
    }


def _of_dino(
    one: Shown, source: Image.Image, truth: Image.Image | None, dino: _Features
) -> dict[str, float | None]:
    after = dino.of(one.picture)
    return {
        "source_dino": _cosine(after, dino.of(one.own_source or source)),
        "truth_dino": None if one.own_source else _cosine(after, dino.of(truth)),
    }


def _differences(
    one: Shown, source: Image.Image, truth: Image.Image | None
) -> dict[str, float | None]:
    found: dict[str, float | None] = {
        "source_l1": difference_to(one.own_source or source, one.picture)[0]
    }
    if truth is not None and one.own_source is None:
        found["truth_l1"], found["truth_l2"] = difference_to(truth, one.picture)
    return found


def difference_to(picture: Image.Image, answer: Image.Image) -> tuple[float, float]:
    """Mean absolute and mean squared difference on [0, 1], at the size of `picture`."""
    if answer.size != picture.size:
        answer = answer.resize(picture.size, Image.Resampling.BICUBIC)
    left, right = (np.asarray(image, dtype=np.float32) / 255.0 for image in (picture, answer))
    gap = left - right
    return float(np.abs(gap).mean()), float(np.square(gap).mean())


def _oracle(one: Shown, task: EditTask) -> dict[str, float | None]:
    if one.own_source is not None:  # a picture of its own making has no known right answer
        return {}
    verdict = judge_edit(np.asarray(one.picture), task.scene, task.edit)
    return {
        "correct": float(verdict.correct),
        "preservation_error": verdict.preservation_error,
    }


def _encoded(pictures: Sequence[Image.Image], encode: Encode) -> _Features:
    distinct = {id(picture): picture for picture in pictures}
    listed = list(distinct.values())
    parts = [
        encode(listed[start : start + _AT_A_TIME]).cpu()
        for start in range(0, len(listed), _AT_A_TIME)
    ]
    return _Features(torch.cat(parts), {key: row for row, key in enumerate(distinct)})


def _decoded(image: Mapping[str, Any] | None) -> Image.Image | None:
    return None if image is None else decode_image(image["bytes"])


def _cosine(left: torch.Tensor | None, right: torch.Tensor | None) -> float | None:
    if left is None or right is None:
        return None
    return float(F.cosine_similarity(left, right, dim=-1))
