import json
import re

import pytest

from tests.estimate.made_run import made_run
from tests.jobs.running import ROOT, Job

JOB = Job("plan.py")
FLAGS = (
    *("measured", "measured-on", "device", "utilisation", "cluster", "prices", "check"),
    *("captions", "candidates", "steps", "acceptance", "hopeless", "keep", "train-steps"),
    *("batch-size", "answers", "answer-steps", "prompt-tokens", "reply-tokens", "json"),
)
QUOTED = """
device_hour = "2"
storage_gb_month = 0
put_1000 = 0
get_1000 = 0
transfer_gb = 0
"""


def test_the_flags_are_those_that_were_promised():
    told = JOB.run("--help")
    assert told.returncode == 0
    found = set(re.findall(r"--([a-z-]+)(?:\.[a-z-]+)? [{\[A-Z]", told.stdout))
    assert found == set(FLAGS)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "--measured RUN, --device NAME, or both"),
        (("--device", "h100", "--check", "x"), "--check compares with a run"),
        (("--device", "h100"), "give --captions"),
        (("--device", "b1", "--captions", "5"), "the devices are h200"),
        (("--measured", "ftp://x"), "--measured ftp://x"),
        (("--device", "h100", "--captions", "0"), "captions is at least 1"),
        (("--device", "h100", "--captions", "5"), "nobody writes the triplets"),
        (("--device", "h100", "--cluster.generators", "0"), "generators is at least 1"),
    ],
)
def test_bad_flags_end_in_status_2_and_a_sentence(flags, sentence):
    ended = JOB.run(*flags)
    assert ended.returncode == 2
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_run_that_is_not_there_ends_in_status_1(tmp_path):
    ended = JOB.run("--measured", tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == f"plan: {tmp_path}: no whole dataset of the flow is there\n"


def test_a_plan_from_a_run_and_prices(tmp_path):
    uri, figures = made_run(tmp_path / "run"), tmp_path / "plan.json"
    prices = ROOT / "cluster" / "prices.example.toml"
    ended = JOB.run(
        *("--measured", uri, "--captions", 4_000, "--json", figures, "--prices", prices)
    )
    assert ended.returncode == 0, ended.stderr
    assert "price of tokens" in ended.stdout
    found = json.loads(figures.read_text())
    assert found["workload"]["captions"] == 4_000
    assert found["estimate"]["counts"]["candidates"] == 10_000
    assert found["prices"]["as_of"] == "made-up example figures, not a price list"


def test_a_prediction_beside_what_was(tmp_path):
    small, large = made_run(tmp_path / "small"), made_run(tmp_path / "large", captions=80)
    ended = JOB.run("--measured", small, "--check", large)
    assert ended.returncode == 0, ended.stderr
    assert ["triplets", "46.0", "s", "26.0", "s", "+77", "%"] in [
        line.split() for line in ended.stdout.splitlines()
    ]


@pytest.mark.parametrize(
    ("text", "named"), [("device_hour = 2\nfuel = 3\n", "fuel"), (QUOTED, "got '2'")]
)
def test_broken_prices_end_in_a_sentence(tmp_path, text, named):
    (tmp_path / "prices.toml").write_text(text)
    flags = ("--device", "h100", "--captions", 5, "--prompt-tokens", 9, "--reply-tokens", 9)
    ended = JOB.run(*flags, "--prices", tmp_path / "prices.toml")
    assert ended.returncode == 2
    assert "holds no prices" in ended.stderr
    assert named in ended.stderr
    assert "Traceback" not in ended.stderr
