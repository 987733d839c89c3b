"""A run of the flow as its files show it, made up: no model was there."""

import json
import os
from pathlib import Path

import pyarrow as pa

from ip2p_ray import storage


def made_run(folder: Path, *, captions: int = 40, start: float = 1_000_000.0) -> str:
    """Two writers' shards and so on, at times that give round speeds.

    Two triplets' captions of three get a triplet; of 5 candidates each, 2 become pairs.
    """
    triplets, uri = captions // 2, str(folder)
    pairs, latents = 2 * triplets, 2 * triplets - 4
    dataset(uri, "captions", [captions], wall=1.0)
    # the second half is written in 10 s
    dataset(uri, "replies", [captions // 2] * 2, wall=25.0, times=[start + 12.0, start + 22.0])
    dataset(uri, "triplets", [triplets], wall=0.5)
    dataset(uri, "rejects/triplets", [captions - triplets], wall=0.5)
    dataset(uri, "queue", [triplets], wall=0.25)
    dataset(
        uri,
        "candidates",
        [triplets],
        wall=40.0,
        device=60.0,
        config={"candidates": 5, "steps": 10, "keep": 4},
    )
    dataset(uri, "scores", [5 * triplets], wall=0.25)
    dataset(uri, "rejects/pairs", [3 * triplets], wall=0.25)
    rejected = {"image_similarity": 3 * triplets - 10, "not_best": 10}
    dataset(uri, "pairs", [pairs], wall=0.25, reports=[{"rejected": rejected}])
    half = latents // 2
    dataset(uri, "latents", [half, half], wall=9.0, times=[start + 5.0, start + 5.0 + half / 4])
    config = {"steps": 20, "batch_size": 8}
    dataset(uri, "checkpoints", [], wall=30.0, config=config)
    lines = [
        {"step": 10, "images_per_s": 8.0, "workers": 2},
        {"step": 20, "images_per_s": 16.0, "workers": 2},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "checkpoints" / "metrics.jsonl").write_text(text)
    state = folder / "checkpoints" / "step-00000020"
    state.mkdir()
    (state / "unet.safetensors").write_bytes(b"0" * 4_000)
    (folder / "editor").mkdir()
    (folder / "editor" / "model_index.json").write_bytes(b"0" * 500)
    dataset(uri, "questions", [40], wall=0.5)
    dataset(
        uri,
        "answers",
        [10] * 4,
        wall=20.0,
        times=[start + 8.0, start + 9.0, start + 13.0, start + 14.0],
        config={"editing": {"steps": 4}},
    )
    (folder / ".lock").touch()
    (folder / "metrics.json").write_text("{}")
    walls = 1 + 26 + 41 + 9 + 30 + 20.5
    os.utime(folder / ".lock", (start, start))
    os.utime(folder / "metrics.json", (start + walls + 6, start + walls + 6))
    return uri


def dataset(uri, name, rows, *, wall, device=0.0, config=None, reports=(), times=()):
    """A whole dataset of shards of so many rows of 100 bytes, written at those times."""
    place = f"{uri}/{name}"
    for number, count in enumerate(rows):
        text = [os.urandom(50).hex() for _ in range(count)]
        storage.write_shard(place, f"{number:05d}", pa.table({"text": text}))
    for number, when in enumerate(times):
        os.utime(Path(place) / f"{number:05d}.parquet", (when, when))
    storage.write_manifest(
        place,
        storage.Manifest(
            dataset=name,
            config=config or {},
            reports=reports,
            wall_seconds=wall,
            device_seconds=device,
        ),
    )
