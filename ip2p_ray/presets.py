"""Whole sets of settings by name: the paper's, a fast one of the same models, the miniature's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ip2p_ray.clip import Clip
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.editor import EditSettings
from ip2p_ray.errors import ConfigError
from ip2p_ray.miniature import weights
from ip2p_ray.pairs import PairConfig
from ip2p_ray.training.loop import TrainConfig
from ip2p_ray.triplets.local_writer import LocalWriter

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CLIP = "ViT-L-14/openai"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Which models make the data, and with which settings."""

    name: str
    """One of PRESETS."""
    writer: str | None
    """Folder of the causal LM that writes triplets; None where a service writes them."""
    generator: str
    """Folder or hub id of the Stable Diffusion that makes pairs and that the editor starts from."""
    judge: str
    """Folder or open_clip name of the CLIP that judges them."""
    shipped: str | None
    """Folder of the weights whose ready editor is compared with; None where there is none."""
    pairs: PairConfig
    training: TrainConfig
    editing: EditSettings
    """What the trained editor is used with when nothing else is said."""


def paper() -> Preset:
    """Everything as in the paper; a cluster's work."""
    return Preset(
        name="paper",
        writer=None,
        generator=STABLE_DIFFUSION,
        judge=CLIP,
        shipped=None,
        pairs=PairConfig(),
        training=TrainConfig(steps=10_000, bf16=True, gradient_checkpointing=True),
        editing=EditSettings(),
    )


def fast() -> Preset:
    """The paper's models at about a twelfth of the cost: fewer steps and candidates.

    Source: the reference's README on 25 steps; DPM-Solver++ needs no more.
    """
    return replace(
        paper(),
        name="fast",
        pairs=PairConfig(steps=25, candidates=32, sampler="dpmpp_2m"),
        training=TrainConfig(
            steps=2_000, batch_size=256, bf16=True, gradient_checkpointing=True, ema_decay=0.999
        ),
        editing=EditSettings(steps=20),
    )


def miniature(folder: Path = weights.WEIGHTS) -> Preset:
    """The drawn world's models and what they were calibrated with; minutes on two cores.

    Raises:
        ModelError: the folder is missing or broken; it is named.
    """
    folder = weights.require(folder).resolve()
    return Preset(
        name="miniature",
        writer=str(folder / "writer"),
        generator=str(folder / "generator"),
        judge=str(folder / "judge"),
        shipped=str(folder),
        pairs=weights.pair_config(folder),
        training=TrainConfig(
            steps=400,
            batch_size=32,
            learning_rate=5e-4,
            warmup_steps=20,
            decay="cosine",
            max_grad_norm=1.0,
            ema_decay=0.99,
            flips=False,
            channels_last=True,
        ),
        editing=weights.load_editor(folder).settings,
    )


PRESETS: dict[str, Callable[[], Preset]] = {"paper": paper, "fast": fast, "miniature": miniature}
"""By the name that a job's --preset takes."""


def by_name(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset is one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]()


def fingerprints(preset: Preset) -> dict[str, str]:
    """What identifies each model of the preset, by role; every model is loaded once for it.

    Raises:
        ModelError: a model is missing or broken; it is named.
    """
    found = {
        "generator": StableDiffusion.load(preset.generator).fingerprint(),
        "judge": Clip.load(preset.judge).fingerprint(),
    }
    if preset.writer is not None:
        LocalWriter.load(preset.writer)
        found["writer"] = folder_fingerprint(Path(preset.writer))
    if preset.shipped is not None:
        found["shipped_editor"] = folder_fingerprint(Path(preset.shipped) / "editor")
    return found


def folder_fingerprint(folder: Path) -> str:
    """32 hex digits of the names and contents of a folder's files: what identifies a model."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
