"""The small training loop resumes where it stopped."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ip2p_ray.miniature.fit import FitConfig, fit


class StoppedError(Exception):
    pass


def run(folder: Path, *, stop_at: int | None = None) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    losses: list[float] = []

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        if step == stop_at:
            raise StoppedError
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        value = (module(x) - x.sum(dim=1, keepdim=True)).square().mean()
        losses.append(float(value.detach()))
        return value, {}

    fit(
        "toy",
        module,
        loss,
        FitConfig(steps=20, learning_rate=0.05, warmup=5, save_every_s=0),
        folder,
    )
    return module, losses


def test_a_stopped_run_continues_to_the_same_weights(tmp_path: Path) -> None:
    whole, losses = run(tmp_path / "whole")
    try:
        run(tmp_path / "stopped", stop_at=11)
        raise AssertionError("the run was not stopped")
    except StoppedError:
        pass
    resumed, rest = run(tmp_path / "stopped")
    assert rest == losses[11:]
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert losses[-1] < losses[0]
