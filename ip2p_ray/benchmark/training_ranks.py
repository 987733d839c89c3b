"""The training loop in several processes of a CPU, without Ray: what sharing the cores costs."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.latents import LatentDataset
from ip2p_ray.training.loop import TrainConfig, start, train

WARM_UP = 2
"""Steps that are not timed."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Processes that train together."""

    model: str
    latents: str
    config: TrainConfig
    count: int
    threads: int
    """Of each of them."""
    steps: int
    micro_batch: int
    meeting: str
    """A file that is not there, over which they find each other."""


def ranks_per_s(ranks: Ranks) -> float:
    """Images a second that they train together, once all are warm."""
    context: Any = torch.multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(ranks.threads)
    try:
        torch.multiprocessing.spawn(  # type: ignore[attr-defined, no-untyped-call]
            _train, args=(ranks, told), nprocs=ranks.count
        )
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    return ranks.steps * ranks.config.batch_size / float(told.get())


def _train(rank: int, ranks: Ranks, told: Any) -> None:
    torch.set_num_threads(ranks.threads)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{ranks.meeting}", rank=rank, world_size=ranks.count
    )
    model = StableDiffusion.load(ranks.model)
    loop = train(
        model,
        LatentDataset(ranks.latents),
        ranks.config,
        rank=rank,
        world_size=ranks.count,
        micro_batch=ranks.micro_batch,
        wrap=DistributedDataParallel if ranks.count > 1 else None,
        state=start(model, ranks.config),
    )
    for _ in range(WARM_UP):
        next(loop)
    torch.distributed.barrier()
    began = time.perf_counter()
    for _ in range(ranks.steps):
        next(loop)
    torch.distributed.barrier()
    if rank == 0:
        told.put(time.perf_counter() - began)
    loop.close()  # type: ignore[attr-defined]
    torch.distributed.destroy_process_group()
