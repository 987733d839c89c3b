"""DINO's view of a picture, for the similarity of an edited picture with the true one.

Preprocessing, that of DINO's own evaluation and of the tables that report it: the shorter side to
256 pixels (bicubic, antialiased), the middle 224 x 224, ImageNet's mean and std. The feature is the
class token after the last norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel

from ip2p_ray.errors import ConfigError, ModelError
from ip2p_ray.model_files import NO_CODE, SAFETENSORS, require_safetensors

KINDS = ("vit", "dinov2", "dinov2_with_registers")
"""transformers' names of the architectures that are taken."""

RESIZE, CROP = 256, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_BROKEN = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)


class Dino:
    """A frozen vision transformer; made by `Dino.load`."""

    def __init__(self, model: torch.nn.Module, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self._model: Any = model.to(self.device).eval().requires_grad_(False)

    @classmethod
    def load(cls, source: str | Path, device: str | torch.device = "cpu") -> Dino:
        """The model of a transformers folder, or hub id, of one of KINDS.

        Raises:
            ConfigError: the device is not there.
            ModelError: the folder is missing, broken or of another kind; it is named.
        """
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"DINO cannot go to {device}: torch sees no CUDA device here")
        try:
            require_safetensors(source, "DINO folder")
            kind = AutoConfig.from_pretrained(str(source), **NO_CODE).model_type
            if kind not in KINDS:
                raise ModelError(f"DINO folder {source} is a {kind}, not one of {', '.join(KINDS)}")
            options = {"add_pooling_layer": False} if kind == "vit" else {}
            model, told = AutoModel.from_pretrained(
                str(source), output_loading_info=True, **SAFETENSORS, **NO_CODE, **options
            )
        except _BROKEN as error:
            raise ModelError(f"DINO folder {source} cannot be loaded: {error}") from error
        if told["missing_keys"]:
            raise ModelError(f"DINO folder {source} lacks {sorted(told['missing_keys'])[0]}")
        return cls(model, device)

    @torch.inference_mode()
    def encode_images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """float32 (picture, feature) of unit length, of RGB pictures of any size."""
        pixels = torch.stack([preprocess(picture) for picture in pictures]).to(self.device)
        options = {"interpolate_pos_encoding": True}
        if self._model.config.model_type != "vit":
            options = {}  # the others do so anyway
        hidden = self._model(pixel_values=pixels, **options).last_hidden_state
        return F.normalize(hidden[:, 0].float(), dim=-1)


def preprocess(picture: Image.Image) -> torch.Tensor:
    """float32 (3, CROP, CROP), normalised, of an RGB picture of any size."""
    scale = RESIZE / min(picture.size)
    size = (max(RESIZE, round(picture.width * scale)), max(RESIZE, round(picture.height * scale)))
    left, top = (size[0] - CROP) // 2, (size[1] - CROP) // 2
    resized = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    cropped = resized.crop((left, top, left + CROP, top + CROP))
    pixels = torch.from_numpy(np.array(cropped, dtype=np.float32)).permute(2, 0, 1) / 255.0
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
