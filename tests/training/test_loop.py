import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import ConfigError, Ip2pError
from ip2p_ray.latents import LatentDataset
from ip2p_ray.testing import tiny_stable_diffusion
from ip2p_ray.training.loop import Metrics, TrainConfig, learning_rate, start, train
from ip2p_ray.training.state import TrainState

Run = tuple[list[Metrics], TrainState]
CONFIG = TrainConfig(steps=4, batch_size=4, learning_rate=1e-3, seed=7)


def run(
    dataset: LatentDataset, config: TrainConfig = CONFIG, model: StableDiffusion | None = None
) -> Run:
    model = model or tiny_stable_diffusion()
    state = start(model, config)
    return list(train(model, dataset, config, state=state)), state


@pytest.fixture(scope="module")
def plain(dataset: LatentDataset) -> Run:
    """The run of CONFIG."""
    return run(dataset)


def losses(metrics: Sequence[Metrics]) -> list[float]:
    return [row.loss for row in metrics]


def assert_same(one: TrainState, other: TrainState) -> None:
    for part, tensors in one.tensors().items():
        others = other.tensors()[part]
        assert tensors.keys() == others.keys()
        for name, value in tensors.items():
            assert torch.equal(value, others[name]), (part, name)
    assert one.facts() == other.facts()


def distance(one: TrainState, other: TrainState) -> float:
    pairs = zip(one.unet.parameters(), other.unet.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def test_metrics(plain: Run) -> None:
    metrics, state = plain
    assert [row.step for row in metrics] == [1, 2, 3, 4]
    assert metrics[-1].epoch == pytest.approx(16 / 10)
    assert {row.learning_rate for row in metrics} == {1e-3}
    assert metrics[0].ema_decay == 2 / 11
    assert all(0.3 < row.loss < 3 and row.grad_norm > 0 and row.seconds > 0 for row in metrics)
    assert (state.step, state.ema.updates) == (4, 4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_learns_to_denoise(dataset: LatentDataset, prediction_type: str) -> None:
    config = dataclasses.replace(CONFIG, steps=18, batch_size=8, learning_rate=5e-3)
    metrics, state = run(dataset, config, tiny_stable_diffusion(prediction_type=prediction_type))
    first, last = losses(metrics[:6]), losses(metrics[-6:])
    assert sum(last) < 0.9 * sum(first)
    assert dict(state.unet.named_parameters())["conv_in.weight"][:, 4:].any()


def test_same_seed_same_run(dataset: LatentDataset, plain: Run) -> None:
    (one, state), (two, again) = plain, run(dataset)
    assert losses(one) == losses(two)
    assert_same(state, again)
    other, _ = run(dataset, dataclasses.replace(CONFIG, seed=8))
    assert losses(one) != losses(other)


RESUMED = dataclasses.replace(CONFIG, gradient_accumulation=2, max_grad_norm=0.5, warmup_steps=3)


@pytest.fixture(scope="module")
def undisturbed(dataset: LatentDataset) -> Run:
    """The run of RESUMED."""
    return run(dataset, RESUMED)


@pytest.mark.parametrize("stop", [1, 3])
def test_resume_is_bit_exact(dataset: LatentDataset, undisturbed: Run, stop: int) -> None:
    whole, expected = undisturbed
    model = tiny_stable_diffusion()
    state = start(model, RESUMED)
    loop = train(model, dataset, RESUMED, state=state)
    before = [next(loop) for _ in range(stop)]
    saved = copy.deepcopy((state.tensors(), state.facts()))
    next(loop, None)  # goes on, and must not touch what was saved

    fresh = tiny_stable_diffusion(seed=99)
    fresh.text_encoder, fresh.vae = model.text_encoder, model.vae
    resumed = start(fresh, RESUMED)
    resumed.restore(*saved)
    after = list(train(fresh, dataset, RESUMED, state=resumed))
    assert losses(before + after) == losses(whole)
    assert [row.grad_norm for row in before + after] == [row.grad_norm for row in whole]
    assert_same(resumed, expected)


def test_ranks_with_uneven_shares_take_the_same_step_as_one(dataset: LatentDataset) -> None:
    """Seven samples on three ranks, two at a time: every sample counts the same."""
    config = dataclasses.replace(CONFIG, steps=1, batch_size=7)
    found: list[dict[str, torch.Tensor]] = []
    ranks: list[float] = []
    for rank, world_size, micro_batch in ((0, 1, 7), (0, 3, 2), (1, 3, 2), (2, 3, 2)):
        model = tiny_stable_diffusion()
        state = start(model, config)
        gradients = found_gradients(state.unet)
        shared = {"rank": rank, "world_size": world_size, "micro_batch": micro_batch}
        metrics = list(train(model, dataset, config, state=state, **shared))
        found.append(gradients)
        ranks += losses(metrics)
    assert sum(ranks[1:]) / 3 == pytest.approx(ranks[0], rel=1e-5)
    for name, whole in found[0].items():
        mean = sum(one[name] for one in found[1:]) / 3
        assert torch.allclose(mean, whole, rtol=1e-3, atol=1e-5), name


def test_ranks_take_the_same_step_as_one(dataset: LatentDataset) -> None:
    """The gradients of two ranks' halves average to those of the whole batch."""
    config = dataclasses.replace(CONFIG, steps=1)
    found: list[dict[str, torch.Tensor]] = []
    ranks: list[float] = []
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        model = tiny_stable_diffusion()
        state = start(model, config)
        gradients = found_gradients(state.unet)
        metrics = list(train(model, dataset, config, rank=rank, world_size=world_size, state=state))
        found.append(gradients)
        ranks += losses(metrics)
    assert (ranks[1] + ranks[2]) / 2 == pytest.approx(ranks[0], rel=1e-5)
    assert ranks[1] != ranks[2]
    for name, whole in found[0].items():
        mean = (found[1][name] + found[2][name]) / 2
        assert torch.allclose(mean, whole, rtol=1e-3, atol=1e-5), name


def found_gradients(unet: nn.Module) -> dict[str, torch.Tensor]:
    """Filled with every parameter's gradient by the next backward pass."""
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in unet.named_parameters():

        def keep(tensor: torch.Tensor, name: str = name) -> None:
            assert tensor.grad is not None
            gradients[name] = tensor.grad.clone()

        parameter.register_post_accumulate_grad_hook(keep)  # type: ignore[no-untyped-call]
    return gradients


def test_accumulation_is_the_same_step(dataset: LatentDataset, plain: Run) -> None:
    whole, one = plain
    split, two = run(dataset, dataclasses.replace(CONFIG, gradient_accumulation=4))
    assert losses(split) == pytest.approx(losses(whole), rel=1e-4)
    assert distance(one, two) < 2e-3


def test_gradient_checkpointing_changes_no_bit(dataset: LatentDataset, plain: Run) -> None:
    whole, one = plain
    checkpointed, two = run(dataset, dataclasses.replace(CONFIG, gradient_checkpointing=True))
    assert losses(whole) == losses(checkpointed)
    assert_same(one, two)


def test_channels_last_is_the_same_run(dataset: LatentDataset, plain: Run) -> None:
    other, state = run(dataset, dataclasses.replace(CONFIG, channels_last=True))
    assert losses(other) == pytest.approx(losses(plain[0]), rel=1e-3)
    weight = dict(state.unet.named_parameters())["conv_in.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_bf16_keeps_float32_weights(dataset: LatentDataset, plain: Run) -> None:
    metrics, state = run(dataset, dataclasses.replace(CONFIG, steps=2, bf16=True))
    expected = losses(plain[0])[:2]
    assert losses(metrics) == pytest.approx(expected, rel=0.05)
    assert losses(metrics) != expected
    assert {p.dtype for p in state.unet.parameters()} == {torch.float32}


def test_half_precision_weights_become_float32_masters() -> None:
    model = tiny_stable_diffusion()
    nn.Module.to(model.unet, torch.bfloat16)
    state = start(model, CONFIG)
    assert {p.dtype for p in state.unet.parameters()} == {torch.float32}
    assert state.unet is model.unet


def test_only_the_unet_learns(dataset: LatentDataset) -> None:
    model = tiny_stable_diffusion()
    frozen = copy.deepcopy((model.vae.state_dict(), model.text_encoder.state_dict()))
    run(dataset, model=model)
    for before, part in zip(frozen, (model.vae, model.text_encoder), strict=True):
        assert all(torch.equal(before[name], value) for name, value in part.state_dict().items())
    assert model.takes_image


def test_an_editor_can_be_trained_further(dataset: LatentDataset) -> None:
    config = dataclasses.replace(CONFIG, steps=1)
    metrics, _ = run(dataset, config, tiny_stable_diffusion(in_channels=8))
    assert len(metrics) == 1


class Wrapper(nn.Module):
    """Stands where DistributedDataParallel would, and counts."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.calls, self.unsynchronised = module, 0, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.module(*args, **kwargs)

    def no_sync(self) -> "Wrapper":
        return self

    def __enter__(self) -> None:
        self.unsynchronised += 1

    def __exit__(self, *error: object) -> None:
        pass


def test_wrapped_and_synchronised_once_a_step(dataset: LatentDataset) -> None:
    config = dataclasses.replace(CONFIG, steps=1, gradient_accumulation=4)
    wrappers: list[Wrapper] = []

    def wrap(module: nn.Module) -> nn.Module:
        wrappers.append(Wrapper(module))
        return wrappers[-1]

    model = tiny_stable_diffusion()
    wrapped = list(train(model, dataset, config, wrap=wrap))
    assert (wrappers[0].calls, wrappers[0].unsynchronised) == (4, 3)
    assert losses(wrapped) == losses(run(dataset, config)[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.timeout(900)
def test_a_compiled_unet_trains_as_the_eager_one(dataset: LatentDataset, plain: Run) -> None:
    """Traced and differentiated by the compiler; that its kernels are right is its own business."""

    def compiled(unet: nn.Module) -> Any:
        return torch.compile(unet, backend="aot_eager")

    model = tiny_stable_diffusion()
    state = start(model, CONFIG)
    found = losses(list(train(model, dataset, CONFIG, state=state, wrap=compiled)))
    assert found == pytest.approx(losses(plain[0]), rel=1e-4)
    assert distance(state, plain[1]) < 1e-3


def test_a_loss_that_is_not_finite_stops_before_the_step(dataset: LatentDataset) -> None:
    model = tiny_stable_diffusion()
    state = start(model, CONFIG)
    loop = train(model, dataset, CONFIG, state=state)
    next(loop)
    with torch.no_grad():
        dict(model.unet.named_parameters())["conv_out.bias"].fill_(float("inf"))
    with pytest.raises(Ip2pError, match="loss is inf at step 2"):
        next(loop)
    assert state.step == 1
    assert all(bool(value.isfinite().all()) for value in state.ema.shadow.values())


def test_a_gradient_that_is_not_finite_stops_before_the_step(dataset: LatentDataset) -> None:
    """The loss is one step behind: it would be finite, and a checkpoint saved meanwhile broken."""
    model = tiny_stable_diffusion()
    state = start(model, CONFIG)
    loop = train(model, dataset, CONFIG, state=state)
    next(loop)
    state.unet.conv_out.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(Ip2pError, match=r"norm of the gradient is .* at step 2"):
        next(loop)
    assert state.step == 1
    for value in (*state.ema.shadow.values(), *state.unet.parameters()):
        assert bool(value.isfinite().all())


def test_another_run_is_not_resumed(dataset: LatentDataset, plain: Run) -> None:
    state = plain[1]
    saved = (state.tensors(), state.facts())
    changes = {"seed": {"seed": 8}, "batch_size": {"batch_size": 5}}
    for name, change in changes.items():
        other = start(tiny_stable_diffusion(), dataclasses.replace(CONFIG, **change))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=f"{name} it began with"):
            other.restore(*saved)
    other = start(tiny_stable_diffusion(), CONFIG)
    facts = {**saved[1], "run": {**saved[1]["run"], "dataset": "another"}}
    other.restore(saved[0], facts)
    with pytest.raises(ConfigError, match="dataset it began with: 'another'"):
        train(tiny_model_of(other), dataset, CONFIG, state=other)


def tiny_model_of(state: TrainState) -> StableDiffusion:
    parts: dict[str, Any] = {"unet": state.unet}
    return dataclasses.replace(tiny_stable_diffusion(), **parts)


def test_mistakes_are_found_before_the_first_step(dataset: LatentDataset) -> None:
    model = tiny_stable_diffusion()
    with pytest.raises(ConfigError, match="multiple of world size"):
        train(model, dataset, CONFIG, world_size=3)
    with pytest.raises(ConfigError, match="rank lies in"):
        train(model, dataset, CONFIG, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="another model"):
        train(model, dataset, CONFIG, state=start(tiny_stable_diffusion(), CONFIG))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("gradient_accumulation", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup_steps", -1),
        ("weight_decay", -1.0),
        ("max_grad_norm", 0.0),
        ("ema_decay", 1.0),
        ("dropout", 0.5),
        ("min_snr_gamma", -5.0),
        ("decay", "step"),
    ],
)
def test_config_is_checked(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field} .*got"):
        dataclasses.replace(CONFIG, **{field: value})


def test_defaults_are_the_papers() -> None:
    config = TrainConfig(steps=1)
    assert (config.batch_size, config.learning_rate, config.warmup_steps) == (1024, 1e-4, 0)
    assert (config.dropout, config.max_grad_norm, config.min_snr_gamma) == (0.05, None, None)
    assert (config.weight_decay, config.bf16) == (0.01, False)


def test_learning_rates() -> None:
    config = dataclasses.replace(CONFIG, steps=12, warmup_steps=2, learning_rate=1.0)
    assert [learning_rate(config, step) for step in (0, 1, 2, 11)] == [0.5, 1.0, 1.0, 1.0]
    cosine = dataclasses.replace(config, decay="cosine")
    rates = [learning_rate(cosine, step) for step in (0, 1, 2, 7, 12)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])
