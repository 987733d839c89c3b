"""A journal in a store of objects keeps what it said it kept, as one on disk does."""

import asyncio
import random
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from ip2p_ray import object_files, objects
from ip2p_ray.errors import DatasetError, StorageError
from ip2p_ray.schema import reply_key
from ip2p_ray.testing import FaultyWay, WayFaults
from ip2p_ray.triplets import shelf
from ip2p_ray.triplets.journal import Journal, JournalledWriter
from ip2p_ray.triplets.limits import Usage
from ip2p_ray.triplets.reply import Reply
from ip2p_ray.triplets.shelf import StoreShelf


def key(name):
    return reply_key(str(name), "model", "recipe")


def reply(text="text", **fields):
    tokens = {"prompt_tokens": 10, "completion_tokens": 3}
    return Reply(**{"text": text, "finish_reason": "stop", "model": "m", **tokens, **fields})


class Fake:
    """A writer that answers at once."""

    model, recipe = "model", "recipe"

    def __init__(self):
        self.asked = []

    async def write(self, caption):
        self.asked.append(caption)
        return reply(f"edit of {caption}")

    async def moderate(self, caption, reply):
        return replace(reply, flagged=False)


class MemoryStore:
    """Objects in this process."""

    def __init__(self):
        self.objects = {}
        self.puts = []
        self.reads = []
        self.open = threading.Event()
        self.open.set()

    def list(self):
        return [(name, len(data)) for name, data in self.objects.items()]

    def read(self, name, start):
        self.reads.append((name, start))
        return self.objects[name][start:]

    def put(self, name, data):
        self.open.wait()
        self.puts.append(name)
        self.objects[name] = data


def told(journal, entries):
    """Submits them all, and returns once all are kept."""
    for future in [journal.submit(key(name), reply(text)) for name, text in entries]:
        future.result()


def test_what_was_put_is_got_here_and_in_another_process():
    store = MemoryStore()
    with Journal(store) as journal, Journal(store) as other:
        told(journal, [(n, f"text {n}") for n in range(20)])
        told(other, [("a", "of the other")])
        for reader in (journal, Journal(store)):
            assert [reader.get(key(n)).text for n in range(20)] == [f"text {n}" for n in range(20)]
        assert Journal(store).get(key("a")).text == "of the other"
        assert Journal(store).get(key("b")) is None
        assert Journal(store).usage() == Usage(210, 63)
        assert len(Journal(store)) == 21
        assert len(store.objects) == 2


def test_its_own_are_there_at_once_and_are_never_fetched():
    store = MemoryStore()
    with Journal(store) as journal:
        for text in ("first", "second"):
            told(journal, [("a", text)])
            assert journal.get(key("a")).text == text
        assert (len(journal), journal.corrupt) == (1, 0)
        assert journal.usage() == Usage(20, 6)
    assert store.reads == []


def test_what_others_put_is_seen_and_only_what_is_new_is_fetched():
    store = MemoryStore()
    one, two = StoreShelf(store, every_s=0.0), StoreShelf(store, every_s=0.0)
    one.append(b"a\n")
    (name,) = two.grown({})
    assert list(two.lines(name, 0)) == [(0, b"a")]
    one.append(b"bb\nccc\n")
    assert list(two.grown({name: 2})) == [name]
    assert list(two.lines(name, 2)) == [(2, b"bb"), (5, b"ccc")]
    assert list(two.lines(name, 5)) == [(5, b"ccc")]
    assert [line for _, line in two.lines(name, 0)] == [b"a", b"bb", b"ccc"]
    assert (two.line(name, 2), two.line(name, 5)) == (b"bb", b"ccc")
    assert list(two.grown({name: 9})) == []
    assert store.reads == [(name, 0), (name, 2)]


def test_an_object_that_is_large_is_followed_by_another():
    store = MemoryStore()
    kept = StoreShelf(store, every_s=0.0)
    line = b"x" * (shelf.OBJECT_BYTES // 3) + b"\n"
    for _ in range(5):
        kept.append(line)
    assert [len(data) for data in store.objects.values()] == [2 * len(line)] * 2 + [len(line)]
    assert list(store.objects) == sorted(store.objects)
    reader = StoreShelf(store)
    names = list(reader.grown({}))
    assert [found for name in names for found in reader.lines(name, 0)] == [
        *2 * [(0, line[:-1]), (len(line), line[:-1])],
        (0, line[:-1]),
    ]


def test_replies_that_arrive_while_others_are_put_go_together():
    store = MemoryStore()
    store.open.clear()
    with Journal(store) as journal:
        futures = [journal.submit(key(n), reply()) for n in range(50)]
        assert not any(future.done() for future in futures)
        store.open.set()
        for future in futures:
            future.result()
    assert len(store.puts) <= 2
    assert len(store.objects) == 1


def test_a_reply_that_waits_for_its_flush_leaves_its_turn_to_others():
    async def main():
        store, fake = MemoryStore(), Fake()
        store.open.clear()
        with Journal(store) as journal:
            writer = JournalledWriter(fake, journal, asyncio.Semaphore(1))
            calls = [asyncio.create_task(writer.write(caption)) for caption in "abc"]
            while len(fake.asked) < 3:
                await asyncio.sleep(0.001)
            assert not any(call.done() for call in calls)
            store.open.set()
            replies = await asyncio.gather(*calls)
            assert [reply.text for reply in replies] == [f"edit of {name}" for name in "abc"]
            again = [Journal(store).get(key(name)) for name in "abc"]
            assert again == replies
            assert {reply.flagged for reply in again} == {False}

    asyncio.run(main())


def test_a_put_that_fails_fails_every_reply_from_then_on():
    class Broken(MemoryStore):
        def put(self, name, data):
            if self.puts:
                raise StorageError("s3://bucket: refused")
            super().put(name, data)

    store = Broken()
    with Journal(store) as journal:
        told(journal, [("a", "kept")])
        for name in "bc":
            with pytest.raises(StorageError, match="refused"):
                journal.put(key(name), reply())
    assert len(Journal(store)) == 1


def test_a_mangled_object_loses_the_lines_that_were_hit():
    store = MemoryStore()
    with Journal(store) as journal:
        told(journal, [(n, f"text {n}") for n in range(3)])
    ((name, data),) = store.objects.items()
    store.objects[name] = data.replace(b"text 1", b"tixt 1")
    journal = Journal(store)
    assert [journal.get(key(n)) is None for n in range(3)] == [False, True, False]
    assert journal.corrupt == 1


def test_an_object_that_is_taken_away_is_told(bucket):
    folder = object_files.ObjectFolder(f"{bucket}/journal")
    with pytest.raises(DatasetError, match=f"{bucket}/journal/a cannot be read"):
        folder.read("a", 0)


JOURNALS = """
import sys, time
from ip2p_ray.object_files import ObjectFolder
from ip2p_ray.schema import reply_key
from ip2p_ray.triplets.journal import Journal, JournalledWriter
from ip2p_ray.triplets.reply import Reply

journal = Journal(ObjectFolder(sys.argv[1]))

def say(number):
    def said(future):
        future.result()
        print(number, flush=True)
    return said

for number in range(int(sys.argv[2]), 10**6):
    reply = Reply(text="x" * (number % 977), finish_reason="stop", model="m",
                  prompt_tokens=10, completion_tokens=3)
    submitted = journal.submit(reply_key(str(number), "model", "recipe"), reply)
    submitted.add_done_callback(say(number))
    time.sleep(0.003)
"""


@pytest.mark.parametrize("faulty", [False, True])
def test_a_process_that_is_killed_loses_nothing_it_was_told_is_kept(
    bucket, bucket_endpoint, faulty, monkeypatch
):
    uri = f"{bucket}/run/journal"
    faults = WayFaults(slow_down=0.1, hang_up=0.05, lost=0.1, cut=0.05, methods=("GET", "PUT"))
    draws = random.Random(int(faulty))
    with FaultyWay(bucket_endpoint, faults if faulty else WayFaults(), seed=2) as way:
        monkeypatch.setenv("AWS_ENDPOINT_URL", way.url)
        start = 0
        for _ in range(3):
            command = [sys.executable, "-c", JOURNALS, uri, str(start)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                kept = [process.stdout.readline()]
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(draws.uniform(0.0, 2.5))
                process.kill()
                kept += process.stdout.readlines()
            numbers = {int(line) for line in kept if line.endswith("\n")}
            journal = Journal(object_files.ObjectFolder(uri))
            for number in numbers:
                assert journal.get(key(number)) == reply("x" * (number % 977))
            assert journal.corrupt == 0
            start = max(numbers) + 10_000
        for found in objects.listing(uri):
            assert objects.read(f"{uri}/{found.name}").endswith(b'"}\n')
        if faulty:
            assert sum(way.counts[kind] for kind in ("slow_down", "hang_up", "lost", "cut")) > 0


def test_the_copy_of_a_journal_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept = StoreShelf(MemoryStore())
    kept.append(b"a\n")
    assert list(tmp_path.iterdir()) == []
