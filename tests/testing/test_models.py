from __future__ import annotations

import pytest
import torch

from ip2p_ray.testing import WORDS, tiny_stable_diffusion, tiny_tokenizer


def test_known_words_are_one_token_and_chinchilla_three() -> None:
    tokenizer = tiny_tokenizer()
    for word in WORDS:
        assert tokenizer.tokenize(word) == [word + "</w>"]
    assert tokenizer.tokenize("chinchilla") == ["chin", "chi", "lla</w>"]
    assert tokenizer.model_max_length == 16


@pytest.mark.parametrize(
    ("latent_channels", "in_channels", "takes_image"),
    [(4, None, False), (4, 8, True), (16, None, False), (16, 32, True)],
)
def test_models_of_any_latent_channels(
    latent_channels: int, in_channels: int | None, takes_image: bool
) -> None:
    model = tiny_stable_diffusion(latent_channels=latent_channels, in_channels=in_channels)
    assert model.latent_channels == latent_channels
    assert model.takes_image == takes_image


def test_weights_follow_the_seed_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = (tiny_stable_diffusion(seed=1).fingerprint() for _ in range(2))
    assert first == second
    assert torch.equal(torch.rand(3), expected)
