"""The training loop: a generator that does one optimizer step and yields what it measured.

It knows no Ray and no files. Who calls it decides how often to save the state between two steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import ConfigError, Ip2pError
from ip2p_ray.training.ahead import Ahead, made_ahead
from ip2p_ray.training.ema import Ema
from ip2p_ray.training.feed import (
    Batch,
    Feed,
    Latents,
    PictureBatch,
    Pictures,
    Visit,
    micro_batch_size,
    read_batch,
    read_pictures,
)
from ip2p_ray.training.inputs import InputMaker
from ip2p_ray.training.lora import add_lora
from ip2p_ray.training.loss import editing_loss
from ip2p_ray.training.state import TrainState, check_same_run
from ip2p_ray.training.unet import widen


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How an editor is trained; the defaults are the paper's (METHOD section 4)."""

    steps: int
    """Optimizer steps of the whole run, resumed parts included (paper: 10,000)."""
    batch_size: int = 1024
    """Samples of one optimizer step, over all ranks and micro-batches."""
    learning_rate: float = 1e-4
    """AdamW's, after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """What the learning rate does after the warm-up; cosine falls to 0 at `steps`."""
    weight_decay: float = 0.01
    """AdamW's."""
    max_grad_norm: float | None = None
    """Gradients are scaled down to this norm; None leaves them."""
    ema_decay: float = 0.9999
    """Per optimizer step, at the most: up to step 9 / (1 - ema_decay) the ramp rules, whose
    horizon is a ninth of the steps done. The released model averaged each of its 4 micro-batches,
    which 0.9996 repeats here; in the paper's 10,000 steps the ramp makes both the same."""
    dropout: float = 0.05
    """Share of samples that lose the text only, both conditions, the image only; each."""
    flips: bool = True
    """Half of the visits see the pair mirrored."""
    min_snr_gamma: float | None = None
    """Min-SNR weighting of the loss; None is the paper's plain mean."""
    seed: int = 0
    """Of the order, noise, timesteps, dropout and flips."""
    gradient_accumulation: int = 1
    """Micro-batches that a rank's part of the batch is split into."""
    bf16: bool = False
    """Autocast to bfloat16; the weights and the optimizer stay float32."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    channels_last: bool = False
    """Keep convolution weights channels-last, faster on an H200 (LOG.md, 2026-11-27)."""
    lora_rank: int | None = None
    """Train only additions of this rank to the attention's projections, and conv_in; None trains
    every weight, as the paper does."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation"):
            _require(getattr(self, name) >= 1, f"{name} is at least 1", getattr(self, name))
        _require(self.warmup_steps >= 0, "warmup_steps is at least 0", self.warmup_steps)
        _require(self.learning_rate > 0, "learning_rate is positive", self.learning_rate)
        _require(self.weight_decay >= 0, "weight_decay is at least 0", self.weight_decay)
        _require(0 <= self.ema_decay < 1, "ema_decay lies in [0, 1)", self.ema_decay)
        _require(0 <= self.dropout <= 1 / 3, "dropout lies in [0, 1/3]", self.dropout)
        for name in ("max_grad_norm", "min_snr_gamma", "lora_rank"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} is positive or None", value)
        _require(self.decay in ("constant", "cosine"), "decay is constant or cosine", self.decay)


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What one optimizer step measured."""

    step: int
    """Optimizer steps done, this one included."""
    epoch: float
    """Passes over the groups so far."""
    loss: float
    """Mean over the global batch where torch.distributed runs, else over this rank's part."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    ema_decay: float
    seconds: float
    """Wall time of the step on this rank."""
    waited: float = 0.0
    """Seconds of these that this rank waited for data."""


def start(model: StableDiffusion, config: TrainConfig) -> TrainState:
    """The state of a run at step 0; the model's UNet is widened and made float32, in place."""
    unet: nn.Module = widen(model.unet)
    if model.dtype != torch.float32:
        nn.Module.to(unet, torch.float32)  # diffusers' own `to` logs a warning here
    if config.channels_last:
        unet.to(memory_format=torch.channels_last)
    unet.requires_grad_(True)
    if config.lora_rank is not None:
        add_lora(unet, config.lora_rank, seed=config.seed)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in unet.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=next(unet.parameters()).device.type in ("cpu", "cuda"),
    )
    run = {"seed": config.seed, "batch_size": config.batch_size}
    return TrainState(unet=unet, optimizer=optimizer, ema=Ema(unet, config.ema_decay), run=run)


def train(
    model: StableDiffusion,
    dataset: Latents | Pictures,
    config: TrainConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    micro_batch: int | None = None,
    readers: int = 1,
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    state: TrainState | None = None,
) -> Iterator[Metrics]:
    """One Metrics an optimizer step, from the state's step to `config.steps`.

    With `micro_batch`, a rank's part of the batch is split into parts of so many samples at most,
    whatever the world size, and `config.gradient_accumulation` is not looked at; without it, the
    batch has to split evenly. `readers` threads read what the next steps need.

    The model's UNet is trained in place; its text encoder and autoencoder stay as they are. Pass
    the `state` that `start` made (restored from a checkpoint, if there is one) and save it between
    two steps. `wrap` is applied to the UNet for the forward pass (DistributedDataParallel).

    Raises:
        ConfigError: the batch does not split over the ranks, the state is another model's, or
            the run was begun with another seed, batch size or dataset.
        Ip2pError: the loss or its gradient is not finite; the state is then as after the step
            before.
    """
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank lies in [0, world_size), got {rank} of {world_size}")
    feed = Feed(len(dataset), config.batch_size, config.seed)

    def parts(step: int) -> list[list[Visit]]:
        if micro_batch is not None:
            return feed.share(step, rank=rank, world_size=world_size, most=micro_batch)
        parts = config.gradient_accumulation
        return feed.part(step, rank=rank, world_size=world_size, parts=parts)

    if micro_batch is None:
        micro_batch_size(config.batch_size, world_size, config.gradient_accumulation)
    parts(0)
    state = state or start(model, config)
    if state.unet is not model.unet:
        raise ConfigError("the state belongs to another model than the one given")
    run = {"seed": config.seed, "batch_size": config.batch_size, "dataset": dataset.digest}
    check_same_run(state.run, run)
    state.run = {**state.run, **run}
    loop = _Loop(model, dataset, config, state, parts, world_size, wrap)
    return loop.run(readers)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of an optimizer step, counted from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class _Loop:
    """What stays the same from step to step."""

    def __init__(
        self,
        model: StableDiffusion,
        dataset: Latents | Pictures,
        config: TrainConfig,
        state: TrainState,
        parts: Callable[[int], list[list[Visit]]],
        world_size: int,
        wrap: Callable[[nn.Module], nn.Module] | None,
    ) -> None:
        self.model, self.dataset, self.config, self.state = model, dataset, config, state
        self.parts, self.world_size = parts, world_size
        self.device = next(state.unet.parameters()).device
        self.inputs = InputMaker(model, self.device)
        if config.gradient_checkpointing:
            state.unet.enable_gradient_checkpointing()  # type: ignore[operator]
        self.unet = wrap(state.unet) if wrap else state.unet

    def run(self, readers: int) -> Iterator[Metrics]:
        every = (
            visits
            for step in range(self.state.step, self.config.steps)
            for visits in self.parts(step)
        )
        with made_ahead(self._read, every, threads=readers, depth=readers + 1) as batches:
            while self.state.step < self.config.steps:
                self.state.unet.train()
                yield self._step(batches)
        self.state.unet.eval()

    def _read(self, visits: Sequence[Visit]) -> Batch | PictureBatch:
        seed, flips = self.config.seed, self.config.flips
        if isinstance(self.dataset, Pictures):
            return read_pictures(self.dataset, visits, seed, flips=flips)
        return read_batch(self.dataset, visits, seed, flips=flips)

    def _step(self, batches: Ahead[Batch | PictureBatch]) -> Metrics:
        began = time.perf_counter()
        batches.waited = 0.0
        state, config = self.state, self.config
        rate = learning_rate(config, state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        loss = self._accumulate_gradients(batches)
        grad_norm = self._clip()
        for name, value in (("loss", loss), ("norm of the gradient", grad_norm)):
            if not math.isfinite(value):
                state.optimizer.zero_grad(set_to_none=True)
                raise Ip2pError(
                    f"the {name} is {value} at step {state.step + 1}; lower learning_rate (now "
                    f"{rate:g}) or set max_grad_norm, and resume from the last checkpoint"
                )
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        ema_decay = state.ema.update(state.unet)
        state.step += 1
        return Metrics(
            step=state.step,
            epoch=state.step * config.batch_size / len(self.dataset),
            loss=loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            ema_decay=ema_decay,
            seconds=time.perf_counter() - began,
            waited=batches.waited,
        )

    def _accumulate_gradients(self, batches: Ahead[Batch | PictureBatch]) -> float:
        """The mean loss of the step's batch, its gradient left in the parameters."""
        sizes = [len(visits) for visits in self.parts(self.state.step)]
        total = torch.zeros((), device=self.device)
        for number, size in enumerate(sizes, start=1):
            batch = batches.next()
            # ranks' gradients are averaged, and every sample of the batch counts the same
            weight = size * self.world_size / self.config.batch_size
            with self._communicate(last=number == len(sizes)):
                loss = self._loss(batch) * weight
                loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return float(_mean_over_ranks(total, self.world_size))

    def _communicate(self, *, last: bool) -> AbstractContextManager[Any]:
        """Ranks exchange gradients in the backward pass of the last micro-batch only."""
        no_sync = getattr(self.unet, "no_sync", None)
        return nullcontext() if last or no_sync is None else no_sync()

    def _loss(self, batch: Batch | PictureBatch) -> torch.Tensor:
        """The mean loss of a micro-batch, a scalar."""
        inputs = self.inputs(batch, self.config.dropout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            losses = editing_loss(
                self.unet,
                self.model.schedule,
                latents=inputs.latents,
                image_latents=inputs.image_latents,
                text=inputs.text,
                noise=inputs.noise,
                timesteps=inputs.timesteps,
                min_snr_gamma=self.config.min_snr_gamma,
            )
        return losses.mean()

    def _clip(self) -> float:
        gradients = [p.grad for p in self.state.unet.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(
                self.state.unet.parameters(), self.config.max_grad_norm, norm
            )
        return float(norm)


def _mean_over_ranks(value: torch.Tensor, world_size: int) -> torch.Tensor:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and world_size > 1:
        torch.distributed.all_reduce(value)
        return value / world_size
    return value


def _require(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"{rule}, got {value!r}")
