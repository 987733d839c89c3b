"""The measures of answers: CLIP's, DINO's, plain differences, and the oracle's.

An editor answers at a size of its own, for which `images.fit_image` cuts the input equally on both
sides. So everything that an answer is compared with, the input and the true picture, is first cut
in the same way to the answer's aspect (`seen`), whoever answered; else what the editor was never
shown would count against it, and the copied input would gain. Where the aspects agree nothing is
cut, and only there it is MagicBrush's own evaluation.

Cosines are then of the pictures as they are, in the preprocessing that `clip` and `dino` state. For
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
from ip2p_ray.images import decode_image, fit_image
from ip2p_ray.miniature.oracle import judge_edit
from ip2p_ray.miniature.scores import EditTask
from ip2p_ray.trials import MEASURES

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


@dataclass(frozen=True)
class _Compared:
    """An answer beside what it is compared with, at its aspect."""

    picture: Image.Image
    source: Image.Image
    """What it was made from."""
    truth: Image.Image | None
    """None also where it was made from a picture of its own."""

    @property
    def pictures(self) -> list[Image.Image]:
        three = (self.picture, self.source, self.truth)
        return [picture for picture in three if picture is not None]


class Measurer:
    """Measures answers with one CLIP and, where there is one, a DINO."""

    def __init__(self, clip: Clip, dino: Dino | None = None, *, at_a_time: int = 64) -> None:
        """`at_a_time` pictures are in one pass of a judge."""
        self._clip, self._dino, self._at_a_time = clip, dino, at_a_time

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
        compared = [_compared(task, some) for task, some in zip(tasks, answers, strict=True)]
        pictures = [picture for some in compared for one in some for picture in one.pictures]
        clip = self._encoded(pictures, self._encode_clip)
        dino = self._encoded(pictures, self._dino.encode_images) if self._dino else None
        texts = self._texts(tasks)
        found: list[list[dict[str, float | None]]] = []
        for place, task in enumerate(tasks):
            found.append(
                [
                    {
                        **dict.fromkeys(MEASURES),
                        **_similarities(one, clip, texts, task),
                        **(_of_dino(one, dino) if dino else {}),
                        **_differences(one),
                        **(_oracle(shown, drawn[place]) if drawn else {}),
                    }
                    for one, shown in zip(compared[place], answers[place], strict=True)
                ]
            )
        return found

    def _encoded(self, pictures: Sequence[Image.Image], encode: Encode) -> _Features:
        """Each picture once."""
        distinct = {id(picture): picture for picture in pictures}
        listed = list(distinct.values())
        parts = [
            encode(listed[start : start + self._at_a_time]).cpu()
            for start in range(0, len(listed), self._at_a_time)
        ]
        return _Features(torch.cat(parts), {key: row for row, key in enumerate(distinct)})

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


def seen(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """What an editor that answers at this size saw of the picture: all of it, or its middle.

    The size stays that of the picture but for what is cut, as `fit_image` cuts, equally on both
    sides of the direction that is too long; the picture itself where that is less than a pixel.
    """
    width, height = picture.size
    across, up = size
    kept = (
        min(width, max(1, round(height * across / up))),
        min(height, max(1, round(width * up / across))),
    )
    return picture if kept == picture.size else fit_image(picture, kept)


def _compared(task: Mapping[str, Any], answers: Sequence[Shown]) -> list[_Compared]:
    """Each answer; those of one size share the pictures that they are compared with."""
    given, right = _decoded(task["source_image"]), _decoded(task["edited_image"])
    assert given is not None
    sources: dict[tuple[int, int], Image.Image] = {}
    truths: dict[tuple[int, int], Image.Image] = {}
    found = []
    for one in answers:
        size = one.picture.size
        truth = None
        if one.own_source is not None:
            source = seen(one.own_source, size)
        else:
            if size not in sources:
                sources[size] = seen(given, size)
                if right is not None:
                    truths[size] = seen(right, size)
            source, truth = sources[size], truths.get(size)
        found.append(_Compared(one.picture, source, truth))
    return found


def _similarities(
    one: _Compared,
    clip: _Features,
    texts: Mapping[str, torch.Tensor],
    task: Mapping[str, Any],
) -> dict[str, float | None]:
    """Of CLIP; the same cosines as `Clip.similarities`."""
    before, after = clip.of(one.source), clip.of(one.picture)
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
        "truth_clip": _cosine(after, clip.of(one.truth)),
    }


def _of_dino(one: _Compared, dino: _Features) -> dict[str, float | None]:
    after = dino.of(one.picture)
    return {
        "source_dino": _cosine(after, dino.of(one.source)),
        "truth_dino": _cosine(after, dino.of(one.truth)),
    }


def _differences(one: _Compared) -> dict[str, float | None]:
    found: dict[str, float | None] = {"source_l1": difference_to(one.source, one.picture)[0]}
    if one.truth is not None:
        found["truth_l1"], found["truth_l2"] = difference_to(one.truth, one.picture)
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


def _decoded(image: Mapping[str, Any] | None) -> Image.Image | None:
    return None if image is None else decode_image(image["bytes"])


def _cosine(left: torch.Tensor | None, right: torch.Tensor | None) -> float | None:
    if left is None or right is None:
        return None
    return float(F.cosine_similarity(left, right, dim=-1))
