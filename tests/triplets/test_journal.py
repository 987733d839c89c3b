"""No reply is lost once it is on disk, whatever is cut or killed; and none is asked for twice."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ip2p_ray.errors import ConfigError, DatasetError, ReplyError, StageError
from ip2p_ray.schema import reply_key
from ip2p_ray.triplets.journal import Journal, JournalledWriter
from ip2p_ray.triplets.limits import Usage
from ip2p_ray.triplets.reply import Reply


def key(name):
    return reply_key(str(name), "model", "recipe")


def reply(text="text", **fields):
    tokens = {"prompt_tokens": 10, "completion_tokens": 3}
    return Reply(**{"text": text, "finish_reason": "stop", "model": "m", **tokens, **fields})


def written(folder, replies):
    """The one file of a journal that these replies were put into."""
    with Journal(folder) as journal:
        for name, text in replies:
            journal.put(key(name), reply(text))
    (file,) = Path(folder).iterdir()
    return file


@given(st.lists(st.tuples(st.integers(0, 3), st.text()), max_size=6))
def test_what_was_put_is_got_here_and_in_the_next_process(tmp_path_factory, entries):
    folder = tmp_path_factory.mktemp("journal")
    with Journal(folder) as journal:
        for name, text in entries:
            journal.put(key(name), reply(text))
            assert journal.get(key(name)) == reply(text)
        assert len(journal) == len(dict(entries))
    again = Journal(folder)
    for name, text in dict(entries).items():
        assert again.get(key(name)) == reply(text)
    assert again.get(key("other")) is None
    assert again.corrupt == 0


def test_reading_alone_leaves_no_file(tmp_path):
    with Journal(tmp_path / "new" / "folder") as journal:
        assert journal.get(key("a")) is None
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_lines_are_json_that_other_tools_read(tmp_path):
    file = written(tmp_path, [("a", "line\nbreak \ud800 \u00e9")])
    (line,) = file.read_text("ascii").splitlines()
    assert json.loads(line)["text"] == "line\nbreak \ud800 \u00e9"
    assert json.loads(line)["key"] == key("a")


def test_a_file_cut_at_any_byte_keeps_every_whole_record(tmp_path):
    whole = written(tmp_path / "whole", [(n, f"text {n}") for n in range(3)]).read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 3
    (tmp_path / "cut").mkdir()
    file = tmp_path / "cut" / "1.jsonl"
    for length in range(len(whole) + 1):
        file.write_bytes(whole[:length])
        journal = Journal(tmp_path / "cut")
        kept = sum(end <= length for end in ends)
        assert len(journal) == kept
        assert [journal.get(key(n)) for n in range(3)] == [
            reply(f"text {n}") if n < kept else None for n in range(3)
        ]
        assert journal.corrupt == 0
        assert journal.usage() == Usage(10 * kept, 3 * kept)


@given(st.data())
def test_mangled_bytes_lose_the_lines_they_hit_and_no_other(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("mangled")
    file = written(folder, [(n, f"text {n}") for n in range(4)])
    content = bytearray(file.read_bytes())
    starts = [0, *(n + 1 for n, byte in enumerate(content[:-1]) if byte == ord("\n"))]
    place = data.draw(st.integers(0, len(content) - 2))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[place]))
    struck = {max(n for n, start in enumerate(starts) if start <= place)}
    if content[place] == ord("\n"):
        struck |= {max(struck) + 1}  # two lines become one
    content[place] = byte
    file.write_bytes(content)
    journal = Journal(folder)
    for n in range(4):
        assert journal.get(key(n)) == (None if n in struck else reply(f"text {n}"))
    assert journal.corrupt in (1, 2)  # two if one line became two


def test_a_record_that_changes_after_it_was_read_is_noticed(tmp_path):
    file = written(tmp_path, [("a", "text")])
    journal = Journal(tmp_path)
    assert len(journal) == 1
    file.write_bytes(file.read_bytes().replace(b"text", b"tixt", 1))
    with pytest.raises(DatasetError, match="was changed: no record at byte 0"):
        journal.get(key("a"))


def test_two_journals_of_one_folder_see_each_other_at_once(tmp_path):
    with Journal(tmp_path) as one, Journal(tmp_path) as two:
        assert two.get(key("a")) is None
        one.put(key("a"), reply("of one"))
        assert two.get(key("a")) == reply("of one")
        two.put(key("b"), reply("of two"))
        one.put(key("c"), reply("of one again"))
        assert [one.get(key(name)).text for name in "abc"] == ["of one", "of two", "of one again"]
        assert two.get(key("c")).text == "of one again"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_line_in_the_making_is_read_when_it_is_whole(tmp_path):
    whole = written(tmp_path / "whole", [("a", "text")]).read_bytes()
    journal = Journal(tmp_path / "new")
    file = tmp_path / "new" / "1.jsonl"
    file.write_bytes(whole[:50])
    assert journal.get(key("a")) is None
    file.write_bytes(whole)
    assert journal.get(key("a")) == reply("text")
    assert journal.corrupt == 0


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_of_two_replies_the_one_of_the_later_process_holds_for_every_reader(tmp_path, order):
    texts = {1: "earlier", 2: "later"}
    journal = Journal(tmp_path / "all")
    for number in order:
        made = written(tmp_path / str(number), [("a", texts[number])])
        (tmp_path / "all" / f"{number}.jsonl").write_bytes(made.read_bytes())
        assert len(journal) == 1
    assert journal.get(key("a")).text == "later"
    assert journal.usage() == Usage(20, 6)  # both were paid for


def test_what_moderation_said_is_added_and_costs_nothing(tmp_path):
    with Journal(tmp_path) as journal:
        journal.put(key("a"), reply("text"))
        journal.put(key("a"), reply("text", flagged=True))
        assert journal.get(key("a")).flagged is True
        assert journal.usage() == Usage(10, 3)
    assert Journal(tmp_path).get(key("a")).flagged is True


def test_many_threads_put_at_once_and_all_of_it_is_there(tmp_path):
    with Journal(tmp_path) as journal:

        def put(thread):
            for n in range(25):
                journal.put(key((thread, n)), reply(f"{thread} {n}"))
                assert journal.get(key((thread, n))) is not None

        threads = [threading.Thread(target=put, args=(thread,)) for thread in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(journal) == 200
    assert len(Journal(tmp_path)) == 200


def test_closing_waits_for_what_was_submitted_and_ends_it(tmp_path):
    journal = Journal(tmp_path)
    submitted = [journal.submit(key(n), reply()) for n in range(50)]
    journal.close()
    assert all(future.done() and future.exception() is None for future in submitted)
    with pytest.raises(ConfigError, match="is closed"):
        journal.put(key("a"), reply())
    journal.close()
    assert len(journal) == 50


IMPORTS = """
import sys
from ip2p_ray.schema import reply_key
from ip2p_ray.triplets.journal import Journal
from ip2p_ray.triplets.reply import Reply
journal = Journal(sys.argv[1])
def put(n, text):
    tokens = {"prompt_tokens": 10, "completion_tokens": 3}
    reply = Reply(text=text, finish_reason="stop", model="m", **tokens)
    journal.put(reply_key(str(n), "model", "recipe"), reply)
"""

FILLS_THE_DISK = f"""
{IMPORTS}
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for n in range(20):
    try:
        put(n, "x" * 100)
        print("kept", n)
    except OSError as error:
        print("failed", n)
"""

WRITES_ON_AND_ON = f"""
{IMPORTS}
for n in range(int(sys.argv[2]), 100000):
    put(n, "x" * (n % 977))
    print(n, flush=True)
"""


def test_a_full_disk_fails_every_reply_from_then_on(tmp_path):
    """After a failed write nobody knows what stands in the file, so nothing may follow it."""
    done = subprocess.run(
        [sys.executable, "-c", FILLS_THE_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    kept = sum(line.startswith("kept") for line in lines)
    assert 0 < kept < 20
    assert lines == [f"{'kept' if n < kept else 'failed'} {n}" for n in range(20)]
    assert len(Journal(tmp_path)) == kept


def test_a_process_that_is_killed_while_it_writes_loses_nothing_it_was_told_is_kept(tmp_path):
    start = 0
    for lines in (40, 57):
        command = [sys.executable, "-c", WRITES_ON_AND_ON, str(tmp_path), str(start)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            told = [process.stdout.readline() for _ in range(lines)]
            os.kill(process.pid, signal.SIGKILL)
            told += process.stdout.readlines()
        after = start + len([line for line in told if line.endswith("\n")])
        journal = Journal(tmp_path)
        for n in range(after):
            assert journal.get(key(n)) == reply("x" * (n % 977))
        assert len(journal) in (after, after + 1)  # one that nobody was told of
        assert journal.corrupt == 0
        start = after


def test_keys_are_small_in_memory(tmp_path):
    line = written(tmp_path / "one", [(0, "x" * 300)]).read_bytes()
    (tmp_path / "many").mkdir()
    with (tmp_path / "many" / "1.jsonl").open("wb") as stream:
        for n in range(5000):
            body = line.replace(key(0).encode(), key(n).encode())
            stream.write(_signed(body))
    tracemalloc.start()
    journal = Journal(tmp_path / "many")
    assert len(journal) == 5000
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used / 5000 < 250
    assert journal.get(key(4999)).text == "x" * 300


def _signed(line):
    from ip2p_ray.triplets import journal

    body = line[: -journal._TAIL - 1]
    return body + journal._CHECKSUM_START + journal._checksum(body) + b'"}\n'


def test_a_key_is_what_schema_makes(tmp_path):
    with Journal(tmp_path) as journal, pytest.raises(ConfigError, match="32 hex digits, got 'a'"):
        journal.put("a", reply())


class Fake:
    """A writer that counts, and answers when it is let."""

    model, recipe = "model", "recipe"

    def __init__(self, flags=None):
        self.asked = []
        self.moderated = []
        self.flags = flags
        self.gate = asyncio.Event()
        self.gate.set()

    async def write(self, caption):
        self.asked.append(caption)
        await self.gate.wait()
        if caption == "bad":
            raise ReplyError("no reply")
        return reply(f"edit of {caption}")

    async def moderate(self, caption, reply):
        if self.flags is None or reply.flagged is not None:
            return reply
        self.moderated.append(caption)
        return replace(reply, flagged=caption in self.flags)


def test_what_was_answered_is_not_asked_again(tmp_path):
    async def main(fake):
        with Journal(tmp_path) as journal:
            writer = JournalledWriter(fake, journal)
            replies = [await writer.write(caption) for caption in ("a", "b", "a")]
            assert [reply.text for reply in replies] == ["edit of a", "edit of b", "edit of a"]
            return writer.asked, writer.found, fake.asked

    assert asyncio.run(main(Fake())) == (2, 1, ["a", "b"])
    assert asyncio.run(main(Fake())) == (0, 3, [])


def test_another_model_or_recipe_is_another_question(tmp_path):
    async def main():
        with Journal(tmp_path) as journal:
            for field in ("", "model", "recipe"):
                fake = Fake()
                if field:
                    setattr(fake, field, "other")
                await JournalledWriter(fake, journal).write("a")
                assert fake.asked == ["a"]

    asyncio.run(main())


def test_callers_at_the_same_time_share_a_request(tmp_path):
    async def main():
        fake = Fake()
        fake.gate.clear()
        with Journal(tmp_path) as journal:
            writer = JournalledWriter(fake, journal)
            calls = [asyncio.create_task(writer.write("a")) for _ in range(5)]
            while not fake.asked:
                await asyncio.sleep(0.001)
            fake.gate.set()
            assert {reply.text for reply in await asyncio.gather(*calls)} == {"edit of a"}
            assert fake.asked == ["a"]

    asyncio.run(main())


def test_a_reply_is_on_disk_before_anyone_sees_it(tmp_path):
    async def main():
        with Journal(tmp_path) as journal:
            await JournalledWriter(Fake(), journal).write("a")
            assert Journal(tmp_path).get(key("a")).text == "edit of a"

    asyncio.run(main())


def test_a_caller_that_is_cancelled_does_not_lose_the_reply(tmp_path):
    async def main():
        fake = Fake()
        fake.gate.clear()
        with Journal(tmp_path) as journal:
            writer = JournalledWriter(fake, journal)
            call, other = (asyncio.create_task(writer.write("a")) for _ in range(2))
            while not fake.asked:
                await asyncio.sleep(0.001)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            fake.gate.set()
            await writer.finish()
            assert (await other).text == "edit of a"
            assert journal.get(key("a")).text == "edit of a"

    asyncio.run(main())


def test_a_failure_is_raised_to_all_and_not_remembered(tmp_path):
    async def main():
        fake = Fake()
        with Journal(tmp_path) as journal:
            writer = JournalledWriter(fake, journal)
            results = await asyncio.gather(
                writer.write("bad"), writer.write("bad"), return_exceptions=True
            )
            assert [type(result) for result in results] == [ReplyError, ReplyError]
            with pytest.raises(ReplyError):
                await writer.write("bad")
            assert fake.asked == ["bad", "bad"]
            assert len(journal) == 0

    asyncio.run(main())


def test_moderation_comes_after_the_reply_is_safe_and_once(tmp_path):
    async def main(fake):
        with Journal(tmp_path) as journal:
            writer = JournalledWriter(fake, journal)
            replies = [await writer.write(caption) for caption in ("a", "b", "a")]
            return [reply.flagged for reply in replies], fake.asked, fake.moderated

    assert asyncio.run(main(Fake())) == ([None] * 3, ["a", "b"], [])
    assert asyncio.run(main(Fake({"b"}))) == ([False, True, False], [], ["a", "b"])
    assert asyncio.run(main(Fake({"b"}))) == ([False, True, False], [], [])


class Expired:
    """A store that raises what no store should."""

    def __str__(self):
        return "expired"

    def list(self):
        return iter(())

    def read(self, name, start):
        return b""

    def put(self, name, data):
        raise RuntimeError("Credentials were refreshed, but are still expired.")


def test_nobody_waits_for_ever_for_a_store_that_raises_anything():
    journal = Journal(Expired())
    for name in "ab":
        with pytest.raises(StageError, match="journal: RuntimeError: Credentials were refreshed"):
            journal.submit(key(name), reply()).result(timeout=60)
