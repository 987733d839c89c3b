"""The whole life of an editor on the miniature's models, on one machine, in minutes.

    python jobs/quickstart.py                 about twelve minutes on two cores
    python jobs/quickstart.py --smoke         about two; a check that everything runs
    ray job submit --working-dir . -- python jobs/quickstart.py --out /shared/quickstart
    ray job submit --working-dir . -- python jobs/quickstart.py --out s3://bucket/quickstart

The same command again goes on where it was stopped.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.command import loading, require_uri


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """From captions to a trained editor and a report, with the miniature's models."""

    out: str | None = None
    """Folder for everything that is made, here or s3://; an unfinished run in it is continued;
    by default runs/quickstart, with --smoke runs/smoke."""
    seed: int = 0
    """Of captions, replies, training and evaluation."""
    captions: int = 400
    """Captions to begin with."""
    candidates: int = 3
    """Candidate pairs of each triplet."""
    train_steps: int = 600
    """Optimizer steps of the editor."""
    workers: int = 2
    """Processes that compute at the same time; the machine's cores are shared among them."""
    smoke: bool = False
    """Only see that everything runs: at most 16 captions, 2 candidates, 16 steps, 8 questions."""
    weights: Path | None = None
    """The miniature's weights; by default those that come with the package."""

    def __post_init__(self) -> None:
        for name in ("captions", "candidates", "train_steps", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is at least 1")
        if self.captions > 50_000:
            raise ValueError("--captions is at most 50,000: the drawn world has not many more")
        if not 0 <= self.seed < 2**31:
            raise ValueError("--seed lies in [0, 2**31)")
        require_uri("--out", self.folder, written=True)

    @property
    def folder(self) -> str:
        """Where everything goes: a smoke run has a folder of its own, for it makes other data."""
        return self.out or ("runs/smoke" if self.smoke else "runs/quickstart")


def main(job: Quickstart) -> int:
    """Run the flow, or what is left of it; returns the exit status."""
    with loading("quickstart"):
        print(f"quickstart: everything goes to {job.folder}; loading the libraries", flush=True)
        from ip2p_ray.stages import flow, run
    return run.guarded("quickstart", lambda: flow.run_all(**{**vars(job), "out": job.folder}))


if __name__ == "__main__":
    with loading("quickstart"):
        import tyro

        asked = tyro.cli(Quickstart, config=(tyro.conf.FlagCreatePairsOff,))
    sys.exit(main(asked))
