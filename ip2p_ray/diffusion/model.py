"""Stable Diffusion in parts: text encoder, autoencoder and denoiser of one diffusers folder."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ip2p_ray.diffusion.folder import read_parts, write_parts
from ip2p_ray.diffusion.guidance import per_row
from ip2p_ray.diffusion.noise import NoiseSchedule
from ip2p_ray.errors import ConfigError, ModelError


@dataclass(eq=False)
class StableDiffusion:
    """A latent diffusion model: from captions, and images where it is an editor, to images.

    Gradients flow through every method; callers that only sample wrap them in
    `torch.inference_mode()`. Latents are (row, channel, height, width), float32 in and out
    whatever the dtype of the weights.
    """

    unet: UNet2DConditionModel
    """Predicts noise (or v) from latents; an editor's takes twice the latent channels."""
    vae: AutoencoderKL
    """Between pixels and latents."""
    text_encoder: CLIPTextModel
    """From tokens to the rows that cross-attention reads."""
    tokenizer: CLIPTokenizer
    """From captions to tokens."""
    schedule: NoiseSchedule
    """What the UNet's timesteps mean."""
    scheduler_config: dict[str, Any]
    """The diffusers scheduler config, kept so that `save` gives back what `load` read."""

    @staticmethod
    def load(
        source: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> StableDiffusion:
        """The model of a local diffusers folder or a hub id, in evaluation mode.

        Raises: ModelError that names the folder and the part which is missing or broken.
        """
        parts = read_parts(str(source))
        config = parts.pop("scheduler")
        try:
            schedule = NoiseSchedule.from_config(config)
        except ConfigError as error:
            raise ModelError(f"scheduler of model {source} is not supported: {error}") from error
        for name in ("unet", "vae", "text_encoder"):
            torch.nn.Module.to(parts[name], device=device, dtype=dtype)
        return StableDiffusion(**parts, schedule=schedule, scheduler_config=config)

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes a diffusers folder, whole or not at all; one that was there is replaced.

        StableDiffusionPipeline loads it, or StableDiffusionInstructPix2PixPipeline where the
        UNet takes an image too. `dtype` is that of the weights on disk, by default their own.
        """
        networks = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        if dtype is not None:
            networks = {
                name: torch.nn.Module.to(copy.deepcopy(network), dtype=dtype)
                for name, network in networks.items()
            }
        name = "StableDiffusionPipeline"
        if self.takes_image:
            name = "StableDiffusionInstructPix2PixPipeline"
        parts = {**networks, "tokenizer": self.tokenizer, "scheduler": self.scheduler_config}
        write_parts(Path(folder), parts, pipeline=name)

    @property
    def device(self) -> torch.device:
        """Where the UNet's weights lie."""
        device: torch.device = next(self.unet.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the UNet's weights."""
        dtype: torch.dtype = next(self.unet.parameters()).dtype
        return dtype

    @property
    def latent_channels(self) -> int:
        """Channels of a latent, 4 for Stable Diffusion 1.5."""
        return int(self.vae.config["latent_channels"])

    @property
    def takes_image(self) -> bool:
        """True for an editor, whose UNet reads image latents beside the noisy ones."""
        return int(self.unet.config["in_channels"]) == 2 * self.latent_channels

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied by to have unit variance, 0.18215 for version 1.5."""
        return float(self.vae.config["scaling_factor"])

    @property
    def text_length(self) -> int:
        """Tokens a caption is padded or cut to, 77 for CLIP."""
        longest = int(self.text_encoder.config.max_position_embeddings)
        return min(int(self.tokenizer.model_max_length), longest)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of a picture of this size.

        Raises: ConfigError unless both are multiples of the autoencoder's factor.
        """
        factor = 2 ** (len(self.vae.config["block_out_channels"]) - 1)
        if height % factor or width % factor or height < factor or width < factor:
            raise ConfigError(
                f"height and width must be multiples of {factor}, got {height} and {width}"
            )
        return height // factor, width // factor

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """What cross-attention reads, (row, token, channel); "" is the unconditional text."""
        return self.encode_tokens(self.tokens(texts))

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """The texts' token numbers, int64 (row, token), cut or padded to `text_length`."""
        found: Tensor = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.text_length,
            truncation=True,
            return_tensors="pt",
        )["input_ids"]
        return found

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """As `encode_text`, of token numbers (row, token), where the text encoder lies."""
        hidden: Tensor = self.text_encoder(tokens.to(self.text_encoder.device))[0]
        return hidden

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior of images (row, 3, height, width).

        Images are in [-1, 1]; the latents are float32 and NOT multiplied by the scaling factor.
        """
        posterior = self.vae.encode(images.to(self.device, self.vae.dtype)).latent_dist
        mean: Tensor = posterior.mean.float()
        std: Tensor = posterior.std.float()
        return mean, std

    def decode(self, latents: Tensor) -> Tensor:
        """The images of scaled latents, float32 (row, 3, height, width), about [-1, 1]."""
        unscaled = latents / self.scaling_factor
        images: Tensor = self.vae.decode(unscaled.to(self.device, self.vae.dtype)).sample
        return images.float()

    def denoise(
        self,
        x: Tensor,
        sigma: Tensor,
        text: Tensor,
        image_latents: Tensor | None = None,
        **attention: Any,
    ) -> Tensor:
        """The model's guess of the clean latents behind x, float32, of x's shape.

        `x` is clean latents plus `sigma` (row,) times standard normal noise; `text` is from
        `encode_text`. An editor also takes `image_latents` of x's shape: the posterior mean of
        the image, unscaled, or zeros for no image. `attention` goes to the attention
        processors. Source: k-diffusion's denoiser wrappers; InstructPix2Pix section 3.2.
        """
        if self.takes_image != (image_latents is not None):
            rule = "needs image_latents" if self.takes_image else "takes no image_latents"
            raise ConfigError(f"a UNet of {self.unet.config['in_channels']} channels {rule}")
        sigma = sigma.to(x.device, torch.float32)
        level = per_row(sigma, x)
        spread = (level**2 + 1).sqrt()
        inputs = x / spread
        if image_latents is not None:
            inputs = torch.cat([inputs, image_latents.to(x)], dim=1)
        output = self.unet(
            inputs.to(self.dtype),
            self.schedule.timestep(sigma),
            encoder_hidden_states=text.to(self.dtype),
            cross_attention_kwargs=attention or None,
        )
        predicted: Tensor = output.sample.to(x)
        if self.schedule.prediction_type == "v_prediction":
            return x / spread**2 - predicted * (level / spread)
        return x - level * predicted

    def fingerprint(self) -> str:
        """32 hex digits that name the weights, their dtype, the configs and the tokenizer."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.unet, self.vae, self.text_encoder):
            config = part.config if isinstance(part.config, Mapping) else part.config.to_dict()
            digest.update(_canonical(config))
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                flat = tensor.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().data)
        digest.update(_canonical(self.scheduler_config))
        digest.update(_canonical(_tokenizer_rules(self.tokenizer)))
        return digest.hexdigest()


def _tokenizer_rules(tokenizer: Any) -> dict[str, Any]:
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {key: rules[key] for key in ("model", "normalizer", "pre_tokenizer")}
    return {**kept, "model_max_length": tokenizer.model_max_length}


def _canonical(config: Mapping[str, Any]) -> bytes:
    """The config as bytes, without what only says where and by which version it was written."""
    passing = {"transformers_version", "torch_dtype", "dtype"}
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k not in passing}
    return json.dumps(kept, sort_keys=True, default=str).encode()
