"""Several nodes on this machine: a head on which nothing runs, and pools that can be killed."""

import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, suppress

import psutil
import pytest

from ip2p_ray.stages import starting

BOOKKEEPING = (
    *("Tally", "Board", "TrainController", "SynchronizationActor", "PlacementGroupCleaner"),
    *("_StatsActor", "_AutoscalingCoordinatorActor", "ActorLocationTracker", "_StatsSummaryActor"),
    *("_UsageCollectionActor", "_clean_pending_checkpoints_task"),
    *("_get_arrow_schema_from_block", "PreemptionWatcher", "TrainStateActor", "DatasetManager"),
)
"""What of ours and of Ray's may live beside the driver: it counts and decides, and holds no CPU."""

IDLE = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""What every node has."""


def started(start, attempts=4):
    """What `start` made; a node of Ray that did not start in time is started again."""
    for _ in range(attempts - 1):
        try:
            return start()
        except Exception as error:
            if not starting.is_late(error):
                raise
    return start()


class Pools:
    """A cluster whose nodes have a custom resource each, by which work finds them."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.nodes = defaultdict(list)
        self.nodes["head"] = [cluster.head_node]
        self.seen = defaultdict(set)
        """What ran on the nodes of each pool, by the titles of Ray's processes."""
        self.drivers = []

    def add(self, pool, *, cpus=1, amount=1.0):
        """One more node of the pool."""
        options = {"num_cpus": cpus, "resources": {pool: amount}, "object_store_memory": 100 << 20}
        node = started(lambda: self.cluster.add_node(**options, wait=False))
        self.nodes[pool].append(node)

    def kill(self, pool):
        """The oldest node of the pool and all that runs on it, with SIGKILL."""
        self.cluster.remove_node(self.nodes[pool].pop(0), allow_graceful=False)

    def look(self):
        """Notes what runs now."""
        for pool, nodes in self.nodes.items():
            for node in nodes:
                for raylet in node.all_processes.get("raylet", ()):
                    self.seen[pool] |= titles(raylet.process.pid)

    def start(self, driver, *arguments, log):
        """The driver's process; what it says is added to the log."""
        started = subprocess.Popen(
            [sys.executable, driver, *map(str, arguments)],
            env={**os.environ, "RAY_ADDRESS": self.cluster.address},
            stdout=log.open("a"),
            stderr=subprocess.STDOUT,
        )
        self.drivers.append(started)
        return started

    def close(self):
        """Nothing is left running."""
        for driver in self.drivers:
            driver.kill()
            driver.wait()
        self.cluster.shutdown()

    def wait(self, driver, log, condition, seconds=600):
        """Until the condition comes true while the driver runs."""
        ends = time.monotonic() + seconds
        while not condition():
            assert driver.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < ends, log.read_text()[-3000:]
            self.look()
            time.sleep(0.05)

    def finish(self, driver, log, seconds=600):
        """Until the driver has ended well."""
        ends = time.monotonic() + seconds
        while driver.poll() is None:
            assert time.monotonic() < ends, log.read_text()[-3000:]
            self.look()
            time.sleep(0.05)
        assert driver.returncode == 0, log.read_text()[-3000:]

    @property
    def head_work(self):
        """What ran on the head beside what only keeps books."""
        # While a named actor starts, its title begins with its name: ray::name:Class.__init__.
        books = re.compile(rf"ray::(?:[^:]+:)?(?:{'|'.join(BOOKKEEPING)})")
        return {title for title in self.seen["head"] if not books.match(title)}

    def where(self, name):
        """The pools on which something of that name ran."""
        return {pool for pool, seen in self.seen.items() if any(name in title for title in seen)}


def titles(raylet):
    """What the workers of a raylet are doing."""
    found = set()
    with suppress(psutil.Error):
        for process in psutil.Process(raylet).children(recursive=True):
            with suppress(psutil.Error):
                title = " ".join(process.cmdline())
                if title.startswith("ray::") and not title.startswith(IDLE):
                    found.add(title)
    return found


@contextmanager
def pools():
    """A cluster that has only a head, without a CPU; a node that dies is missed within seconds."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_failure_threshold": "4",
            "RAY_health_check_initial_delay_ms": "0",
        }.items():
            patch.setenv(name, value)
        head = {"num_cpus": 0, "include_dashboard": False}
        cluster = started(lambda: Cluster(initialize_head=True, connect=False, head_node_args=head))
        found = Pools(cluster)
        try:
            yield found
        finally:
            found.close()
