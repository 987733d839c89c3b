"""A diffusers folder on disk: its parts read and checked, and written in one move."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_euler_ancestral_discrete import (
    EulerAncestralDiscreteScheduler,
)
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer

from ip2p_ray.atomic import atomic_folder
from ip2p_ray.errors import ModelError
from ip2p_ray.model_files import SAFETENSORS, require_safetensors

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_LIBRARIES = (["diffusers"], ["transformers"])
# What the readers of the parts raise for a file that is missing, cut short or of another shape.
READ_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)


def read_parts(source: str) -> dict[str, Any]:
    """The five parts of a diffusers folder or hub id, by name, on the CPU.

    The scheduler comes as its config, a dict. Weights must be complete: a missing tensor is
    an error here, never a random start.

    Raises: ModelError that names the source and the part which is missing or broken.
    """
    _check_source(source)
    parts: dict[str, Any] = {
        "scheduler": _read_scheduler(source),
        "tokenizer": _read_tokenizer(source),
        "text_encoder": _read_weights(CLIPTextModel, source, "text_encoder", "text_encoder"),
        "vae": _read_weights(AutoencoderKL, source, "vae", "vae"),
        "unet": _read_weights(UNet2DConditionModel, source, "unet", "unet"),
    }
    known = int(parts["text_encoder"].config.vocab_size)
    if len(parts["tokenizer"]) > known:
        raise ModelError(
            f"tokenizer of model {source} has {len(parts['tokenizer'])} tokens, "
            f"its text_encoder knows {known}: they do not belong together"
        )
    return parts


def read_vae(source: str) -> torch.nn.Module:
    """An autoencoder of its own folder or hub id, in evaluation mode, on the CPU.

    Either of Stable Diffusion's kind (AutoencoderKL) or a tiny one (AutoencoderTiny), by its
    config.

    Raises: ModelError that names the source.
    """
    try:
        kind = AutoencoderKL.load_config(source).get("_class_name")
    except READ_ERRORS as error:
        raise _broken(source, "autoencoder", error) from error
    kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    if kind not in kinds:
        raise ModelError(
            f"autoencoder {source} is a {kind}, which is not supported: {' or '.join(kinds)} is"
        )
    return _read_weights(kinds[kind], source, "autoencoder", None)


def write_parts(folder: Path, parts: Mapping[str, Any], *, pipeline: str) -> None:
    """A diffusers folder with these parts, whole or not at all.

    `parts` has the names of PARTS, the scheduler being its config; `pipeline` is the class that
    diffusers builds from the folder. A folder that was there is replaced.
    """
    _forget_last_call(parts["tokenizer"])
    with atomic_folder(folder) as new:
        for name in ("unet", "vae", "text_encoder", "tokenizer"):
            parts[name].save_pretrained(new / name)
            for path in (new / name).glob("config.json"):
                content = json.loads(path.read_text(encoding="utf-8"))
                content.pop("_name_or_path", None)  # where this machine read it from
                _write_json(path, content)
        (new / "scheduler").mkdir()
        _write_json(new / "scheduler" / "scheduler_config.json", parts["scheduler"])
        _write_json(new / "model_index.json", _model_index(parts, pipeline))


def _forget_last_call(tokenizer: Any) -> None:
    """A tokenizer that has worked would be saved with the padding that it was asked for last."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()


def _check_source(source: str) -> None:
    folder = Path(source)
    if not folder.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
            return
        raise ModelError(f"no model folder {source}: give a diffusers folder or a hub id")
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise ModelError(
            f"model folder {source} has no {missing[0]}/: a diffusers folder holds "
            + ", ".join(f"{part}/" for part in PARTS)
        )
    _require_known_classes(folder / "model_index.json", source)


def _require_known_classes(index: Path, source: str) -> None:
    """The parts are read by classes that are named here; a folder that wants its own is refused."""
    if not index.is_file():
        return
    try:
        told = dict(json.loads(index.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _broken(source, "model_index.json", error) from error
    wanted = {part: told.get(part) for part in PARTS if told.get(part) is not None}
    own = [
        part
        for part, classes in wanted.items()
        if not isinstance(classes, list) or classes[:1] not in ([None], *_LIBRARIES)
    ]
    if own or not isinstance(told.get("_class_name", ""), str):
        raise ModelError(
            f"model {source} names code of its own in model_index.json "
            f"({own[0] if own else '_class_name'}), which is not run: it has to be a plain Stable "
            "Diffusion"
        )


def _read_weights(kind: Any, source: str, part: str, subfolder: str | None) -> torch.nn.Module:
    try:
        require_safetensors(Path(source, subfolder or ""), f"{part} of model")
        model, info = kind.from_pretrained(
            source, subfolder=subfolder, output_loading_info=True, **SAFETENSORS
        )
    except READ_ERRORS as error:
        raise _broken(source, part, error) from error
    lost = sorted(info["missing_keys"]) + [str(key) for key in info["mismatched_keys"]]
    if lost:
        raise ModelError(
            f"{part} of model {source} lacks {len(lost)} tensors, the first {lost[0]}: "
            "the weights are not whole"
        )
    network: torch.nn.Module = model
    return network.eval()


def _read_tokenizer(source: str) -> Any:
    try:
        tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer")
    except READ_ERRORS as error:
        raise _broken(source, "tokenizer", error) from error
    # transformers answers a folder without a vocabulary with a tokenizer of its special tokens
    if len(tokenizer) <= len(tokenizer.all_special_tokens) + 1:
        raise ModelError(f"tokenizer of model {source} has no vocabulary (tokenizer.json)")
    return tokenizer


def _read_scheduler(source: str) -> dict[str, Any]:
    try:
        config = EulerAncestralDiscreteScheduler.load_config(source, subfolder="scheduler")
    except READ_ERRORS as error:
        raise _broken(source, "scheduler", error) from error
    return dict(config)


def _broken(source: str, part: str, error: BaseException) -> ModelError:
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    if not Path(source).exists():
        source = f"{source} (no folder here, so a hub id)"
    return ModelError(f"{part} of model {source} cannot be read: {reason}")


def _model_index(parts: Mapping[str, Any], pipeline: str) -> dict[str, Any]:
    return {
        "_class_name": pipeline,
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": [
            "diffusers",
            parts["scheduler"].get("_class_name", "EulerAncestralDiscreteScheduler"),
        ],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
