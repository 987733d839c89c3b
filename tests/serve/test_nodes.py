"""The service on several nodes, of which one dies under load."""

import asyncio
import json
import logging
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest

from ip2p_ray.editor import Editor
from ip2p_ray.miniature import weights
from tests.nodes import pools
from tests.ports import free_port
from tests.serve.asking import ask, picture_bytes, pixels_of

logger = logging.getLogger(__name__)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

DRIVER = Path(__file__).parent / "nodes_driver.py"
REQUESTS, STEPS = 32, 150
LOST = "connection"
"""In place of a status, where none came."""


@pytest.fixture(scope="module")
def model(tiny_weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "editor"
    weights.load_editor(tiny_weights).save(folder)
    return folder


@pytest.fixture(scope="module")
def cluster():
    """A head without a CPU, two nodes for the HTTP front and two for editors."""
    with pools() as found:
        for pool in ("front", "front", "editor", "editor"):
            found.add(pool)
        found.cluster.wait_for_nodes()
        yield found


def deployed(cluster, model, folder, *, proxies, fronts):
    """The URL of two replicas, each on a node of its own."""
    port, log = free_port(), folder / "log"
    settings = {
        "model": str(model),
        "name": "tiny",
        "num_cpus": 0.8,
        "batch_size": 4,
        "max_queued": 100,
        "min_replicas": 2,
        "max_replicas": 2,
        "max_steps": STEPS,
        "deadline_s": 900.0,
        "resources": {"editor": 1},
        "fronts": fronts,
        "front_resources": {"front": 1},
    }
    cluster.finish(cluster.start(DRIVER, port, proxies, json.dumps(settings), log=log), log)
    cluster.seen.clear()
    cluster.look()
    assert cluster.where("ServeReplica:editor:Editor") == {"editor"}
    assert cluster.where("ServeReplica:editor:Front") == {"front"}
    return f"http://127.0.0.1:{port}"


class Load:
    """Clients that ask until they have a picture, in a thread; what each was told, in order."""

    def __init__(self, url):
        self.url = url
        self.told = [[] for _ in range(REQUESTS)]
        self.pictures = {}
        self.thread = threading.Thread(target=lambda: asyncio.run(self._all()))

    def __enter__(self):
        self.thread.start()
        ends = time.monotonic() + 600
        while not self.pictures:
            assert time.monotonic() < ends
            time.sleep(0.01)
        assert len(self.pictures) < REQUESTS / 2
        return self

    def __exit__(self, *_):
        self.thread.join()

    async def _all(self):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=900, limits=limits) as client:
            await asyncio.gather(*(self._one(client, seed) for seed in range(REQUESTS)))

    async def _one(self, client, seed):
        for _ in range(60):
            pause = 1.0
            try:
                answer = await ask(client, self.url, seed=seed, steps=STEPS)
            except httpx.TransportError:
                self.told[seed].append(LOST)
            else:
                self.told[seed].append(answer.status)
                if answer.status == 200:
                    (made,) = answer.body["data"]
                    assert made["seed"] == seed
                    self.pictures[seed] = made["b64_json"]
                    return
                if answer.status == 503:
                    pause = int(answer.headers["retry-after"])
            await asyncio.sleep(pause)

    @property
    def counts(self):
        return Counter(told for each in self.told for told in each)


def assert_right(load, model):
    """Each client has the picture that it asked for."""
    assert sorted(load.pictures) == list(range(REQUESTS))
    editor = Editor.load(model)
    for seed in (0, 13, REQUESTS - 1):
        made = editor.edit(picture_bytes(seed), "make it night", seed=seed, steps=STEPS)
        difference = pixels_of(load.pictures[seed]) - np.asarray(made).astype(int)
        assert np.abs(difference).max() <= 1


def test_a_node_with_a_replica_killed_under_load_loses_no_request(cluster, model, tmp_path):
    url = deployed(cluster, model, tmp_path, proxies="HeadOnly", fronts=1)
    with Load(url) as load:
        cluster.kill("editor")
        cluster.add("editor")
    logger.info("a replica's node: %s", dict(load.counts))
    assert set(load.counts) <= {200, 503}
    assert_right(load, model)


def test_a_node_with_a_front_and_a_proxy_killed_under_load_is_survived(cluster, model, tmp_path):
    """What was open there gets no answer, or Serve's 500; who asks again has the picture."""
    url = deployed(cluster, model, tmp_path, proxies="EveryNode", fronts=2)
    with Load(url) as load:
        cluster.kill("front")
        cluster.add("front")
    logger.info("the node of a front and of a proxy: %s", dict(load.counts))
    assert set(load.counts) <= {200, 500, 503, LOST}
    assert_right(load, model)
