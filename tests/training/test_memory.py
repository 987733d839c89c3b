import dataclasses
from typing import Any

import pytest
import torch

from ip2p_ray.testing import tiny_stable_diffusion
from ip2p_ray.training.loop import TrainConfig
from ip2p_ray.training.memory import MARGIN, MemoryPlan, _Counted, memory_plan

MODEL = tiny_stable_diffusion()
CONFIG = TrainConfig(steps=1)


def plan(
    micro_batch: int = 4,
    workers: int = 1,
    accumulates: bool = False,
    encoder: torch.nn.Module | None = None,
    device: str = "cpu",
    **settings: object,
) -> MemoryPlan:
    config = dataclasses.replace(CONFIG, **settings)  # type: ignore[arg-type]
    return memory_plan(
        MODEL.unet,
        config,
        latent=(16, 16),
        text=(16, 24),
        micro_batch=micro_batch,
        frozen=1000,
        workers=workers,
        accumulates=accumulates,
        encoder=encoder,
        device=device,
    )


def test_tensors_are_counted_while_they_live() -> None:
    with _Counted() as held:
        one = torch.empty(1000)
        two = one.view(10, 100) + 1.0
        assert held.held == 8000
        del one
        assert held.held == 4000
        three = two.double()
        assert held.held == held.most == 12000
        del two, three
    assert (held.held, held.most) == (0, 12000)


def test_weights_and_optimizer_are_exact() -> None:
    found = plan(workers=2)
    wide = tiny_stable_diffusion(in_channels=8).unet
    weights = sum(parameter.numel() for parameter in wide.parameters()) * 4
    assert found.weights == found.average == found.exchanged == weights
    assert found.optimizer == 2 * weights
    assert plan().exchanged == 0
    assert found.step > weights, "gradients are as large"
    assert found.need == int(MARGIN * (5 * weights + found.frozen + found.step))


def test_a_step_grows_with_the_micro_batch_and_shrinks_with_what_spares_it() -> None:
    four, eight = plan(4), plan(8)
    assert 1.7 * four.step < eight.step < 2.1 * four.step
    assert plan(4, gradient_checkpointing=True).step < 0.6 * four.step
    assert plan(4, bf16=True).step < 0.8 * four.step
    # CUDA's autocast computes norms in float32, and keeps what goes into them (LOG.md, 2026-11-27)
    assert plan(4, bf16=True).step < plan(4, bf16=True, device="cuda").step < four.step
    assert plan(4, device="cuda").step == four.step
    small = plan(4, lora_rank=2)
    assert small.optimizer < 0.2 * four.optimizer
    assert small.weights > four.weights


def test_the_reckoned_step_is_that_of_a_real_one() -> None:
    """Counted by the same means on tensors that are really there."""
    unet = tiny_stable_diffusion(in_channels=8).unet.train()
    most = []
    with _Counted() as held:
        for _ in range(2):
            x, text = torch.randn(4, 8, 16, 16), torch.randn(4, 16, 24)
            timesteps = torch.zeros(4, dtype=torch.long)
            found = unet(x, timesteps, encoder_hidden_states=text, return_dict=False)[0]
            found.float().square().mean().backward()
            del found
            most.append(held.most)
    once, again = plan(4).step, plan(4, accumulates=True).step
    assert once < again
    assert most == pytest.approx([once, again], rel=0.05)


def test_encoding_pictures_may_take_the_most() -> None:
    assert plan(1, encoder=MODEL.vae).step == plan(1).step
    large: Any = type(MODEL.vae).from_config({**MODEL.vae.config, "block_out_channels": (512, 512)})
    with _Counted() as held, torch.no_grad():
        large.encode(torch.randn(1, 3, 32, 32))
    gradients = sum(p.numel() for p in tiny_stable_diffusion(in_channels=8).unet.parameters()) * 4
    assert held.most > plan(1).step
    assert plan(1, encoder=large).step == pytest.approx(gradients + held.most, rel=0.05)


def test_the_line_names_the_parts() -> None:
    line = plan().line()
    assert "gradients and activations of 4 samples" in line
    assert "exchange" not in line
