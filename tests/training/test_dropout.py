import numpy as np
import pytest
import torch

from ip2p_ray.training.dropout import drop_images, drop_instructions, dropout_masks
from ip2p_ray.training.feed import Visit, draw


def test_one_draw_decides_both() -> None:
    uniforms = torch.tensor([0.0, 0.049, 0.05, 0.099, 0.1, 0.149, 0.151, 0.9], dtype=torch.float64)
    text, image = dropout_masks(uniforms)
    assert text.tolist() == [True, True, True, True, False, False, False, False]
    assert image.tolist() == [False, False, True, True, True, True, False, False]


def test_frequencies_over_an_epoch() -> None:
    count = 10_000
    draws = [draw(1, Visit(0, 0), f"key {i}", (1, 1, 1)).dropout for i in range(count)]
    text, image = dropout_masks(torch.tensor(draws, dtype=torch.float64))
    shares = [text & ~image, text & image, ~text & image, ~text & ~image]
    for share, expected in zip(shares, (0.05, 0.05, 0.05, 0.85), strict=True):
        error = 4 * np.sqrt(expected * (1 - expected) / count)
        assert abs(share.double().mean().item() - expected) < error


def test_rate_0_drops_nothing_and_a_third_everything() -> None:
    uniforms = torch.rand(100, dtype=torch.float64)
    assert not torch.stack(dropout_masks(uniforms, 0.0)).any()
    assert torch.stack(dropout_masks(uniforms, 1 / 3)).any(0).all()


@pytest.mark.parametrize("rate", [-0.1, 0.34, float("nan")])
def test_impossible_rates(rate: float) -> None:
    with pytest.raises(ValueError, match="dropout rate"):
        dropout_masks(torch.zeros(1), rate)


def test_nulls_are_the_empty_text_and_zeros() -> None:
    dropped = torch.tensor([True, False])
    assert drop_instructions(["a", "b"], dropped) == ["", "b"]
    latents = torch.tensor([float("nan"), 2.0])[:, None, None, None].expand(2, 4, 8, 8)
    kept = drop_images(latents, dropped)
    assert not kept[0].any()
    assert torch.equal(kept[1], latents[1])


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="3 instructions but 2 rows"):
        drop_instructions(["a", "b", "c"], torch.tensor([True, False]))
