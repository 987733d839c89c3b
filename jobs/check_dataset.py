"""Whether a dataset has all that it was made from, each once: lost, duplicate, unexpected keys.

    python jobs/check_dataset.py --dataset runs/q/pairs
    python jobs/check_dataset.py --dataset runs/editor/latents --source runs/q/pairs
    ray job submit --working-dir . -- python jobs/check_dataset.py --dataset s3://bucket/run/candidates

Replies, triplets, candidates, scores, pairs of the generator and latents can be checked, each with
what it was made from. One line is told of each count. The status is 0 when nothing is lost and
nothing there twice, 1 when something is or cannot be read, and 2 for a wrong flag.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.command import loading, require_uri


@dataclass(frozen=True, kw_only=True)
class CheckDataset:
    """A dataset in, its counts out; nothing is written."""

    dataset: str
    """The finished dataset, a folder or s3://bucket/folder."""
    source: str | None = None
    """What it was made from; by default what lies beside it: the queue of candidates, the
    candidates of pairs, the pairs of latents, the replies of triplets."""
    ledger: Path | None = None
    """File of JSON lines with a `key`, one for each time that a row was made, as the test's
    generators write it; by it, what was made again is counted too."""

    def __post_init__(self) -> None:
        require_uri("--dataset", self.dataset)
        if self.source is not None:
            require_uri("--source", self.source)


def main(job: CheckDataset) -> int:
    """Tell the counts; returns the exit status."""
    with loading("check_dataset"):
        from ip2p_ray.errors import StageError
        from ip2p_ray.stages import run

    def work() -> None:
        from ip2p_ray import completeness, storage

        uri = storage.absolute(job.dataset)
        source = storage.absolute(job.source) if job.source else None
        source, found = completeness.check(uri, source)
        print(f"wanted = {found.wanted:,} keys of {source}")
        for name in ("lost", "duplicate", "unexpected"):
            print(f"{name} = {getattr(found, name)}")
        if job.ledger is not None:
            print(f"recomputed = {completeness.recomputed(job.ledger)}")
        sys.stdout.flush()
        if found.lost or found.duplicate:
            told = f", such as {', '.join(found.missing)}" if found.missing else ""
            raise StageError(
                f"{job.dataset}: {found.lost:,} keys are lost and {found.duplicate:,} rows are "
                f"there twice{told}"
            )

    return run.guarded("check_dataset", work)


if __name__ == "__main__":
    with loading("check_dataset"):
        import tyro

        asked = tyro.cli(CheckDataset)
    sys.exit(main(asked))
