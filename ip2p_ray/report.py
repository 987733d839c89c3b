"""What a stage counted: one sentence for the log, one dictionary for the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ip2p_ray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Report:
    """Counts of one run of a stage; every row that came in was kept or has a reason."""

    stage: str
    """Name of the dataset that the stage makes."""
    rows_in: int
    """Rows, or candidates, that were judged."""
    rows_out: int
    """Those of them that were kept."""
    rejected: Mapping[str, int]
    """Count by reason of the others, most frequent first."""
    seconds: float
    """Wall time."""

    def __post_init__(self) -> None:
        if self.rows_in != self.rows_out + sum(self.rejected.values()):
            raise ConfigError(
                f"{self.stage}: {self.rows_in} rows came in, but {self.rows_out} were kept and "
                f"{sum(self.rejected.values())} rejected"
            )

    @classmethod
    def count(cls, stage: str, reasons: Iterable[str | None], seconds: float) -> Report:
        """The report of rows given as their reasons, None for each row that was kept."""
        counts = Counter(reasons)
        kept = counts.pop(None, 0)
        rejected = {str(reason): number for reason, number in counts.most_common()}
        total = kept + sum(rejected.values())
        return cls(stage=stage, rows_in=total, rows_out=kept, rejected=rejected, seconds=seconds)

    def line(self) -> str:
        """One sentence: stage, kept of how many, rejected by reason, time."""
        share = f" ({100 * self.rows_out / self.rows_in:.0f} %)" if self.rows_in else ""
        text = f"{self.stage}: kept {self.rows_out:,} of {self.rows_in:,}{share}"
        if self.rejected:
            counts = ", ".join(f"{reason} {count:,}" for reason, count in self.rejected.items())
            text += f"; rejected {counts}"
        return f"{text}; {duration(self.seconds)}"

    def as_dict(self) -> dict[str, Any]:
        """The fields, as JSON can express them."""
        return {**asdict(self), "rejected": dict(self.rejected)}


def duration(seconds: float) -> str:
    """A time for people, such as "12.3 s", "31.4 min" or "2.5 h"."""
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def size(count: float) -> str:
    """A number of bytes for people, such as "12.3 MB" or "1.8 TB"."""
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count:.0f} B"
