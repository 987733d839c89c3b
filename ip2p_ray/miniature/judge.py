"""Training of the miniature's CLIP: an open_clip model, and the text encoder that comes from it.

The text tower learns two things at once: to match pictures (contrastively, with edited scenes as
hard negatives; some captions also say on which side a thing stands, or the image features would not
tell two layouts apart) and to predict the next word of captions and instructions. The second keeps
every word's meaning in its own hidden state, which is what a generator's cross-attention reads; the
tower is then frozen and becomes its CLIPTextModel, as CLIP's is in Stable Diffusion.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ip2p_ray.clip import preprocess, save_clip
from ip2p_ray.miniature import grammar
from ip2p_ray.miniature.feed import captions, scene_batch, step_random, training_edit
from ip2p_ray.miniature.fit import FitConfig, fit, save_module
from ip2p_ray.miniature.scenes import Scene, draw
from ip2p_ray.miniature.vocabulary import TEXT_LENGTH, clip_tokenizer


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """How the judge is trained."""

    steps: int = 700
    batch_size: int = 128
    """Pictures a step: scenes, and one edit of each as its hard negative."""
    learning_rate: float = 1e-3
    language_weight: float = 0.3
    """Weight of the next-word loss beside the contrastive one."""
    mirrored: float = 0.25
    """Share of scenes whose hard negative is their mirror image instead of an edit."""


def clip_config(vocabulary: int) -> dict[str, Any]:
    """The open_clip config: a small ResNet and a small causal transformer."""
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 64},
        "text_cfg": {
            "context_length": TEXT_LENGTH,
            "vocab_size": vocabulary,
            "width": 128,
            "heads": 4,
            "layers": 3,
        },
    }


def train(config: JudgeConfig, folder: Path, *, seed: int, device: str) -> dict[str, float]:
    """Train (or resume); save `folder`/judge (open_clip), /text_encoder and /tokenizer.

    In one process: the contrast is among all pictures of a batch.
    """
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    shape = clip_config(len(tokenizer))
    model: Any = open_clip.CLIP(**shape).to(device)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD

    def tokens(texts: list[str]) -> Tensor:
        options: dict[str, Any] = {"padding": "max_length", "truncation": True}
        ids = tokenizer(texts, max_length=TEXT_LENGTH, return_tensors="pt", **options)["input_ids"]
        return ids.to(device)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = step_random("judge", seed, step)
        examples, wishes = _examples(rng, config)
        images = torch.from_numpy(np.stack([draw(example.scene) for example in examples]))
        image = F.normalize(
            model.visual(preprocess(images.to(device), (64, 64), mean, std)), dim=-1
        )
        ids = tokens([example.caption for example in examples])
        hidden, text = _text(model, ids)
        wish_ids = tokens(wishes)
        wish_hidden, _ = _text(model, wish_ids)
        contrast, accuracy = _contrast(model.logit_scale, image, text, _rivals(examples).to(device))
        language = _next_word(model, hidden, ids) + _next_word(model, wish_hidden, wish_ids)
        figures = {"accuracy": accuracy, "language": float(language.detach()) / 2}
        return contrast + config.language_weight * language, figures

    fit_config = FitConfig(steps=config.steps, learning_rate=config.learning_rate)
    result = fit("judge", model, loss, fit_config, folder / "state", shared=False)
    model.float().cpu()
    save_clip(model, shape, tokenizer, folder / "judge")
    save_module(text_encoder(model, tokenizer), folder / "text_encoder")
    save_module(tokenizer, folder / "tokenizer")
    return result


def _text(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden states (text, token, channel), unit features (text, feature)) of the text tower."""
    x = model.token_embedding(ids) + model.positional_embedding
    hidden = model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
    pooled = hidden[torch.arange(len(ids)), ids.argmax(dim=-1)] @ model.text_projection
    return hidden, F.normalize(pooled, dim=-1)


@dataclass(frozen=True)
class _Example:
    scene: Scene
    caption: str
    side: str | None
    """The side that the caption names, if it does."""


def _examples(rng: random.Random, config: JudgeConfig) -> tuple[list[_Example], list[str]]:
    """(scenes and their hard negatives, instructions of the edits among them)."""
    first, second, wishes = [], [], []
    for scene in scene_batch(rng, config.batch_size // 2):
        edit = training_edit(scene, rng)
        wishes.append(grammar.instruction(edit, grammar.random_wording(rng), rng))
        if rng.random() < config.mirrored:
            turned = replace(scene.layout, first_left=not scene.layout.first_left)
            first.append(_with_side(scene, rng))
            second.append(_with_side(replace(scene, layout=turned), rng))
        else:
            first.append(_Example(scene, captions([scene], rng)[0], None))
            second.append(_Example(edit.edited, captions([edit.edited], rng)[0], None))
    return first + second, wishes


def _with_side(scene: Scene, rng: random.Random) -> _Example:
    side = "left" if scene.layout.first_left else "right"
    text = f"{captions([scene], rng)[0]} with the {scene.things[0].subject} on the {side}"
    return _Example(scene, text, side)


def _rivals(examples: list[_Example]) -> Tensor:
    """A bool (picture, caption): which captions a picture must be told from.

    Not those that describe it as well: the same description, unless both name a side and differ.
    """
    names = {
        name: index for index, name in enumerate(dict.fromkeys(e.scene.described for e in examples))
    }
    group = torch.tensor([names[e.scene.described] for e in examples])
    side = torch.tensor([{None: 0, "left": 1, "right": -1}[e.side] for e in examples])
    return (group[:, None] != group[None]) | (side[:, None] * side[None] == -1)


def _contrast(
    log_scale: Tensor, image: Tensor, text: Tensor, rivals: Tensor
) -> tuple[Tensor, float]:
    """(symmetric cross-entropy against the rivals, share of pictures that find their caption)."""
    logits = log_scale.clamp(max=4.6).exp() * image @ text.T
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(~(rivals | own), -1e4)
    target = torch.arange(len(logits), device=image.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, float((logits.argmax(dim=-1) == target).float().mean())


def _next_word(model: Any, hidden: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it, up to the first end token."""
    logits = hidden[:, :-1] @ model.token_embedding.weight.T
    target = ids[:, 1:]
    end = ids.max()
    after_end = (ids[:, :-1] == end).long().cumsum(dim=-1) > 0
    target = target.masked_fill(after_end, -100)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)


def text_encoder(model: Any, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text tower of an open_clip model as transformers' CLIPTextModel; same hidden states."""
    width = model.positional_embedding.shape[1]
    blocks = model.transformer.resblocks
    end = tokenizer.convert_tokens_to_ids(str(tokenizer.eos_token))
    start = tokenizer.convert_tokens_to_ids(str(tokenizer.bos_token))
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=len(blocks),
            num_attention_heads=blocks[0].attn.num_heads,
            max_position_embeddings=model.positional_embedding.shape[0],
            hidden_act="gelu",
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    state = {
        "embeddings.token_embedding.weight": model.token_embedding.weight,
        "embeddings.position_embedding.weight": model.positional_embedding,
        "final_layer_norm.weight": model.ln_final.weight,
        "final_layer_norm.bias": model.ln_final.bias,
    }
    for index, block in enumerate(blocks):
        to = f"encoder.layers.{index}"
        for name, part in zip("qkv", block.attn.in_proj_weight.chunk(3), strict=True):
            state[f"{to}.self_attn.{name}_proj.weight"] = part
        for name, part in zip("qkv", block.attn.in_proj_bias.chunk(3), strict=True):
            state[f"{to}.self_attn.{name}_proj.bias"] = part
        pairs = {
            "self_attn.out_proj": block.attn.out_proj,
            "layer_norm1": block.ln_1,
            "layer_norm2": block.ln_2,
            "mlp.fc1": block.mlp.c_fc,
            "mlp.fc2": block.mlp.c_proj,
        }
        for name, module in pairs.items():
            state[f"{to}.{name}.weight"] = module.weight
            state[f"{to}.{name}.bias"] = module.bias
    names = encoder.state_dict()
    prefix = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    renamed = {prefix + name: value.detach().clone() for name, value in state.items()}
    missing, unexpected = encoder.load_state_dict(renamed, strict=False)
    if unexpected or any("position_ids" not in name for name in missing):
        raise ValueError(f"text tower does not fit: missing {missing}, unexpected {unexpected}")
    return encoder.eval()
