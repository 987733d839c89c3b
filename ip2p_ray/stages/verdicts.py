"""What becomes of each row of own pairs, once all are known: kept, repeated, below a score.

In memory are some hundred bytes a row, and no picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from ip2p_ray.errors import StageError
from ip2p_ray.filtering import select
from ip2p_ray.own_pairs import DUPLICATE, Groups
from ip2p_ray.rules import Rules
from ip2p_ray.schema import SIMILARITIES
from ip2p_ray.stages.checked import CHECKED
from ip2p_ray.stages.shards import read_tables

_READ = 20_000


class Verdicts:
    """The reason and the split of each row of the dataset CHECKED at a URI.

    Rows that share a picture, the three texts or a group are in one split.
    """

    def __init__(self, checked: str, rules: Rules | None, held_out: float) -> None:
        self._checked, self._rules, self._held_out = checked, rules, held_out
        self._groups = Groups()
        self._sizes = Counter[tuple[int, int]]()

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of CHECKED with their final reasons; of repeated ones the first is kept."""
        first: dict[str, str] = {}
        for row, reason in zip(self._read(), self.reasons, strict=True):
            if reason == DUPLICATE:
                row["detail"] = f"the same as {first[row['pair_key']]}"
            elif row["pair_key"]:
                first[row["pair_key"]] = row["place"]
            yield {**row, "reason": reason}

    def split(self, row: Mapping[str, Any]) -> Literal["train", "held_out"]:
        """The split of a row that is a pair."""
        assert self.reasons
        return self._groups.split(row["source_digest"], self._held_out)

    @property
    def sizes(self) -> Counter[tuple[int, int]]:
        """How many pairs came in each (width, height)."""
        assert self.reasons
        return self._sizes

    @cached_property
    def reasons(self) -> list[str | None]:
        """The reason of each row, None where it is kept.

        Raises:
            StageError: there are rules, but no row has a similarity.
        """
        reasons: list[str | None] = []
        seen: set[bytes] = set()
        scored: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for number, row in enumerate(self._read()):
            reasons.append(row["reason"])
            if row["reason"] is not None:
                continue
            key = bytes.fromhex(row["pair_key"])
            if key in seen:
                reasons[-1] = DUPLICATE
                continue
            seen.add(key)
            names = (row["source_digest"], row["edited_digest"], row["triplet_key"], row["group"])
            self._groups.join(name for name in names if name is not None)
            self._sizes[row["width"], row["height"]] += 1
            if self._rules:
                scores = {name: row[name] for name in SIMILARITIES}
                scored.setdefault(row["triplet_key"], []).append((number, scores))
        if self._rules:
            _require_scores(scored)
            for same in scored.values():
                found = select(
                    [scores for _, scores in same], self._rules.thresholds, self._rules.keep
                )
                for (number, _), reason in zip(same, found, strict=True):
                    reasons[number] = reason
        return reasons

    def _read(self) -> Iterator[dict[str, Any]]:
        for table in read_tables(self._checked, CHECKED, rows=_READ):
            yield from table.to_pylist()


def _require_scores(scored: Mapping[str, Sequence[tuple[int, Mapping[str, Any]]]]) -> None:
    found = (scores for same in scored.values() for _, scores in same)
    if scored and not any(value is not None for scores in found for value in scores.values()):
        raise StageError(
            "pairs: there are thresholds, but the data brought no similarities; name a CLIP model "
            "with --judge"
        )
