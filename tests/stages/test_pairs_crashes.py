"""Drivers, workers and nodes are killed at random; what comes out is what an undisturbed run makes.

The generator only sleeps and the judge draws, so the stage is all that is tested.
"""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ip2p_ray import completeness, storage
from ip2p_ray.schema import PAIRS, SCORES, SIMILARITIES
from ip2p_ray.stages import run
from ip2p_ray.stages.pairs import ROWS_ON_THE_WAY
from ip2p_ray.testing.pairs import write_triplets
from tests.nodes import started

logger = logging.getLogger(__name__)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2400)]

DRIVER = Path(__file__).parent / "pairs_driver.py"
MOST_ACTORS = 3
PART = 24  # triplets
KINDS = ("driver", "driver", "worker", "node")
SECONDS = 0.8  # of one triplet


class Runs:
    """Runs of the driver in a cluster of three nodes, two of which may die."""

    def __init__(self, root: Path) -> None:
        from ray.cluster_utils import Cluster

        self.root = root
        head = {"num_cpus": 3, "include_dashboard": False}
        self.cluster = started(
            lambda: Cluster(initialize_head=True, connect=False, head_node_args=head)
        )
        self.nodes = [self._node(), self._node()]

    def _node(self):
        return started(lambda: self.cluster.add_node(num_cpus=2, wait=False))

    def close(self) -> None:
        self.cluster.shutdown()

    def start(
        self, folder: Path, actors: int, seconds: float, part: int = PART
    ) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        return subprocess.Popen(
            [
                *(sys.executable, DRIVER, self.root / "triplets", folder, str(actors)),
                *(str(seconds), self.root / f"{folder.name}.jsonl"),
            ],
            env={
                **os.environ,
                "RAY_ADDRESS": self.cluster.address,
                "PART_TRIPLETS": str(part),
            },
            stdout=(self.root / f"{folder.name}.log").open("a"),
            stderr=subprocess.STDOUT,
        )

    def lines(self, folder: Path):
        log = self.root / f"{folder.name}.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def wait(self, driver: subprocess.Popen, folder: Path, more: int) -> None:
        """Until so many more triplets are made, or the driver has ended, or for a minute."""
        wanted, deadline = len(self.lines(folder)) + more, time.monotonic() + 60
        while len(self.lines(folder)) < wanted and driver.poll() is None:
            if time.monotonic() > deadline:
                return
            time.sleep(0.1)

    def kill(self, kind: str, driver: subprocess.Popen, folder: Path, draw: random.Random) -> bool:
        """Whether there was one to kill."""
        if kind == "driver":
            driver.kill()
            driver.wait()
            return True
        if kind == "node":
            place = draw.randrange(2)
            self.cluster.remove_node(self.nodes[place], allow_graceful=False)
            self.nodes[place] = self._node()
            return True
        pids = list(dict.fromkeys(line["pid"] for line in self.lines(folder)[-6:]))
        draw.shuffle(pids)
        for pid in pids:
            if _is_worker(pid):
                os.kill(pid, signal.SIGKILL)
                return True
        return False


def _is_worker(pid: int) -> bool:
    try:
        return "ray::" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


@pytest.fixture
def runs(tmp_path):
    before = dict(os.environ)
    os.environ.update(
        RAY_health_check_period_ms="500",
        RAY_health_check_failure_threshold="4",
        RAY_health_check_initial_delay_ms="0",
    )
    found = Runs(tmp_path)
    yield found
    found.close()
    os.environ.clear()
    os.environ.update(before)


def outcome(folder: Path):
    """Pairs and scores, each by its key."""
    found = {}
    for name, schema, columns in (
        ("scores", SCORES, ("pair_key", "seed", *SIMILARITIES, "reason")),
        ("pairs", PAIRS, ("pair_key", "triplet_key", "seed", *SIMILARITIES, "source_image")),
    ):
        rows = storage.read_dataset(str(folder / name), schema, columns=list(columns)).to_pylist()
        found[name] = {row["pair_key"]: row for row in rows}
    return found


def on_disk(folder: Path) -> set[str]:
    """Keys of the triplets that need not be made again: of whole parts, and noted of the others."""
    notes = [
        note
        for note in folder.glob(f"candidates/part-*/.work/{run.RESUME}/**/*.parquet")
        if not note.name.endswith(".pending.parquet")
    ]
    shards = [
        shard
        for whole in folder.glob("candidates/part-*/_manifest.json")
        for shard in whole.parent.glob("*.parquet")
    ]
    found = set()
    for file in [*notes, *shards]:
        found.update(pq.read_table(file, columns=["triplet_key"])["triplet_key"].to_pylist())
    return found


def wait_for_disk(driver: subprocess.Popen, folder: Path) -> None:
    """Until something need not be made again, or the driver has ended."""
    while driver.poll() is None:
        with suppress(OSError):  # files come and go
            if on_disk(folder):
                return
        time.sleep(0.2)


@pytest.mark.parametrize(("kills", "triplets"), [(4, 96), (20, 240)])
def test_kills_change_nothing(runs, tmp_path, kills, triplets):
    write_triplets(str(tmp_path / "triplets"), triplets)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    # in one part: each starts its actors anew, and no row tells which part it came in
    first = runs.start(undisturbed, 2, seconds=0.0, part=triplets)
    assert first.wait(600) == 0, (tmp_path / "undisturbed.log").read_text()[-3000:]
    expected = outcome(undisturbed)
    assert len(expected["scores"]) == 4 * triplets

    draw = random.Random(20)
    left = list(KINDS) * (kills // len(KINDS))
    draw.shuffle(left)
    whole_parts = set()  # that there were when something was killed
    saved = []  # what was on disk when a driver died, and when that was
    while left:
        driver = runs.start(killed, draw.randint(1, MOST_ACTORS), SECONDS)
        while driver.poll() is None and left:
            runs.wait(driver, killed, more=draw.randint(0, 16))
            time.sleep(draw.uniform(0, 3))
            if left[-1] == "driver" and left.count("driver") == 1:
                wait_for_disk(driver, killed)
            if driver.poll() is None and runs.kill(left[-1], driver, killed, draw):
                if left.pop() == "driver":
                    saved.append((time.time(), on_disk(killed)))
                whole_parts.add(len(list(killed.glob("candidates/part-*/_manifest.json"))))
        if driver.poll() == 0:
            break
        driver.kill()
        driver.wait()
    last = runs.start(killed, MOST_ACTORS, seconds=0.05)
    assert last.wait(900) == 0, (tmp_path / "killed.log").read_text()[-3000:]

    assert outcome(killed) == expected
    lines = runs.lines(killed)
    for when, keys in saved:
        later = {line["key"] for line in lines if line["began"] > when}
        assert not keys & later, "a triplet that was on disk was made again"
    assert saved[-1][1], "nothing was on disk when the last driver died"
    if kills == 20:
        assert len(whole_parts) > 1, "all kills fell into the same part"
    for name, wanted in (("candidates", triplets), ("scores", 4 * triplets), ("pairs", None)):
        _, found = completeness.check(str(killed / name))
        assert (found.lost, found.duplicate, found.unexpected) == (0, 0, 0), name
        assert wanted in (None, found.wanted)
    again = completeness.recomputed(tmp_path / "killed.jsonl")
    logger.info("%d kills: lost = 0, duplicate = 0, recomputed = %d", kills, again)
    assert len({line["key"] for line in lines}) == triplets
    assert not left, "it was done before the last kill"
    assert again <= (kills + 1) * MOST_ACTORS * ROWS_ON_THE_WAY
    assert not list(killed.rglob("*.tmp"))
