"""What of a source row's attention each target row takes at each step, without attention maps.

Every Prompt-to-Prompt operation on a map A_t = softmax(Q_t K_t) of tokens is linear in the
source's map A_s, so what it does to the output is

    out_t = SDPA(Q_s, K_s, W V_t) + SDPA(Q_t, K_t, b * V_t)

with a matrix W (token, token) and a vector b (token,) that depend on the captions and the step
only; for self-attention W is the identity and b zero: SDPA(Q_s, K_s, V_t).

Layout of P pairs: latents are [sources 0..S-1 | targets 0..P-1], `source` says which of the sources
each target follows; the batch of a guided step is [those S + P without text | those S + P with
text]. Without `source` each target has its own, S = P and `source` = 0..P-1: 4 P rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ip2p_ray.errors import ConfigError
from ip2p_ray.prompt_to_prompt.alignment import (
    TokenizedCaption,
    refinement,
    replacement,
    word_positions,
)
from ip2p_ray.prompt_to_prompt.blend import LocalBlend, WordMaps, each, source_count

Span = float | tuple[float, float]
"""A part of the steps: (0.2, 0.8), or 0.8 for (0, 0.8)."""
Kind = Literal["replace", "refine", "reweight"]


@dataclass(frozen=True, eq=False)
class CrossControl:
    """Cross-attention of one edited caption, taken from its caption's; tensors on the CPU."""

    mapping: Tensor
    """float32 (source token, target token): what a target token reads of the source's map."""
    share: Tensor
    """float32 (target token,): 1 reads the source's map, 0 its own."""
    scale: Tensor
    """float32 (target token,): the map's column is multiplied by it."""
    spans: Tensor
    """float64 (target token, 2): from which to which fraction of the steps it is controlled."""

    def weights(self, step: int, steps: int) -> tuple[Tensor, Tensor]:
        """W (token, token), which acts on values, and b (token,) of one step, float32.

        Source: METHOD section 2: all cases follow from (a c) beta and (1 - a) c beta + 1 - beta.
        """
        bounds = (self.spans * (steps + 1)).long()
        active = ((bounds[:, 0] <= step) & (step < bounds[:, 1])).float()
        matrix = self.mapping * (self.share * self.scale * active)
        return matrix, (1 - self.share) * self.scale * active + 1 - active


def cross_control(
    tokenizer: Any,
    source: TokenizedCaption,
    target: TokenizedCaption,
    *,
    kind: Kind = "refine",
    spans: Span | Mapping[str, Span] = 1.0,
    scales: Mapping[str, float] | None = None,
) -> CrossControl:
    """The control that makes the target's picture follow the source's cross-attention.

    "replace" aligns word by word, "refine" by the words both captions have, "reweight" token by
    token (for equal captions). `spans` is one part of the steps, or one for each word of the
    target, "default_" being that of all others (the whole run if absent). `scales` multiplies
    the attention to words of the target, after replacement or refinement.

    Raises: ConfigError for a word that the target does not have, or a span outside [0, 1].
    """
    share = torch.ones(target.length)
    if kind == "replace":
        mapping = replacement(source, target)
        # A word whose source word was cut off by the tokenizer keeps its own attention.
        share = mapping.any(dim=0).float()
    elif kind == "refine":
        mapping, share = refinement(source, target)
    elif kind == "reweight":
        mapping = torch.eye(target.length)
    else:
        raise ConfigError(f"kind must be 'replace', 'refine' or 'reweight', got {kind!r}")
    scale = torch.ones(target.length)
    for word, factor in (scales or {}).items():
        scale[word_positions(tokenizer, target, word)] = factor
    return CrossControl(mapping, share, scale, _token_spans(tokenizer, target, spans))


@dataclass(frozen=True, eq=False, kw_only=True)
class PairControl:
    """How one target picture follows its source."""

    self_replace: float = 0.0
    """Fraction of the steps, in [0, 1], in which self-attention maps are the source's."""
    cross: CrossControl | None = None
    """Cross-attention, with the text only; None leaves it alone."""
    blend: LocalBlend | None = None
    """Keeps the source's latents outside the words' regions; None leaves them alone."""

    def copies_self(self, step: int, steps: int) -> bool:
        """True in the steps whose self-attention is the source's."""
        return self.self_replace > step / max(steps - 1, 1)


@dataclass(frozen=True, eq=False)
class CrossRows:
    """Cross-attention of a batch, of which some rows are controlled."""

    own: Tensor
    """int64 (n,): rows whose own map counts."""
    own_weight: Tensor
    """float32 (n, token): b."""
    copied: Tensor
    """int64 (m,): rows that take their source's map."""
    source: Tensor
    """int64 (m,): the row of each one's source."""
    matrix: Tensor
    """float32 (m, token, token): W."""


@dataclass(frozen=True, eq=False)
class AttentionControl:
    """One step's control of a batch, as the attention processor takes it."""

    self_source: Tensor | None = None
    """int64 (row,): whose queries and keys a row's self-attention takes; None is its own."""
    cross: CrossRows | None = None
    """None leaves cross-attention as it is."""
    word_maps: WordMaps | None = None
    """Collects the attention to words for LocalBlend."""
    self_tokens: int | None = None
    """Layers of more tokens keep their own self-attention; None controls all layers."""


def attention_control(
    pairs: Sequence[PairControl],
    *,
    step: int | Sequence[int],
    steps: int | Sequence[int],
    device: str | torch.device = "cpu",
    maps: WordMaps | None = None,
    self_tokens: int | None = None,
    both_halves: bool = True,
    source: Sequence[int] | None = None,
) -> AttentionControl | None:
    """The control of P pairs at one step each, None where nothing is controlled.

    Rows are laid out as in the head of this module; `source` names each source at least once.
    `step` and `steps` are one number for all
    pairs or one for each. `self_tokens` limits self-attention to small layers and
    `both_halves=False` to the rows with text, as Prompt-to-Prompt's own code does; the defaults
    are InstructPix2Pix's.
    """
    at = each(step, len(pairs))
    of = each(steps, len(pairs))
    sources = range(len(pairs)) if source is None else source
    self_source = _self_source(pairs, sources, at, of, both_halves)
    cross = _cross_rows(pairs, sources, at, of, torch.device(device))
    if self_source is None and cross is None and maps is None:
        return None
    moved = None if self_source is None else self_source.to(device)
    return AttentionControl(moved, cross, maps, self_tokens)


def word_maps(
    pairs: Sequence[PairControl],
    latent_size: tuple[int, int],
    *,
    downscale: int = 4,
    device: str | torch.device = "cpu",
    source: Sequence[int] | None = None,
) -> WordMaps | None:
    """Empty maps for one run of P pairs, None where no pair has a blend."""
    blends = [pair.blend for pair in pairs]
    if all(blend is None for blend in blends):
        return None
    return WordMaps(blends, latent_size, downscale=downscale, device=device, source=source)


def _self_source(
    pairs: Sequence[PairControl],
    sources: Sequence[int],
    step: Sequence[int],
    steps: Sequence[int],
    both_halves: bool,
) -> Tensor | None:
    count = source_count(sources)
    rows = count + len(pairs)
    source = torch.arange(2 * rows)
    for half in (0, 1) if both_halves else (1,):
        for pair, control in enumerate(pairs):
            if control.copies_self(step[pair], steps[pair]):
                source[half * rows + count + pair] = half * rows + sources[pair]
    return None if torch.equal(source, torch.arange(2 * rows)) else source


def _cross_rows(
    pairs: Sequence[PairControl],
    sources: Sequence[int],
    step: Sequence[int],
    steps: Sequence[int],
    device: torch.device,
) -> CrossRows | None:
    count = source_count(sources)
    rows = count + len(pairs)
    own_weights: dict[int, Tensor | None] = dict.fromkeys(range(2 * rows))
    matrices: dict[int, Tensor] = {}
    copied_from: list[int] = []
    for pair, control in enumerate(pairs):
        if control.cross is None:
            continue
        matrix, own_weight = control.cross.weights(step[pair], steps[pair])
        row = rows + count + pair
        if matrix.any():
            matrices[row] = matrix
            copied_from.append(rows + sources[pair])
        if not own_weight.any():
            del own_weights[row]
        elif not bool((own_weight == 1).all()):
            own_weights[row] = own_weight
    tokens = next((c.cross.share.shape[0] for c in pairs if c.cross is not None), 0)
    if not matrices and all(weight is None for weight in own_weights.values()):
        return None
    ones = torch.ones(tokens)
    weights = torch.stack([ones if w is None else w for w in own_weights.values()])
    empty = torch.zeros(0, tokens, tokens)
    return CrossRows(
        own=torch.tensor(list(own_weights), device=device),
        own_weight=weights.to(device),
        copied=torch.tensor(list(matrices), dtype=torch.long, device=device),
        source=torch.tensor(copied_from, dtype=torch.long, device=device),
        matrix=(torch.stack(list(matrices.values())) if matrices else empty).to(device),
    )


def _token_spans(
    tokenizer: Any, target: TokenizedCaption, spans: Span | Mapping[str, Span]
) -> Tensor:
    words = dict(spans) if isinstance(spans, Mapping) else {"default_": spans}
    table = torch.empty(target.length, 2, dtype=torch.float64)
    table[:] = torch.tensor(_bounds(words.pop("default_", 1.0)), dtype=torch.float64)
    for word, span in words.items():
        places = word_positions(tokenizer, target, word)
        table[places] = torch.tensor(_bounds(span), dtype=torch.float64)
    return table


def _bounds(span: Span) -> tuple[float, float]:
    low, high = span if isinstance(span, tuple) else (0.0, span)
    if not 0 <= low <= high <= 1:
        raise ConfigError(f"a span must be 0 <= from <= to <= 1, got {span}")
    return low, high
