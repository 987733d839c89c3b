import json

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from ip2p_ray.benchmark import measure
from ip2p_ray.benchmark.config import PairBenchmark
from ip2p_ray.benchmark.pairs import KEYS, compare, table, unet_row_flops
from ip2p_ray.errors import ConfigError
from ip2p_ray.testing import tiny_stable_diffusion


@pytest.fixture(scope="module")
def result():
    job = PairBenchmark(candidates=3, steps=2, rounds=2, decode_batch=2, channels_last=True)
    return compare(job)


def test_both_ways_and_their_ratio_have_every_key(result):
    for name in ("ours", "reference", "ratio"):
        assert set(KEYS) <= set(result[name])
    for key in ("candidates_per_s", "peak_bytes", "device_s_per_accepted_pair"):
        assert key in KEYS
    assert json.loads(json.dumps(result)) == result


def test_the_figures_fit_each_other(result):
    for name in ("ours", "reference"):
        way = result[name]
        assert way["candidates_per_s"] == pytest.approx(3 / np.median(way["seconds"]))
        assert way["unet_rows_per_s"] == pytest.approx(4 * 2 * way["candidates_per_s"])
        done = way["unet_rows_per_s"] * result["unet_row_flops"]
        assert way["utilisation"] == pytest.approx(done / result["matmul_flops"])
        assert way["peak_bytes"] == result["weight_bytes"] + way["working_bytes"]
    turns = zip(result["reference"]["seconds"], result["ours"]["seconds"], strict=True)
    assert result["ratio"]["candidates_per_s"] == pytest.approx(
        np.median([a / b for a, b in turns])
    )
    searched = result["batch_sizes"]
    assert list(searched) == ["1", "2"]
    assert result["batch_size"] == int(max(searched, key=searched.get))


def test_both_ways_made_the_same_pictures(result):
    assert result["mean_difference"] <= result["mean_difference_bound"] == 0.05
    assert result["max_difference"] <= 2
    assert result["ours"]["accepted"] == result["reference"]["accepted"]


def test_the_table_shows_both_ways(result):
    text = table(result)
    assert "preset miniature, 64 px, 2 steps, float32, 3 candidates, 2 rounds" in text
    (line,) = (line for line in text.splitlines() if line.startswith("candidates/s"))
    ours, reference, ratio = (float(cell) for cell in line.split()[1:])
    assert ours == pytest.approx(result["ours"]["candidates_per_s"], abs=1e-3)
    assert reference == pytest.approx(result["reference"]["candidates_per_s"], abs=1e-3)
    assert ratio == pytest.approx(result["ratio"]["candidates_per_s"], abs=1e-2)


def test_what_no_judge_accepted_is_told_as_unknown(result):
    unjudged = {
        **result,
        "judge_candidates_per_s": None,
        "sd15": True,
        **{
            name: {**result[name], "device_s_per_accepted_pair": None}
            for name in ("ours", "reference", "ratio")
        },
    }
    text = table(unjudged)
    (line,) = (line for line in text.splitlines() if line.startswith("device s per accepted"))
    assert line.split()[-3:] == ["-", "-", "-"]
    assert "SD-1.5 shapes" in text
    assert "the judge" not in text


def test_a_unet_rows_arithmetic_is_that_of_a_real_call():
    model = tiny_stable_diffusion()
    model.unet.set_attn_processor(AttnProcessor2_0())
    with torch.inference_mode():
        text = model.encode_text(["a cat"])
        x = torch.zeros(1, 4, 8, 8)
        counted = measure.count_flops(lambda: model.denoise(x, torch.ones(1), text))
    assert unet_row_flops(model, 16) == counted


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"candidates": 0}, "--candidates is at least 1"),
        ({"decode_batch": 0}, "--decode-batch is at least 1"),
        ({"candidates": 2, "batch_size": 4}, "more than --candidates"),
        ({"compile": True}, "--compile needs a --batch-size"),
        ({"compile": True, "candidates": 6, "batch_size": 4}, "divides --candidates"),
        ({"dtype": "float16"}, "float16 is for CUDA"),
    ],
)
def test_wrong_settings_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        PairBenchmark(**settings)


@pytest.mark.parametrize("device", ["gpu9", "cuda"])
def test_a_device_that_is_not_there_is_named(device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match=f"--device .?{device}"):
        compare(PairBenchmark(device=device))
