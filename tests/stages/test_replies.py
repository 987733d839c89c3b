"""The stage against the faulty server: what comes out, what it costs, what stops it."""

import asyncio
import json
import time

import pyarrow as pa
import pytest
import ray

from ip2p_ray import storage
from ip2p_ray.errors import BudgetError, ConfigError, DatasetError, StageError
from ip2p_ray.schema import CAPTIONS, REJECTS, TRIPLETS, reply_key, triplet_key
from ip2p_ray.stages import plan, replies, run
from ip2p_ray.stages.captions import collect_captions
from ip2p_ray.stages.progress import Progress
from ip2p_ray.stages.replies import Asking, AskReplies, Count
from ip2p_ray.stages.reply_rows import REPLIES, drop_unanswered
from ip2p_ray.stages.triplets import _made, ask_triplets
from ip2p_ray.testing import Behaviour, Faults, FaultyServer, edit
from ip2p_ray.triplets.endpoint import Endpoint
from ip2p_ray.triplets.journal import Journal
from ip2p_ray.triplets.limits import LimitsConfig
from ip2p_ray.triplets.reply import Reply
from ip2p_ray.triplets.writer import WriterConfig, writer_recipe

CONFIG = WriterConfig(model="fake", shots=0)


class Stage:
    """The stage in a folder of its own, as often as one likes."""

    def __init__(self, folder, server, captions):
        self.folder, self.server = folder, server
        self.captions = [f"a red boat {number} at sea" for number in range(captions)]
        collect_captions(self.captions, self.uri("captions"), config={})

    def uri(self, name):
        return str(self.folder / name)

    def endpoint(self, **changes):
        usual = {"api_key_env": None, "backoff_s": 0.01, "attempts": 20}
        return Endpoint(base_url=self.server.url, **{**usual, **changes})

    def ask(self, *, limits=None, endpoint=None, config=CONFIG, **asking):
        told = Asking(
            journal=self.uri("journal"),
            endpoint=endpoint or self.endpoint(),
            limits=limits or LimitsConfig(),
            **{"actors": 2, "concurrency": 8, "wait_s": 600.0, **asking},
        )
        return ask_triplets(
            self.uri("captions"), str(self.folder), config, examples=[], asking=told
        )

    def check(self, config=CONFIG, endpoint=None, captions=None):
        replies.check(
            captions or self.uri("captions"),
            str(self.folder),
            config,
            examples=[],
            endpoint=endpoint or self.endpoint(),
        )

    def rows(self, name, schema):
        return storage.read_dataset(self.uri(name), schema).to_pylist()


@pytest.mark.ray
def test_every_caption_is_a_triplet_or_a_reject_with_its_reason(local_ray, tmp_path):
    behaviour = Behaviour(seed=1, faults=Faults.evenly(0.2), slow_s=0.05, retry_after_s=0.01)
    with FaultyServer(behaviour) as server:
        stage = Stage(tmp_path, server, 300)
        manifest = stage.ask()
        paid = server.counts.paid.copy()
    triplets, rejects = stage.rows("triplets", TRIPLETS), stage.rows("rejects/triplets", REJECTS)
    assert sum(server.counts.faults.values()) > 30
    assert len(triplets) == manifest.rows > 250
    for row in triplets:
        texts = (row["caption"], *edit(row["caption"]))
        assert row["triplet_key"] == triplet_key(*texts)
        assert row["writer"].startswith("fake ")
    found = {row["caption_key"] for row in triplets} | {row["key"] for row in rejects}
    assert found == {row["caption_key"] for row in stage.rows("captions", CAPTIONS)}
    assert len(triplets) + len(rejects) == 300
    assert {row["reason"] for row in rejects} == {"empty_reply", "refused", "unparseable"}
    assert manifest.reports[0]["rejected"].keys() == {row["reason"] for row in rejects}
    assert set(paid.values()) == {1}
    page = (tmp_path / "triplets.html").read_text()
    assert f"{manifest.rows} of 300 replies are triplets" in page


@pytest.mark.ray
def test_a_budget_stops_the_stage_and_more_of_it_goes_on(local_ray, tmp_path):
    with FaultyServer(Behaviour(delay_s=0.01)) as server:
        stage = Stage(tmp_path, server, 200)
        with pytest.raises(BudgetError, match=r"max_tokens 60,000.*same command goes on"):
            stage.ask(limits=LimitsConfig(max_tokens=60_000))
        first = server.counts.paid.copy()
        assert 0 < first.total() < 200
        assert not (tmp_path / "triplets").exists()
        # nothing was in flight when the actors ended: every reply that was paid for is kept
        with pytest.raises(BudgetError):
            stage.ask(limits=LimitsConfig(max_tokens=60_000))
        assert server.counts.paid == first
        manifest = stage.ask(limits=LimitsConfig(max_tokens=10**9, requests_per_minute=1e5))
        assert manifest.rows == 200
        assert set(server.counts.paid.values()) == {1}


@pytest.mark.ray
def test_captions_without_a_reply_are_told_and_asked_again(local_ray, tmp_path):
    with FaultyServer(Behaviour(refused=("boat 3 ", "boat 4 "))) as server:
        stage = Stage(tmp_path, server, 40)
        with pytest.raises(StageError, match=r"2 of 40 captions got none.*Invalid prompt"):
            stage.ask(max_no_reply=0.01)
        manifest = stage.ask(max_no_reply=0.1)
        assert manifest.rows == 38
        assert manifest.reports[0]["rejected"] == {"no_reply": 2}
        server.behaviour = Behaviour()
        assert stage.ask().recipe == manifest.recipe
        (tmp_path / "candidates").mkdir()
        with pytest.raises(StageError, match=r"2 captions .*triplets that candidates in .*delete"):
            drop_unanswered(str(tmp_path))
        assert stage.ask().rows == 38
        (tmp_path / "candidates").rmdir()
        assert drop_unanswered(str(tmp_path)) == 2
        again = stage.ask()
        assert again.rows == 40
        assert again.recipe != manifest.recipe  # what was made of the old ones elsewhere is told so
        assert drop_unanswered(str(tmp_path)) == 0
        assert set(server.counts.paid.values()) <= {1, 2}  # 2: the server is asked for any other


@pytest.mark.ray
def test_a_key_that_is_refused_on_the_way_stops_the_stage(local_ray, tmp_path):
    with FaultyServer(Behaviour(api_key="right")) as server:
        stage = Stage(tmp_path, server, 40)
        with pytest.raises(ConfigError, match="refuses requests without a key"):
            stage.ask()
        assert server.counts.requests["/v1/chat/completions"] <= 2 * 8
        server.behaviour = Behaviour()
        assert stage.ask().rows == 40


def test_what_is_wrong_is_told_before_anything_is_spent(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with FaultyServer() as server:
        stage = Stage(tmp_path, server, 3)
        stage.check()
        with pytest.raises(ConfigError, match="NO_SUCH_KEY holds no key"):
            stage.check(endpoint=stage.endpoint(api_key_env="NO_SUCH_KEY"))
        with pytest.raises(ConfigError, match="has no model 'other'"):
            stage.check(WriterConfig(model="other", shots=0))
        away = Endpoint(base_url="http://127.0.0.1:9/v1", api_key_env=None, backoff_s=0.01)
        with pytest.raises(ConfigError, match="cannot be reached"):
            stage.check(endpoint=away)
        manifest = tmp_path / "captions" / storage.MANIFEST
        told = json.loads(manifest.read_text())
        shard = storage.list_shards(stage.uri("captions"))[0]
        table = storage.read_dataset(stage.uri("captions"), CAPTIONS).rename_columns(
            ["caption_key", "alt", "url"]
        )
        storage.write_shard(stage.uri("captions"), "captions-00000", table)
        told["shards"][0]["bytes"] = storage.local_path(shard).stat().st_size
        manifest.write_text(json.dumps(told))
        with pytest.raises(DatasetError, match=r"lacks caption and has caption_key, alt, url"):
            stage.check()
        with pytest.raises(DatasetError, match="does not exist"):
            stage.check(captions=stage.uri("nothing"))
        assert not server.counts.paid


def test_a_journal_with_half_a_character_is_read(tmp_path):
    text = "make it \ud83d"
    with Journal(tmp_path) as journal:
        key = reply_key("a cat", "fake", writer_recipe(CONFIG, []))
        tokens = {"prompt_tokens": 1, "completion_tokens": 1}
        journal.put(key, Reply(text=text, finish_reason="stop", model="fake", **tokens))
    told = Asking(
        journal=str(tmp_path),
        endpoint=Endpoint(base_url="http://127.0.0.1:9/v1", api_key_env=None),
        limits=LimitsConfig(),
    )
    captions = pa.table({"caption_key": ["a"], "caption": ["a cat"], "url": [None]})
    asking = AskReplies(CONFIG, [], told)
    (row,) = asyncio.run(asking(captions.cast(CAPTIONS))).to_pylist()
    asking._sign.close()
    assert (row["reply"], row["status"]) == ("make it ?", "unparseable")


class Told:
    """Looks like the handle of an actor."""

    def __init__(self):
        self.counts = []
        self.add = self
        self.remote = self.counts.append


def test_replies_are_counted_as_they_arrive_but_not_told_one_by_one():
    told = Told()
    count = Count(told, every_s=3600.0)
    for _ in range(500):
        count.add()
    assert told.counts == []
    count.tell()
    count.tell()
    assert told.counts == [500]
    at_once = Count(told, every_s=0.0)
    at_once.add()
    assert told.counts == [500, 1]
    Count(None).tell()


@pytest.mark.ray
def test_the_stage_tells_of_each_reply_once(local_ray, tmp_path):
    """One block, so that the count rises before a block is done, or not at all."""
    progress = Progress("replies", total=30, unit="captions")
    with FaultyServer(Behaviour(refused=("boat 3 ",))) as server:
        stage = Stage(tmp_path, server, 30)
        told = Asking(
            journal=stage.uri("journal"), endpoint=stage.endpoint(), limits=LimitsConfig()
        )
        with plan.counted(progress) as tally:
            asking = ray.remote(AskReplies).remote(CONFIG, [], told, None, tally)
            captions = storage.read_dataset(stage.uri("captions"), CAPTIONS)
            rows = ray.get(asking.__call__.remote(captions)).to_pylist()
            assert len(rows) == 30
            deadline = time.monotonic() + 60  # what two processes tell may come in any order
            while ray.get(tally.known.remote()).total < 30:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert ray.get(tally.known.remote()).total == 30
            ray.kill(asking)


def test_asking_says_what_is_wrong_with_it():
    for wrong in ({"actors": 0}, {"concurrency": 0}, {"max_no_reply": 1.5}):
        with pytest.raises(ConfigError):
            Asking(journal="j", endpoint=Endpoint(), limits=LimitsConfig(), **wrong)


def test_a_page_that_is_gone_is_written_again(tmp_path):
    asked = run.Origin(dataset="replies", config={}, models={"writer": "fake 0"})
    rows = [
        {
            "caption_key": f"{number:032x}",
            "caption": f"a red boat {number}",
            "url": None,
            "reply": "r",
            "status": "ok" if number else "refused",
            "instruction": "make it blue",
            "edited_caption": f"a blue boat {number}",
        }
        for number in range(5)
    ]
    uri = str(tmp_path / "replies")
    storage.write_shard(uri, "a", pa.Table.from_pylist(rows, schema=REPLIES))
    storage.write_manifest(uri, storage.Manifest(dataset="replies"))
    page = tmp_path / "triplets.html"
    made = []
    for _ in range(2):
        assert _made(str(tmp_path), asked, {}, 0.05, 1.0).rows == 4
        made.append(page.read_text())
        page.unlink()
    assert made[0] == made[1]
    assert "4 of 5 replies are triplets" in made[0]
