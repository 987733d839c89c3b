import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ip2p_ray.benchmark.config import TrainingBenchmark
from ip2p_ray.benchmark.training import KEYS, _compare, _prepare, compare, table
from ip2p_ray.errors import ConfigError, Ip2pError

JOB = TrainingBenchmark(batch_size=4, micro_batch=3, pairs=4, steps=1, rounds=2, ranks=2)


@pytest.fixture(scope="module")
def result():
    return compare(JOB)


def test_both_ways_and_their_ratio_have_every_key(result):
    for name in ("ours", "reference", "ratio"):
        assert set(KEYS) <= set(result[name])
    assert {"images_per_s", "peak_bytes"} <= set(KEYS)
    assert json.loads(json.dumps(result)) == result


def test_the_figures_fit_each_other(result):
    for name in ("ours", "reference"):
        way = result[name]
        assert way["images_per_s"] == pytest.approx(4 / np.median(way["seconds"]))
        done = way["images_per_s"] * result["image_flops"]
        assert way["utilisation"] == pytest.approx(done / result["matmul_flops"])
        assert way["peak_bytes"] > way["working_bytes"] > 0
    turns = zip(result["reference"]["seconds"], result["ours"]["seconds"], strict=True)
    assert result["ratio"]["images_per_s"] == pytest.approx(np.median([a / b for a, b in turns]))
    assert 0 <= result["ours"]["wait_share"] < 1
    ranks = result["ranks"]
    assert len(ranks["one"]) == len(ranks["several"]) == 2
    turns = zip(ranks["several"], ranks["one"], strict=True)
    assert ranks["ratio"] == pytest.approx(np.median([a / b for a, b in turns]))


def test_both_ways_take_the_same_first_step(result):
    assert result["loss_difference"] <= result["loss_difference_bound"] == 0.01


def test_ways_that_do_not_drop_conditions_alike_are_found(tmp_path):
    job = replace(JOB, ranks=1, batch_size=8, pairs=8)
    scene = _prepare(job, torch.device("cpu"), tmp_path)
    other = replace(scene, config=replace(scene.config, dropout=1 / 3))
    with pytest.raises(Ip2pError, match="different losses for the same step"):
        _compare(job, torch.device("cpu"), other)


def test_the_table_shows_both_ways(result):
    text = table(result)
    assert "preset miniature, 64 px, steps of 4 samples, 1 a turn, 2 rounds" in text
    (line,) = (line for line in text.splitlines() if line.startswith("images/s"))
    ours, reference, ratio = (float(cell) for cell in line.split()[1:])
    assert ours == pytest.approx(result["ours"]["images_per_s"], abs=1e-2)
    assert reference == pytest.approx(result["reference"]["images_per_s"], abs=1e-2)
    assert ratio == pytest.approx(result["ratio"]["images_per_s"], abs=1e-2)
    assert "2 processes of " in text
    alone = {name: value for name, value in result.items() if name != "ranks"}
    assert "2 processes of " not in table(alone)


def test_without_ranks_there_are_none():
    found = compare(replace(JOB, ranks=1, rounds=1))
    assert "ranks" not in found
    assert "processes of" not in table(found)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"steps": 0}, "--steps is at least 1"),
        ({"micro_batch": 0}, "--micro-batch is at least 1"),
        ({"ranks": 2, "device": "cuda"}, "--ranks is for the CPU"),
    ],
)
def test_wrong_settings_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        TrainingBenchmark(**settings)


@pytest.mark.parametrize("device", ["gpu9", "cuda"])
def test_a_device_that_is_not_there_is_named(device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match=f"--device .?{device}"):
        compare(TrainingBenchmark(device=device))
