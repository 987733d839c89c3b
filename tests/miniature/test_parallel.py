"""Processes that share a batch train what one process would."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from ip2p_ray.miniature import parallel

WORK = """
import json
import torch
from torch import nn
from ip2p_ray.errors import ConfigError
from ip2p_ray.miniature import parallel
from ip2p_ray.miniature.fit import FitConfig, fit

def work(folder, started):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = nn.Linear(4, 1)
    drawn = torch.randn(20, 8, 4, generator=torch.Generator().manual_seed(1))

    def loss(step):
        count = parallel.share(8)
        x = drawn[step, parallel.rank() * count : (parallel.rank() + 1) * count]
        return (module(x) - x.sum(dim=1, keepdim=True)).square().mean(), {}

    told = parallel.agreed(parallel.rank() == 0)
    try:
        parallel.share(7)
        uneven = None
    except ConfigError as error:
        uneven = str(error)
    fit("toy", module, loss, FitConfig(steps=20, learning_rate=0.05, warmup=5), folder)
    parallel.meet()
    weights = [p.flatten().tolist() for p in module.parameters()]
    said = {"told": told, "uneven": uneven, "weights": weights}
    (folder / f"{started}-{parallel.rank()}.json").write_text(json.dumps(said))
"""


def test_a_single_process_is_alone() -> None:
    assert (parallel.rank(), parallel.count(), parallel.share(7)) == (0, 1, 7)
    assert parallel.agreed(True)
    assert not parallel.agreed(False)
    parallel.meet()


def test_two_processes_train_the_weights_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The processes are started afresh, so what they do must be importable by name.
    (tmp_path / "shared_batch.py").write_text(WORK, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    work = importlib.import_module("shared_batch").work
    found = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        parallel.run(count, work, folder, count)
        assert (folder / "toy.pt").exists()
        said = [json.loads((folder / f"{count}-{k}.json").read_text()) for k in range(count)]
        assert all(one["told"] for one in said)
        assert all(bool(one["uneven"]) == (count == 2) for one in said)
        assert all(one["weights"] == said[0]["weights"] for one in said)
        found[count] = torch.tensor(said[0]["weights"][0])
    torch.testing.assert_close(found[1], found[2], rtol=0.0, atol=1e-5)
