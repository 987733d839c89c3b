import pytest
import torch
from torch import nn

from ip2p_ray.training.ema import Ema, ema_horizon, ramped_decay


def test_ramp_is_the_references() -> None:
    assert ramped_decay(0.9999, 1) == 2 / 11
    assert ramped_decay(0.9999, 89_989) < 0.9999
    assert ramped_decay(0.9999, 89_990) == 0.9999


def test_horizon() -> None:
    assert ema_horizon(0.9996) == pytest.approx(2500)
    assert ema_horizon(0.9999, 10_000) == ema_horizon(0.9996, 10_000) == pytest.approx(10_010 / 9)
    assert ema_horizon(0.9996, 22_500) == pytest.approx(2500)


def test_by_hand() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    ema = Ema(module, 0.25)
    assert ema.shadow["weight"].item() == 1.0
    nn.init.constant_(module.weight, 3.0)
    assert ema.update(module) == 2 / 11
    first = 1.0 * 2 / 11 + 3.0 * 9 / 11
    assert ema.shadow["weight"].item() == pytest.approx(first)
    assert ema.update(module) == 0.25
    assert ema.shadow["weight"].item() == pytest.approx(first * 0.25 + 3.0 * 0.75)
    assert ema.updates == 2


def test_starts_from_the_weights_without_sharing_them() -> None:
    module = nn.Linear(3, 2)
    ema = Ema(module, 0.9)
    before = module.weight.detach().clone()
    nn.init.zeros_(module.weight)
    assert torch.equal(ema.shadow["weight"], before)


def test_is_float32_whatever_the_weights() -> None:
    module = nn.Linear(3, 2).to(torch.bfloat16)
    ema = Ema(module, 0.9)
    ema.update(module)
    assert {value.dtype for value in ema.shadow.values()} == {torch.float32}


def test_applied_only_inside_the_block() -> None:
    module = nn.Linear(3, 2)
    ema = Ema(module, 0.9)
    average, own = module.weight.detach().clone(), torch.ones(2, 3)
    nn.init.ones_(module.weight)
    with ema.applied_to(module):
        assert torch.equal(module.weight, average)
    assert torch.equal(module.weight, own)


def test_own_weights_come_back_after_an_error() -> None:
    module = nn.Linear(3, 2)
    ema = Ema(module, 0.9)
    nn.init.ones_(module.weight)

    def fail() -> None:
        with ema.applied_to(module):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.equal(module.weight, torch.ones(2, 3))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_impossible_decays(decay: float) -> None:
    with pytest.raises(ValueError, match="ema decay"):
        Ema(nn.Linear(1, 1), decay)
