"""Who answers tasks: an editor, and what a generator can do without being trained to edit.

Each is told as a small frozen object, which travels to an actor and loads its model there. An
answer is a row of the `answers` of `trials.ANSWERED`. Pictures come out at the size of
`images.edit_size`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from ip2p_ray.baselines import prompt_to_prompt, sdedit
from ip2p_ray.candidates import CandidateRequest
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.editor import Editor, EditSettings
from ip2p_ray.errors import ModelError
from ip2p_ray.generator import DTypeName, GeneratorWeights
from ip2p_ray.images import UINT8, decode_image, edit_size, encode_png, fit_image, to_pil
from ip2p_ray.miniature import weights
from ip2p_ray.pairs import PairConfig, generate_candidates
from ip2p_ray.trials import (
    EDITOR,
    GENERATED_PAIR,
    PROMPT_TO_PROMPT,
    SDEDIT,
    Setting,
    TrialConfig,
    noise_seed,
)

Row = Mapping[str, Any]
Answers = list[dict[str, Any]]
Made = Callable[[Sequence[Row], Sequence[Image.Image], float], UINT8]


class Answering(Protocol):
    """Answers tasks, which are rows of `trials.TASKS`."""

    def answer(self, tasks: Sequence[Row]) -> list[Answers]:
        """The answers of each task, one at each setting that it is asked at."""
        ...


class Answerer(Protocol):
    """Who answers, before anything is loaded."""

    def load(self, device: str, batch_size: int) -> Answering:
        """Ready on the device, making so many pictures at a time."""
        ...


@dataclass(frozen=True, kw_only=True)
class EditorAnswerer:
    """A trained editor; does a task's instructions one after the other."""

    source: str
    """Diffusers folder or hub id; or a folder of the miniature's weights."""
    trials: TrialConfig
    steps: int | None = None
    """None is the editor's own."""
    dtype: DTypeName = "float32"

    def load(self, device: str = "cpu", batch_size: int = 8) -> _Editing:
        """As `Answerer.load`."""
        return _Editing(self.editor(device, batch_size), self.trials)

    def editor(self, device: str = "cpu", batch_size: int = 8) -> Editor:
        """The editor itself.

        Raises:
            ModelError: it is missing, broken, or no editor.
        """
        if (Path(self.source) / weights.PAIRS_FILE).is_file():
            shipped = weights.load_editor(Path(self.source), device=device)
            editor = Editor(shipped.model, settings=shipped.settings, batch_size=batch_size)
        else:
            editor = Editor.load(
                self.source, device=device, dtype=getattr(torch, self.dtype), batch_size=batch_size
            )
        if self.steps is not None:
            editor.settings = replace(editor.settings, steps=self.steps)
        return editor


class _Editing:
    def __init__(self, editor: Editor, trials: TrialConfig) -> None:
        self._editor, self._trials = editor, trials

    def answer(self, tasks: Sequence[Row]) -> list[Answers]:
        own = self._editor.settings
        settings = self._trials.editor_settings(own.text_guidance_scale, own.image_guidance_scale)
        asked = _asked(tasks, settings, self._trials)
        pictures: list[Any] = [tasks[row]["source_image"]["bytes"] for row, _ in asked]
        longest = max(len(task["instructions"]) for task in tasks)
        for turn in range(longest):
            going = [
                place
                for place, (row, _) in enumerate(asked)
                if turn < len(tasks[row]["instructions"])
            ]
            edited = self._editor.edit_batch(
                [pictures[place] for place in going],
                [tasks[asked[place][0]]["instructions"][turn] for place in going],
                [
                    noise_seed(self._trials, tasks[asked[place][0]]["task_key"], turn)
                    for place in going
                ],
                text_guidance_scale=[asked[p][1].text_guidance_scale or 0.0 for p in going],
                image_guidance_scale=[asked[p][1].image_guidance_scale or 0.0 for p in going],
            )
            for place, picture in zip(going, edited, strict=True):
                pictures[place] = picture
        return _collected(EDITOR, asked, pictures, len(tasks))


@dataclass(frozen=True, kw_only=True)
class GeneratorAnswerer:
    """What a generator makes of a task: SDEdit, Prompt-to-Prompt, and a pair of its own."""

    weights: GeneratorWeights
    pairs: PairConfig
    """How the generator is sampled; the guidance scale of a pair of its own is the middle of the
    range."""
    trials: TrialConfig
    guidance_scale: float | None = None
    """Of SDEdit and Prompt-to-Prompt; None is the middle of the pairs' range too."""

    @property
    def pair_scale(self) -> float:
        """The guidance scale of a pair of its own."""
        return sum(self.pairs.guidance_scale) / 2

    @property
    def edit_scale(self) -> float:
        """The guidance scale of edits of a task's picture."""
        return self.pair_scale if self.guidance_scale is None else self.guidance_scale

    def load(self, device: str = "cpu", batch_size: int = 8) -> _Generating:
        """As `Answerer.load`.

        Raises:
            ModelError: it is missing, broken, or an editor.
        """
        model = self.weights.load(device)
        if model.takes_image:
            raise ModelError(
                f"generator {self.weights.source} is an editor: its UNet takes "
                f"{model.unet.config['in_channels']} channels, a generator's "
                f"{model.latent_channels}"
            )
        return _Generating(self, model, batch_size)


class _Generating:
    def __init__(self, told: GeneratorAnswerer, model: StableDiffusion, batch_size: int) -> None:
        self._told, self._model, self._batch_size = told, model, batch_size

    def answer(self, tasks: Sequence[Row]) -> list[Answers]:
        """No answer where there are no captions; SDEdit takes the instructions for one."""
        edits = (
            self._edited(tasks, SDEDIT, "strength", self._sdedit),
            self._edited(tasks, PROMPT_TO_PROMPT, "self_replace", self._prompt_to_prompt),
            self._pairs(tasks),
        )
        return [[answer for some in own for answer in some] for own in zip(*edits, strict=True)]

    def _edited(self, tasks: Sequence[Row], kind: str, name: str, made: Made) -> list[Answers]:
        """Edits of the tasks' pictures at each value of the setting `name`."""
        trials = self._told.trials
        asked = [
            (row, setting)
            for row, setting in _asked(tasks, trials.of_one_number(name), trials)
            if kind == SDEDIT or _has_captions(tasks[row])
        ]
        prepared = [self._prepared(task) for task in tasks]
        batches: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for place, (row, setting) in enumerate(asked):
            batches[(getattr(setting, name), prepared[row].size)].append(place)
        pictures: list[Image.Image | None] = [None] * len(asked)
        for (number, _), places in batches.items():
            for start in range(0, len(places), self._batch_size):
                part = places[start : start + self._batch_size]
                rows = [asked[place][0] for place in part]
                drawn = made([tasks[r] for r in rows], [prepared[r] for r in rows], number)
                for place, array in zip(part, drawn, strict=True):
                    pictures[place] = to_pil(array)
        return _collected(kind, asked, pictures, len(tasks))

    def _sdedit(
        self, tasks: Sequence[Row], pictures: Sequence[Image.Image], strength: float
    ) -> UINT8:
        config = self._told.pairs
        return sdedit(
            self._model,
            pictures,
            [task["edited_caption"] or ", ".join(task["instructions"]) for task in tasks],
            [noise_seed(self._told.trials, task["task_key"]) for task in tasks],
            strength=strength,
            steps=config.steps,
            guidance_scale=self._told.edit_scale,
            sampler=config.sampler,
            spacing=config.spacing,
        )

    def _prompt_to_prompt(
        self, tasks: Sequence[Row], pictures: Sequence[Image.Image], self_replace: float
    ) -> UINT8:
        return prompt_to_prompt(
            self._model,
            pictures,
            [task["caption"] for task in tasks],
            [task["edited_caption"] for task in tasks],
            self_replace=self_replace,
            steps=self._told.pairs.steps,
            guidance_scale=self._told.edit_scale,
            spacing=self._told.pairs.spacing,
        )

    def _pairs(self, tasks: Sequence[Row]) -> list[Answers]:
        """Both pictures from the captions, made as training pairs are, and not chosen among."""
        trials, config = self._told.trials, self._told.pairs
        usual, others = trials.of_one_number("self_replace")
        asked = [
            (row, setting)
            for row, setting in _asked(tasks, (usual, others), trials)
            if _has_captions(tasks[row])
        ]
        made: list[tuple[Image.Image, Image.Image]] = []
        for start in range(0, len(asked), self._batch_size):
            part = asked[start : start + self._batch_size]
            requests = [
                CandidateRequest(
                    triplet_key=tasks[row]["task_key"],
                    index=0,
                    caption=tasks[row]["caption"],
                    edited_caption=tasks[row]["edited_caption"],
                    seed=noise_seed(trials, tasks[row]["task_key"]),
                    self_replace=setting.self_replace or 0.0,
                    guidance_scale=self._told.pair_scale,
                )
                for row, setting in part
            ]
            both = generate_candidates(self._model, requests, config)
            made += [(to_pil(a), to_pil(b)) for a, b in zip(*both, strict=True)]
        found = _collected(GENERATED_PAIR, asked, [edited for _, edited in made], len(tasks))
        own = _collected(GENERATED_PAIR, asked, [source for source, _ in made], len(tasks))
        for answers, sources in zip(found, own, strict=True):
            for answer, drawn in zip(answers, sources, strict=True):
                answer["own_source"] = drawn["picture"]
        return found

    def _prepared(self, task: Row) -> Image.Image:
        """The picture as an editor of this generator would take it."""
        upright = decode_image(task["source_image"]["bytes"])
        model = self._model
        levels = len(model.vae.config["block_out_channels"])
        levels += len(model.unet.config["block_out_channels"])
        size = edit_size(
            *upright.size,
            resolution=self._told.pairs.resolution,
            multiple=int(2 ** (levels - 2)),
            max_pixels=EditSettings().max_pixels,
        )
        return fit_image(upright, size)


def _asked(
    tasks: Sequence[Row], settings: tuple[list[Setting], list[Setting]], trials: TrialConfig
) -> list[tuple[int, Setting]]:
    """(task, setting) of every answer that is to be made."""
    usual, others = settings
    return [
        (row, setting)
        for row, task in enumerate(tasks)
        for setting in (*usual, *(others if trials.on_curve(task["number"]) else ()))
    ]


def _collected(
    kind: str,
    asked: Sequence[tuple[int, Setting]],
    pictures: Sequence[Image.Image | None],
    tasks: int,
) -> list[Answers]:
    found: list[Answers] = [[] for _ in range(tasks)]
    for (row, setting), picture in zip(asked, pictures, strict=True):
        assert picture is not None
        stored = {"bytes": encode_png(picture), "path": None}
        answer = {"kind": kind, **asdict(setting), "picture": stored, "own_source": None}
        found[row].append(answer)
    return found


def _has_captions(task: Row) -> bool:
    return task["caption"] is not None and task["edited_caption"] is not None
