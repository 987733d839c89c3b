import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ip2p_ray.latents import LatentDataset

TRAIN = """
import sys
import torch
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from ip2p_ray.latents import LatentDataset
from ip2p_ray.testing import tiny_stable_diffusion
from ip2p_ray.training.loop import TrainConfig, start, train

shards, folder, rank, world_size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meet-{world_size}", rank=rank, world_size=world_size
)
config = TrainConfig(steps=4, batch_size=8, gradient_accumulation=2, max_grad_norm=1.0)
model = tiny_stable_diffusion()
state = start(model, config)
loop = train(
    model,
    LatentDataset(shards),
    config,
    rank=rank,
    world_size=world_size,
    wrap=DistributedDataParallel,
    state=state,
)
losses = torch.tensor([metrics.loss for metrics in loop])
save_file({"losses": losses, **state.tensors()["ema"]}, f"{folder}/{rank}-of-{world_size}")
torch.distributed.destroy_process_group()
"""


def run(shards: Path, folder: Path, world_size: int) -> list[dict[str, torch.Tensor]]:
    """What each rank of a real process group ended with."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(shards), str(folder), str(rank), str(world_size)]
        )
        for rank in range(world_size)
    ]
    assert [rank.wait(timeout=250) for rank in ranks] == [0] * world_size
    return [load_file(folder / f"{rank}-of-{world_size}") for rank in range(world_size)]


@pytest.mark.slow
def test_two_processes_train_as_one(dataset: LatentDataset, shards: Path, tmp_path: Path) -> None:
    (one,) = run(shards, tmp_path, 1)
    first, second = run(shards, tmp_path, 2)
    assert len(dataset) == 10
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert torch.allclose(value, one[name], rtol=1e-3, atol=1e-4), name
