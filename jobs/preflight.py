"""Before the first job on a cluster: what would travel, who answers, what can be written to.

    python jobs/preflight.py --storage s3://bucket/run --address http://127.0.0.1:8265
    ray job submit --working-dir . -- python jobs/preflight.py --storage /shared/run

Named are the largest files where the working directory is large, the storage that is out of reach,
and the versions that differ. The second line asks the same of storage as a node of the cluster
sees it. Nothing stays behind. The status is 0 when a job can be submitted, 1 when something is
wrong and 2 for a wrong flag.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.command import is_web_address, loading, require_uri

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """Questions about a submission; nothing is submitted but a job that prints versions."""

    working_dir: Path = Path()
    """What `ray job submit --working-dir` will be given."""
    storage: tuple[str, ...] = ()
    """Folders or s3:// places that jobs will read and write."""
    address: str | None = None
    """Of the dashboard, as http://127.0.0.1:8265; without it no cluster is asked."""

    def __post_init__(self) -> None:
        for uri in self.storage:
            require_uri("--storage", uri, written=True)
        if self.address is not None and not is_web_address(self.address):
            raise ValueError(f"--address {self.address}: give that of the dashboard, http://...")


def main(job: Preflight) -> int:
    """Print a line for everything that was looked at; returns the exit status."""
    with loading("preflight"):
        from ip2p_ray.errors import ConfigError
        from ip2p_ray.stages import preflight
    checks = preflight.check_package(job.working_dir)
    pins: dict[str, str] = {}
    try:
        pins = preflight.read_pins(ROOT / "constraints.txt")
        checks += preflight.check_pins(pins, preflight.installed(), "this machine")
    except ConfigError as error:  # it does not travel everywhere, and nothing needs it to work
        checks.append(preflight.Check("note", f"versions are not compared: {error}"))
    checks += map(preflight.check_storage, job.storage)
    if job.address is not None:
        checks += preflight.check_cluster(job.address, pins)
    for check in checks:
        print(f"{check.state}: {check.text}", flush=True)
    return int(any(check.state == "wrong" for check in checks))


if __name__ == "__main__":
    with loading("preflight"):
        import tyro

        asked = tyro.cli(Preflight)
    sys.exit(main(asked))
