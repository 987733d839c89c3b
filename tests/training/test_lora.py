import dataclasses

import torch

from ip2p_ray.checkpoint import load_checkpoint, save_checkpoint
from ip2p_ray.latents import LatentDataset
from ip2p_ray.testing import tiny_stable_diffusion
from ip2p_ray.training.loop import TrainConfig, start, train
from ip2p_ray.training.lora import merged

CONFIG = TrainConfig(steps=3, batch_size=4, learning_rate=1e-2, lora_rank=2, ema_decay=0.5)


def test_additions_begin_as_nothing_and_the_same_everywhere() -> None:
    plain, one, two = (tiny_stable_diffusion(in_channels=8) for _ in range(3))
    torch.manual_seed(1)
    start(one, CONFIG)
    torch.manual_seed(2)
    start(two, CONFIG)
    inputs = torch.randn(2, 8, 8, 8), torch.tensor([3, 700])
    text = torch.randn(2, 16, 24)
    with torch.no_grad():
        found = [
            model.unet(*inputs, encoder_hidden_states=text).sample for model in (plain, one, two)
        ]
    assert torch.allclose(found[0], found[1], atol=1e-6)
    for ours, theirs in zip(one.unet.parameters(), two.unet.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_only_additions_and_the_first_layer_learn_and_merge(dataset: LatentDataset) -> None:
    model = tiny_stable_diffusion()
    state = start(model, CONFIG)
    before = {name: one.detach().clone() for name, one in model.unet.named_parameters()}
    list(train(model, dataset, CONFIG, state=state))
    changed = {
        name for name, one in model.unet.named_parameters() if not torch.equal(one, before[name])
    }
    assert {"conv_in.weight", "conv_in.bias"} < changed
    assert all("lora_" in name for name in changed - {"conv_in.weight", "conv_in.bias"})
    inputs = torch.randn(2, 8, 8, 8), torch.tensor([3, 700])
    text = torch.randn(2, 16, 24)
    whole = merged(model.unet)
    with torch.no_grad():
        apart = (
            whole(*inputs, encoder_hidden_states=text).sample
            - model.unet(*inputs, encoder_hidden_states=text).sample
        )
    assert apart.abs().max() < 1e-5
    plain = tiny_stable_diffusion(in_channels=8).unet
    assert whole.state_dict().keys() == plain.state_dict().keys()


def test_a_checkpoint_holds_what_learns_and_goes_on(dataset: LatentDataset, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = tiny_stable_diffusion()
    state = start(model, CONFIG)
    loop = train(model, dataset, CONFIG, state=state)
    next(loop)
    folder = save_checkpoint(tmp_path, state)
    rest = [metrics.loss for metrics in loop]
    fresh = tiny_stable_diffusion()
    resumed = start(fresh, dataclasses.replace(CONFIG))
    load_checkpoint(folder, resumed)
    assert [one.loss for one in train(fresh, dataset, CONFIG, state=resumed)] == rest
    assert all("lora_" in name or "conv_in" in name for name in state.tensors()["unet"])
