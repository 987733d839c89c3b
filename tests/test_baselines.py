import numpy as np
import pytest
import torch
from PIL import Image

from ip2p_ray.baselines import inverted, prompt_to_prompt, sdedit
from ip2p_ray.diffusion.sample import sample, text_to_image
from ip2p_ray.errors import ConfigError
from ip2p_ray.images import to_pil, to_tensor, to_uint8
from ip2p_ray.miniature.scenes import draw
from ip2p_ray.miniature.scores import edit_tasks
from ip2p_ray.miniature.weights import load_generator
from ip2p_ray.testing import tiny_stable_diffusion

CAPTIONS = ["a red cat", "a boat on the sea"]
EDITED = ["a blue cat", "a boat at night"]


@pytest.fixture(scope="module")
def model():
    return tiny_stable_diffusion()


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in CAPTIONS]


@torch.inference_mode()
def roundtrip(model, pictures):
    """The pictures as the autoencoder gives them back."""
    mean, _ = model.encode_image(torch.stack([to_tensor(picture) for picture in pictures]))
    return to_uint8(model.decode(mean * model.scaling_factor))


def edited(model, pictures, strength, seeds=(1, 2), **changes):
    options = {"steps": 10, "guidance_scale": 3.0, "sampler": "euler", **changes}
    return sdedit(model, pictures, EDITED, seeds, strength=strength, **options)


def gap(left, right):
    return np.abs(left.astype(int) - right.astype(int)).mean()


def test_less_strength_keeps_more(model, pictures):
    kept = roundtrip(model, pictures)
    gaps = [gap(edited(model, pictures, strength), kept) for strength in (0.1, 0.5, 1.0)]
    assert gaps[0] < gaps[1] < gaps[2]


def test_at_full_strength_the_picture_is_all_but_forgotten(model, pictures):
    drawn = text_to_image(
        model,
        EDITED,
        [1, 2],
        height=16,
        width=16,
        steps=10,
        guidance_scale=3.0,
        sampler="euler",
    )
    other = [picture.transpose(Image.Transpose.ROTATE_90) for picture in pictures]
    at_full = edited(model, pictures, 1.0)
    # the first noise level, 14.6, leaves a fifteenth of the picture
    assert gap(at_full, drawn) < gap(edited(model, pictures, 0.3), drawn)
    assert gap(at_full, edited(model, other, 1.0)) < gap(
        edited(model, pictures, 0.3), edited(model, other, 0.3)
    )


def test_rows_do_not_know_of_each_other(model, pictures):
    both = edited(model, pictures, 0.5, sampler="euler_ancestral")
    alone = sdedit(
        model,
        pictures[1:],
        EDITED[1:],
        [2],
        strength=0.5,
        steps=10,
        guidance_scale=3.0,
        sampler="euler_ancestral",
    )
    assert np.abs(both[1].astype(int) - alone[0].astype(int)).max() <= 1
    again = edited(model, pictures, 0.5, seeds=(1, 3), sampler="euler_ancestral")
    assert gap(again[1], both[1]) > 0


@pytest.mark.parametrize("strength", [0.0, 1.5])
def test_strength_is_a_share(model, pictures, strength):
    with pytest.raises(ConfigError, match="strength"):
        edited(model, pictures, strength)


@pytest.fixture(scope="module")
def drawn():
    """The miniature's generator, whose latents have unit variance, and pictures that it knows."""
    tasks = edit_tasks(2, 0)
    pictures = [to_pil(draw(task.scene)) for task in tasks]
    return load_generator(), pictures, [task.caption for task in tasks]


@torch.inference_mode()
def test_what_was_inverted_is_drawn_again_the_better_the_more_steps(drawn):
    model, pictures, captions = drawn
    mean, _ = model.encode_image(torch.stack([to_tensor(picture) for picture in pictures]))
    text = model.encode_text(captions)
    gaps = []
    for steps in (10, 80):
        x = inverted(model, pictures, captions, steps=steps)
        sigmas = model.schedule.sigmas(steps)
        again = sample(lambda x, sigma: model.denoise(x, sigma, text), x, sigmas, sampler="euler")
        gaps.append(float((again - mean * model.scaling_factor).abs().mean()))
        assert 0.4 < float(x.std() / sigmas[0]) < 1.2
    assert gaps[1] < 0.5 * gaps[0] < 0.1


def test_nothing_asked_is_nothing_changed(drawn):
    """With one caption for both pictures, attention is the same wherever it comes from."""
    model, pictures, captions = drawn
    free, held = (
        prompt_to_prompt(
            *(model, pictures, captions, captions),
            self_replace=share,
            steps=40,
            guidance_scale=1.0,
        )
        for share in (0.0, 1.0)
    )
    assert np.abs(free.astype(int) - held.astype(int)).max() <= 1
    assert gap(free, roundtrip(model, pictures)) < 4.0


def test_the_sources_attention_holds_the_picture(model, pictures):
    options = {"steps": 10, "guidance_scale": 3.0}
    free, held = (
        prompt_to_prompt(model, pictures, CAPTIONS, EDITED, self_replace=share, **options)
        for share in (0.0, 1.0)
    )
    assert gap(free, held) > 0
    alone = prompt_to_prompt(
        model, pictures[1:], CAPTIONS[1:], EDITED[1:], self_replace=1.0, **options
    )
    assert np.abs(held[1].astype(int) - alone[0].astype(int)).max() <= 1
