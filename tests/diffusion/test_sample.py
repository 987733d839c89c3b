from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.diffusion.noise import row_generators, row_noise
from ip2p_ray.diffusion.sample import (
    Sampler,
    dpmpp_2m_step,
    euler_ancestral_step,
    euler_step,
    sample,
    text_to_image,
)
from ip2p_ray.errors import ConfigError
from ip2p_ray.testing import tiny_scheduler_config, tiny_stable_diffusion

# diffusers' schedulers turn tensors into arrays in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SAMPLERS: tuple[Sampler, ...] = ("euler", "euler_ancestral", "dpmpp_2m")
SCHEDULERS = {
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}
CAPTIONS = ["a cat on the mat", "a photo of a boat"]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def model(request: pytest.FixtureRequest) -> StableDiffusion:
    return tiny_stable_diffusion(prediction_type=request.param)


def diffusers_run(
    model: StableDiffusion, sampler: str, x: Tensor, sigmas: Tensor, text: Tensor, seeds: list[int]
) -> Tensor:
    """The loop of a diffusers pipeline, one row at a time, with these noise levels."""
    generators = row_generators(seeds)
    row_noise(generators, x.shape[1:])
    finals = []
    for row in range(x.shape[0]):
        scheduler = SCHEDULERS[sampler].from_config(
            tiny_scheduler_config(model.schedule.prediction_type)
        )
        scheduler.set_timesteps(len(sigmas) - 1)
        scheduler.sigmas = sigmas.clone()
        scheduler.timesteps = model.schedule.timestep(sigmas[:-1]) + torch.arange(
            len(sigmas) - 1
        ).mul(1e-6)
        # DPM-Solver's scheduler keeps latents at unit scale, the Euler ones at noise scale
        unit = (1 + sigmas[0] ** 2).sqrt() if sampler == "dpmpp_2m" else torch.tensor(1.0)
        latents = x[row : row + 1] / unit
        for step, timestep in enumerate(scheduler.timesteps):
            inputs = scheduler.scale_model_input(latents, timestep)
            output = model.unet(inputs, model.schedule.timestep(sigmas[step]), text[row : row + 1])
            latents = scheduler.step(
                output.sample, timestep, latents, generator=generators[row], return_dict=False
            )[0]
        finals.append(latents)
    return torch.cat(finals)


@pytest.mark.parametrize("steps", [2, 8])
@pytest.mark.parametrize("sampler", SAMPLERS)
@torch.inference_mode()
def test_a_whole_run_agrees_with_diffusers(
    model: StableDiffusion, sampler: Sampler, steps: int
) -> None:
    seeds = [3, 4]
    sigmas = model.schedule.sigmas(steps)
    text = model.encode_text(CAPTIONS)
    generators = row_generators(seeds)
    x = row_noise(generators, (4, 8, 6)) * sigmas[0]
    ours = sample(
        lambda x, sigma: model.denoise(x, sigma, text),
        x,
        sigmas,
        sampler=sampler,
        generators=generators,
    )
    theirs = diffusers_run(model, sampler, x, sigmas, text, seeds)
    unit = max(1.0, theirs.std().item())
    assert (ours - theirs).abs().max().item() <= 1e-4 * unit


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rows_at_different_steps_come_out_as_alone(sampler: Sampler) -> None:
    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(x / (1 + sigma.reshape(-1, 1, 1, 1)))

    generator = torch.Generator().manual_seed(0)
    x = 5 * torch.randn(3, 4, 4, 4, generator=generator)
    levels = torch.tensor([[9.0, 4.0, 1.0, 0.0], [3.0, 2.0, 0.5, 0.1], [1.0, 0.0, 0.0, 0.0]])
    seeds = [1, 2, 3]
    together = sample(denoise, x, levels, sampler=sampler, generators=row_generators(seeds))
    assert torch.isfinite(together).all()
    for row, seed in enumerate(seeds):
        one = sample(
            denoise,
            x[row : row + 1],
            levels[row],
            sampler=sampler,
            generators=row_generators([seed]),
        )
        assert torch.equal(together[row], one[0])
    short = sample(
        denoise, x[2:], levels[2, :2], sampler=sampler, generators=row_generators([seeds[2]])
    )
    assert torch.equal(together[2], short[0])


STEPS: dict[str, Callable[..., Tensor]] = {
    "euler": lambda x, d, s, n: euler_step(x, d, s, n),
    "euler_ancestral": lambda x, d, s, n: euler_ancestral_step(x, d, s, n, torch.ones_like(x)),
    "dpmpp_2m": lambda x, d, s, n: dpmpp_2m_step(x, d, s, n, 7 * d, 2 * s),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_last_step_gives_the_denoised_image_and_then_rests(name: str) -> None:
    x, denoised = torch.full((3, 1, 2, 2), 4.0), torch.full((3, 1, 2, 2), 0.5)
    sigma, sigma_next = torch.tensor([2.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 1.0])
    moved = STEPS[name](x, denoised, sigma, sigma_next)
    assert torch.isfinite(moved).all()
    assert torch.equal(moved[0], denoised[0])
    assert torch.equal(moved[1], x[1])
    assert not torch.equal(moved[2], x[2])


def test_ancestral_step_by_hand() -> None:
    x, denoised = torch.full((1, 1, 1, 1), 6.0), torch.zeros(1, 1, 1, 1)
    noise = torch.ones_like(x)
    two, one = torch.tensor([2.0]), torch.tensor([1.0])
    up = (3 / 4) ** 0.5
    moved = euler_ancestral_step(x, denoised, two, one, noise)
    assert moved.item() == pytest.approx(6 * 0.5 / 2 + up)
    plain = euler_ancestral_step(x, denoised, two, one, noise, eta=0.0)
    assert torch.equal(plain, euler_step(x, denoised, two, one))


def test_second_order_step_by_hand_and_first_step_without_history() -> None:
    x, denoised = torch.full((2, 1, 1, 1), 8.0), torch.full((2, 1, 1, 1), 2.0)
    previous = torch.full((2, 1, 1, 1), 1.0)
    four, two = torch.full((2,), 4.0), torch.full((2,), 2.0)
    before = torch.tensor([16.0, float("inf")])
    moved = dpmpp_2m_step(x, denoised, four, two, previous, before)
    # log(4 / 2) is half of log(16 / 4): a quarter of the last change is added
    assert moved[0].item() == pytest.approx(0.5 * 8 + 0.5 * 2.25)
    assert moved[1].item() == pytest.approx(0.5 * 8 + 0.5 * 2)


def test_after_step_may_change_the_latents() -> None:
    seen: list[int] = []

    def after(step: int, x: Tensor) -> Tensor:
        seen.append(step)
        return x + 1

    x = torch.zeros(1, 1, 2, 2)
    final = sample(
        lambda x, _: x, x, torch.tensor([2.0, 1.0, 0.0]), sampler="euler", after_step=after
    )
    assert seen == [0, 1]
    assert torch.equal(final, torch.full_like(x, 2.0))


def test_wrong_arguments_are_refused() -> None:
    x, sigmas = torch.zeros(1, 1, 2, 2), torch.tensor([2.0, 1.0, 0.0])
    with pytest.raises(ConfigError, match="heun"):
        sample(lambda x, _: x, x, sigmas, sampler="heun")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="generator"):
        sample(lambda x, _: x, x, sigmas, sampler="euler_ancestral")
    with pytest.raises(ConfigError, match="one seed a caption"):
        text_to_image(tiny_stable_diffusion(), ["a cat"], [1, 2], height=16, width=16)


@pytest.mark.filterwarnings("ignore")
def test_pictures_are_those_of_the_diffusers_pipeline(
    model: StableDiffusion, tmp_path: Path
) -> None:
    model.save(tmp_path / "model")
    kind: Any = StableDiffusionPipeline
    pipeline = kind.from_pretrained(tmp_path / "model", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        CAPTIONS,
        height=16,
        width=24,
        num_inference_steps=6,
        guidance_scale=5.0,
        generator=row_generators([5, 6]),
        output_type="np",
    ).images
    ours = text_to_image(model, CAPTIONS, [5, 6], height=16, width=24, steps=6, guidance_scale=5.0)
    assert ours.shape == (2, 16, 24, 3)
    assert ours.dtype == np.uint8
    # the schedules interpolate differently between timesteps, by 9e-5
    assert np.abs(ours - 255.0 * theirs).max() <= 1.0


def test_a_picture_does_not_depend_on_its_neighbours() -> None:
    model = tiny_stable_diffusion()
    options: dict[str, Any] = {"height": 16, "width": 16, "steps": 6}
    both = text_to_image(model, CAPTIONS, [5, 6], guidance_scale=[3.0, 9.0], **options)
    alone = text_to_image(model, CAPTIONS[1:], [6], guidance_scale=9.0, **options)
    assert np.abs(both[1].astype(int) - alone[0].astype(int)).max() <= 1
