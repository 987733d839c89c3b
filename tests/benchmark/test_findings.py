import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from ip2p_ray import presets, storage
from ip2p_ray.benchmark.findings import (
    ARMS,
    TOLD,
    FindingsConfig,
    _chosen,
    measure_findings,
    summary,
)
from ip2p_ray.errors import ConfigError
from ip2p_ray.filtering import Thresholds
from ip2p_ray.images import encode_png, to_pil
from ip2p_ray.intervals import BootstrapConfig
from ip2p_ray.schema import LATENTS, PAIRS

CONFIG = FindingsConfig(
    seeds=(0,),
    steps=1,
    tasks=2,
    grid_tasks=1,
    text_guidance_scales=(1.0,),
    image_guidance_scales=(1.0,),
)


@pytest.fixture(scope="module")
def preset(tiny_weights):
    found = presets.miniature(tiny_weights)
    pairs = replace(found.pairs, thresholds=Thresholds())  # the tiny ones let all through
    return replace(found, pairs=pairs, training=replace(found.training, batch_size=2))


def pool_rows(preset, triplets=20):
    """Three candidates of each triplet, of which one passes the filter."""
    rng = np.random.default_rng(0)
    least = preset.pairs.thresholds.least()
    pictures = [
        {"bytes": encode_png(to_pil(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)))}
        for _ in range(2)
    ]
    return [
        {
            **dict.fromkeys(PAIRS.names),
            "pair_key": f"{triplet:02d}-{index}",
            "triplet_key": f"{triplet:02d}",
            "instruction": "make it night",
            "split": "held_out" if triplet == 0 else "train",
            "index": index,
            **dict.fromkeys(least, 1.0 if index == 1 else -0.9),
            "source_image": {**pictures[0], "path": None},
            "edited_image": {**pictures[1], "path": None},
        }
        for triplet in range(triplets)
        for index in range(3)
    ]


def write_pool(uri, rows, least=-1.0):
    storage.write_shard(uri, "all", pa.Table.from_pylist(rows, schema=PAIRS))
    thresholds = dict.fromkeys(("text", "image", "direction"), least)
    manifest = storage.Manifest(dataset="pairs", config={"thresholds": thresholds})
    storage.write_manifest(uri, manifest)


def test_arms_choose_what_they_say(preset):
    rows = [row for row in pool_rows(preset) if row["split"] == "train"]
    schema = pa.schema(
        [
            *(f for f in LATENTS if f.name in PAIRS.names),
            *(PAIRS.field(name) for name in ("index", *preset.pairs.thresholds.least())),
        ]
    )
    table = pa.Table.from_pylist([{n: r[n] for n in schema.names} for r in rows], schema=schema)
    for name in LATENTS.names:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows))
    keys = {arm.name: _chosen(table, arm, 0, preset)["pair_key"].to_pylist() for arm in ARMS}
    assert keys["filtered"] == [f"{triplet:02d}-1" for triplet in range(1, 20)]
    assert keys["no-dropout"] == keys["filtered"]
    assert len(keys["random"]) == len(set(keys["random"])) == 19
    assert any(not key.endswith("-1") for key in keys["random"])
    assert set(keys["filtered-10"]) < set(keys["filtered-30"]) < set(keys["filtered"])
    assert (len(keys["filtered-10"]), len(keys["filtered-30"])) == (2, 6)
    assert _chosen(table, ARMS[1], 1, preset)["pair_key"].to_pylist() != keys["random"]


def test_the_whole_measurement_goes_on_where_it_was(preset, tmp_path):
    write_pool(str(tmp_path / "pairs"), pool_rows(preset))
    found = measure_findings(str(tmp_path / "pairs"), tmp_path / "out", CONFIG, preset)
    told = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert told == json.loads(json.dumps(found))  # tuples are lists there
    assert list(found["arms"]) == [arm.name for arm in ARMS]
    assert found["arms"]["filtered"]["pairs"] == {"pairs": 19, "triplets": 19}
    assert found["arms"]["random"]["correct"]["count"] == 2
    assert set(found["scales"]) == {"filtered", "no-dropout"}
    unets = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("editor-1/model_index.json")}
    assert len(unets) == len(ARMS)
    for path in tmp_path.rglob("random-0/scores-*.json"):
        path.unlink()
    again = measure_findings(str(tmp_path / "pairs"), tmp_path / "out", CONFIG, preset)
    assert again == found
    assert unets == {p: p.stat().st_mtime_ns for p in unets}


def test_a_pool_that_was_filtered_is_refused(preset, tmp_path):
    write_pool(str(tmp_path / "pairs"), pool_rows(preset, 2), least=0.2)
    with pytest.raises(ConfigError, match="was filtered"):
        measure_findings(str(tmp_path / "pairs"), tmp_path / "out", CONFIG, preset)


def test_differences_are_by_task_and_seed():
    def answer(task, seed, value, usual=True, scale=2.0):
        return {
            "task_key": task,
            "seed": seed,
            "usual": usual,
            "text_guidance_scale": scale,
            "image_guidance_scale": 1.5,
            **dict.fromkeys(TOLD, value),
        }

    rows = {
        "first": [answer(t, s, t_ + 10 * s) for t_, t in enumerate("abc") for s in (0, 1)],
        "second": [answer(t, s, t_ + 10 * s + 1) for t_, t in enumerate("abc") for s in (0, 1)],
    }
    rows["first"].append(answer("a", 0, 5.0, usual=False, scale=1.0))
    counts = {key: {"pairs": 1, "triplets": 1} for key in rows}
    found = summary(rows, counts, BootstrapConfig(resamples=200))
    assert found["arms"]["first"]["correct"]["mean"] == 6.0
    assert found["arms"]["first"]["correct"]["groups"] == 3
    assert found["arms"]["first"]["by_seed"]["correct"] == [1.0, 11.0]
    told = found["differences_to_first"]["second"]["correct"]
    assert (told["mean"], told["low"], told["high"], told["count"]) == (1.0, 1.0, 1.0, 6)
    assert [point["text_guidance_scale"] for point in found["scales"]["first"]] == [1.0, 2.0]
    assert [point["correct"]["count"] for point in found["scales"]["first"]] == [1, 2]
    assert "second" not in found["scales"]
