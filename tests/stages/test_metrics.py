"""The stages' metrics, as a real Prometheus scrapes them and the dashboard asks for them."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
import yaml

from ip2p_ray import storage
from ip2p_ray.notes import read_origin
from ip2p_ray.schema import SCORES
from ip2p_ray.stages.reply_rows import REPLIES
from ip2p_ray.testing import faulty_process
from tests.ports import free_port

ROOT = Path(__file__).parent.parent.parent
BOARDS = {name: ROOT / "cluster" / "grafana" / f"{name}.json" for name in ("pipeline", "editor")}
DRIVER = Path(__file__).parent / "metrics_driver.py"
OF_GPUS = "ray_ip2p_device_memory_bytes"


def board(name):
    return json.loads(BOARDS[name].read_text("utf-8"))


def named():
    """The metrics of this package that the pipeline's dashboard asks for."""
    return set(re.findall(r"\bray_ip2p_[a-z0-9_]+", BOARDS["pipeline"].read_text("utf-8")))


def expressions(name):
    """What a dashboard's panels ask for, with the times that Grafana would fill in."""
    for panel in board(name)["panels"]:
        for target in panel["targets"]:
            asked = target["expr"].replace("$__rate_interval", "10m").replace("$__range", "1h")
            yield panel["title"], asked.replace("$dataset", ".*").replace("$cluster", ".*")


def test_the_dashboard_shows_every_metric_and_no_other():
    source = (ROOT / "ip2p_ray" / "stages" / "metrics.py").read_text("utf-8")
    made = re.findall(r"(Counter|Gauge|Histogram)\(\s*\"(ip2p_[a-z_]+)\"", source)
    suffixes = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_sum", "_count")}
    assert len(made) > 15
    assert named() == {f"ray_{name}{end}" for kind, name in made for end in suffixes[kind]}


@pytest.mark.parametrize("name", BOARDS)
def test_panels_have_places_of_their_own(name):
    places = [tuple(panel["gridPos"].values()) for panel in board(name)["panels"]]
    ids = [panel["id"] for panel in board(name)["panels"]]
    assert len(set(places)) == len(places)
    assert ids == sorted(set(ids))
    assert all(panel["title"] and panel["description"] for panel in board(name)["panels"])


@pytest.mark.parametrize("name", BOARDS)
def test_every_selector_is_of_the_clusters_that_were_chosen(name):
    (variable,) = [each for each in board(name)["templating"]["list"] if each["name"] == "cluster"]
    assert variable["allValue"] == ".*", "matches where nothing sets the label, too"
    asked = [target["expr"] for panel in board(name)["panels"] for target in panel["targets"]]
    for expression in asked:
        metrics = re.findall(r"\bray_(?!io_cluster)[a-z0-9_]+", expression)
        chosen = re.findall(r'\bray_[a-z0-9_]+\{ray_io_cluster=~"\$cluster"[,}]', expression)
        assert metrics, expression
        assert len(chosen) == len(metrics), expression


class Prometheus:
    """One that runs, and scrapes one place."""

    def __init__(self, url):
        self._url = url

    def ask(self, expression):
        """The series now, a list of labels and values."""
        return self._answer("query", query=expression)

    def ask_range(self, expression):
        """The series of the last quarter of an hour, as a panel asks for them."""
        now = time.time()
        return self._answer("query_range", query=expression, start=now - 900, end=now, step="1s")

    def _answer(self, path, **params):
        answer = httpx.get(f"{self._url}/api/v1/{path}", params=params, timeout=20)
        assert answer.status_code == 200, f"{params['query']}: {answer.text}"
        return answer.json()["data"]["result"]

    def sums(self, metric, *labels):
        """The sum of what processes counted, by the values of some labels."""
        return {
            tuple(series["metric"].get(label, "") for label in labels): float(series["value"][1])
            for series in self.ask(f"sum by ({', '.join(labels)}) (last_over_time({metric}[1h]))")
        }


@contextlib.contextmanager
def prometheus(folder, target):
    """Prometheus on a port of its own, of which every file lies in the folder."""
    config = {
        "global": {"scrape_interval": "2s", "scrape_timeout": "2s"},
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                *(shutil.which("prometheus"), f"--config.file={folder / 'prometheus.yml'}"),
                *(f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Driver:
    """The driver, which says where its metrics are, and when it has done its work."""

    def __init__(self, errors, *arguments):
        self._errors = errors
        self._process = subprocess.Popen(
            [sys.executable, DRIVER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors.open("w"),
            env={**os.environ, "RAY_metrics_report_interval_ms": "1000"},  # ten times as often
            text=True,
        )

    def said(self, name):
        """The value of what it says under the name."""
        lines = []
        for line in self._process.stdout:
            lines.append(line)
            if line.startswith("{"):
                return json.loads(line)[name]
        return pytest.fail("".join([*lines[-20:], self._errors.read_text()[-3000:]]))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.communicate("end\n", timeout=60)
        self._process.kill()
        self._process.wait()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(not shutil.which("prometheus"), reason="Debian's prometheus is not installed")
def test_a_real_prometheus_finds_what_the_manifests_say(tiny_weights, tmp_path):
    folder = tmp_path / "made"
    faults = ("--faults.too-many", "0.1", "--faults.refusal", "0.2")
    with (
        faulty_process(*faults) as endpoint,
        Driver(tmp_path / "driver.err", tiny_weights, folder, endpoint) as driver,
        prometheus(tmp_path, f"127.0.0.1:{driver.said('port')}") as asked,
    ):
        assert driver.said("done")
        settled(lambda: _all_there(asked))
        settled(lambda: _check(asked, folder))
        for title, expression in expressions("pipeline"):
            found = asked.ask_range(expression)
            assert found or OF_GPUS in expression, f"{title}: no series of {expression}"
        for _, expression in expressions("editor"):
            asked.ask(expression)  # nothing is served here, but Prometheus can read it


def settled(check, seconds=240):
    """Returns once the check passes: a scrape may be late, or fail where the machine is busy."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            check()
        except (AssertionError, httpx.HTTPError):
            if time.monotonic() > deadline:
                raise
            time.sleep(2)
        else:
            return


def _all_there(asked):
    """Every metric, a counter so often that a rate can be made of it."""
    lacking = [
        name
        for name in sorted(named() - {OF_GPUS})
        if not asked.ask(f"count_over_time({name}[1h]) > {4 if _is_kept(name) else 0}")
    ]
    assert not lacking


def _is_kept(name):
    """Whether Ray shows what a process counted when it has ended, as it does not with gauges."""
    return name.endswith(("_total", "_sum", "_count"))


def _check(asked, folder):
    """What counters say, against what is kept."""
    names = ("replies", "candidates", "latents", "pairs")
    manifests = {name: storage.read_manifest(str(folder / name)) for name in names}
    rows = asked.sums("ray_ip2p_dataset_rows_total", "dataset")
    for name in ("replies", "candidates", "latents"):
        assert rows[(name,)] == manifests[name].rows, name

    scores = storage.read_dataset(str(folder / "scores"), SCORES, columns=["reason"])
    verdicts = Counter(scores["reason"].to_pylist())
    counted = asked.sums("ray_ip2p_dataset_verdicts_total", "dataset", "reason")

    def of(dataset):
        """Verdicts as they were counted, None for what was kept."""
        mine = {reason: count for (name, reason), count in counted.items() if name == dataset}
        return {None if reason == "kept" else reason: count for reason, count in mine.items()}

    assert of("candidates") == of("pairs") == dict(verdicts)
    pairs = manifests["pairs"].reports[0]
    assert pairs["rejected"] == {name: n for name, n in verdicts.items() if name is not None}

    replies = storage.read_dataset(str(folder / "replies"), REPLIES, columns=["status"])
    statuses = Counter(replies["status"].to_pylist())
    assert of("replies") == {None if name == "ok" else name: n for name, n in statuses.items()}
    assert len(statuses) > 1
    assert len(verdicts) > 1

    requests = asked.sums("ray_ip2p_writer_requests_total", "outcome")
    assert requests[("answered",)] == manifests["replies"].rows
    tokens = asked.sums("ray_ip2p_writer_tokens_total", "direction")
    usd = asked.sums("ray_ip2p_writer_usd_total")
    spent = (1000.0 * tokens[("read",)] + 2000.0 * tokens[("written",)]) / 1e6
    assert usd[()] == pytest.approx(spent)

    training = read_origin(str(folder / "checkpoints"))["config"]
    steps, batch = training["steps"], training["batch_size"]
    assert asked.sums("ray_ip2p_training_images_total")[()] == steps * batch
    (most,) = asked.ask("max(max_over_time(ray_ip2p_training_step[1h]))")  # of a process that ended
    assert most["value"][1] == str(steps)
    busy = asked.sums("ray_ip2p_device_seconds_total", "dataset", "actor", "device")
    assert {device for _, _, device in busy} == {"cpu"}
    made = busy[("candidates", "GenerateCandidates", "cpu")]
    assert made >= manifests["candidates"].device_seconds > 0  # the actor also encodes pictures
