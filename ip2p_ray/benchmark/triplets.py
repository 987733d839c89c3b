"""`jobs/benchmark.py triplets`: how fast an endpoint is asked, what that costs and keeps in memory.

The jobs as users run them, against the shipped server in a process of its own, on this machine.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

from ip2p_ray import __version__
from ip2p_ray.atomic import atomic_file
from ip2p_ray.benchmark.processes import Cost, watched
from ip2p_ray.command import require_place
from ip2p_ray.errors import StageError

SERVER, DRIVER, ACTOR = "server", "driver", "actors"
MEBIBYTE = 1 << 20
JOBS = Path(__file__).parents[2] / "jobs"
"""Of this checkout."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Replies a second of a server that answers after a while, and what they cost."""

    captions: int = 8_000
    """Captions to write triplets of."""
    delay: float = 0.5
    """Seconds after which the server answers."""
    fault_rate: float = 0.0
    """Share of requests, in [0, 1], that go wrong."""
    actors: int = 1
    """Processes that ask."""
    concurrency: int = 64
    """Requests in flight of each actor."""
    shots: int = 8
    """Examples shown with each caption."""
    json: Path | None = None
    """Where the figures go as JSON, besides the table."""

    def __post_init__(self) -> None:
        for name in ("captions", "actors", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is at least 1")
        if self.delay < 0 or self.shots < 0 or not 0 <= self.fault_rate < 1:
            raise ValueError("--delay and --shots are at least 0, --fault-rate lies in [0, 1)")
        if self.json is not None:
            require_place("--json", self.json, folder=False)

    @property
    def ideal(self) -> float | None:
        """Replies a second if nothing but the server's delay took time."""
        return self.actors * self.concurrency / self.delay if self.delay else None


def run(job: Options) -> str:
    """The table; the JSON file is written.

    Raises:
        StageError: the stage failed; says what it said.
    """
    found = measure(job)
    if job.json is not None:
        with atomic_file(job.json) as new:
            new.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return "\n".join(lines(found))


def measure(asked: Options) -> dict[str, Any]:
    """What the job did; as JSON can express it.

    `steady` is the time between the first and the last tenth of the replies.

    Raises:
        StageError: the job failed; says what it said.
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, _server(asked) as (server, url):
        texts = (f"a red boat {number} at sea\n" for number in range(asked.captions))
        Path(folder, "captions.txt").write_text("".join(texts), encoding="utf-8")
        with _job(folder, "collect_captions", "--files", f"{folder}/captions.txt") as process:
            _require_success(process.wait(), folder)
        began = time.monotonic()
        with _job(folder, "write_triplets", *_flags(asked, folder, url)) as process:
            roots = {process.pid: DRIVER, server.pid: SERVER}
            with watched(roots, _role) as cost:
                _require_success(process.wait(), folder)
        seconds = time.monotonic() - began
        with urlopen(url.removesuffix("/v1") + "/counts") as answer:
            counts = json.load(answer)
    return {
        "asked": {name: value for name, value in vars(asked).items() if name != "json"},
        "machine": {
            "cores": psutil.cpu_count(),
            "load_before": round(load, 2),
            "others_cores": round(cost.others_cores, 2),
            "python": platform.python_version(),
            **{name: version(name) for name in ("ray", "openai")},
            "ip2p_ray": __version__,
        },
        **_figures(asked, counts, cost, seconds),
    }


def _figures(
    asked: Options, counts: Mapping[str, Any], cost: Cost, seconds: float
) -> dict[str, Any]:
    times = sorted((float(at), count) for at, count in counts["paid_at"].items())
    replies = sum(count for _, count in times)
    first, last = _when(times, replies * 0.1), _when(times, replies * 0.9)
    between = sum(count for at, count in times if first < at <= last)
    steady = between / (last - first) if last > first else None
    cpu = cost.cpu(first, last)
    whole = cost.cpu(cost.samples[0].at, cost.samples[-1].at)
    return {
        "replies": replies,
        "requests": sum(counts["requests"].values()),
        "most_in_flight": counts["most_in_flight"],
        "seconds": round(seconds, 2),
        "replies_a_second": {
            "ideal": asked.ideal,
            "steady": steady and round(steady, 2),
            "whole": round(replies / seconds, 2),
        },
        "cpu_ms_a_reply_steady": {
            role: round(1000 * used / between, 3) for role, used in cpu.items() if between
        },
        "cpu_seconds": {role: round(used, 2) for role, used in whole.items()},
        "peak_rss_mib": {role: round(most / MEBIBYTE, 1) for role, most in cost.rss.items()},
        "peak_own_mib": {role: round(most / MEBIBYTE, 1) for role, most in cost.own.items()},
    }


def lines(found: Mapping[str, Any]) -> list[str]:
    """What `measure` found, for people."""
    asked, machine, rates = found["asked"], found["machine"], found["replies_a_second"]
    cpu, steady = found["cpu_ms_a_reply_steady"], rates["steady"]
    told = "replies a second:"
    if rates["ideal"] and steady:
        told += f" {steady:,.1f} of {rates['ideal']:,.1f} ideal"
        told += f" ({100 * steady / rates['ideal']:.1f} %) in the steady part,"
    elif steady:
        told += f" {steady:,.1f} in the steady part,"
    client = sum(used for role, used in cpu.items() if role != SERVER)
    return [
        f"{found['replies']:,} replies, {asked['actors']} x {asked['concurrency']} in flight, "
        f"after {asked['delay']:g} s each; at most {found['most_in_flight']} were in flight",
        f"{machine['cores']} cores, of which others kept {machine['others_cores']:.2f} busy; "
        f"Python {machine['python']}, Ray {machine['ray']}, openai {machine['openai']}",
        f"{told} {rates['whole']:,.1f} with start and end, {found['seconds']:,.1f} s",
        f"CPU in the steady part: client {client:.2f} ms a reply, server "
        f"{cpu.get(SERVER, 0.0):.2f}; by role "
        + ", ".join(f"{role} {used:.2f}" for role, used in cpu.items()),
        "peak memory of the largest process: "
        + ", ".join(
            f"{role} {most:,.0f} MiB (own {found['peak_own_mib'][role]:,.0f})"
            for role, most in found["peak_rss_mib"].items()
        ),
    ]


def _when(times: list[tuple[float, int]], count: float) -> float:
    """The moment at which so many replies had gone out."""
    so_far = 0
    for at, more in times:
        so_far += more
        if so_far >= count:
            return at
    raise StageError("the server answered nothing")


def _role(names: Set[str]) -> str:
    if any("AskReplies" in name for name in names):
        return ACTOR
    return "other workers" if any(name.startswith("ray::") for name in names) else "Ray itself"


@contextmanager
def _server(asked: Options) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "ip2p_ray.testing", "--delay-s", str(asked.delay)]
    command += ["--fault-rate", str(asked.fault_rate), "--slow-s", str(asked.delay)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.terminate()


@contextmanager
def _job(folder: str, name: str, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(JOBS / f"{name}.py"), "--out", folder, *flags]
    with Path(folder, "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def _flags(asked: Options, folder: str, url: str) -> list[str]:
    flags = ["--captions", f"{folder}/captions", "--model", "fake", "--base-url", url]
    flags += ["--api-key-env", "none", "--shots", str(asked.shots), "--attempts", "30"]
    return [*flags, "--actors", str(asked.actors), "--concurrency", str(asked.concurrency)]


def _require_success(status: int, folder: str) -> None:
    if status:
        told = Path(folder, "log").read_text(encoding="utf-8").strip()
        raise StageError(f"the job failed: {told.splitlines()[-1] if told else status}")
