"""Sampling from a causal model in process: the right distribution, one stream a caption."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ip2p_ray.errors import ConfigError, ModelError
from ip2p_ray.triplets.local_writer import LocalWriter
from ip2p_ray.triplets.prompt import STOP, completion_prompt

CAPTIONS = ["a cat", "a dog on a mat in the snow", "", "a cat", "caf\u00e9"]
END = 256


def tokenizer():
    """One token a byte, and an end token that it never adds by itself."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<end>"]
    rules = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(tokens)}, merges=[]))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="<end>")


def gpt2(positions=96):
    """Positions are learnt, so a wrong position id changes the logits."""
    sizes = {"vocab_size": 257, "n_positions": positions, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=END, eos_token_id=END, initializer_range=0.3)
    return GPT2LMHeadModel(config)


def llama():
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=96,
        bos_token_id=END,
        eos_token_id=END,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(params=[gpt2, llama], ids=["gpt2", "llama"])
def writer(request):
    torch.manual_seed(0)
    return LocalWriter(request.param(), tokenizer(), "cpu")


def test_a_reply_does_not_depend_on_its_neighbours(writer):
    together = writer.write(CAPTIONS, seed=3, max_tokens=40)
    alone = [writer.write([caption], seed=3, max_tokens=40)[0] for caption in CAPTIONS]
    assert together == alone
    assert writer.write(CAPTIONS[::-1], seed=3, max_tokens=40) == together[::-1]
    assert together[0] == together[3]
    assert len(set(together)) == 4


def test_another_seed_writes_something_else(writer):
    first, second = (writer.write(CAPTIONS, seed=seed, max_tokens=20) for seed in (1, 2))
    assert all(one != two for one, two in zip(first, second, strict=True))


def test_near_zero_temperature_is_the_models_own_greedy_text(writer):
    """Left padding, positions and the cache against a loop with none of them."""
    replies = writer.write(CAPTIONS, seed=0, temperature=1e-6, max_tokens=12)
    for caption, reply in zip(CAPTIONS, replies, strict=True):
        tokens = writer._tokenizer(completion_prompt(caption)).input_ids
        start = len(tokens)
        while len(tokens) < start + 12 and tokens[-1] != END:
            tokens.append(int(writer._model(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert reply == writer._tokenizer.decode(tokens[start:], skip_special_tokens=True)


class Scripted(torch.nn.Module):
    """A causal model that writes the same text whatever it reads."""

    def __init__(self, text):
        super().__init__()
        self.script = [*tokenizer()(text).input_ids, END]
        self.config = GPT2Config(vocab_size=257, n_positions=64)
        self.calls = 0

    def forward(self, tokens, attention_mask, past_key_values=None, use_cache=True):
        logits = torch.zeros(*tokens.shape, 257)
        logits[..., self.script[min(self.calls, len(self.script) - 1)]] = 1000.0
        self.calls += 1
        return type("Output", (), {"logits": logits, "past_key_values": None})()


class Fixed(Scripted):
    """A causal model that gives "a" and "b" the same two probabilities at every place."""

    def __init__(self, probabilities):
        super().__init__("ab")
        self.logits = torch.full((257,), -torch.inf)
        self.logits[self.script[:2]] = torch.tensor(probabilities).log()

    def forward(self, tokens, attention_mask, past_key_values=None, use_cache=True):
        logits = self.logits.expand(*tokens.shape, 257)
        return type("Output", (), {"logits": logits, "past_key_values": None})()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_are_drawn_from_the_softmax_at_the_temperature(temperature):
    writer = LocalWriter(Fixed([0.7, 0.3]), tokenizer(), "cpu")
    captions = [f"caption {n}" for n in range(100)]
    text = "".join(writer.write(captions, seed=0, temperature=temperature, max_tokens=40))
    weights = 0.7 ** (1 / temperature), 0.3 ** (1 / temperature)
    assert len(text) == 4000
    assert text.count("a") / 4000 == pytest.approx(weights[0] / sum(weights), abs=0.025)


def test_a_finished_reply_ends_with_the_stop_and_writing_ends_there():
    model = Scripted("blue\n%%\na boat\nEND and so on")
    assert (
        LocalWriter(model, tokenizer(), "cpu").write(["a", "b"], seed=0)
        == ["blue\n%%\na boat" + STOP] * 2
    )
    assert model.calls == len("blue\n%%\na boat\nEND")


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("blue", {}, "blue"),
        ("blue boats", {"max_tokens": 4}, "blue"),
        ("x" * 200, {}, "x" * (64 - len(completion_prompt("a")))),
    ],
    ids=["end token", "max_tokens", "context full"],
)
def test_a_reply_that_is_cut_off_has_no_stop(text, options, expected):
    assert LocalWriter(Scripted(text), tokenizer(), "cpu").write(["a"], seed=0, **options) == [
        expected
    ]


def test_a_caption_longer_than_the_context_gets_an_unfinished_reply(writer):
    replies = writer.write(["y" * 300, "a cat"], seed=0, max_tokens=8)
    assert STOP not in replies[0]
    assert replies[1] == writer.write(["a cat"], seed=0, max_tokens=8)[0]


def test_no_captions_no_replies(writer):
    assert writer.write([], seed=0) == []


def test_bad_settings_are_refused(writer):
    with pytest.raises(ConfigError, match="temperature is above 0"):
        writer.write(["a"], seed=0, temperature=0.0)
    with pytest.raises(ConfigError, match="max_tokens at least 1"):
        writer.write(["a"], seed=0, max_tokens=0)


@pytest.fixture
def folder(writer, tmp_path):
    writer._model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_saved_folder_loads_and_writes_the_same(folder, writer):
    loaded = LocalWriter.load(folder)
    assert loaded.write(CAPTIONS, seed=5, max_tokens=16) == writer.write(
        CAPTIONS, seed=5, max_tokens=16
    )


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"writer folder .*nothing does not exist"):
        LocalWriter.load(tmp_path / "nothing")


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded"):
        LocalWriter.load(tmp_path)


@pytest.mark.parametrize("look", [LocalWriter.load, LocalWriter.check])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_broken_file_is_noticed(folder, name, look):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=f"{folder} cannot be loaded"):
        look(folder)


@pytest.mark.parametrize("look", [LocalWriter.load, LocalWriter.check])
def test_lacking_weights_are_noticed_and_not_made_up(folder, look):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    weights.popitem()
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks weights"):
        look(folder)


@pytest.mark.parametrize("look", [LocalWriter.load, LocalWriter.check])
def test_the_dtype_of_the_configuration_does_not_matter(folder, look):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "int8"}))
    look(folder)


def test_a_check_holds_no_weights(folder, monkeypatch):
    held = []
    taken = AutoModelForCausalLM.from_pretrained

    def taking(*arguments, **options):
        model, found = taken(*arguments, **options)
        held.extend(parameter.device.type for parameter in model.parameters())
        return model, found

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", taking)
    LocalWriter.check(folder)
    assert set(held) == {"meta"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_writes_what_the_cpu_does(folder, writer):
    on_gpu = LocalWriter.load(folder, "cuda").write(CAPTIONS, seed=3, max_tokens=16)
    assert on_gpu == writer.write(CAPTIONS, seed=3, max_tokens=16)
