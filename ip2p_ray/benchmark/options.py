"""What each option of a search saves and what it costs, beside full generation in the same run."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from ip2p_ray.clip import Clip
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import ConfigError
from ip2p_ray.filtering import NOT_BEST
from ip2p_ray.pairs import PairConfig
from ip2p_ray.search.fitting import fit
from ip2p_ray.search.generator import PairGenerator
from ip2p_ray.search.options import SearchConfig
from ip2p_ray.search.schedule import schedule
from ip2p_ray.search.triplet import PRUNED, Candidate, Searched

_LOG = logging.getLogger(__name__)

QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
FULL = "full"
"""The search with all options off."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One way to search the same triplets. An accepted pair is one that is kept."""

    options: dict[str, Any]
    """What differs from SearchConfig's defaults."""
    device_s: float
    """Seconds of the device; on a CPU those that this process spent computing."""
    unet_rows: int
    """Rows that went through the UNet; unlike seconds the same in every run."""
    candidates: int
    """Begun, pruned ones among them."""
    pruned: int
    never_made: int
    passed: int
    """Candidates that reached every threshold."""
    pairs: int
    """Of these, the kept ones."""
    device_s_per_accepted_pair: float | None
    """None where no pair was accepted."""
    unet_rows_per_accepted_pair: float | None
    false_reject_rate: float | None
    """Share of the candidates that pass in full generation and were pruned or never made; None
    where candidates share sources and so are others than in full generation."""
    lost_pairs: float | None
    """The same share of the pairs that full generation keeps; others may be kept instead."""
    lost_triplets: float | None
    """Share of the triplets with a pair in full generation that have none."""
    ended: dict[str, int]
    """How many triplets ended in which way."""
    quantiles: dict[str, list[float]]
    """QUANTILES of the accepted pairs' self_replace, guidance_scale and two similarities."""


@dataclass(frozen=True, kw_only=True)
class Levels:
    """How far each option is taken."""

    stop_early: float = 0.5
    """Chance of a better pair below which a triplet is stopped."""
    stop_margin: float = 0.05
    """Cosine by which a pair has to be better."""
    give_up: float = 0.5
    """Chance of any further accepted candidate below which a triplet is given up."""
    decide_every: int = 8
    """Candidates between two decisions."""
    share_source: tuple[int, ...] = (2, 4)
    """Candidates of one source picture; each is measured alone, the last with the others too."""
    prune_at: tuple[float, ...] = (0.25, 0.5)
    """Fractions of the steps after which hopeless candidates are pruned; measured likewise."""
    lose: float = 0.05
    """Share of the pilots' accepted candidates that pruning may lose; the margins follow."""

    def ways(self) -> dict[str, SearchConfig]:
        """Every option alone and together; without margins and prior, which pilots give."""
        stop = SearchConfig(
            stop_early=self.stop_early,
            stop_margin=self.stop_margin,
            decide_every=self.decide_every,
        )
        give_up = SearchConfig(give_up=self.give_up, decide_every=self.decide_every)
        prune = {f"prune_at={at:g}": SearchConfig(prune_at=at) for at in self.prune_at}
        shared = {f"share_source={n}": SearchConfig(share_source=n) for n in self.share_source}
        fewer = replace(stop, give_up=self.give_up, prune_at=self.prune_at[-1])
        return {
            FULL: SearchConfig(),
            "stop_early": stop,
            "give_up": give_up,
            **prune,
            "all but sharing": fewer,
            **shared,
            "all": replace(fewer, share_source=self.share_source[-1]),
        }


def measure_options(
    model: StableDiffusion,
    clip: Clip,
    triplets: Sequence[Mapping[str, Any]],
    pilots: Sequence[Mapping[str, Any]],
    config: PairConfig,
    levels: Levels,
    *,
    recipe: str,
    batch_size: int,
) -> dict[str, Measured]:
    """Every way of `levels`, the first being full generation, over the same triplets.

    `recipe` is one for all, so that the same candidates are compared. `pilots` are triplets that
    the acceptance prior and the margins are read off; they must be others.

    Raises:
        ConfigError: a triplet is among the pilots, or no candidate of the pilots was accepted.
    """
    same = {row["triplet_key"] for row in triplets} & {row["triplet_key"] for row in pilots}
    if same or not pilots or not triplets:
        raise ConfigError(f"triplets and pilots must differ, and be some: {len(same)} are the same")

    def run(rows: Iterable[Mapping[str, Any]], options: SearchConfig) -> _Run:
        generator = PairGenerator(model, clip, config, options)
        before = device_seconds(model.device)
        found = [*schedule(generator, rows, config, options, recipe, batch_size=batch_size)]
        return _Run(found, device_seconds(model.device) - before, generator.unet_rows)

    seen: dict[float, Sequence[Searched]] = {}
    for at in levels.prune_at:
        predicting = SearchConfig(
            prune_at=at, prune_text=None, prune_image=None, prune_direction=None
        )
        seen[at] = run(pilots, predicting).searched
        _LOG.info("options: searched %d pilots in full", len(pilots))
    measured: dict[str, Measured] = {}
    full: _Run | None = None
    for name, options in levels.ways().items():
        if name != FULL:
            known = seen[options.prune_at or levels.prune_at[-1]]
            options = fit(options, known, config.thresholds, lose=levels.lose)
        came = run(triplets, options)
        full = full or came
        measured[name] = _measured(options, came, full)
        _LOG.info("options: %s took %.1f s of the device", name, came.device_s)
    return measured


def device_seconds(device: torch.device) -> float:
    """A clock of the device's work: processor time of this process on a CPU, else wall time."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def table(measured: Mapping[str, Measured]) -> str:
    """Two tables in plain text: what was saved and lost, and what the accepted pairs look like."""
    full = measured[FULL]
    lines = [
        f"{'':16} {'device s':>9} {'s/pair':>8} {'ratio':>6} {'rows/pair':>9} {'ratio':>6} "
        f"{'begun':>6} {'pruned':>6} {'unmade':>6} {'pairs':>6} {'false rej.':>10} "
        f"{'lost pairs':>10} {'lost tripl.':>11}"
    ]
    for name, one in measured.items():
        seconds, rows = one.device_s_per_accepted_pair, one.unet_rows_per_accepted_pair
        lines.append(
            f"{name:16} {one.device_s:9.1f} {_number(seconds, 8, 3)} "
            f"{_ratio(full.device_s_per_accepted_pair, seconds)} {_number(rows, 9, 0)} "
            f"{_ratio(full.unet_rows_per_accepted_pair, rows)} "
            f"{one.candidates:6d} {one.pruned:6d} {one.never_made:6d} {one.pairs:6d} "
            f"{_share(one.false_reject_rate, 10)} {_share(one.lost_pairs, 10)} "
            f"{_share(one.lost_triplets, 11)}"
        )
    lines += ["", f"{'accepted pairs':37}" + "".join(f"{100 * q:7.0f} %" for q in QUANTILES)]
    for column in full.quantiles:
        for name, one in measured.items():
            values = "".join(f"{value:9.3f}" for value in one.quantiles[column])
            lines.append(f"{column:20} {name:16}{values}")
    return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class _Run:
    searched: Sequence[Searched]
    device_s: float
    unet_rows: int


_Key = tuple[str, int]


def _measured(options: SearchConfig, came: _Run, full: _Run) -> Measured:
    made, whole = _candidates(came), _candidates(full)
    passed = {key for key, one in made.items() if one.reason in (None, NOT_BEST)}
    pairs = {key for key, one in made.items() if one.reason is None}
    full_passed = {key for key, one in whole.items() if one.reason in (None, NOT_BEST)}
    full_pairs = {key for key, one in whole.items() if one.reason is None}
    alike = options.share_source is None
    defaults = SearchConfig()
    changed = {
        field.name: getattr(options, field.name)
        for field in fields(options)
        if getattr(options, field.name) != getattr(defaults, field.name)
    }
    return Measured(
        options=changed,
        device_s=came.device_s,
        unet_rows=came.unet_rows,
        candidates=len(made),
        pruned=sum(one.reason == PRUNED for one in made.values()),
        never_made=sum(one.never_made for one in came.searched),
        passed=len(passed),
        pairs=len(pairs),
        device_s_per_accepted_pair=came.device_s / len(pairs) if pairs else None,
        unet_rows_per_accepted_pair=came.unet_rows / len(pairs) if pairs else None,
        false_reject_rate=_missing(full_passed, passed) if alike else None,
        lost_pairs=_missing(full_pairs, pairs) if alike else None,
        lost_triplets=_missing({key for key, _ in full_pairs}, {key for key, _ in pairs}),
        ended=dict(Counter(one.ended for one in came.searched)),
        quantiles=_quantiles([made[key] for key in sorted(pairs)]),
    )


def _candidates(run: _Run) -> dict[_Key, Candidate]:
    return {
        (str(one.triplet["triplet_key"]), candidate.request.index): candidate
        for one in run.searched
        for candidate in one.candidates
    }


def _missing(expected: set[Any], found: set[Any]) -> float | None:
    return len(expected - found) / len(expected) if expected else None


def _quantiles(pairs: Sequence[Candidate]) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = {}
    for name in ("self_replace", "guidance_scale"):
        columns[name] = [getattr(one.request, name) for one in pairs]
    for name in ("direction_similarity", "image_similarity"):
        columns[name] = [(one.similarities or {})[name] for one in pairs]
    return {
        name: np.quantile(values, QUANTILES).tolist() if values else []
        for name, values in columns.items()
    }


def _number(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def _ratio(full: float | None, value: float | None) -> str:
    return f"{'-':>6}" if full is None or value is None else f"{value / full:6.2f}"


def _share(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{100 * value:{width - 2}.1f} %"
