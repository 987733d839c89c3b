"""The attention processor of diffusers' UNets that takes a control, and needs no maps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from ip2p_ray.errors import ConfigError
from ip2p_ray.prompt_to_prompt.control import AttentionControl, CrossRows


@contextmanager
def controlled_attention(unet: Any) -> Iterator[None]:
    """While open, `unet` takes `cross_attention_kwargs={"control": AttentionControl | None}`.

    A UNet whose layers have a PromptToPromptProcessor already keeps it: compiled code is tied to
    its processors, so a UNet that is to be compiled gets one before.

    Raises: ConfigError for fused projections, which hide the queries from the keys.
    """
    before = dict(unet.attn_processors)
    for name, module in unet.named_modules():
        if getattr(module, "fused_projections", False):
            raise ConfigError(f"{name} has fused projections: call unfuse_qkv_projections() first")
    own = {each for each in before.values() if isinstance(each, PromptToPromptProcessor)}
    stays = bool(own) and all(each in own for each in before.values())
    if not stays:
        own = {PromptToPromptProcessor()}
        unet.set_attn_processor(next(iter(own)))
    try:
        yield
    finally:
        for processor in own:
            processor.forget_text()
        if not stays:
            unet.set_attn_processor(before)


class PromptToPromptProcessor:
    """Scaled dot-product attention in which rows may take the attention of other rows.

    Without a control, and in every layer that the control leaves alone, it does what diffusers'
    own processor does; rows that are not controlled come out the same bit for bit. The text's keys
    and values are kept from step to step, as long as each brings the same tensor.
    """

    def __init__(self) -> None:
        plain: Any = AttnProcessor2_0
        self._plain = plain()
        self._text: Tensor | None = None
        self._of_text: dict[Any, tuple[Tensor, Tensor]] = {}

    def forget_text(self) -> None:
        """Frees the kept keys and values."""
        self._text, self._of_text = None, {}

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        control: AttentionControl | None = None,
    ) -> Tensor:
        """The layer's output for hidden states (row, position, channel) or (row, c, h, w)."""
        if control is not None and not _concerns(control, hidden_states, encoder_hidden_states):
            control = None
        if control is not None and attention_mask is not None:
            raise ConfigError("attention masks and a control of attention do not go together")
        if control is None and (encoder_hidden_states is None or attention_mask is not None):
            plain: Tensor = self._plain(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb
            )
            return plain
        inputs = _inputs(attn, hidden_states)
        query = _query(attn, inputs)
        if encoder_hidden_states is None:
            key, value = _key_value(attn, inputs)
            source = None if control is None else control.self_source
            attended = _self_attention(query, key, value, source)
        else:
            key, value = self._key_value_of_text(attn, encoder_hidden_states)
            rows = None if control is None else control.cross
            attended = _cross_attention(query, key, value, rows)
            maps = None if control is None else control.word_maps
            if maps is not None and query.shape[2] == maps.tokens:
                maps.add(_cross_attention(query, key, maps.values(value), rows))
        return _finish(attn, attended, hidden_states)

    def _key_value_of_text(self, attn: Any, text: Tensor) -> tuple[Tensor, Tensor]:
        """They depend on the text alone, so every step but the first finds them here."""
        # Compiled code would be tied to this tensor, and a gradient to its first step.
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return _key_value(attn, _context(attn, text))
        if self._text is not text:
            self._text, self._of_text = text, {}
        if attn not in self._of_text:
            self._of_text[attn] = _key_value(attn, _context(attn, text))
        return self._of_text[attn]


def _concerns(
    control: AttentionControl, hidden_states: Tensor, encoder_hidden_states: Tensor | None
) -> bool:
    """True where this layer has something to do other than plain attention."""
    shape = hidden_states.shape
    tokens = shape[1] if len(shape) == 3 else shape[2] * shape[3]
    if encoder_hidden_states is None:
        small = control.self_tokens is None or tokens <= control.self_tokens
        return control.self_source is not None and small
    maps = control.word_maps
    return control.cross is not None or (maps is not None and maps.tokens == tokens)


def _self_attention(query: Tensor, key: Tensor, value: Tensor, source: Tensor | None) -> Tensor:
    if source is not None:
        query, key = query.index_select(0, source), key.index_select(0, source)
    return F.scaled_dot_product_attention(query, key, value)


def _cross_attention(query: Tensor, key: Tensor, value: Tensor, rows: CrossRows | None) -> Tensor:
    """The sum of two attentions where rows are controlled, in one call over stacked rows."""
    if rows is None:
        return F.scaled_dot_product_attention(query, key, value)
    weight = rows.own_weight.to(value)[:, None, :, None]
    mixed = rows.matrix.to(value).unsqueeze(1) @ value.index_select(0, rows.copied)
    queried = torch.cat([rows.own, rows.source])
    attended = F.scaled_dot_product_attention(
        query.index_select(0, queried),
        key.index_select(0, queried),
        torch.cat([value.index_select(0, rows.own) * weight, mixed]),
    )
    own = rows.own.shape[0]
    output = torch.zeros_like(query).index_copy(0, rows.own, attended[:own])
    return output.index_add(0, rows.copied, attended[own:])


def _inputs(attn: Any, hidden_states: Tensor) -> Tensor:
    """The layer's normalised inputs, (row, position, channel)."""
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    return hidden_states


def _context(attn: Any, text: Tensor) -> Tensor:
    normalised: Tensor = attn.norm_encoder_hidden_states(text) if attn.norm_cross else text
    return normalised


def _query(attn: Any, inputs: Tensor) -> Tensor:
    """Queries (row, head, position, channel)."""
    query = _heads(attn, attn.to_q(inputs))
    return query if attn.norm_q is None else attn.norm_q(query)


def _key_value(attn: Any, context: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, each (row, head, position, channel)."""
    key = _heads(attn, attn.to_k(context))
    return key if attn.norm_k is None else attn.norm_k(key), _heads(attn, attn.to_v(context))


def _heads(attn: Any, projected: Tensor) -> Tensor:
    rows, positions, _ = projected.shape
    return projected.reshape(rows, positions, attn.heads, -1).transpose(1, 2)


def _finish(attn: Any, attended: Tensor, residual: Tensor) -> Tensor:
    """The heads joined and projected, in the shape of the layer's input."""
    output: Tensor = attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))
    if residual.ndim == 4:
        output = output.transpose(1, 2).reshape(residual.shape)
    if attn.residual_connection:
        output = output + residual
    rescaled: Tensor = output / attn.rescale_output_factor
    return rescaled
