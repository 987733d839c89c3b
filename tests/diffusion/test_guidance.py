from __future__ import annotations

import torch

from ip2p_ray.diffusion.guidance import one_scale, rescale, two_scale


def rows(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 2, 2, generator=generator)


def test_scales_belong_to_rows() -> None:
    guided = one_scale(rows(0), rows(1), torch.tensor([0.0, 1.0, 3.0]))
    torch.testing.assert_close(guided[0], rows(0)[0])
    torch.testing.assert_close(guided[1], rows(1)[1])
    torch.testing.assert_close(guided[2], rows(0)[2] + 3 * (rows(1)[2] - rows(0)[2]))


def test_both_scales_one_is_the_conditional_prediction() -> None:
    one = torch.ones(3)
    guided = two_scale(rows(0), rows(1), rows(2), image_scale=one, text_scale=one)
    torch.testing.assert_close(guided, rows(2))


def test_equal_scales_are_joint_guidance() -> None:
    scale = torch.tensor([0.5, 2.0, 7.0])
    guided = two_scale(rows(0), rows(1), rows(2), image_scale=scale, text_scale=scale)
    torch.testing.assert_close(guided, one_scale(rows(0), rows(2), scale))


def test_scales_below_one_follow_the_formula() -> None:
    guided = two_scale(
        rows(0),
        rows(1),
        rows(2),
        image_scale=torch.full((3,), 0.5),
        text_scale=torch.full((3,), 0.25),
    )
    expected = rows(0) + 0.5 * (rows(1) - rows(0)) + 0.25 * (rows(2) - rows(1))
    torch.testing.assert_close(guided, expected)


def test_rescale_takes_the_contrast_of_the_conditional() -> None:
    guided = 5 * rows(0)
    drawn = rescale(guided, rows(1), torch.tensor([0.0, 0.5, 1.0]))
    spread = [x.std(dim=(1, 2, 3)) for x in (guided, rows(1), drawn)]
    torch.testing.assert_close(drawn[0], guided[0])
    torch.testing.assert_close(spread[2][1], (spread[0][1] + spread[1][1]) / 2)
    torch.testing.assert_close(spread[2][2], spread[1][2])
