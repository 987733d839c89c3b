"""The judge: a CLIP model from a local open_clip folder or a published open_clip name.

Preprocessing, one rule for training and judging (PREPROCESSING names it in every fingerprint):
uint8 RGB -> float32 in [0, 1] -> bicubic, without antialiasing, straight to the model's square
input (nothing is cropped) -> minus the model's mean, divided by its std. That is what the reference
filter does, so the paper's thresholds apply; it is not open_clip's own transform, which antialiases
and crops, and whose cosines differ on finely textured images. Texts longer than the model's context
are cut. All arithmetic is float32; on CUDA torch's own choice, TF32 for convolutions, is left as it
is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file

from ip2p_ray.atomic import atomic_folder
from ip2p_ray.errors import ConfigError, ModelError
from ip2p_ray.images import UINT8
from ip2p_ray.model_files import require_no_code, require_safetensors

PREPROCESSING = "bicubic-no-antialias-whole-image"

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"

_LOCAL = "local-dir:"
_TAKEN_FIRST = (WEIGHTS_FILE, "open_clip_pytorch_model.safetensors")
_BROKEN = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)


@dataclass(frozen=True)
class Similarities:
    """The four cosines of a batch of candidates, each float32 (batch,) in [-1, 1]."""

    caption_similarity: torch.Tensor
    """Source image with caption."""
    edited_caption_similarity: torch.Tensor
    """Edited image with edited caption."""
    image_similarity: torch.Tensor
    """Source image with edited image."""
    direction_similarity: torch.Tensor
    """Change of the image with change of the caption; 0 where either does not change."""

    def rows(self) -> list[dict[str, float]]:
        """The same as one dictionary a candidate, as `filtering.select` takes them."""
        columns = {name: values.tolist() for name, values in vars(self).items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class Clip:
    """A frozen CLIP with its tokenizer; made by `Clip.load`."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self._model: Any = model.to(self.device).eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._fingerprint: str | None = None

    @classmethod
    def load(cls, source: str | Path, device: str | torch.device = "cpu") -> Clip:
        """The model of a local folder, or of an open_clip name such as "ViT-L-14/openai".

        A folder holds open_clip_config.json, open_clip_model.safetensors and tokenizer files, as
        `save_clip` writes them. A name is `<architecture>/<weights>`; weights that were trained
        with QuickGELU (OpenAI's) get it even where the architecture's name does not ask for it.

        Raises:
            ConfigError: the device is not there.
            ModelError: the folder is missing or broken, or the weights cannot be had.
        """
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"CLIP cannot go to {device}: torch sees no CUDA device here")
        source = str(source).removeprefix(_LOCAL)
        architecture, _, weights = source.rpartition("/")
        named = architecture in open_clip.list_models() and not Path(source).exists()
        options: dict[str, Any] = {}
        if named:
            options = {
                "pretrained": weights,
                "force_quick_gelu": needs_quick_gelu(architecture, weights),
            }
        else:
            _require_folder(source)
            architecture = f"{_LOCAL}{source}"
        try:
            model = open_clip.create_model_from_pretrained(
                architecture, return_transform=False, **options
            )
            tokenizer = open_clip.get_tokenizer(architecture)
        except _BROKEN as error:
            kind = "weights" if named else "folder"
            raise ModelError(f"CLIP {kind} {source} cannot be loaded: {error}") from error
        if not named:
            _require_words(tokenizer.tokenizer, source)
        return cls(model, tokenizer, device)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the model's input."""
        return _two(self._model.visual.image_size)

    @torch.inference_mode()
    def encode_images(self, images: UINT8 | torch.Tensor) -> torch.Tensor:
        """float32 (batch, feature) of unit length, of uint8 RGB (batch, height, width, 3)."""
        config = self._model.visual.preprocess_cfg
        pixels = preprocess(
            torch.as_tensor(images).to(self.device), self.image_size, config["mean"], config["std"]
        )
        return F.normalize(self._model.encode_image(pixels).float(), dim=-1)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 (batch, feature) of unit length; equal texts give equal rows."""
        distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        tokens = self._tokenizer(list(distinct)).to(self.device)
        features = F.normalize(self._model.encode_text(tokens).float(), dim=-1)
        return features[[distinct[text] for text in texts]]

    def similarities(
        self,
        source: UINT8 | torch.Tensor,
        edited: UINT8 | torch.Tensor,
        caption: Sequence[str],
        edited_caption: Sequence[str],
    ) -> Similarities:
        """The four cosines of each row.

        `source` and `edited` are uint8 RGB (batch, height, width, 3), the texts one a row.

        Source: paper section 3.1.2; the direction is StyleGAN-NADA's.
        """
        both = torch.cat([torch.as_tensor(source), torch.as_tensor(edited)])
        image, edited_image = self.encode_images(both).chunk(2)
        text, edited_text = self.encode_texts([*caption, *edited_caption]).chunk(2)
        return Similarities(
            caption_similarity=_cosine(image, text),
            edited_caption_similarity=_cosine(edited_image, edited_text),
            image_similarity=_cosine(image, edited_image),
            direction_similarity=_cosine(edited_image - image, edited_text - text),
        )

    def count_tokens(self, text: str) -> int:
        """How many tokens the text has, with start and end, before it is cut to the context."""
        inner = getattr(self._tokenizer, "tokenizer", None)
        if inner is None:
            return len(self._tokenizer.encode(text)) + 2
        return len(inner(text).input_ids)

    def fits(self, text: str) -> bool:
        """Whether the model reads the whole text, that is, nothing of it is cut."""
        return self.count_tokens(text) <= int(self._model.context_length)

    def fingerprint(self) -> str:
        """32 hex digits of the weights, the tokens of a probe text and the preprocessing."""
        if self._fingerprint is None:
            config = self._model.visual.preprocess_cfg
            probe = self._tokenizer(["a photo of 2 cats, running!"]).tolist()
            facts = [PREPROCESSING, self.image_size, config["mean"], config["std"], probe]
            digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16)
            for name, tensor in sorted(self._model.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


def openai_fits(text: str) -> bool:
    """Whether OpenAI's CLIP models read the whole text; needs no weights."""
    tokenizer = _openai_tokenizer()
    return len(tokenizer.encode(text)) + 2 <= int(tokenizer.context_length)


@lru_cache(maxsize=1)
def _openai_tokenizer() -> Any:
    return open_clip.SimpleTokenizer()


def preprocess(
    images: torch.Tensor, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> torch.Tensor:
    """float32 (batch, 3, *size), normalised, of uint8 RGB (batch, height, width, 3)."""
    pixels = images.permute(0, 3, 1, 2).float() / 255.0
    if pixels.shape[-2:] != size:
        pixels = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False)
    shift = torch.tensor(mean, device=pixels.device).view(1, 3, 1, 1)
    scale = torch.tensor(std, device=pixels.device).view(1, 3, 1, 1)
    return (pixels - shift) / scale


def needs_quick_gelu(architecture: str, weights: str) -> bool:
    """Whether the published weights were trained with QuickGELU, whatever the name says.

    Raises:
        ModelError: open_clip has no such weights.
    """
    trained = open_clip.get_pretrained_cfg(architecture, weights)
    if not trained:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise ModelError(f"open_clip has no weights {architecture}/{weights}; it has: {known}")
    return bool(trained.get("quick_gelu", False))


def save_clip(
    model: torch.nn.Module,
    config: Mapping[str, Any],
    tokenizer: Any,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes the folder that `Clip.load` and open_clip's "local-dir:" read.

    `model` is an open_clip.CLIP and `config` what it was made from: embed_dim, vision_cfg, text_cfg
    and quick_gelu. `tokenizer` is a fast transformers tokenizer that adds start and end tokens and
    can pad. The weights are stored as `dtype`; floating point is computed in float32 after
    loading, so the fingerprint of a float16 folder is that of the rounded weights. The folder
    appears whole or not at all, after it was loaded once as a check.

    Raises:
        ConfigError: the config and the tokenizer do not fit each other.
        ModelError: the config does not describe the model.
    """
    text_cfg = {"context_length": 77, "pool_type": "argmax", **config["text_cfg"]}
    _check_tokenizer(tokenizer, text_cfg)
    text_cfg["hf_tokenizer_name"] = text_cfg.get("hf_tokenizer_name") or "."
    trained: dict[str, Any] = getattr(model.visual, "preprocess_cfg", {})
    content = {
        "model_cfg": {**config, "text_cfg": text_cfg},
        "preprocess_cfg": {
            "mean": list(trained.get("mean", open_clip.OPENAI_DATASET_MEAN)),
            "std": list(trained.get("std", open_clip.OPENAI_DATASET_STD)),
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }
    with atomic_folder(folder) as new:
        tokenizer.save_pretrained(new)
        (new / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(_stored(model, dtype), new / WEIGHTS_FILE)
        Clip.load(new)


def _require_words(tokenizer: Any, source: str) -> None:
    # transformers answers a folder without a vocabulary with a tokenizer of its special tokens
    if len(tokenizer) <= len(tokenizer.all_special_tokens) + 1:
        raise ModelError(f"CLIP folder {source} has no vocabulary (tokenizer.json)")
    if tokenizer.pad_token is None:
        raise ModelError(f"CLIP folder {source} names no padding token (tokenizer_config.json)")


def _require_folder(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir():
        raise ModelError(
            f"CLIP folder {source} does not exist, nor is it an open_clip name such as "
            "ViT-L-14/openai"
        )
    if not (folder / CONFIG_FILE).is_file():
        raise ModelError(f"CLIP folder {source} has no {CONFIG_FILE}")
    require_safetensors(folder, "CLIP folder", _TAKEN_FIRST)
    for name in ("tokenizer_config.json", "config.json"):
        require_no_code(folder / name, "CLIP folder")
    if not any(path.suffix == ".safetensors" for path in folder.iterdir()):
        raise ModelError(f"CLIP folder {source} has no weights ({WEIGHTS_FILE})")


def _check_tokenizer(tokenizer: Any, text_cfg: Mapping[str, Any]) -> None:
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer of a CLIP model needs a pad token and an end token")
    if len(tokenizer) > text_cfg["vocab_size"]:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, text_cfg vocab_size is "
            f"{text_cfg['vocab_size']}"
        )
    end = tokenizer.eos_token_id
    if end not in tokenizer("a").input_ids:
        raise ConfigError("the tokenizer of a CLIP model has to add the end token to each text")
    if text_cfg["pool_type"] == "argmax" and end != len(tokenizer) - 1:
        raise ConfigError(
            f"text pool_type argmax reads the highest token, {len(tokenizer) - 1}, but the end "
            f'token is {end}; use pool_type "eos" with eos_id {end}'
        )
    if text_cfg["pool_type"] == "eos" and text_cfg.get("eos_id", 2) != end:
        raise ConfigError(f"text_cfg eos_id is {text_cfg.get('eos_id', 2)}, the end token is {end}")


def _stored(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in state.items()
    }


def _cosine(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(left, right, dim=-1)


def _two(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)
