"""Small models with random weights: the fakes of this package's tests, and of yours; and kills.

Their classes and their wiring are those of the real models; only the sizes and the weights
are not. A call takes milliseconds on one core.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.diffusion.noise import NoiseSchedule

START, END = "<|startoftext|>", "<|endoftext|>"
# Words that are one token each. "chinchilla" is three: its pieces are here, the word is not.
WORDS = (
    *("a", "an", "the", "and", "on", "in", "of", "at", "with", "photo", "red", "blue", "green"),
    *("cat", "dog", "house", "boat", "car", "mat", "sea", "snow", "night", "sits", "sketch"),
)
PIECES = (("c", "h"), ("ch", "i"), ("chi", "n"), ("l", "l"), ("ll", "a</w>"))


def tiny_tokenizer(length: int = 16) -> CLIPTokenizer:
    """A CLIP tokenizer that knows WORDS as single tokens and spells out any other text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(PIECES)
    for word in sorted(WORDS, key=len, reverse=True):
        letters = [*word[:-1], word[-1] + "</w>"]
        while len(letters) > 1:
            merges.append((letters[0], letters[1]))
            letters[:2] = [letters[0] + letters[1]]
    merges = list(dict.fromkeys(merges))
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    options: dict[str, Any] = {"vocab": vocabulary, "merges": merges}
    return CLIPTokenizer(**options, model_max_length=length)


def tiny_stable_diffusion(
    seed: int = 0,
    prediction_type: str = "epsilon",
    latent_channels: int = 4,
    in_channels: int | None = None,
) -> StableDiffusion:
    """A whole Stable Diffusion of some 200,000 random weights, for pictures of 16 x 16 and up.

    Latents are half as high and wide as the picture; the UNet has cross-attention at two
    levels. `in_channels` is `latent_channels` for a generator (the default) and twice that for
    an editor. Weights depend on `seed` only, and torch's global generator is left as it was.
    """
    tokenizer = tiny_tokenizer()
    config = tiny_scheduler_config(prediction_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=in_channels or latent_channels,
            out_channels=latent_channels,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=24,
            attention_head_dim=2,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            sample_size=16,
            latent_channels=latent_channels,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
        )
        text_encoder = CLIPTextModel(_text_config(tokenizer))
    for network in (unet, vae, text_encoder):
        network.train(False)
    return StableDiffusion(
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        schedule=NoiseSchedule.from_config(config),
        scheduler_config=config,
    )


def tiny_scheduler_config(prediction_type: str = "epsilon") -> dict[str, Any]:
    """Stable Diffusion 1.5's noise schedule, as an Euler-ancestral scheduler of diffusers."""
    return {
        "_class_name": "EulerAncestralDiscreteScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "steps_offset": 1,
        "timestep_spacing": "linspace",
    }


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=int(tokenizer.model_max_length),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def stable_diffusion_1_5(*, in_channels: int = 4, layers_per_block: int = 2) -> StableDiffusion:
    """Random weights in the shapes of Stable Diffusion 1.5, some 4 GB; its tokenizer is tiny.

    One layer a block instead of two saves a third of the UNet's memory and keeps its widths.
    """
    text = CLIPTextConfig(
        vocab_size=49_408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )
    unet = UNet2DConditionModel(
        in_channels=in_channels,
        cross_attention_dim=768,
        attention_head_dim=8,
        layers_per_block=layers_per_block,
    )
    scheduler = tiny_scheduler_config()
    return StableDiffusion(
        unet=unet.eval(),
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tiny_tokenizer(77),
        schedule=NoiseSchedule.from_config(scheduler),
        scheduler_config=scheduler,
    )


def killed_at(event: int, work: Callable[[], object]) -> bool:
    """Whether `work`, in a child process, got as far as its file operation `event` (from 0).

    kill -9 ends it there; opening to read is no operation. False: it was done before.

    Raises:
        RuntimeError: `work` failed; the child wrote its traceback to stderr.
    """
    child = os.fork()
    if not child:
        _work_until(event, work)
    status = os.waitpid(child, 0)[1]
    if status not in (0, signal.SIGKILL):
        raise RuntimeError(f"the child process ended with wait status {status}")
    return bool(status)


def _work_until(event: int, work: Callable[[], object]) -> None:
    """Never returns: the process ends, at the latest when the work is done."""
    seen = 0

    def count(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        reads = name == "open" and arguments[1] in ("r", "rb")
        if name in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and not reads:
            seen += 1
            if seen == event + 1:  # once: the kill is an operation too
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(count)
        work()
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)
