"""The frozen text encoder with a memory: instructions recur, so each is encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch


class TextCache:
    """Embeddings of the most recently used texts, at most `max_bytes` of them.

    A text is whatever `encode` takes: a string, or token numbers. `null` is the empty one.
    New texts are encoded in chunks of one fixed size, filled up with the empty text: a text's
    embedding then does not depend on which others happened to be missing beside it, which exact
    resume needs.
    """

    def __init__(
        self,
        encode: Callable[[list[Any]], torch.Tensor],
        *,
        null: Hashable = "",
        max_bytes: int = 1 << 28,
        chunk: int = 16,
    ) -> None:
        self._encode, self._max_bytes, self._chunk = encode, max_bytes, chunk
        self._null = null
        self._rows: OrderedDict[Hashable, torch.Tensor] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    @torch.no_grad()
    def __call__(self, texts: Sequence[Hashable]) -> torch.Tensor:
        """The embeddings (row, token, channel) of the texts, in order."""
        wanted = list(dict.fromkeys(texts))
        found = {text: self._rows[text] for text in wanted if text in self._rows}
        missing = [text for text in wanted if text not in found]
        for start in range(0, len(missing), self._chunk):
            found.update(self._encode_chunk(missing[start : start + self._chunk]))
        self._remember(wanted, found)
        return torch.stack([found[text] for text in texts])

    def _encode_chunk(self, texts: list[Hashable]) -> dict[Hashable, torch.Tensor]:
        filling = [self._null] * (self._chunk - len(texts))
        rows = self._encode(texts + filling)[: len(texts)]
        return {text: row.detach().clone() for text, row in zip(texts, rows, strict=True)}

    def _remember(self, wanted: list[Hashable], found: dict[Hashable, torch.Tensor]) -> None:
        for text in wanted:
            if text not in self._rows:
                self._rows[text] = found[text]
                self._bytes += found[text].nbytes
            self._rows.move_to_end(text)
        while self._bytes > self._max_bytes and self._rows:
            _, row = self._rows.popitem(last=False)
            self._bytes -= row.nbytes
