"""kill -9 at any moment, then the same command: what is asked again, and what comes out.

A reply that has left the server and is not yet on disk when the process dies cannot be known
afterwards: it is asked for again. Those are counted here, kill by kill: they are never more than
the requests in flight, and no other reply is paid for twice.
"""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from ip2p_ray.schema import reply_key
from ip2p_ray.testing import Behaviour, Faults, FaultyServer
from ip2p_ray.triplets.endpoint import Endpoint
from ip2p_ray.triplets.journal import Journal
from ip2p_ray.triplets.writer import OpenAIWriter, WriterConfig

IN_FLIGHT = 16

COMMAND = """
import asyncio, json, sys
from ip2p_ray.errors import ReplyError
from ip2p_ray.triplets.endpoint import Endpoint
from ip2p_ray.triplets.journal import Journal, JournalledWriter
from ip2p_ray.triplets.reply import NO_REPLY, Triplet, read_reply
from ip2p_ray.triplets.writer import OpenAIWriter, WriterConfig

url, folder, captions, in_flight = sys.argv[1:]

async def main():
    endpoint = Endpoint(base_url=url, api_key_env=None, backoff_s=0.01)
    turn = asyncio.Semaphore(int(in_flight))
    with Journal(folder) as journal:
        async with OpenAIWriter(WriterConfig(model="fake"), endpoint) as writer:
            journalled = JournalledWriter(writer, journal)

            async def one(caption):
                async with turn:
                    try:
                        found = read_reply(caption, await journalled.write(caption))
                    except ReplyError:
                        found = NO_REPLY
                    return found.key if isinstance(found, Triplet) else found

            found = await asyncio.gather(*(one(caption) for caption in json.loads(captions)))
    print(json.dumps(found))

asyncio.run(main())
"""


class Runs:
    """The same command on the same journal, as often as one likes."""

    def __init__(self, server, folder, captions):
        self.server = server
        self.folder = folder
        self.captions = captions
        arguments = [server.url, str(folder), json.dumps(captions), str(IN_FLIGHT)]
        self._command = [sys.executable, "-c", COMMAND, *arguments]

    def to_the_end(self):
        """The key of the triplet, or the reason, of each caption."""
        done = subprocess.run(self._command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    def killed(self, after, pause):
        """Captions whose reply left the server in this run, which is killed `pause` seconds after
        it was paid for `after` replies in all."""
        before = self.server.counts.paid.copy()
        with subprocess.Popen(self._command, stdout=subprocess.DEVNULL) as process:
            while self.server.counts.paid.total() < after:
                assert process.poll() is None
                time.sleep(0.001)
            time.sleep(pause)
            os.kill(process.pid, signal.SIGKILL)
        while self.server.counts.in_flight:
            time.sleep(0.001)
        return self.server.counts.paid - before

    def kept(self):
        """Captions whose reply is on disk."""
        writer = OpenAIWriter(
            WriterConfig(model="fake"), Endpoint(base_url=self.server.url, api_key_env=None)
        )
        journal = Journal(self.folder)
        keys = {caption: reply_key(caption, "fake", writer.recipe) for caption in self.captions}
        return {caption for caption, key in keys.items() if journal.get(key) is not None}


@pytest.mark.parametrize(
    ("captions", "kills"), [(150, 2), pytest.param(1000, 20, marks=pytest.mark.slow)]
)
@pytest.mark.timeout(1800)
def test_kills_change_nothing_and_no_kept_reply_is_paid_for_again(tmp_path, captions, kills):
    texts = [f"a red boat {n}" for n in range(captions)]
    behaviour = Behaviour(
        seed=3, faults=Faults.evenly(0.2), delay_s=0.02, slow_s=0.02, retry_after_s=0.01
    )
    with FaultyServer(behaviour) as server:
        undisturbed = Runs(server, tmp_path / "undisturbed", texts).to_the_end()
        assert server.counts.paid == Counter(texts)

    draws = random.Random(kills)
    with FaultyServer(behaviour) as server:
        runs = Runs(server, tmp_path / "killed", texts)
        lost = Counter()
        for _ in range(kills):
            after = server.counts.paid.total() + draws.randint(1, captions // (kills + 1))
            sent = runs.killed(after, draws.uniform(0.0, 0.03))
            assert max(sent.values()) == 1
            unknown = set(sent) - runs.kept()
            assert len(unknown) <= IN_FLIGHT
            lost.update(unknown)
        assert runs.to_the_end() == undisturbed
        assert server.counts.paid == Counter(texts) + lost
        assert runs.kept() == set(texts)

        asked = server.counts.requests.copy()
        assert runs.to_the_end() == undisturbed
        assert server.counts.requests == asked
    logging.getLogger(__name__).info(
        "%d kills, %d captions: %d replies were asked for again", kills, captions, lost.total()
    )
