"""LocalBlend: outside the regions that chosen words attend to, the source's picture stays.

The attention to a set of words S is softmax(Q K) 1_S, that is attention with an indicator of S
in place of the values; so the regions need no attention maps either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ip2p_ray.errors import ConfigError
from ip2p_ray.prompt_to_prompt.alignment import TokenizedCaption, word_positions


@dataclass(frozen=True, eq=False, kw_only=True)
class LocalBlend:
    """The words of one pair whose regions may change; indicators are float32 (token,)."""

    words: tuple[Tensor, Tensor]
    """Tokens of the chosen words in the caption and in the edited caption."""
    less: tuple[Tensor, Tensor] | None = None
    """Tokens of words whose regions stay the source's even so."""
    threshold: float = 0.3
    """A place belongs to a region from this share of the map's maximum on, in [0, 1]."""
    less_threshold: float = 0.3
    """The same for `less`."""
    start: float = 0.2
    """Fraction of the steps before the first blend, in [0, 1]."""

    def active(self, step: int, steps: int) -> bool:
        """True in the steps after which latents are blended."""
        return step >= int(self.start * steps)


def local_blend(
    tokenizer: Any,
    source: TokenizedCaption,
    target: TokenizedCaption,
    *,
    words: tuple[Sequence[str], Sequence[str]],
    less: tuple[Sequence[str], Sequence[str]] | None = None,
    threshold: float = 0.3,
    less_threshold: float = 0.3,
    start: float = 0.2,
) -> LocalBlend:
    """The blend for words of the caption and words of the edited caption.

    Raises: ValueError for a word that its caption does not have.
    """

    def indicators(chosen: tuple[Sequence[str], Sequence[str]]) -> tuple[Tensor, Tensor]:
        first, second = (
            _indicator(tokenizer, caption, phrases)
            for caption, phrases in zip((source, target), chosen, strict=True)
        )
        return first, second

    return LocalBlend(
        words=indicators(words),
        less=None if less is None else indicators(less),
        threshold=threshold,
        less_threshold=less_threshold,
        start=start,
    )


class WordMaps:
    """Attention to chosen words, summed over the layers of one size and over the steps so far."""

    def __init__(
        self,
        blends: Sequence[LocalBlend | None],
        latent_size: tuple[int, int],
        *,
        downscale: int = 4,
        device: str | torch.device = "cpu",
        source: Sequence[int] | None = None,
    ) -> None:
        """Maps of `latent_size` over `downscale`, of all P pairs (None: a pair without blend).

        At 512 pixels and the default these are the layers of 16 x 16 tokens. `source` is as in
        `control`: which source each pair follows, its own by default.

        Raises: ConfigError where pairs of one source name different words of its caption.
        """
        height, width = latent_size
        self.blends = tuple(blends)
        self.source = tuple(range(len(blends)) if source is None else source)
        self.grid = (-(-height // downscale), -(-width // downscale))
        self.indicators = _row_indicators(self.blends, self.source).to(device)
        self.sums = torch.zeros(len(self.indicators), self.grid[0] * self.grid[1], 2, device=device)

    @property
    def tokens(self) -> int:
        """Tokens of the layers that are summed."""
        return self.grid[0] * self.grid[1]

    def values(self, like: Tensor) -> Tensor:
        """Indicators in the place of values `like` (row, head, token, channel).

        Channel 0 holds the chosen words, 1 the words taken away; only rows with text have any.
        """
        values = torch.zeros_like(like)
        values[like.shape[0] // 2 :, :, :, :2] = self.indicators.to(like).unsqueeze(1)
        return values

    def add(self, attended: Tensor) -> None:
        """Adds one layer: attention of `values`, (row, head, position, channel)."""
        self.sums += attended[attended.shape[0] // 2 :, :, :, :2].float().mean(1)

    def blend(self, x: Tensor, step: int | Sequence[int], steps: int | Sequence[int]) -> Tensor:
        """The latents [sources | targets] with each target's unchanged region its source's.

        `step` and `steps` are one number for all pairs or one for each.
        Source: Prompt-to-Prompt's LocalBlend.
        """
        count = source_count(self.source)
        sources, targets = x[:count], x[count:].clone()
        at, of = each(step, len(self.blends)), each(steps, len(self.blends))
        for pair, blend in enumerate(self.blends):
            if blend is not None and blend.active(at[pair], of[pair]):
                mask = self._mask(pair, blend, (x.shape[2], x.shape[3]))
                targets[pair] = torch.where(mask, targets[pair], sources[self.source[pair]])
        return torch.cat([sources, targets])

    def _mask(self, pair: int, blend: LocalBlend, size: tuple[int, int]) -> Tensor:
        """The places (height, width), bool, where the target may differ from its source."""
        rows = [self.source[pair], source_count(self.source) + pair]
        maps = self.sums[rows].transpose(1, 2)
        maps = maps.reshape(2, 2, *self.grid)
        region = _above(F.max_pool2d(maps[:, :1], 3, 1, 1), blend.threshold, size)
        if blend.less is not None:
            region &= ~_above(maps[:, 1:], blend.less_threshold, size)
        return region


def each(value: int | Sequence[int], count: int) -> Sequence[int]:
    """One number for each of `count` pairs."""
    return [value] * count if isinstance(value, int) else value


def source_count(source: Sequence[int]) -> int:
    """How many sources `source` names; each of them at least once."""
    return max(source, default=-1) + 1


def _above(maps: Tensor, threshold: float, size: tuple[int, int]) -> Tensor:
    """The places (height, width), bool, where a map of (branch, 1, h, w) is over the threshold."""
    grown = F.interpolate(maps, size=size)
    peak = grown.amax((2, 3), keepdim=True).clamp(min=torch.finfo(grown.dtype).tiny)
    return (grown / peak > threshold).any(0)[0]


def _row_indicators(blends: Sequence[LocalBlend | None], source: Sequence[int]) -> Tensor:
    """float32 (row, token, 2) of the rows with text: sources, then targets."""
    tokens = next((blend.words[0].shape[0] for blend in blends if blend is not None), 0)
    count = source_count(source)
    rows: dict[int, Tensor] = {}
    for pair, blend in enumerate(blends):
        if blend is None:
            continue
        less = blend.less or (torch.zeros(tokens), torch.zeros(tokens))
        for branch, row in enumerate((source[pair], count + pair)):
            words = torch.stack([blend.words[branch], less[branch]], dim=1)
            if not torch.equal(rows.setdefault(row, words), words):
                raise ConfigError("blends of pairs that share a source name different words of it")
    indicators = torch.zeros(count + len(blends), tokens, 2)
    for row, words in rows.items():
        indicators[row] = words
    return indicators


def _indicator(tokenizer: Any, caption: TokenizedCaption, phrases: Sequence[str]) -> Tensor:
    indicator = torch.zeros(caption.length)
    for phrase in phrases:
        indicator[word_positions(tokenizer, caption, phrase)] = 1.0
    return indicator
