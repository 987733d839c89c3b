"""Batches of drawn scenes as tensors, each drawn from its own seed."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from ip2p_ray.miniature import grammar
from ip2p_ray.miniature.scenes import (
    WORLD,
    Edit,
    Scene,
    draw,
    is_held_out,
    random_edit,
    random_scene,
)
from ip2p_ray.schema import stream_seed


def step_random(name: str, seed: int, step: int, *, rank: int = 0) -> random.Random:
    """The random stream of one step of one named training run, in one of its processes."""
    place = (rank,) if rank else ()
    return random.Random(stream_seed("miniature", name, seed, step, *place))


def scene_batch(rng: random.Random, count: int, *, held_out: bool = False) -> list[Scene]:
    """Scenes of the shipped world, with or without held-out combinations."""
    return [random_scene(rng, WORLD, held_out=held_out) for _ in range(count)]


def training_edit(scene: Scene, rng: random.Random) -> Edit:
    """An edit of the scene that shows no held-out combination."""
    while True:
        edit = random_edit(scene, rng)
        if not is_held_out(edit.edited):
            return edit


def pictures(scenes: list[Scene]) -> Tensor:
    """float32 (scene, 3, 64, 64) in [-1, 1]."""
    stacked = np.stack([draw(scene) for scene in scenes])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def captions(scenes: list[Scene], rng: random.Random) -> list[str]:
    """One caption a scene, its wording drawn from `rng`."""
    return [grammar.caption(grammar.describe(s), grammar.random_wording(rng)) for s in scenes]
