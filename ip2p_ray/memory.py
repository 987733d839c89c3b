"""Memory of devices: how much is free, what running out of it looks like, batches that fit."""

from __future__ import annotations

import logging

import psutil
import torch

from ip2p_ray.errors import ModelError

logger = logging.getLogger(__name__)

_TOLD = (
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""What a RuntimeError of torch says that is no torch.OutOfMemoryError, but means it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a computation failed because it wanted more memory than there is."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(told in str(error) for told in _TOLD)


def halved(
    what: str,
    tried: int,
    told: str,
    device: str | torch.device,
    *,
    least: int = 1,
    held: int = 0,
) -> int:
    """Half of the `tried` candidates at a time that did not fit on the device, which is told.

    It is at least `least`.

    To be called outside of the except block, which holds on to the tensors. `told` is the error's
    text and `held` what the weights hold, in bytes, where that is known.

    Raises:
        ModelError: no fewer are possible; says what is needed and what is there.
    """
    device = torch.device(device)
    if tried <= least:
        free = gib(free_bytes(device))
        reason = told.splitlines()[0] if told else "no more is known"
        weights = f"the weights hold {gib(held)}, " if held else ""
        raise ModelError(
            f"{what}: not even {least} at a time fit: {weights}{free} are free on {device} and "
            f"more is needed ({reason}); give a lower resolution or dtype"
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    fewer = max(tried // 2, least)
    logger.warning(
        "%s: %d candidates at a time do not fit on %s, goes on with %d", what, tried, device, fewer
    )
    return fewer


def free_bytes(device: str | torch.device) -> int:
    """Memory of the device that nobody uses now."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def held_bytes(*modules: torch.nn.Module) -> int:
    """Of all parameters and buffers."""
    tensors = [tensor for part in modules for tensor in [*part.parameters(), *part.buffers()]]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gib(count: int) -> str:
    """For example "1.5 GiB"."""
    return f"{count / (1 << 30):.1f} GiB"
