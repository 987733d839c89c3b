"""Fine-tuning of a causal language model in this process: a generator of what each step measured.

It knows no Ray and no files. Who calls it saves the model when the generator has ended.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ip2p_ray.errors import ConfigError, Ip2pError
from ip2p_ray.schema import stream_seed
from ip2p_ray.triplets.prompt import completion, completion_prompt
from ip2p_ray.triplets.reply import Triplet

logger = logging.getLogger(__name__)

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class LocalTuningConfig:
    """How a local model is fine-tuned; one epoch is the paper's, the rest is ours."""

    epochs: int = 1
    """Passes over the examples."""
    batch_size: int = 8
    """Examples of one optimizer step, over all ranks."""
    learning_rate: float = 2e-5
    """AdamW's highest; it rises linearly from 0 and falls linearly to it."""
    warmup: float = 0.1
    """Share of the steps, in [0, 1), in which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    seed: int = 0
    """Of the order of the examples in each epoch."""
    bf16: bool = False
    """Autocast to bfloat16; the weights and the optimizer stay as they are."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is positive, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup lies in [0, 1), got {self.warmup}")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay is at least 0, got {self.weight_decay}")


@dataclass(frozen=True, kw_only=True)
class TuningMetrics:
    """What one optimizer step measured."""

    step: int
    """Optimizer steps done, this one included."""
    steps: int
    """Of the whole run."""
    epoch: float
    """Passes over the examples so far."""
    loss: float
    """Nats a token of the completions, mean over the step's batch."""
    tokens: int
    """Tokens of the completions in the step's batch."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    seconds: float
    """Wall time of the step on this rank."""


@dataclass(frozen=True)
class Encoded:
    """An example as tokens."""

    key: str
    """Of the triplet."""
    tokens: tuple[int, ...]
    """Prompt, completion and the end token."""
    prompt: int
    """How many of them are the prompt's: nothing is learned of these."""


def encode_examples(
    tokenizer: Any, examples: Sequence[Triplet], context: int | None = None
) -> list[Encoded]:
    """Each example's tokens, in order, without those that a context of so many cannot hold.

    Prompt and completion are encoded apart, as `LocalWriter` will see the prompt.

    Raises:
        ConfigError: none is left.
    """
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    encoded = []
    for example in examples:
        prompt = tokenizer(completion_prompt(example.caption)).input_ids
        text = completion(example.instruction, example.edited_caption)
        written = tokenizer(text, add_special_tokens=False).input_ids
        encoded.append(Encoded(example.key, (*prompt, *written, *end), len(prompt)))
    fitting = [row for row in encoded if context is None or len(row.tokens) <= context]
    if not fitting:
        raise ConfigError(
            f"of {len(examples)} examples none fits the model's context of {context} tokens"
        )
    if len(fitting) < len(encoded):
        logger.warning(
            "%d of %d examples are left out: the model's context of %s tokens does not hold them",
            len(encoded) - len(fitting),
            len(encoded),
            context,
        )
    return fitting


def finetune_local(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Triplet],
    config: LocalTuningConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
) -> Iterator[TuningMetrics]:
    """One TuningMetrics an optimizer step; the model is trained in place, where it is.

    `model` is any AutoModelForCausalLM with its tokenizer. The loss is that of the completion
    alone. Which examples a step sees depends on the config and their texts, not on their order or
    on `world_size`. `wrap` is applied to the model for the forward pass (DistributedDataParallel,
    which averages the gradients of the ranks).

    Raises:
        ConfigError: no example fits the model's context.
        Ip2pError: the loss is not finite.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank lies in [0, world_size), got {rank} of {world_size}")
    context = getattr(model.config, "max_position_embeddings", None)
    rows = encode_examples(tokenizer, examples, context)
    return _steps(model, rows, config, rank, world_size, wrap)


def _steps(
    model: Any,
    rows: list[Encoded],
    config: LocalTuningConfig,
    rank: int,
    world_size: int,
    wrap: Callable[[nn.Module], nn.Module] | None,
) -> Iterator[TuningMetrics]:
    device = next(model.parameters()).device
    model.requires_grad_(True)
    forward: Any = wrap(model) if wrap else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    batches = [batch for epoch in range(config.epochs) for batch in _batches(rows, config, epoch)]
    for step, batch in enumerate(batches, start=1):
        began = time.monotonic()
        model.train()
        rate = config.learning_rate * _factor(step, len(batches), config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        total = sum(len(row.tokens) - row.prompt for row in batch)
        tokens, mask, labels = _pad(batch[rank::world_size], batch[0], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            logits = forward(input_ids=tokens, attention_mask=mask).logits
        summed = F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        # The ranks' gradients are averaged; times their number that is the sum.
        (summed / total * world_size).backward()  # type: ignore[no-untyped-call]
        loss = _over_ranks(summed.detach() / total, world_size)
        if not math.isfinite(loss):
            raise Ip2pError(f"fine-tuning: the loss of step {step} is {loss}")
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.eval()
        yield TuningMetrics(
            step=step,
            steps=len(batches),
            epoch=config.epochs * step / len(batches),
            loss=loss,
            tokens=total,
            learning_rate=rate,
            grad_norm=float(norm),
            seconds=time.monotonic() - began,
        )


def _batches(rows: list[Encoded], config: LocalTuningConfig, epoch: int) -> list[list[Encoded]]:
    """The rows in an order of this epoch's own, in batches of which the last may be smaller."""
    order = sorted(rows, key=lambda row: (stream_seed(config.seed, epoch, row.key), row.key))
    size = config.batch_size
    return [order[start : start + size] for start in range(0, len(order), size)]


def _factor(step: int, steps: int, warmup: float) -> float:
    """Of the learning rate in a step counted from 1: up over the warm-up, then down, never 0."""
    rising = max(1, round(warmup * steps))
    return min(step / rising, (steps - step + 1) / (steps - rising + 1))


def _pad(
    rows: Sequence[Encoded], other: Encoded, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """int64 (row, token) tokens, mask and labels; labels are IGNORED outside the completions.

    Where there are no rows it is the other one with nothing to learn, so that each rank has a step.
    """
    shown = rows or [other]
    length = max(len(row.tokens) for row in shown)
    tokens = torch.zeros(len(shown), length, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, IGNORED)
    for place, row in enumerate(shown):
        end = len(row.tokens)
        tokens[place, :end] = torch.tensor(row.tokens)
        mask[place, :end] = 1
        if rows:
            labels[place, row.prompt : end] = tokens[place, row.prompt : end]
    return tokens.to(device), mask.to(device), labels.to(device)


def _over_ranks(loss: Tensor, world_size: int) -> float:
    """The sum over the ranks where torch.distributed runs, else this rank's part."""
    if world_size > 1 and torch.distributed.is_initialized():
        torch.distributed.all_reduce(loss)
    return float(loss)
