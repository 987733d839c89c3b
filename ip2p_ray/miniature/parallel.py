"""Several CPU processes that train one model: each computes its share of every batch.

On a few cores two processes of one thread each do more steps a minute than one of two threads.
Without a process group, everything here is that of a single process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ip2p_ray.errors import ConfigError


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(batch_size: int) -> int:
    """This process's part of a batch.

    Raises:
        ConfigError: the batch does not split evenly.
    """
    if batch_size % count():
        raise ConfigError(f"a batch of {batch_size} does not split over {count()} processes")
    return batch_size // count()


def meet() -> None:
    """Returns once every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def agreed(value: bool) -> bool:
    """What the first process says, for all."""
    if not dist.is_initialized():
        return value
    told = torch.tensor(int(value))
    dist.broadcast(told, src=0)
    return bool(told)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Each gradient becomes the mean over the processes."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    means = torch.split(flat / count(), [gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def run(processes: int, work: Callable[..., None], *arguments: Any) -> None:
    """`work(*arguments)` in so many processes at once; it must be importable by name."""
    if processes == 1:
        work(*arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn: Any = torch.multiprocessing.spawn  # type: ignore[attr-defined]
        spawn(_work, (processes, Path(folder) / "meeting", work, arguments), nprocs=processes)


def _work(
    number: int, processes: int, meeting: Path, work: Callable[..., None], arguments: Any
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # One process may train for hours while the others wait for it.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=number,
        world_size=processes,
        timeout=timedelta(days=2),
    )
    try:
        work(*arguments)
    finally:
        dist.destroy_process_group()
