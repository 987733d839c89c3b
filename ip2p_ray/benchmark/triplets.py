"""How fast the stage of triplets asks an endpoint, what that costs, and what it keeps in memory.

The job as users run it, against the shipped server in a process of its own, on this machine.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

from ip2p_ray import __version__
from ip2p_ray.benchmark.processes import Cost, watched
from ip2p_ray.errors import StageError

SERVER, DRIVER, ACTOR = "server", "driver", "actors"
MEBIBYTE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TripletsBenchmark:
    """What is asked, and how."""

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

    def __post_init__(self) -> None:
        for name in ("captions", "actors", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is at least 1")
        if self.delay < 0 or self.shots < 0 or not 0 <= self.fault_rate < 1:
            raise ValueError("--delay and --shots are at least 0, --fault-rate lies in [0, 1)")

    @property
    def ideal(self) -> float | None:
        """Replies a second if nothing but the server's delay took time."""
        return self.actors * self.concurrency / self.delay if self.delay else None


def measure(asked: TripletsBenchmark, job: Path) -> dict[str, Any]:
    """What `job`, jobs/write_triplets.py, did; as JSON can express it.

    `steady` is the time between the first and the last tenth of the replies.

    Raises:
        StageError: the job failed; says what it said.
    """
    from ip2p_ray.stages.captions import collect_captions  # with Ray, too slow for a --help

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, _server(asked) as (server, url):
        texts = [f"a red boat {number} at sea" for number in range(asked.captions)]
        collect_captions(texts, f"{folder}/captions", config={})
        began = time.monotonic()
        with _job(asked, job, folder, url) as process:
            roots = {process.pid: DRIVER, server.pid: SERVER}
            with watched(roots, _role) as cost:
                status = process.wait()
        seconds = time.monotonic() - began
        if status:
            raise StageError(f"{job} failed: {Path(folder, 'log').read_text(encoding='utf-8')}")
        with urlopen(url.removesuffix("/v1") + "/counts") as answer:
            counts = json.load(answer)
    return {
        "asked": {field.name: getattr(asked, field.name) for field in fields(TripletsBenchmark)},
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
    asked: TripletsBenchmark, counts: Mapping[str, Any], cost: Cost, seconds: float
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


def _role(name: str) -> str:
    if "AskReplies" in name:
        return ACTOR
    return "other workers" if name.startswith("ray::") else "Ray itself"


@contextmanager
def _server(asked: TripletsBenchmark) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "ip2p_ray.testing", "--delay-s", str(asked.delay)]
    command += ["--fault-rate", str(asked.fault_rate), "--slow-s", str(asked.delay)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.terminate()


@contextmanager
def _job(
    asked: TripletsBenchmark, job: Path, folder: str, url: str
) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, str(job), "--captions", f"{folder}/captions", "--out", folder]
    command += ["--model", "fake", "--base-url", url, "--api-key-env", "none"]
    command += ["--shots", str(asked.shots), "--attempts", "30"]
    command += ["--actors", str(asked.actors), "--concurrency", str(asked.concurrency)]
    with Path(folder, "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()
