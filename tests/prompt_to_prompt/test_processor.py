"""The processor against an implementation that stores every attention map and edits it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import ConfigError
from ip2p_ray.prompt_to_prompt.alignment import (
    TokenizedCaption,
    refinement,
    replacement,
    tokenize_caption,
    word_positions,
)
from ip2p_ray.prompt_to_prompt.blend import local_blend
from ip2p_ray.prompt_to_prompt.control import (
    AttentionControl,
    PairControl,
    Span,
    attention_control,
    cross_control,
    word_maps,
)
from ip2p_ray.prompt_to_prompt.processor import PromptToPromptProcessor, controlled_attention
from ip2p_ray.testing import tiny_stable_diffusion

STEPS = 10


@dataclass(frozen=True)
class Edit:
    """One pair's settings, as a user of Prompt-to-Prompt states them."""

    caption: str
    edited_caption: str
    self_replace: float
    kind: Any = None
    spans: dict[str, Span] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)


REPLACE = Edit(
    "a cat on the mat",
    "a chinchilla on the mat",
    0.9,
    "replace",
    {"default_": 0.8, "chinchilla": (0.0, 0.4), "on": (0.3, 0.6)},
    {"mat": 2.0},
)
REFINE = Edit(
    "a boat at sea, sketch",
    "a red boat at sea",
    0.35,
    "refine",
    {"default_": (0.2, 0.7), "boat": 1.0},
    {"red": 3.0, "boat": 0.5},
)
REWEIGHT = Edit("a photo of a house", "a photo of a house", 0.0, "reweight", {}, {"house": 4.0})
SELF_ONLY = Edit("a dog in the snow", "a red car in the snow at night", 0.5)
PLAIN = Edit("a dog in the snow", "a red car", 0.0)
ALL_REPLACED = Edit("a cat on the mat", "a dog on the mat", 1.0, "replace")


class MapsProcessor:
    """Attention with stored maps, changed row by row as the papers describe."""

    def __init__(self, model: StableDiffusion, edits: list[Edit], step: int) -> None:
        self.model, self.edits, self.step = model, edits, step
        self.maps: list[Tensor] = []
        """The cross-attention maps after the edit, (row, head, position, token)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        heads = [
            torch.stack(layer(states).chunk(attn.heads, dim=-1), dim=1)
            for layer, states in (
                (attn.to_q, hidden_states),
                (attn.to_k, context),
                (attn.to_v, context),
            )
        ]
        logits = torch.einsum("rhqc,rhkc->rhqk", heads[0], heads[1])
        maps = (logits * heads[0].shape[-1] ** -0.5).softmax(-1)
        count = len(self.edits)
        edited = maps.clone()
        for pair, edit in enumerate(self.edits):
            if encoder_hidden_states is None:
                if edit.self_replace > self.step / (STEPS - 1):
                    edited[count + pair] = maps[pair]
                    edited[3 * count + pair] = maps[2 * count + pair]
            elif edit.kind is not None:
                edited[3 * count + pair] = self.edit_cross(
                    edit, maps[2 * count + pair], maps[3 * count + pair]
                )
        if encoder_hidden_states is not None:
            self.maps.append(edited)
        attended = torch.einsum("rhqk,rhkc->rhqc", edited, heads[2])
        output: Tensor = attn.to_out[0](torch.cat(list(attended.unbind(1)), dim=-1))
        return output

    def edit_cross(self, edit: Edit, source: Tensor, target: Tensor) -> Tensor:
        """The target's map (head, position, token) in this step."""
        before, after = (tokenized(self.model, c) for c in (edit.caption, edit.edited_caption))
        controlled = source.clone()
        if edit.kind == "replace":
            controlled = torch.einsum("hqs,st->hqt", source, replacement(before, after))
        if edit.kind == "refine":
            mapping, _ = refinement(before, after)
            for token in range(after.length):
                readers = mapping[:, token].nonzero().flatten().tolist()
                controlled[..., token] = source[..., readers[0]] if readers else target[..., token]
        for word, factor in edit.scales.items():
            controlled[..., word_positions(self.model.tokenizer, after, word)] *= factor
        table = self.schedule(edit, after)
        return torch.where(table[self.step] > 0, controlled, target)

    def schedule(self, edit: Edit, after: TokenizedCaption) -> Tensor:
        """(step, token): 1 where the token is controlled."""
        table = torch.zeros(STEPS + 1, after.length)
        spans = {"default_": 1.0, **edit.spans}
        for word in ("default_", *(word for word in spans if word != "default_")):
            places = list(range(after.length))
            if word != "default_":
                places = word_positions(self.model.tokenizer, after, word)
            span = spans[word]
            low, high = span if isinstance(span, tuple) else (0.0, span)
            table[:, places] = 0.0
            table[int(low * (STEPS + 1)) : int(high * (STEPS + 1)), places] = 1.0
        return table


def tokenized(model: StableDiffusion, text: str) -> TokenizedCaption:
    return tokenize_caption(model.tokenizer, text, model.text_length)


def pair_control(model: StableDiffusion, edit: Edit) -> PairControl:
    if edit.kind is None:
        return PairControl(self_replace=edit.self_replace)
    cross = cross_control(
        model.tokenizer,
        tokenized(model, edit.caption),
        tokenized(model, edit.edited_caption),
        kind=edit.kind,
        spans=edit.spans,
        scales=edit.scales,
    )
    return PairControl(self_replace=edit.self_replace, cross=cross)


@dataclass
class Batch:
    """The input of a guided step of some pairs."""

    model: StableDiffusion
    x: Tensor
    timesteps: Tensor
    text: Tensor

    def forward(self, processor: Any = None, **kwargs: Any) -> Tensor:
        if processor is not None:
            self.model.unet.set_attn_processor(processor)
        output: Tensor = self.model.unet(
            self.x, self.timesteps, self.text, cross_attention_kwargs=kwargs
        ).sample
        return output

    def plain(self) -> Tensor:
        plain: Any = AttnProcessor2_0
        return self.forward(plain())

    def controlled(self, control: AttentionControl | None) -> Tensor:
        with controlled_attention(self.model.unet):
            return self.forward(control=control)


def batch_of(edits: list[Edit], dtype: torch.dtype = torch.float32) -> Batch:
    model = tiny_stable_diffusion(seed=1)
    generator = torch.Generator().manual_seed(2)
    count = len(edits)
    captions = [""] * (2 * count) + [e.caption for e in edits] + [e.edited_caption for e in edits]
    text = model.encode_text(captions)
    torch.nn.Module.to(model.unet, dtype)
    x = torch.randn(2 * count, 4, 8, 6, generator=generator)
    timesteps = 999 * torch.rand(count, generator=generator)
    return Batch(
        model,
        torch.cat([x, x]).to(dtype),
        timesteps.repeat(4),
        text.to(dtype),
    )


BATCHES = [
    [REPLACE, REFINE, REWEIGHT],
    [SELF_ONLY, REPLACE, PLAIN],
    [PLAIN, ALL_REPLACED, REFINE],
]


@pytest.mark.parametrize("edits", BATCHES, ids=["cross", "mixed", "replaced"])
@pytest.mark.parametrize("step", [0, 3, 8])
@torch.inference_mode()
def test_a_whole_unet_agrees_with_stored_maps(edits: list[Edit], step: int) -> None:
    batch = batch_of(edits)
    pairs = [pair_control(batch.model, edit) for edit in edits]
    plain = batch.plain()
    stored = batch.forward(MapsProcessor(batch.model, edits, step))
    control = attention_control(pairs, step=step, steps=STEPS)
    ours = batch.controlled(control)
    assert (ours - stored).abs().max().item() <= 1e-5
    sources = [0, 1, 2, 6, 7, 8]
    assert torch.equal(ours[sources], plain[sources])
    for pair, edit in enumerate(edits):
        if not edit.self_replace > step / (STEPS - 1):
            assert torch.equal(ours[3 + pair], plain[3 + pair])
            if edit.kind is None:
                assert torch.equal(ours[9 + pair], plain[9 + pair])
        else:
            assert not torch.equal(ours[3 + pair], plain[3 + pair])
            assert (ours[9 + pair] - plain[9 + pair]).abs().max() > 1e-3


@torch.inference_mode()
def test_pairs_may_be_at_different_steps() -> None:
    edits = [REPLACE, REPLACE, REPLACE]
    batch = batch_of(edits)
    pairs = [pair_control(batch.model, edit) for edit in edits]
    mixed = batch.controlled(attention_control(pairs, step=[0, 4, 9], steps=[10, 10, 10]))
    for pair, step in enumerate([0, 4, 9]):
        alike = batch.controlled(attention_control(pairs, step=step, steps=10))
        rows = [pair, 3 + pair, 6 + pair, 9 + pair]
        torch.testing.assert_close(mixed[rows], alike[rows], rtol=0, atol=1e-6)


@torch.inference_mode()
def test_half_precision_differs_by_rounding_only() -> None:
    edits = [REPLACE, REFINE, REWEIGHT]
    fine, coarse = batch_of(edits), batch_of(edits, torch.bfloat16)
    pairs = [pair_control(fine.model, edit) for edit in edits]
    control = attention_control(pairs, step=3, steps=STEPS)
    rounding = (coarse.plain().float() - fine.plain()).abs().max()
    difference = (coarse.controlled(control).float() - fine.controlled(control)).abs().max()
    assert difference <= 2 * rounding


@torch.inference_mode()
def test_without_a_control_it_is_the_plain_processor() -> None:
    batch = batch_of([SELF_ONLY])
    plain = batch.plain()
    assert torch.equal(batch.controlled(None), plain)
    assert torch.equal(batch.controlled(AttentionControl()), plain)
    assert attention_control([PairControl(self_replace=0.3)], step=9, steps=10) is None


@torch.inference_mode()
def test_self_attention_may_be_limited_to_small_layers_and_to_rows_with_text() -> None:
    batch = batch_of([SELF_ONLY])
    pairs = [pair_control(batch.model, SELF_ONLY)]
    plain = batch.plain()
    nowhere = batch.controlled(attention_control(pairs, step=0, steps=STEPS, self_tokens=4))
    assert torch.equal(nowhere, plain)
    small = batch.controlled(attention_control(pairs, step=0, steps=STEPS, self_tokens=12))
    everywhere = batch.controlled(attention_control(pairs, step=0, steps=STEPS))
    assert not torch.equal(small, plain)
    assert not torch.equal(small, everywhere)
    half = batch.controlled(attention_control(pairs, step=0, steps=STEPS, both_halves=False))
    assert torch.equal(half[1], plain[1])
    assert torch.equal(half[3], everywhere[3])


@torch.inference_mode()
def test_attention_to_words_agrees_with_stored_maps() -> None:
    edits = [REPLACE, PLAIN, REFINE]
    batch = batch_of(edits)
    pairs = [pair_control(batch.model, edit) for edit in edits]
    words = (["cat"], ["chinchilla"]), (["boat", "sea"], ["red boat", "sea"])
    captions = [
        (tokenized(batch.model, e.caption), tokenized(batch.model, e.edited_caption)) for e in edits
    ]
    for index, (pair, chosen) in enumerate(zip((0, 2), words, strict=True)):
        less = None if index == 0 else (["a"], ["a"])
        blend = local_blend(batch.model.tokenizer, *captions[pair], words=chosen, less=less)
        pairs[pair] = PairControl(
            self_replace=pairs[pair].self_replace, cross=pairs[pair].cross, blend=blend
        )
    maps = word_maps(pairs, (8, 6), downscale=2)
    assert maps is not None
    expected = torch.zeros(6, 12, 2)
    for step in (0, 4):
        control = attention_control(pairs, step=step, steps=STEPS, maps=maps)
        ours = batch.controlled(control)
        stored = MapsProcessor(batch.model, edits, step)
        assert (ours - batch.forward(stored)).abs().max().item() <= 1e-5
        layers = [m for m in stored.maps if m.shape[2] == 12]
        assert len(layers) == 4
        for pair, (chosen, less) in {
            0: ((["cat"], ["chinchilla"]), ([], [])),
            2: ((["boat", "sea"], ["red boat", "sea"]), (["a"], ["a"])),
        }.items():
            for branch in (0, 1):
                for channel, phrases in enumerate((chosen[branch], less[branch])):
                    for phrase in phrases:
                        places = word_positions(
                            batch.model.tokenizer, captions[pair][branch], phrase
                        )
                        for layer in layers:
                            row = layer[6 + 3 * branch + pair]
                            expected[3 * branch + pair, :, channel] += (
                                row[..., places].sum(-1).mean(0)
                            )
    torch.testing.assert_close(maps.sums, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 12, 16), (4, 16, 3, 4)], ids=["tokens", "picture"])
@torch.inference_mode()
def test_layers_with_norms_and_residuals_come_out_the_same(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = Attention(
        query_dim=16,
        heads=2,
        dim_head=8,
        norm_num_groups=4,
        residual_connection=True,
        rescale_output_factor=1.5,
        bias=True,
        qk_norm="layer_norm",
    )
    hidden = torch.randn(shape)
    own = AttentionControl(self_source=torch.arange(4))
    plain = layer(hidden)
    processor: Any = PromptToPromptProcessor()
    layer.set_processor(processor)
    assert torch.equal(layer(hidden, control=own), plain)
    swapped = layer(hidden, control=AttentionControl(self_source=torch.tensor([0, 0, 2, 3])))
    assert torch.equal(swapped[[0, 2, 3]], plain[[0, 2, 3]])
    assert not torch.equal(swapped[1], plain[1])


def test_processors_are_put_back_also_after_an_error() -> None:
    unet = tiny_stable_diffusion().unet
    before = dict(unet.attn_processors)
    with controlled_attention(unet):
        assert all(isinstance(p, PromptToPromptProcessor) for p in unet.attn_processors.values())
    assert unet.attn_processors == before
    with pytest.raises(RuntimeError, match="stop"), controlled_attention(unet):
        raise RuntimeError("stop")
    assert unet.attn_processors == before


def test_a_processor_that_is_there_already_stays() -> None:
    """Compiled code is tied to it."""
    unet = tiny_stable_diffusion().unet
    own = PromptToPromptProcessor()
    unet.set_attn_processor(own)
    with controlled_attention(unet):
        assert all(processor is own for processor in unet.attn_processors.values())
    assert all(processor is own for processor in unet.attn_processors.values())


@torch.inference_mode()
def test_keys_and_values_are_kept_for_one_text_only() -> None:
    batch = batch_of([SELF_ONLY, PLAIN])
    unet: Any = batch.model.unet
    other = batch.text.flip(0)

    def call(text: Tensor) -> Tensor:
        output: Tensor = unet(batch.x, batch.timesteps, text).sample
        return output

    plain, plain_other = call(batch.text), call(other)
    assert not torch.equal(plain, plain_other)
    projected: list[Any] = []
    (name, layer), *_ = ((n, m) for n, m in unet.named_modules() if n.endswith("attn2.to_k"))
    layer.register_forward_hook(lambda *_: projected.append(name))
    with controlled_attention(unet):
        assert torch.equal(call(batch.text), plain)
        assert torch.equal(call(batch.text), plain)
        assert len(projected) == 1
        assert torch.equal(call(other), plain_other)
        assert torch.equal(call(batch.text), plain)
        assert len(projected) == 3


def test_nothing_is_kept_where_gradients_flow() -> None:
    batch = batch_of([PLAIN])
    unet: Any = batch.model.unet
    text = batch.text.detach()
    with controlled_attention(unet):
        for _ in range(2):  # a graph can be walked back once
            unet(batch.x, batch.timesteps, text).sample.sum().backward()


def test_what_cannot_be_controlled_is_refused() -> None:
    batch = batch_of([SELF_ONLY])
    control = attention_control([PairControl(self_replace=1.0)], step=0, steps=STEPS)
    with controlled_attention(batch.model.unet), pytest.raises(ConfigError, match="masks"):
        batch.model.unet(
            batch.x,
            batch.timesteps,
            batch.text,
            attention_mask=torch.ones(4, 48),
            cross_attention_kwargs={"control": control},
        )
    unet: Any = batch.model.unet
    unet.fuse_qkv_projections()
    with (
        pytest.raises(ConfigError, match="fused projections"),
        controlled_attention(batch.model.unet),
    ):
        pass
