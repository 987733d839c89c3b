"""Which savings a search makes; each changes the data, so all are part of the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ip2p_ray.errors import ConfigError
from ip2p_ray.pairs import PairConfig
from ip2p_ray.schema import recipe


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What is saved on the way to a triplet's pairs; the defaults save nothing, as the paper."""

    stop_early: float | None = None
    """Stop once a better pair than the worst kept one is less probable than this, in (0, 1)."""
    stop_margin: float = 0.02
    """Cosine by which a better one is to be better; else chance always finds one more."""
    give_up: float | None = None
    """Stop once any further accepted candidate is less probable than this, in (0, 1)."""
    acceptance_prior: tuple[float, float] = (0.5, 0.5)
    """Beta prior of the share of a triplet that is accepted; `fitting` reads it off pilots."""
    decide_every: int = 8
    """Candidates of a triplet between two decisions to stop."""
    share_source: int | None = None
    """So many candidates in a row have one source picture and differ in self_replace only."""
    prune_at: float | None = None
    """Fraction of the steps, in (0, 1), after which the finished picture is predicted."""
    prune_text: float | None = 0.1
    """Cosine below the text threshold from which a prediction is hopeless; None: never."""
    prune_image: float | None = 0.1
    """The same of the image threshold."""
    prune_direction: float | None = 0.1
    """The same of the direction threshold."""

    def __post_init__(self) -> None:
        for name in ("stop_early", "give_up", "prune_at"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ConfigError(f"{name} must lie in (0, 1), got {value}")
        for name in ("stop_margin", "prune_text", "prune_image", "prune_direction"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 2:
                raise ConfigError(f"{name} is a difference of cosines in [0, 2], got {value}")
        if not all(0 < value < float("inf") for value in self.acceptance_prior):
            raise ConfigError(f"acceptance_prior must be above 0, got {self.acceptance_prior}")
        if self.share_source is not None and self.share_source < 2:
            raise ConfigError(f"share_source must be at least 2, got {self.share_source}")
        if self.decide_every < 1:
            raise ConfigError(f"decide_every must be at least 1, got {self.decide_every}")
        self._refuse_idle("stop_early", self.stop_early is None, ("stop_margin",))
        deciding = ("acceptance_prior", "decide_every")
        self._refuse_idle("stop_early or give_up", not self.decides, deciding)
        margins = ("prune_text", "prune_image", "prune_direction")
        self._refuse_idle("prune_at", self.prune_at is None, margins)
        if self.decides and self.decide_every % (self.share_source or 1):
            raise ConfigError(
                f"decide_every must be a multiple of share_source, {self.share_source}, "
                f"got {self.decide_every}"
            )

    def _refuse_idle(self, option: str, off: bool, names: Sequence[str]) -> None:
        """A setting that nothing reads would still be in the recipe, and change every seed."""
        for name in names:
            if off and getattr(self, name) != getattr(SearchConfig, name):
                raise ConfigError(f"{name} means nothing without {option}")

    @property
    def decides(self) -> bool:
        """Whether a triplet may end before all its candidates are made."""
        return self.stop_early is not None or self.give_up is not None

    def prune_step(self, steps: int) -> int | None:
        """After how many of the steps candidates are pruned; None without pruning.

        Raises: ConfigError for a single step, which has no middle.
        """
        if self.prune_at is None:
            return None
        if steps < 2:
            raise ConfigError("prune_at needs at least 2 steps, got 1")
        return min(max(round(self.prune_at * steps), 1), steps - 1)


def search_recipe(config: PairConfig, options: SearchConfig, *fingerprints: str) -> str:
    """16 hex digits of `schema.recipe`; with all options off it is that of the config alone."""
    if options == SearchConfig():
        return recipe(config, *fingerprints)
    return recipe(config, *fingerprints, recipe(options))
