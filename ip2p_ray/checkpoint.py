"""Checkpoints of a training run, and the export of its editor.

A checkpoint is a folder `step-00000012` that appears by one rename when it is whole: safetensors
for the weights, their average and the optimizer's moments, JSON for the rest, and `checksums.json`.
Nothing is pickled. One process at a time writes to a folder of checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ip2p_ray.atomic import atomic_folder, remove_folder, remove_leftovers, set_aside, sync
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import ConfigError, ModelError
from ip2p_ray.training.ema import Ema
from ip2p_ray.training.lora import merged
from ip2p_ray.training.state import TrainState

EDITOR_DEFAULTS = "editor_defaults.json"
CARD = "README.md"
CHECKSUMS, FACTS = "checksums.json", "state.json"
PARTS = ("unet", "ema", "optimizer")
FILES = (*(f"{part}.safetensors" for part in PARTS), FACTS)
"""What a checkpoint has beside CHECKSUMS."""


def save_checkpoint(folder: str | Path, state: TrainState, *, keep: int | None = 2) -> Path:
    """The new folder `folder/step-...`; the `keep` newest stay, older ones are removed after.

    Whatever moment the process is killed at, `latest_checkpoint` finds a whole one, at the
    latest the one before. A step that is already saved is left as it is. None keeps all.
    """
    if keep is not None and keep < 1:
        raise ConfigError(f"keep is at least 1 or None, got {keep}")
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    remove_leftovers(root)
    target = root / f"step-{state.step:08d}"
    if not _is_whole(target):
        with atomic_folder(target) as new:
            write_checkpoint(new, state)
    for old in _steps(root)[:-keep] if keep else []:
        if old != target:
            remove_folder(old)
    return target


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The whole checkpoint of the highest step in the folder, or None.

    Whole means that every listed file is there with its size; contents are checked by
    `load_checkpoint`.
    """
    root = Path(folder)
    whole = [path for path in _steps(root) if _is_whole(path)] if root.is_dir() else []
    return whole[-1] if whole else None


def set_aside_broken(folder: str | Path) -> list[Path]:
    """Renames the newest checkpoints whose contents differ from their checksums, until one is good.

    A disk that lost bytes then costs the steps since the checkpoint before.

    Raises:
        ModelError: there is none that is good; none is renamed.
    """
    root = Path(folder)
    whole = [path for path in _steps(root) if _is_whole(path)] if root.is_dir() else []
    broken = list(itertools.takewhile(lambda path: not is_sound(path), reversed(whole)))
    if whole and len(broken) == len(whole):
        raise ModelError(
            f"every checkpoint in {root} differs from its checksums; delete the folder to train "
            "again"
        )
    return [set_aside(path) for path in broken]


def is_sound(folder: Path) -> bool:
    """Whether a checkpoint is whole, and its contents have their checksums."""
    if not _is_whole(folder):
        return False
    sums = _read_json(folder, CHECKSUMS)
    return all(_checksum(folder / name) == facts for name, facts in sums.items())


def write_checkpoint(folder: str | Path, state: TrainState) -> None:
    """Write the state's files into an existing folder, flushed to disk, checksums last."""
    root = Path(folder)
    for part, tensors in state.tensors().items():
        rows = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(rows, root / f"{part}.safetensors")
    _write_json(root / FACTS, state.facts())
    for name in FILES:
        sync(root / name)
    sums = {name: _checksum(root / name) for name in FILES}
    _write_json(root / CHECKSUMS, sums)
    sync(root / CHECKSUMS)
    sync(root)


def load_checkpoint(folder: str | Path, state: TrainState) -> None:
    """Put a saved state into `state`, which `training.loop.start` made; it then goes on exactly.

    Raises:
        ModelError: a file is missing or differs from its checksum, or the checkpoint is of
            another model; the state is then unchanged.
        ConfigError: the run had another seed, batch size or dataset.
    """
    root = Path(folder)
    sums = _read_json(root, CHECKSUMS)
    for name in FILES:
        if name not in sums or not (root / name).is_file():
            raise ModelError(f"checkpoint {root} has no {name}: it is not whole, use another")
        if _checksum(root / name) != sums[name]:
            raise ModelError(f"checkpoint {root}: {name} differs from its checksum, use another")
    try:
        tensors = {part: load_file(root / f"{part}.safetensors") for part in PARTS}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"checkpoint {root} cannot be read: {error}") from error
    state.restore(tensors, _read_json(root, FACTS))


def export_editor(
    model: StableDiffusion,
    ema: Ema | None,
    folder: str | Path,
    defaults: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = None,
    card: str | None = None,
) -> None:
    """A diffusers folder that StableDiffusionInstructPix2PixPipeline.from_pretrained loads.

    With `ema` its UNet holds the averaged weights; the model keeps its own. `defaults` are fields
    of editor.EditSettings and travel as editor_defaults.json. `dtype` is that of the weights on
    disk, `card` becomes README.md. LoRA's additions are merged in. The folder appears whole or not
    at all and replaces an older one.
    """
    averaged = ema.applied_to(model.unet) if ema else contextlib.nullcontext()
    with atomic_folder(folder) as new, averaged:
        whole: Any = model
        if getattr(model.unet, "peft_config", None):
            whole = replace(model, unet=merged(model.unet))
        whole.save(new, dtype=dtype)
        if card is not None:
            (new / CARD).write_text(card, encoding="utf-8")
        if defaults is not None:
            _write_json(new / EDITOR_DEFAULTS, defaults)


def _steps(root: Path) -> list[Path]:
    found = [path for path in root.iterdir() if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _is_whole(folder: Path) -> bool:
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == facts["bytes"] for name, facts in sums.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _checksum(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
    return {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}


def _read_json(root: Path, name: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((root / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"checkpoint {root} has no readable {name}: {error}") from error
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
