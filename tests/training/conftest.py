from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p_ray.latents import LatentDataset, encode_pairs
from ip2p_ray.schema import LATENTS
from ip2p_ray.testing import tiny_stable_diffusion


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten groups of one to three pairs of noise pictures, encoded."""
    random = np.random.default_rng(0)
    source, edited = random.integers(0, 256, (2, 20, 16, 16, 3), dtype=np.uint8)
    rows = [
        {
            "pair_key": f"pair {number:02}",
            "triplet_key": f"triplet {number % 10 if number < 16 else number - 16}",
            "instruction": f"make it {'red' if number % 2 else 'blue'} {number % 10}",
            "split": "train",
            **arrays,
        }
        for number, arrays in enumerate(encode_pairs(tiny_stable_diffusion(), source, edited))
    ]
    folder: Path = tmp_path_factory.mktemp("latents")
    pq.write_table(pa.Table.from_pylist(rows, schema=LATENTS), folder / "shard.parquet")
    return folder


@pytest.fixture(scope="session")
def dataset(shards: Path) -> LatentDataset:
    """The pairs of `shards`."""
    return LatentDataset(shards)
