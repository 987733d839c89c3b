"""What was used last, up to a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch


class Recent:
    """Tensors by key; the ones that were not used for longest make room. For many threads."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0
        self._kept: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, bool]:
        """The tensor of a key, made where it is not kept, and whether it was kept.

        Two threads that miss the same key at once both make it.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key], True
        made = make()
        with self._lock:
            if key not in self._kept and made.nbytes <= self.most_bytes:
                self._kept[key] = made
                self.held_bytes += made.nbytes
                while self.held_bytes > self.most_bytes:
                    _, gone = self._kept.popitem(last=False)
                    self.held_bytes -= gone.nbytes
        return made, False

    def __len__(self) -> int:
        return len(self._kept)
