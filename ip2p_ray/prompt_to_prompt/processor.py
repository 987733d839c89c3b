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

    Raises: ConfigError for fused projections, which hide the queries from the keys.
    """
    before = dict(unet.attn_processors)
    for name, module in unet.named_modules():
        if getattr(module, "fused_projections", False):
            raise ConfigError(f"{name} has fused projections: call unfuse_qkv_projections() first")
    unet.set_attn_processor(PromptToPromptProcessor())
    try:
        yield
    finally:
        unet.set_attn_processor(before)


class PromptToPromptProcessor:
    """Scaled dot-product attention in which rows may take the attention of other rows.

    Without a control, and in every layer that the control leaves alone, it is diffusers' own
    processor; rows that are not controlled come out the same bit for bit.
    """

    def __init__(self) -> None:
        plain: Any = AttnProcessor2_0
        self._plain = plain()

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
        if control is None or not _concerns(control, hidden_states, encoder_hidden_states):
            plain: Tensor = self._plain(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb
            )
            return plain
        if attention_mask is not None:
            raise ConfigError("attention masks and a control of attention do not go together")
        query, key, value = _project(attn, hidden_states, encoder_hidden_states)
        if encoder_hidden_states is None:
            attended = _self_attention(query, key, value, control.self_source)
        else:
            attended = _cross_attention(query, key, value, control.cross)
            if control.word_maps is not None and query.shape[2] == control.word_maps.tokens:
                words = control.word_maps.values(value)
                control.word_maps.add(_cross_attention(query, key, words, control.cross))
        return _finish(attn, attended, hidden_states)


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


def _project(
    attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (row, head, position, channel)."""
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    if encoder_hidden_states is not None and attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    query, key, value = (
        projected.unflatten(2, (attn.heads, -1)).transpose(1, 2)
        for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
    )
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    return query, key, value


def _finish(attn: Any, attended: Tensor, residual: Tensor) -> Tensor:
    """The heads joined and projected, in the shape of the layer's input."""
    output: Tensor = attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))
    if residual.ndim == 4:
        output = output.transpose(1, 2).reshape(residual.shape)
    if attn.residual_connection:
        output = output + residual
    rescaled: Tensor = output / attn.rescale_output_factor
    return rescaled
