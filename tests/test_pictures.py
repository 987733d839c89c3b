from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ip2p_ray.errors import DatasetError
from ip2p_ray.images import encode_png, to_pil
from ip2p_ray.pictures import PictureDataset
from ip2p_ray.schema import PAIRS
from ip2p_ray.testing import tiny_stable_diffusion
from ip2p_ray.training.feed import CENTRE, Crop, Visit, read_pictures
from ip2p_ray.training.loop import TrainConfig, train

SHAPE = (4, 8, 8)


def write(folder: Path, width: int = 32, height: int = 16, **columns: Any) -> Path:
    """Four pairs whose source tells each pixel's place and whose edited picture is its inverse."""
    y, x = np.mgrid[:height, :width]
    source = np.stack([x * 7, y * 15, np.zeros_like(x)], axis=2).astype(np.uint8)
    images = [{"bytes": encode_png(to_pil(one)), "path": None} for one in (source, 255 - source)]
    rows = [
        dict.fromkeys(PAIRS.names)
        | {
            "pair_key": f"pair {number}",
            "triplet_key": f"triplet {number // 2}",
            "instruction": f"make it {number}",
            "split": "held_out" if number > 2 else "train",
            "source_image": images[0],
            "edited_image": images[1],
            **columns,
        }
        for number in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIRS), folder / "a.parquet")
    return folder


def test_the_middle_is_cut_out_of_what_has_the_right_height(tmp_path: Path) -> None:
    dataset = PictureDataset(write(tmp_path), resolution=16, shape=SHAPE)
    assert (len(dataset), dataset.pairs) == (2, 4)
    row = dataset.read_pictures(0, pick=0.9, flip=False, crop=CENTRE)
    assert row.instruction == "make it 1"
    assert row.source[0, :, 0].tolist() == [7 * x for x in range(8, 24)]
    assert row.source[:, 0, 1].tolist() == [15 * y for y in range(16)]
    flipped = dataset.read_pictures(0, pick=0.9, flip=True, crop=CENTRE)
    assert np.array_equal(flipped.source, row.source[:, ::-1])


@pytest.mark.parametrize("size", [0.0, 0.5, 0.999])
def test_both_pictures_are_cut_alike(tmp_path: Path, size: float) -> None:
    dataset = PictureDataset(write(tmp_path), resolution=16, shape=SHAPE)
    row = dataset.read_pictures(0, pick=0.0, flip=True, crop=Crop(size, 0.7, 0.2))
    assert row.source.shape == row.edited.shape == (16, 16, 3)
    assert np.abs(row.source.astype(int) + row.edited - 255).max() <= 1


def test_small_pictures_are_enlarged_and_every_corner_can_be_met(tmp_path: Path) -> None:
    dataset = PictureDataset(write(tmp_path, 9, 8), resolution=16, shape=SHAPE)
    corners = [
        dataset.read_pictures(0, pick=0.0, flip=False, crop=Crop(0.999, y, x)).source.mean()
        for y in (0.0, 0.999)
        for x in (0.0, 0.999)
    ]
    assert len(set(corners)) == 4


def test_crops_change_with_the_epoch_and_with_nothing_else(tmp_path: Path) -> None:
    dataset = PictureDataset(write(tmp_path, 40, 40), resolution=16, shape=SHAPE)

    def read(*visits: Visit) -> torch.Tensor:
        return read_pictures(dataset, visits, 3, flips=False).source

    together = read(Visit(0, 0), Visit(1, 0), Visit(0, 1))
    assert torch.equal(together[1], read(Visit(1, 0))[0])
    assert not torch.equal(together[0], together[1])


def test_training_on_pictures_is_the_same_every_time(tmp_path: Path) -> None:
    dataset = PictureDataset(write(tmp_path, 16, 16), resolution=16, shape=SHAPE)
    config = TrainConfig(steps=2, batch_size=3, seed=1)
    runs = [
        [one.loss for one in train(tiny_stable_diffusion(), dataset.of("train"), config, readers=2)]
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert all(0.1 < loss < 10 for loss in runs[0])


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    broken = {"bytes": b"no picture", "path": None}
    dataset = PictureDataset(write(tmp_path, edited_image=broken), resolution=16, shape=SHAPE)
    with pytest.raises(DatasetError, match="edited_image of pair pair 0"):
        dataset.read_pictures(0, pick=0.0, flip=False, crop=CENTRE)
