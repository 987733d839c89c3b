"""Fine-tuning in process: the completion alone is learned, whatever the order or the ranks."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoTokenizer

from ip2p_ray.errors import ConfigError, Ip2pError
from ip2p_ray.miniature import writer as miniature_writer
from ip2p_ray.miniature.scores import random_captions
from ip2p_ray.miniature.tiny import true_edit
from ip2p_ray.miniature.weights import WEIGHTS
from ip2p_ray.triplets.finetune import score
from ip2p_ray.triplets.local_finetune import (
    Encoded,
    LocalTuningConfig,
    encode_examples,
    finetune_local,
)
from ip2p_ray.triplets.local_writer import LocalWriter
from ip2p_ray.triplets.prompt import completion, completion_prompt
from ip2p_ray.triplets.reply import Triplet

FAST = LocalTuningConfig(batch_size=4, learning_rate=1e-3)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WEIGHTS / "writer", local_files_only=True)


@pytest.fixture(scope="module")
def examples():
    return [Triplet(text, *true_edit(text)) for text in random_captions(10, 3)]


def model_of(tokenizer, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return miniature_writer.build(len(tokenizer), tokenizer.eos_token_id)


@pytest.fixture
def model(tokenizer):
    return model_of(tokenizer)


def weights(model):
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def test_an_example_is_prompt_completion_and_end(tokenizer, examples):
    row = encode_examples(tokenizer, examples)[0]
    prompt = tokenizer.decode(row.tokens[: row.prompt])
    rest = tokenizer.decode(row.tokens[row.prompt :])
    assert prompt == completion_prompt(examples[0].caption)
    texts = examples[0].instruction, examples[0].edited_caption
    assert rest == completion(*texts) + tokenizer.eos_token


def test_examples_beyond_the_context_are_left_out_and_told(tokenizer, examples, caplog):
    longest = max(len(row.tokens) for row in encode_examples(tokenizer, examples))
    rows = encode_examples(tokenizer, examples, longest - 1)
    assert 0 < len(rows) < len(examples)
    assert "left out" in caplog.text
    with pytest.raises(ConfigError, match="of 10 examples none fits the model's context of 5"):
        encode_examples(tokenizer, examples, 5)


def test_a_writer_knows_what_it_was_tuned_on(tokenizer, examples, model):
    """Before and after, on what was trained; one epoch is too little for a model of nothing."""
    few = examples[:4]

    def measure():
        write = LocalWriter(model, tokenizer, "cpu").write
        return score(partial(write, seed=0, temperature=0.01, max_tokens=60), few)

    before = measure()
    assert before.parse_rate == 0.0
    config = LocalTuningConfig(epochs=70, batch_size=4, learning_rate=4e-3)
    losses = [metrics.loss for metrics in finetune_local(model, tokenizer, few, config)]
    assert losses[-1] < 0.1 < 4 < losses[0]
    assert measure().validity == 1.0


def test_metrics_say_what_each_step_did(tokenizer, examples, model):
    config = replace(FAST, epochs=2, warmup=0.5)
    told = list(finetune_local(model, tokenizer, examples, config))
    assert [metrics.step for metrics in told] == [1, 2, 3, 4, 5, 6]
    assert {metrics.steps for metrics in told} == {6}
    assert [metrics.epoch for metrics in told] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    rates = [metrics.learning_rate * 1e3 for metrics in told]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4])
    encoded = encode_examples(tokenizer, examples)
    total = sum(len(row.tokens) - row.prompt for row in encoded)
    assert sum(metrics.tokens for metrics in told) == 2 * total
    assert all(metrics.grad_norm > 0 and metrics.seconds > 0 for metrics in told)
    assert not model.training


def test_the_loss_is_that_of_the_completion_alone(tokenizer, examples, model):
    """Against each example by itself, without padding."""
    rows = encode_examples(tokenizer, examples[:4])
    summed, count = 0.0, 0
    for row in rows:
        tokens = torch.tensor([row.tokens])
        with torch.no_grad():
            chances = model(input_ids=tokens).logits[0, :-1].log_softmax(dim=-1)
        picked = chances[torch.arange(len(row.tokens) - 1), tokens[0, 1:]]
        summed -= float(picked[row.prompt - 1 :].sum())
        count += len(row.tokens) - row.prompt
    first = next(finetune_local(model, tokenizer, examples[:4], FAST))
    assert first.loss == pytest.approx(summed / count, rel=1e-5)
    assert first.tokens == count


def test_the_order_of_the_examples_does_not_matter(tokenizer, examples, model):
    other = model_of(tokenizer)
    losses = [
        [metrics.loss for metrics in finetune_local(each, tokenizer, order, FAST)]
        for each, order in ((model, examples), (other, examples[::-1]))
    ]
    assert losses[0] == losses[1]
    assert torch.equal(weights(model), weights(other))
    again = [
        m.loss
        for m in finetune_local(model_of(tokenizer), tokenizer, examples, replace(FAST, seed=1))
    ]
    assert again != losses[0]


def test_ranks_share_a_step_as_one_would_do_it(tokenizer, examples):
    """The mean of the ranks' gradients is the gradient of one; the last step has an idle rank."""
    config = replace(FAST, batch_size=3, max_grad_norm=1e9)
    gradients = {}
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        model, kept = model_of(tokenizer), []

        def keep(module, kept=kept):
            hook = module.get_input_embeddings().weight.register_hook
            hook(lambda gradient: kept.append(gradient.clone()))
            return module

        steps = finetune_local(
            model, tokenizer, examples[:1], config, rank=rank, world_size=world_size, wrap=keep
        )
        gradients[rank, world_size] = (next(steps).loss, kept[0])
    whole_loss, whole = gradients[0, 1]
    half_loss, half = gradients[0, 2]
    idle_loss, idle = gradients[1, 2]
    assert torch.allclose((half + idle) / 2, whole, atol=1e-6)
    assert half_loss + idle_loss == pytest.approx(whole_loss)
    assert idle_loss == 0.0
    assert idle.abs().sum() == 0.0


def test_frozen_weights_are_tuned_too(tokenizer, examples, model):
    LocalWriter(model, tokenizer, "cpu")  # it freezes its model
    before = weights(model)
    next(finetune_local(model, tokenizer, examples, FAST))
    assert not torch.equal(before, weights(model))


def test_bfloat16_is_near(tokenizer, examples, model):
    whole = next(finetune_local(model_of(tokenizer), tokenizer, examples, FAST)).loss
    half = next(finetune_local(model, tokenizer, examples, replace(FAST, bf16=True))).loss
    assert half == pytest.approx(whole, rel=0.02)
    assert all(value.dtype == torch.float32 for value in model.parameters())


def test_a_loss_that_is_not_finite_stops_it(tokenizer, examples, model):
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(Ip2pError, match="the loss of step 1 is nan"):
        next(finetune_local(model, tokenizer, examples, FAST))


def test_a_tokenizer_without_end_token_adds_none():
    class Letters:
        eos_token_id = None

        def __call__(self, text, **options):
            return type("Encoding", (), {"input_ids": [ord(letter) for letter in text]})()

    triplet = Triplet("a", "b", "c")
    prompt, rest = completion_prompt("a"), completion("b", "c")
    [row] = encode_examples(Letters(), [triplet])
    assert row == Encoded(triplet.key, tuple(map(ord, prompt + rest)), len(prompt))


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"max_grad_norm": float("nan")},
        {"warmup": 1.0},
        {"weight_decay": -0.1},
    ],
)
def test_settings_that_cannot_be_are_refused(changes):
    with pytest.raises(ConfigError):
        LocalTuningConfig(**changes)


def test_a_rank_outside_the_world_is_refused(tokenizer, examples, model):
    with pytest.raises(ConfigError, match="rank lies in"):
        finetune_local(model, tokenizer, examples, FAST, rank=2, world_size=2)
