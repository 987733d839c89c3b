from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ip2p_ray.errors import ConfigError, DatasetError, ModelError
from ip2p_ray.latents import LatentDataset, encode_pairs
from ip2p_ray.schema import LATENT_TEXTS, LATENTS
from ip2p_ray.testing import tiny_stable_diffusion

MODEL = tiny_stable_diffusion()
PICTURES = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 24, 3), dtype=np.uint8)
GROUPS = ("c", "a", "a", "b", "a")


def rows() -> list[dict[str, Any]]:
    return [
        {
            "pair_key": f"pair {9 - number}",
            "triplet_key": GROUPS[number],
            "instruction": f"instruction {number}",
            "split": "train",
            **arrays,
        }
        for number, arrays in enumerate(encode_pairs(MODEL, *PICTURES))
    ]


ROWS = rows()


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema = LATENTS) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def array(row: dict[str, Any], name: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(row[name], np.float16).reshape(row["shape"]).copy())


def posterior(pictures: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    with torch.inference_mode():
        distribution = MODEL.vae.encode(pixels).latent_dist
    return distribution.mean, distribution.std


@pytest.mark.parametrize("flip", [False, True])
def test_encoded_as_the_autoencoder_does(flip: bool) -> None:
    source, edited = PICTURES[:, :, :, ::-1] if flip else PICTURES
    suffix = "_flipped" if flip else ""
    mode, _ = posterior(source)
    mean, std = posterior(edited)
    for number, row in enumerate(ROWS):
        assert row["shape"] == [4, 8, 12]
        for name, expected in (("source_mode", mode), ("edited_mean", mean), ("edited_std", std)):
            got = array(row, name + suffix).float()
            assert torch.allclose(got, expected[number], rtol=1e-3, atol=1e-3)


def test_only_the_edited_image_keeps_its_spread() -> None:
    """The source is its mode, the posterior's mean, and nothing is scaled."""
    same = encode_pairs(MODEL, PICTURES[0], PICTURES[0])
    assert all(row["source_mode"] == row["edited_mean"] for row in same)


def test_what_float16_cannot_hold_is_refused() -> None:
    broken = tiny_stable_diffusion()
    with torch.no_grad():
        dict(broken.vae.named_parameters())["quant_conv.bias"].fill_(1e6)
    with pytest.raises(ModelError, match=r"edited_mean .* not finite in float16"):
        encode_pairs(broken, *PICTURES)


def test_unequal_pictures_are_refused() -> None:
    with pytest.raises(ConfigError, match="got"):
        encode_pairs(MODEL, PICTURES[0], PICTURES[1][:, :8])


def test_groups_and_pairs_in_key_order(tmp_path: Path) -> None:
    dataset = LatentDataset(write(tmp_path / "a.parquet", ROWS))
    assert (len(dataset), dataset.pairs, dataset.shape) == (3, 5, (4, 8, 12))
    assert [dataset.key(index) for index in range(3)] == ["a", "b", "c"]
    picks = [dataset.read(0, pick=pick).instruction for pick in (0.0, 0.34, 0.67, 0.999)]
    assert picks == ["instruction 4", "instruction 2", "instruction 1", "instruction 1"]
    assert {dataset.read(2, pick=pick).instruction for pick in (0.0, 0.99)} == {"instruction 0"}


@pytest.mark.parametrize("flip", [False, True])
def test_read_back_bit_for_bit(tmp_path: Path, flip: bool) -> None:
    dataset = LatentDataset(write(tmp_path / "a.parquet", ROWS))
    row = dataset.read(1, pick=0.5, flip=flip)
    suffix = "_flipped" if flip else ""
    assert row.instruction == "instruction 3"
    assert row.edited_mean.tobytes() == ROWS[3]["edited_mean" + suffix]
    assert row.edited_std.tobytes() == ROWS[3]["edited_std" + suffix]
    assert row.source_mode.tobytes() == ROWS[3]["source_mode" + suffix]
    assert row.source_mode.shape == dataset.shape


def test_shards_can_be_cut_and_named_in_any_way(tmp_path: Path) -> None:
    one = LatentDataset(write(tmp_path / "whole.parquet", ROWS))
    (tmp_path / "cut").mkdir()
    paths = [write(tmp_path / "cut" / f"{n}.parquet", [row]) for n, row in enumerate(ROWS)]
    for two in (LatentDataset(tmp_path / "cut"), LatentDataset(reversed(paths))):
        assert two.digest == one.digest
        for index in range(3):
            assert two.read(index, pick=0.5).instruction == one.read(index, pick=0.5).instruction
    fewer = LatentDataset(paths[:4])
    assert fewer.digest != one.digest


def test_arrow_files_are_read_where_they_are(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS, schema=LATENTS)
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), LATENTS) as writer:
        writer.write_table(table)
    dataset = LatentDataset(tmp_path)
    assert dataset.digest == LatentDataset(write(tmp_path / "b.parquet", ROWS)).digest
    before = pa.total_allocated_bytes()
    held = [dataset.read(0) for _ in range(100)]
    assert pa.total_allocated_bytes() - before < len(held) * len(ROWS[0]["edited_mean"])


def test_converted_once_and_again_when_a_shard_changes(tmp_path: Path) -> None:
    shard, cache = write(tmp_path / "a.parquet", ROWS), tmp_path / "cache"
    LatentDataset(shard, cache=cache)
    (converted,) = cache.iterdir()
    stamp = converted.stat().st_mtime_ns
    LatentDataset(shard, cache=cache)
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [stamp]
    write(shard, ROWS[:4])
    assert LatentDataset(shard, cache=cache).pairs == 4
    assert len(list(cache.iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.parquet"]


def test_converted_beside_the_shards_and_not_read_twice(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ROWS)
    assert LatentDataset(tmp_path).pairs == LatentDataset(tmp_path).pairs == 5
    assert len(list(tmp_path.glob(".latents-*.arrow"))) == 1


def changed(number: int, **columns: Any) -> list[dict[str, Any]]:
    return [{**row, **columns} if n == number else row for n, row in enumerate(ROWS)]


def test_latents_that_a_model_could_not_have_made_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ROWS)
    LatentDataset(path).require_model(MODEL)
    wide = [{**row, "shape": [8, 4, 12]} for row in ROWS]
    with pytest.raises(DatasetError, match=r"another model: latent channels 8, .* has 4"):
        LatentDataset(write(tmp_path / "b.parquet", wide)).require_model(MODEL)
    schema = LATENTS.append(LATENT_TEXTS[0])
    assert LATENT_TEXTS[0].name == "tokens"
    told = [{**row, "tokens": [1] * 77} for row in ROWS]
    with pytest.raises(DatasetError, match=r"another model: tokens 77, .* has 16"):
        LatentDataset(write(tmp_path / "c.parquet", told, schema)).require_model(MODEL)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "hold no rows"),
        (changed(1, pair_key="pair 5", triplet_key="a"), "pair 5 twice"),
        (changed(0, pair_key="pair 5"), "pair 5 twice"),
        (changed(1, shape=[4, 8, 8]), "need one shape"),
        ([{**row, "shape": [384]} for row in ROWS], "need one shape"),
        (changed(2, edited_std=b"12"), "'edited_std' holds arrays of 2 to 768 bytes, 768 expected"),
        (changed(3, source_mode_flipped=None), "nulls in 'source_mode_flipped'"),
    ],
)
def test_broken_rows_are_found_on_opening(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    path = write(tmp_path / "a.parquet", rows)
    with pytest.raises(DatasetError, match=message):
        LatentDataset(path)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"pair_key": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match=r"a.parquet has no column triplet_key, instruction"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_columns_of_another_type_are_refused(tmp_path: Path, suffix: str) -> None:
    table = pa.Table.from_pylist([{**row, "split": 3.5, "shape": "x"} for row in ROWS])
    if suffix == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DatasetError, match=f"a.{suffix} cannot be read"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_broken_files_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"neither one nor the other")
    with pytest.raises(DatasetError, match=f"{name} cannot be read"):
        LatentDataset(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "nothing.parquet", ""])
def test_nothing_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match="no latents at"):
        LatentDataset(tmp_path / name)
