"""The shipped weights of the miniature: where they are, what is in them, how they load.

The editor shares the generator's autoencoder, text encoder and tokenizer, so its folder holds only
its UNet; `load_editor` puts the parts together and `Editor.save` writes them out as one folder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.editor import Editor, EditSettings
from ip2p_ray.errors import ModelError
from ip2p_ray.filtering import Thresholds
from ip2p_ray.model_files import SAFETENSORS, require_safetensors
from ip2p_ray.pairs import PairConfig
from ip2p_ray.settings import read_settings

WEIGHTS = Path(__file__).parent / "weights"
"""The folder that comes with the package."""

PAIRS_FILE = "pairs.json"
"""The fields of PairConfig that the generator was tried with; thresholds are in their own file."""
THRESHOLDS_FILE = "thresholds.json"
EDITOR_DEFAULTS = "editor_defaults.json"

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_DIFFUSERS = ("config.json", "diffusion_pytorch_model.safetensors")
_TRANSFORMERS = ("config.json", "model.safetensors")

CONTENT = (
    *(f"writer/{name}" for name in (*_TRANSFORMERS, *_TOKENIZER)),
    *(f"judge/{n}" for n in ("open_clip_config.json", "open_clip_model.safetensors", *_TOKENIZER)),
    "generator/model_index.json",
    "generator/scheduler/scheduler_config.json",
    *(f"generator/unet/{name}" for name in _DIFFUSERS),
    *(f"generator/vae/{name}" for name in _DIFFUSERS),
    *(f"generator/text_encoder/{name}" for name in _TRANSFORMERS),
    *(f"generator/tokenizer/{name}" for name in _TOKENIZER),
    *(f"editor/unet/{name}" for name in _DIFFUSERS),
    f"editor/{EDITOR_DEFAULTS}",
    PAIRS_FILE,
    THRESHOLDS_FILE,
)
"""Files without which `require` refuses the folder."""


BROKEN = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)


def require(folder: Path = WEIGHTS) -> Path:
    """The folder itself, once everything in it is there.

    Raises:
        ModelError: the folder is missing or lacks a file; it is named.
    """
    if not folder.is_dir():
        raise ModelError(f"the miniature's weights folder {folder} does not exist")
    for name in CONTENT:
        path = folder / name
        if not path.is_file() or path.stat().st_size == 0:
            raise ModelError(f"the miniature's weights folder {folder} lacks {name}")
    return folder


def load_generator(
    folder: Path = WEIGHTS, *, device: str | torch.device = "cpu"
) -> StableDiffusion:
    """The text-to-image model of the drawn world."""
    return StableDiffusion.load(require(folder) / "generator", device=device)


def load_editor(folder: Path = WEIGHTS, *, device: str | torch.device = "cpu") -> Editor:
    """The shipped editor with its own defaults (64 pixels, fewer steps than the paper's)."""
    model = load_generator(folder, device=device)
    place = folder / "editor" / "unet"
    require_safetensors(place, "the editor's UNet")
    try:
        unet: Any
        unet, found = UNet2DConditionModel.from_pretrained(
            place, local_files_only=True, output_loading_info=True, **SAFETENSORS
        )
    except BROKEN as error:
        raise ModelError(f"the editor in {folder / 'editor'} cannot be loaded: {error}") from error
    settings = read_settings(EditSettings, folder / "editor" / EDITOR_DEFAULTS)
    if found["missing_keys"]:
        raise ModelError(f"the editor's UNet in {place} lacks {found['missing_keys'][0]}")
    parts = replace(model, unet=unet.to(device).eval())
    return Editor(parts, settings=settings, batch_size=32)


def thresholds(folder: Path = WEIGHTS) -> Thresholds:
    """The least similarities of a kept pair, calibrated on drawn pairs for this judge."""
    return read_settings(Thresholds, folder / THRESHOLDS_FILE, complete=True)


def pair_config(folder: Path = WEIGHTS, **changes: Any) -> PairConfig:
    """How the miniature's candidates are made and judged; `changes` replace single fields."""
    given = {"thresholds": thresholds(folder), **changes}
    return read_settings(PairConfig, folder / PAIRS_FILE, **given)
