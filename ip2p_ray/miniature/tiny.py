"""A stand-in for the miniature's weights that is made in seconds: the fake of the stages' tests.

Every class, file and wiring is that of the real weights; only the sizes are not, and all weights
but the writer's are random.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ip2p_ray.clip import save_clip
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.diffusion.noise import NoiseSchedule
from ip2p_ray.miniature import autoencoder, generator, grammar, judge, scenes, weights, writer
from ip2p_ray.miniature.scores import random_captions
from ip2p_ray.miniature.vocabulary import END, clip_tokenizer
from ip2p_ray.training.unet import widen
from ip2p_ray.triplets.prompt import completion, completion_prompt

PAIRS: dict[str, Any] = {
    "resolution": 64,
    "steps": 2,
    "sampler": "dpmpp_2m",
    "candidates": 2,
    "guidance_scale": [2.0, 4.0],
    "keep": 2,
}
EDITOR: dict[str, Any] = {
    "steps": 2,
    "text_guidance_scale": 3.0,
    "resolution": 64,
    "max_pixels": 64 * 64,
}
THRESHOLDS = {"text": -1.0, "image": -1.0, "direction": -1.0}
_WRITER_STEPS = 200
_KNOWN = 0.005  # nats a token: the replies are known by heart


def tiny_miniature(folder: Path, *, captions: int = 8, seed: int = 0) -> Path:
    """The folder, filled as `weights.require` wants it; some 10 seconds on one core.

    Pictures are 64 x 64 noise and every threshold is -1, so that all candidates pass. Of the first
    `captions` of `random_captions(..., seed)` the writer knows one true edit each by heart; asked
    for others it writes nonsense, which becomes rejects.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer()
        shape = judge.clip_config(len(tokenizer))
        clip: Any = open_clip.CLIP(**shape)
        save_clip(clip, shape, tokenizer, folder / "judge")
        model = _generator(judge.text_encoder(clip, tokenizer), tokenizer)
        model.save(folder / "generator")
        widen(model.unet).save_pretrained(folder / "editor" / "unet")
        _save_writer(folder / "writer", random_captions(captions, seed))
    _write_json(folder / "editor" / weights.EDITOR_DEFAULTS, EDITOR)
    _write_json(folder / weights.PAIRS_FILE, PAIRS)
    _write_json(folder / weights.THRESHOLDS_FILE, THRESHOLDS)
    return weights.require(folder)


def true_edit(caption: str) -> tuple[str, str]:
    """(instruction, edited caption) of one true edit of a caption of the miniature's grammar."""
    described = grammar.parse_caption(caption)
    if described is None:
        raise ValueError(f"not a caption of the miniature's grammar: {caption!r}")
    rng = random.Random(caption)
    # A colourless picture is drawn alike for every colour, so any colour will do.
    things = tuple(scenes.Thing(subject, colour or "white") for subject, colour in described.things)
    layout = scenes.random_layout(rng)
    scene = scenes.Scene(
        things=things, setting=described.setting, manner=described.manner, layout=layout
    )
    edit = scenes.random_edit(scene, rng)
    wording = grammar.random_wording(rng)
    edited_caption = grammar.caption(grammar.describe(edit.edited), wording)
    return grammar.instruction(edit, wording, rng), edited_caption


def _generator(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer) -> StableDiffusion:
    """8x8 latents, as the real one's, and a UNet with attention at one of its two levels."""
    config = autoencoder.AutoencoderConfig(channels=(8, 8, 8, 8))
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 16),
        layers_per_block=1,
        cross_attention_dim=int(text_encoder.config.hidden_size),
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return StableDiffusion(
        unet=unet.eval(),
        vae=autoencoder.build(config).eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        schedule=NoiseSchedule.from_config(generator.SCHEDULER),
        scheduler_config=generator.SCHEDULER,
    )


def _save_writer(folder: Path, captions: list[str]) -> None:
    """Writes a writer that was trained on the captions' edits until it knows them."""
    words = writer.tokenizer()
    end = int(words.convert_tokens_to_ids(END))
    prompts = words([completion_prompt(text) for text in captions])["input_ids"]
    replies = words([completion(*true_edit(text)) for text in captions])["input_ids"]
    rows = [[*prompt, *reply, end] for prompt, reply in zip(prompts, replies, strict=True)]
    length = max(map(len, rows))
    tokens = torch.tensor([row + [end] * (length - len(row)) for row in rows])
    labels = torch.full_like(tokens, -100)
    for place, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        labels[place, len(prompt) : len(row)] = torch.tensor(row[len(prompt) :])
    model: Any = writer.build(len(words), end)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(_WRITER_STEPS):
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if float(loss.detach()) < _KNOWN:
            break
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
