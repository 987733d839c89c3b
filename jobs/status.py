"""How far a dataset is, or all of a run, while it is made, when it is done, and after a kill.

    python jobs/status.py --dataset runs/q/candidates
    python jobs/status.py --dataset s3://bucket/run --watch 10
    ray job submit --working-dir . -- python jobs/status.py --dataset /shared/run

Only storage is asked, no Ray: state, progress, survival by reason, failures, time used and left, as
far as the job noted them, which it does every ten seconds. Of a run its folders are listed and
those in them, not the shards. `ray job submit` is for where only the cluster reaches the storage.
With --json one object is printed: {"datasets": [...]}. The status is 0 when something was found, 1
for a failure and 2 for a wrong flag.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.command import loading, require_uri


@dataclass(frozen=True, kw_only=True)
class Status:
    """The state of a dataset, or of every dataset of a run, told from storage alone."""

    dataset: str
    """A dataset, or a run's folder: a folder here or s3://bucket/folder."""
    json: bool = False
    """Print one JSON object."""
    watch: float | None = None
    """Look again after so many seconds, until Ctrl-C or until the dataset is whole; also after
    the storage refused, or where there is no dataset yet."""

    def __post_init__(self) -> None:
        require_uri("--dataset", self.dataset)
        if self.watch is not None and not self.watch > 0:
            raise ValueError("--watch is above 0")


def main(job: Status) -> int:
    """Print the status; returns the exit status."""
    with loading("status"):
        from ip2p_ray import status
        from ip2p_ray.errors import DatasetError, Ip2pError, StorageError
    try:
        while True:
            try:
                found = status.statuses(job.dataset)
            except Ip2pError as error:
                sys.stderr.write(f"status: {error}\n")
                if job.watch is None or not isinstance(error, DatasetError | StorageError):
                    return 1
                time.sleep(job.watch)
                continue
            if job.watch is not None and not job.json and sys.stdout.isatty():
                print("\x1b[H\x1b[2J", end="")
            objects = {"datasets": [each.as_dict() for each in found]}
            print(json.dumps(objects) if job.json else "\n".join(status.lines(found)), flush=True)
            made = found[0].uri == job.dataset and found[0].state == "whole"
            if job.watch is None or made:
                return 0
            time.sleep(job.watch)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    with loading("status"):
        import tyro

        asked = tyro.cli(Status, config=(tyro.conf.FlagCreatePairsOff,))
    sys.exit(main(asked))
