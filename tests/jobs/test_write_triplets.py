"""The job as people run it: its flags, its sentences, and kill -9 at any moment."""

import contextlib
import json
import logging
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import ray

from ip2p_ray import storage
from ip2p_ray.miniature.scores import random_captions
from ip2p_ray.miniature.weights import WEIGHTS
from ip2p_ray.object_files import ObjectFolder
from ip2p_ray.s3 import is_object
from ip2p_ray.schema import REJECTS, TRIPLETS, caption_key, reply_key, triplet_key
from ip2p_ray.stages.captions import collect_captions
from ip2p_ray.testing import Behaviour, Faults, FaultyServer, edit
from ip2p_ray.triplets.journal import Journal
from ip2p_ray.triplets.writer import WriterConfig, writer_recipe

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent.parent
JOB = ROOT / "jobs" / "write_triplets.py"

FLAGS = {
    "--captions",
    "--out",
    "--journal",
    "--writer",
    "--engine",
    "--model",
    "--base-url",
    "--api-key-env",
    "--form",
    "--examples",
    "--shots",
    "--seed",
    "--temperature",
    "--max-reply-tokens",
    "--structured",
    "--moderation",
    "--concurrency",
    "--actors",
    "--actor-resources",
    "--gpus",
    "--requests-per-minute",
    "--tokens-per-minute",
    "--max-tokens",
    "--max-usd",
    "--usd-per-million",
    "--timeout",
    "--attempts",
    "--max-no-reply",
    "--retry-rejects",
    "--held-out",
}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""


def command(*arguments):
    return [sys.executable, str(JOB), *map(str, arguments)]


def environment(**changes):
    return {**os.environ, "COLUMNS": "400", "OMP_NUM_THREADS": "1", **changes}


def run_job(*arguments, **changes):
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=1700,
        cwd=ROOT,
        env=environment(**changes),
    )


@pytest.fixture
def captions(tmp_path):
    uri = tmp_path / "captions"
    collect_captions([f"a red boat {number}" for number in range(20)], str(uri), config={})
    return uri


def test_the_flags_are_those_that_were_promised():
    done = run_job("--help")
    assert done.returncode == 0
    assert set(re.findall(r"--[a-z][a-z-]+", done.stdout)) - {"--help"} == FLAGS


def test_bad_flags_end_in_status_2_and_a_sentence(tmp_path):
    for arguments, told in (
        ([], "--captions"),
        (["--captions", "c"], "--model names a model"),
        (["--captions", "ftp://b/c", "--model", "m"], "--captions ftp://b/c: a folder here or"),
        (["--captions", "c", "--model", "m", "--journal", "ftp://a"], "a folder here or s3://"),
        (["--captions", "c", "--model", "m", "--base-url", "host"], "--base-url is like"),
        (["--captions", "c", "--model", "m", "--max-usd", "5"], "--usd-per-million"),
        (["--captions", "c", "--model", "m", "--concurrency", "0"], "--concurrency is at least 1"),
        (["--captions", "c", "--model", "m", "--max-token", "1"], "--max-token"),
        (["--captions", "c", "--model", "m", "--base-url", "http://h:99999/v1"], "--base-url is"),
        (["--captions", "c", "--model", "m", "--temperature", "2.5"], "lies in [0, 2]"),
        (["--captions", "c", "--model", "m", "--usd-per-million", "-1", "1"], "two prices"),
        (["--captions", "c", "--writer", "local", "--max-usd", "5"], "--max-usd is of --writer o"),
        (["--captions", "c", "--writer", "local", "--model", tmp_path / "no"], "no such folder"),
        (["--captions", "c", "--model", "m", "--examples", tmp_path / "no"], "no such file"),
    ):
        done = run_job(*arguments)
        assert done.returncode == 2, arguments
        assert told in done.stderr
        assert "Traceback" not in done.stderr


def test_what_is_wrong_is_told_in_one_sentence_before_any_spending(bucket, captions, tmp_path):
    out = tmp_path / "out"
    with FaultyServer() as server:
        usual = {"--captions": captions, "--out": out, "--model": "fake", "--shots": 0}
        usual |= {"--base-url": server.url, "--api-key-env": "none", "--attempts": 2}
        for changes, told in (
            ({"--api-key-env": "NO_KEY"}, "the environment variable NO_KEY holds no key"),
            ({"--model": "other"}, "has no model 'other'; it has fake"),
            ({"--base-url": "http://127.0.0.1:9/v1"}, "cannot be reached"),
            ({"--base-url": "http://127.0.0.1:9/v1", "--captions": tmp_path}, "no manifest"),
            ({"--journal": captions / storage.MANIFEST / "j"}, "is no folder"),
            (
                {"--writer": "local", "--model": WEIGHTS / "writer", "--captions": tmp_path},
                "no manifest",
            ),
            ({"--journal": "s3://test-none/journal"}, "there is no bucket test-none at http://"),
        ):
            flags = [part for flag in {**usual, **changes}.items() for part in flag]
            done = run_job(*flags)
            assert done.returncode == 1, done.stderr
            assert done.stderr.startswith("write_triplets: ")
            assert told in done.stderr
            assert done.stderr.count("\n") == 1
        assert not server.counts.paid


def test_an_endpoint_needs_no_torch_here():
    code = "import sys, ip2p_ray.stages.triplets; print({'torch', 'diffusers'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert told.stdout == "set()\n", told.stderr


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_there_is_told(captions, tmp_path):
    flags = ["--captions", captions, "--out", tmp_path / "out", "--writer", "local"]
    for more, told in (
        (["--model", tmp_path, "--gpus", "1"], "vLLM is not installed; pip install"),
        (["--model", tmp_path, "--gpus", "0.5"], "vLLM needs whole GPUs for each engine"),
        ([], "vLLM needs a model"),
    ):
        done = run_job(*flags, "--engine", "vllm", *more)
        assert done.returncode == 1
        assert done.stderr.startswith(f"write_triplets: {told}")
        assert done.stderr.count("\n") == 1


@pytest.mark.ray
def test_a_cap_ends_in_status_3_and_more_of_it_in_0(captions, tmp_path):
    out = tmp_path / "out"
    with FaultyServer(Behaviour(delay_s=0.02)) as server:
        usual = ["--captions", captions, "--out", out, "--model", "fake", "--shots", "0"]
        usual += ["--base-url", server.url, "--api-key-env", "none", "--concurrency", "2"]
        usual += ["--usd-per-million", "1000", "1000", "--max-reply-tokens", "64"]
        done = run_job(*usual, "--max-usd", "5")
        assert done.returncode == 3, done.stderr
        assert re.search(r"spending cap reached \(max_usd 5\).*the same command goes", done.stderr)
        assert done.stderr.count("\n") == 1
        assert 0 < server.counts.paid.total() < 20
        done = run_job(*usual, "--max-usd", "500")
        assert done.returncode == 0, done.stderr
        assert f"write_triplets: {out / 'triplets'} has 20 rows" in done.stdout
        assert set(server.counts.paid.values()) == {1}
    # Neither Ray nor the server is needed where all is there: here is none of them.
    done = run_job(*usual, RAY_ADDRESS="127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert "replies: there already, 20 rows" in done.stdout
    assert "rejects/triplets: there already, 0 rows" in done.stdout
    assert f"write_triplets: {out / 'triplets'} has 20 rows" in done.stdout


@pytest.mark.ray
def test_a_local_writer_needs_no_server(tmp_path):
    collect_captions(random_captions(12, 0), str(tmp_path / "captions"), config={})
    flags = ["--captions", tmp_path / "captions", "--out", tmp_path, "--writer", "local"]
    done = run_job(*flags)
    assert done.returncode == 0, done.stderr
    assert f"write_triplets: {tmp_path / 'triplets'} has" in done.stdout
    assert (tmp_path / "triplets.html").is_file()


class Runs:
    """The same command on the same folder, as often as one likes, in a Ray that is there."""

    IN_FLIGHT = 16

    def __init__(self, server, folder, captions, address, journal=None):
        self.server, self.folder, self.captions = server, str(folder), captions
        self.journal = journal or f"{folder}/journal"
        collect_captions(captions, f"{folder}/captions", config={})
        self._flags = ["--captions", f"{folder}/captions", "--out", folder, "--model", "fake"]
        self._flags += ["--base-url", server.url, "--api-key-env", "none", "--shots", "0"]
        self._flags += ["--actors", "2", "--concurrency", str(self.IN_FLIGHT // 2)]
        self._flags += ["--attempts", "30", *(["--journal", journal] if journal else [])]
        self._address = address
        self._job = None
        self._before = Counter()

    def to_the_end(self):
        """The triplets by their keys, and the reason of each reject by its caption's."""
        self.end()
        done = run_job(*self._flags, RAY_ADDRESS=self._address)
        assert done.returncode == 0, done.stderr
        triplets = storage.read_dataset(f"{self.folder}/triplets", TRIPLETS).to_pylist()
        rejects = storage.read_dataset(f"{self.folder}/rejects/triplets", REJECTS).to_pylist()
        keys = [row["triplet_key"] for row in triplets]
        assert len(keys) == len(set(keys))
        return set(keys), {row["key"]: row["reason"] for row in rejects}

    def killed(self, victim, more, pause):
        """Kills the driver, or one of its actors, `pause` seconds after the server was paid for so
        many more replies; returns what left the server since the last kill and is not on disk."""
        paid = self.server.counts.paid
        until = paid.total() + more
        if self._job is None or self._job.poll() is not None:
            self._job = subprocess.Popen(
                command(*self._flags),
                cwd=ROOT,
                env=environment(RAY_ADDRESS=self._address),
                stdout=subprocess.DEVNULL,
            )
        while paid.total() < until and self._job.poll() is None:
            time.sleep(0.002)
        time.sleep(pause)
        assert self._job.poll() is None, "it ended before it was killed"
        if victim == "driver":
            self.end()
        else:
            while not (actors := self._actors()):
                time.sleep(0.01)
            random.choice(actors).kill()
            time.sleep(0.3)  # what was on its way to it; it is not there again so soon
        if is_object(self.journal):
            time.sleep(3.0)  # until the store has what was on its way to it
        sent = paid - self._before
        unknown = Counter(set(sent) - self.kept())
        self._before = paid.copy()
        return unknown

    def end(self):
        """Returns when no driver and no actor is there any more."""
        if self._job is not None:
            self._job.kill()
            self._job.wait()
            self._job = None
            while self._actors() or self.server.counts.in_flight:
                time.sleep(0.05)

    def kept(self):
        """Captions whose reply is in the journal."""
        recipe = writer_recipe(WriterConfig(model="fake", shots=0), [])
        journal = Journal(ObjectFolder(self.journal) if is_object(self.journal) else self.journal)
        keys = {caption: reply_key(caption, "fake", recipe) for caption in self.captions}
        return {caption for caption, key in keys.items() if journal.get(key) is not None}

    @staticmethod
    def _actors():
        """The processes that ask: Ray's are below that which started it, this one."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and "AskReplies" in process.name():
                    found.append(process)
        return found


@pytest.fixture
def address(local_ray):
    """Of a Ray that outlives the jobs: its start would take most of their time."""
    return ray.get_runtime_context().gcs_address


def faulty(delay_s):
    faults = Faults.evenly(0.2)
    return Behaviour(seed=3, faults=faults, delay_s=delay_s, slow_s=delay_s, retry_after_s=0.01)


@pytest.mark.ray
@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_every_caption_is_a_triplet_or_a_reject_with_its_reason(tmp_path, address, count):
    texts = [f"a red boat {number}" for number in range(count)]
    with FaultyServer(faulty(0.01)) as server:
        runs = Runs(server, tmp_path, texts, address)
        triplets, rejects = runs.to_the_end()
        asked, faults = server.counts.requests.total(), server.counts.faults.copy()
        assert server.counts.paid == Counter(texts)
    made = {caption: triplet_key(caption, *edit(caption)) for caption in texts}
    rejected = {caption for caption in texts if caption_key(caption) in rejects}
    assert len(rejected) == len(rejects)
    assert triplets == {key for caption, key in made.items() if caption not in rejected}
    assert set(rejects.values()) == {"empty_reply", "refused", "unparseable"}
    assert len(faults) == 8, "not every kind of fault was there"
    logger.info(
        "%d captions: %d triplets, rejects %s; %d requests, faults %s",
        count,
        len(triplets),
        dict(Counter(rejects.values())),
        asked,
        dict(faults),
    )


@pytest.mark.ray
@pytest.mark.parametrize(
    ("count", "kills"), [(200, 2), pytest.param(1000, 20, marks=pytest.mark.slow)]
)
@pytest.mark.timeout(3600)
def test_kills_change_nothing_and_no_kept_reply_is_paid_for_again(tmp_path, address, count, kills):
    texts = [f"a red boat {number}" for number in range(count)]
    with FaultyServer(faulty(0.05)) as server:
        undisturbed = Runs(server, tmp_path / "undisturbed", texts, address).to_the_end()
        assert server.counts.paid == Counter(texts)
    draws = random.Random(kills)
    victims = ["driver", "actor"] * (kills // 2)
    draws.shuffle(victims)
    with FaultyServer(faulty(0.05)) as server:
        runs = Runs(server, tmp_path / "killed", texts, address)
        lost = Counter()
        for victim in victims:
            more = draws.randint(1, count // (kills + 1))
            unknown = runs.killed(victim, more, draws.uniform(0.0, 0.1))
            assert unknown.total() <= Runs.IN_FLIGHT
            logger.info("%s killed: %d replies were not on disk", victim, unknown.total())
            lost += unknown
        assert runs.to_the_end() == undisturbed
        again = server.counts.paid - Counter(texts)
        assert again <= lost, "a reply that was on disk was paid for again"
        assert set(server.counts.paid) == set(texts)
        asked = server.counts.requests.copy()
        assert runs.to_the_end() == undisturbed
        assert server.counts.requests == asked
    logger.info(
        "%d kills, %d captions: %d replies were not on disk, %d were asked for again",
        kills,
        count,
        lost.total(),
        again.total(),
    )


@pytest.mark.ray
@pytest.mark.parametrize(
    "everything",
    [pytest.param(False, id="journal"), pytest.param(True, id="all", marks=pytest.mark.slow)],
)
@pytest.mark.timeout(1800)
def test_kills_cost_a_journal_in_a_bucket_only_what_was_not_yet_put(
    bucket, tmp_path, address, monkeypatch, everything
):
    # As `ray job submit --runtime-env-json` hands them to the processes of a Ray that is there.
    told = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    monkeypatch.setenv(
        "RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"env_vars": told}})
    )
    texts = [f"a red boat {number}" for number in range(150)]
    behaviour = Behaviour(seed=3, faults=Faults.evenly(0.2), delay_s=0.3, retry_after_s=0.01)
    folder = f"{bucket}/run" if everything else tmp_path / "run"
    with FaultyServer(behaviour) as server:
        runs = Runs(server, folder, texts, address, f"{bucket}/run/journal")
        lost = runs.killed("driver", 50, 0.4)
        keys, reasons = runs.to_the_end()
        assert len(keys) + len(reasons) == len(texts)
        assert server.counts.paid == Counter(texts) + lost
        assert runs.kept() == set(texts)
        asked = server.counts.requests.copy()
        assert runs.to_the_end() == (keys, reasons)
        assert server.counts.requests == asked
    left = {path.name for path in tmp_path.rglob("*")}
    assert "journal" not in left
    assert ("triplets" in left) is not everything
    logger.info("%d replies were asked for again", lost.total())
