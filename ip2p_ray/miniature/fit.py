"""A resumable training loop for the miniature's small models, with a log line a minute."""

from __future__ import annotations

import logging
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ip2p_ray.atomic import atomic_file, atomic_folder
from ip2p_ray.errors import ModelError
from ip2p_ray.miniature import parallel
from ip2p_ray.miniature.pace import Pace

logger = logging.getLogger(__name__)

Loss = Callable[[int], tuple[Tensor, dict[str, float]]]
"""From a step to (scalar loss, figures to log).

All randomness must come from the step, and from the rank where processes share the batch.
"""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How one small model is trained."""

    steps: int
    """Optimizer steps, >= 1."""
    learning_rate: float = 1e-3
    """Peak of a linear warm-up over `warmup` steps and a cosine decay to a twentieth."""
    warmup: int = 100
    ema_decay: float = 0.998
    """Decay of the weights' moving average per step, ramped up over the first steps."""
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    save_every_s: float = 120.0
    """Seconds between saved states; a killed run loses no more than this."""


def fit(
    name: str,
    module: nn.Module,
    loss: Loss,
    config: FitConfig,
    folder: Path,
    *,
    shared: bool = True,
) -> dict[str, float]:
    """Train `module` in place and leave the averaged weights in it; returns run figures.

    Reruns continue from `folder`/<name>.pt. Every step draws its randomness from its own number, so
    a resumed run sees what an undisturbed one would have seen. Where several processes run
    (`parallel`) all of them call this together, unless it is not `shared`; the first one saves.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.99),
    )
    ema = {k: v.detach().clone() for k, v in module.state_dict().items()}
    first, seconds = 0, 0.0
    if path.exists():
        state = read_state(path)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        ema, first, seconds = state["ema"], state["step"], state["seconds"]
        logger.info("%s: continues at step %d of %d", name, first, config.steps)
    started = saved = time.monotonic()
    pace = Pace(name, config.steps, unit="step", done=first)
    module.train()
    figures: dict[str, float] = {}
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        value, figures = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        if shared:
            parallel.average_gradients(module.parameters())
        nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm)
        optimizer.step()
        _average(ema, module, min(config.ema_decay, (1 + step) / (10 + step)))
        now = time.monotonic()
        rest = " ".join(f"{k} {v:.4f}" for k, v in figures.items())
        pace.tick(step + 1, f"loss {float(value.detach()):.4f} {rest}".rstrip())
        due = now - saved >= config.save_every_s or step + 1 == config.steps
        if due and not parallel.rank():
            saved = now
            state = {
                "module": module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "ema": ema,
                "step": step + 1,
                "seconds": seconds + now - started,
            }
            with atomic_file(path) as new:
                torch.save(state, new)
    module.load_state_dict(ema)
    module.eval()
    total = seconds + time.monotonic() - started
    return {"steps": float(config.steps), "seconds": round(total, 1), **figures}


def read_state(path: Path) -> Any:
    """What torch.save wrote for a later start of the same run: tensors, numbers, texts.

    Raises:
        ModelError: it holds anything else, or is cut.
    """
    try:
        return torch.load(path, weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(f"{path} cannot be read: {reason}; delete it to start anew") from error


def save_module(module: Any, folder: Path) -> None:
    """`module.save_pretrained`; the folder appears whole, and an older one stays until then."""
    with atomic_folder(folder) as new:
        module.save_pretrained(new)


def _schedule(step: int, config: FitConfig) -> float:
    warm = min(1.0, (step + 1) / config.warmup)
    return warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))


@torch.no_grad()
def _average(ema: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    for key, value in module.state_dict().items():
        if value.is_floating_point():
            ema[key].lerp_(value, 1 - decay)
        else:
            ema[key].copy_(value)
