"""Training of the miniature's writer: a small causal LM that turns captions into triplets."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ip2p_ray.atomic import atomic_folder
from ip2p_ray.miniature import grammar, parallel
from ip2p_ray.miniature.feed import scene_batch, step_random, training_edit
from ip2p_ray.miniature.fit import FitConfig, fit
from ip2p_ray.miniature.vocabulary import END, sentences
from ip2p_ray.triplets.prompt import completion, completion_prompt


@dataclass(frozen=True, kw_only=True)
class WriterConfig:
    """How the writer is trained."""

    steps: int = 5_500
    batch_size: int = 64
    learning_rate: float = 2e-3


def tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE that keeps line breaks, for the writer's prompts and replies."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (completion_prompt(c) + completion(i, e) for c, i, e in sentences(4_000, seed))
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=END, model_max_length=128
    )


def build(vocabulary: int, end: int) -> LlamaForCausalLM:
    """A Llama of 0.9 million weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def examples(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """(prompt, completion) of random edits of random scenes, none of them held out."""
    written = []
    for scene in scene_batch(rng, count):
        caption, instruction, edited = grammar.triplet(scene, training_edit(scene, rng), rng)
        written.append((completion_prompt(caption), completion(instruction, edited)))
    return written


def train(config: WriterConfig, folder: Path, *, seed: int, device: str) -> dict[str, float]:
    """Train (or resume) and save `folder`/writer, a transformers folder with its tokenizer."""
    torch.manual_seed(seed)
    words = tokenizer()
    end = int(words.convert_tokens_to_ids(END))
    model: Any = build(len(words), end).to(device)
    count = parallel.share(config.batch_size)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = step_random("writer", seed, step, rank=parallel.rank())
        rows = examples(rng, count)
        ids, target = _pad(words, rows, end)
        logits = model(input_ids=ids.to(device)).logits[:, :-1]
        value = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten().to(device))
        return value, {}

    fit_config = FitConfig(steps=config.steps, learning_rate=config.learning_rate)
    result = fit("writer", model, loss, fit_config, folder / "state")
    if not parallel.rank():
        with atomic_folder(folder / "writer") as new:
            model.cpu().save_pretrained(new)
            words.save_pretrained(new)
    return result


def _pad(words: Any, rows: list[tuple[str, str]], end: int) -> tuple[Tensor, Tensor]:
    """(tokens, targets), each (row, token); only the completion and its end are targets."""
    prompts = words([prompt for prompt, _ in rows])["input_ids"]
    replies = words([reply for _, reply in rows])["input_ids"]
    length = max(len(p) + len(r) for p, r in zip(prompts, replies, strict=True)) + 1
    ids = torch.full((len(rows), length), end)
    target = torch.full((len(rows), length), -100)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        full = [*prompt, *reply, end]
        ids[row, : len(full)] = torch.tensor(full)
        target[row, len(prompt) : len(full)] = torch.tensor(full[len(prompt) :])
    return ids, target
