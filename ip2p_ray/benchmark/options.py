"""What each option of a search saves and what it costs, beside full generation in the same run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ip2p_ray.benchmark.comparison import FULL, Measured, Run, compare
from ip2p_ray.clip import Clip
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import ConfigError
from ip2p_ray.pairs import PairConfig
from ip2p_ray.search.fitting import fit
from ip2p_ray.search.generator import PairGenerator
from ip2p_ray.search.options import SearchConfig
from ip2p_ray.search.schedule import schedule
from ip2p_ray.search.triplet import Searched

logger = logging.getLogger(__name__)


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

    def __post_init__(self) -> None:
        for name in ("share_source", "prune_at"):
            if not getattr(self, name):
                raise ConfigError(f"{name} needs at least one value to measure")

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

    def run(rows: Iterable[Mapping[str, Any]], options: SearchConfig) -> Run:
        generator = PairGenerator(model, clip, config, options)
        before = device_seconds(model.device)
        found = [*schedule(generator, rows, config, options, recipe, batch_size=batch_size)]
        return Run(
            options=options,
            searched=found,
            device_s=device_seconds(model.device) - before,
            unet_rows=generator.unet_rows,
        )

    seen: dict[float, Sequence[Searched]] = {}
    for at in levels.prune_at:
        predicting = SearchConfig(
            prune_at=at, prune_text=None, prune_image=None, prune_direction=None
        )
        seen[at] = run(pilots, predicting).searched
        logger.info("options: predicted %d pilots after %g of the steps", len(pilots), at)
    measured: dict[str, Measured] = {}
    full: Run | None = None
    for name, options in levels.ways().items():
        if name != FULL:
            known = seen[options.prune_at or levels.prune_at[-1]]
            options = fit(options, known, config.thresholds, lose=levels.lose)
        came = run(triplets, options)
        full = full or came
        measured[name] = compare(came, full)
        logger.info("options: %s took %.1f s of the device", name, came.device_s)
    return measured


def device_seconds(device: torch.device) -> float:
    """A clock of the device's work: processor time of this process on a CPU, else wall time."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
