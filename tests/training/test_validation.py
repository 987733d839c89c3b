import torch

from ip2p_ray.latents import LatentDataset
from ip2p_ray.testing import tiny_stable_diffusion
from ip2p_ray.training.validation import validation_loss

MODEL = tiny_stable_diffusion(in_channels=8)


def test_the_same_weights_give_the_same_loss_whatever_the_batches(dataset: LatentDataset) -> None:
    def measured(groups: int, batch_size: int) -> float:
        return validation_loss(MODEL, MODEL.unet, dataset, groups=groups, batch_size=batch_size)

    torch.manual_seed(1)
    one = measured(10, 4)
    torch.manual_seed(2)
    assert measured(10, 4) == one
    assert abs(measured(99, 3) - one) < 1e-5
    assert measured(5, 4) != one
    assert not MODEL.unet.training


def test_other_weights_give_another_and_keep_their_mode(dataset: LatentDataset) -> None:
    other = tiny_stable_diffusion(seed=5, in_channels=8)
    other.unet.train()
    ours = validation_loss(MODEL, MODEL.unet, dataset, groups=4)
    assert validation_loss(other, other.unet, dataset, groups=4) != ours
    assert other.unet.training
    assert all(parameter.grad is None for parameter in other.unet.parameters())
