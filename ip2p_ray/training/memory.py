"""The memory that training takes, reckoned before it begins: nothing of it is allocated.

A micro-batch goes forward and backward on tensors without contents, and what would be held at once
is counted. That of the weights and the optimizer is exact; on a GPU the kernels' own workspaces and
what the allocator cannot use come on top, for which there is a margin.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ip2p_ray.report import size
from ip2p_ray.training.inputs import ENCODED
from ip2p_ray.training.loop import TrainConfig
from ip2p_ray.training.lora import add_lora

MARGIN = 1.1
"""Of what is reckoned."""

CONTEXT_BYTES = 700 << 20
"""That CUDA and its libraries hold on a device."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes that one worker holds on its device."""

    weights: int
    """Of the UNet."""
    frozen: int
    """Of the text encoder and the autoencoder."""
    optimizer: int
    """AdamW's two moments."""
    average: int
    exchanged: int
    """Copies of the gradients that ranks exchange; 0 for one worker."""
    step: int
    """The most that a step holds: gradients, activations and what autocast rounds."""
    micro_batch: int
    device: str

    @property
    def need(self) -> int:
        """All of it, with the margin."""
        parts = self.weights + self.frozen + self.optimizer + self.average + self.exchanged
        context = CONTEXT_BYTES if self.device == "cuda" else 0
        return int(MARGIN * (parts + self.step)) + context

    def line(self) -> str:
        """For people."""
        parts = {
            "weights": self.weights + self.frozen,
            "optimizer": self.optimizer,
            "average": self.average,
            "exchange": self.exchanged,
            f"gradients and activations of {self.micro_batch} samples": self.step,
        }
        told = ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
        return f"plan: a worker needs about {size(self.need)} of its device: {told}"


def memory_plan(
    unet: torch.nn.Module,
    config: TrainConfig,
    *,
    latent: tuple[int, int],
    text: tuple[int, int],
    micro_batch: int,
    frozen: int,
    accumulates: bool = False,
    encoder: torch.nn.Module | None = None,
    workers: int = 1,
    device: str = "cpu",
) -> MemoryPlan:
    """The plan of training such a UNet; only its config and class are looked at.

    `latent` is (height, width) of the latents, `text` (token, channel) of an embedding, `frozen`
    the bytes of whatever else lies on the device. Where a worker `accumulates` gradients over
    micro-batches, those of the ones before are held beside the activations; `encoder` is the
    autoencoder that encodes pictures in every step, None where there are latents; `device` is the
    kind of device, "cpu" or "cuda".
    """
    shape: Any = unet.config
    wide = {**shape, "in_channels": 2 * int(shape["out_channels"])}
    with torch.device("meta"):
        fake: Any = type(unet).from_config(wide)  # type: ignore[attr-defined]
        fake.requires_grad_(True)
        if config.lora_rank is not None:
            add_lora(fake, config.lora_rank, seed=config.seed)
    with FakeTensorMode():
        _fill(fake)
        if config.gradient_checkpointing:
            fake.enable_gradient_checkpointing()
        if config.bf16 and device == "cuda":
            _norms_in_float32(fake)
        fake.train()
        weights = sum(p.numel() for p in fake.parameters()) * 4
        trained = sum(p.numel() for p in fake.parameters() if p.requires_grad) * 4
        channels = int(fake.config.in_channels)
        arguments = {
            "x": torch.randn(micro_batch, channels, *latent),
            "timesteps": torch.zeros(micro_batch, dtype=torch.long),
            "text": torch.randn(micro_batch, *text),
        }
        with _Counted() as held:
            for _ in range(2 if accumulates else 1):
                _forward_and_backward(fake, arguments, bf16=config.bf16)
        step = held.most
        if encoder is not None:
            step = max(step, held.held + _encoding(encoder, min(ENCODED, micro_batch), latent))
    return MemoryPlan(
        weights=weights,
        frozen=frozen,
        optimizer=2 * trained,
        average=trained,
        exchanged=trained if workers > 1 else 0,
        step=step,
        micro_batch=micro_batch,
        device=device,
    )


def _fill(module: torch.nn.Module) -> None:
    """Puts fake tensors in the place of a meta module's, as attention asks where they lie."""
    for part in module.modules():
        for name, one in part._parameters.items():
            if one is not None:
                fresh = torch.nn.Parameter(torch.empty(one.shape), requires_grad=one.requires_grad)
                part._parameters[name] = fresh
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _norms_in_float32(module: torch.nn.Module) -> None:
    """As CUDA's autocast computes them, and so keeps their inputs; the CPU's leaves bfloat16."""
    for part in module.modules():
        if isinstance(part, torch.nn.GroupNorm | torch.nn.LayerNorm):
            part.register_forward_pre_hook(lambda _, given: (given[0].float(),))


def _encoding(encoder: Any, pictures: int, latent: tuple[int, int]) -> int:
    """The most that the autoencoder holds while it encodes so many pictures."""
    with torch.device("meta"):
        fake: Any = type(encoder).from_config(encoder.config)
    _fill(fake)
    times = 2 ** (len(encoder.config["block_out_channels"]) - 1)
    images = torch.randn(pictures, 3, *(times * side for side in latent))
    with _Counted() as held, torch.no_grad():
        fake.encode(images)
    return held.most


def _forward_and_backward(unet: Any, given: Mapping[str, torch.Tensor], *, bf16: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = unet(
            given["x"], given["timesteps"], encoder_hidden_states=given["text"], return_dict=False
        )[0]
        loss = found.float().square().mean()
    loss.backward()


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are made while it is on, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            id(leaf.untyped_storage())
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage(), before)
        return result

    def _count(self, storage: Any, before: set[int]) -> None:
        key = id(storage)
        if key in before or key in self._known:
            return
        count = int(storage.nbytes())
        self._known.add(key)
        self.held += count
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._release, key, count)

    def _release(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.held -= count
