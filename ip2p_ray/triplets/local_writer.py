"""A causal language model in this process that writes a reply to each caption.

Tokens are sampled here and not by `generate`, whose draws depend on the batch: row by row, token
number n of the reply to a caption is chosen by uniform number n of a stream of that caption's own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from ip2p_ray.errors import ConfigError, ModelError
from ip2p_ray.model_files import NO_CODE, SAFETENSORS, require_safetensors
from ip2p_ray.schema import stream_seed
from ip2p_ray.triplets.prompt import MAX_TOKENS, STOP, TEMPERATURE, completion_prompt

_BROKEN = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)
_TAIL = 2 * len(STOP)  # tokens that surely hold a stop string which has just been finished


class LocalWriter:
    """A model with its tokenizer; made by `LocalWriter.load`."""

    def __init__(self, model: Any, tokenizer: Any, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self._model = model.to(self.device).eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self._context = getattr(model.config, "max_position_embeddings", None)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        *,
        dtype: torch.dtype = torch.float32,
    ) -> LocalWriter:
        """The model of a transformers folder: any AutoModelForCausalLM with its AutoTokenizer.

        Raises:
            ModelError: the folder is missing or broken, or lacks some of the weights.
        """
        model, tokenizer = _loaded(folder, dtype=dtype)
        return cls(model, tokenizer, device)

    @staticmethod
    def check(folder: str | Path) -> None:
        """Raises what `load` would, and holds no weights: for a process that sends others to work.

        Raises:
            ModelError: as `load`.
        """
        _loaded(folder, dtype=torch.float32, device_map="meta")

    @torch.inference_mode()
    def write(
        self,
        captions: Sequence[str],
        *,
        seed: int,
        temperature: float = TEMPERATURE,
        max_tokens: int = MAX_TOKENS,
    ) -> list[str]:
        """The reply to each caption, in order, with STOP at its end when it is finished.

        All captions are one batch. The draws for a caption depend on `seed` and on its text alone;
        what stands beside it in the batch changes its logits by rounding only. For another attempt
        give another seed.

        Raises:
            ConfigError: `temperature` or `max_tokens` is not positive.
        """
        if temperature <= 0.0 or max_tokens < 1:
            raise ConfigError(
                f"temperature is above 0 and max_tokens at least 1, got {temperature}, {max_tokens}"
            )
        if not captions:
            return []
        prompts = [self._prompt(caption) for caption in captions]
        uniforms = _uniforms(captions, seed, max_tokens).to(self.device)
        tokens, mask = _pad_left(prompts, self.device)
        written: list[list[int]] = [[] for _ in captions]
        replies: list[str | None] = [None] * len(captions)
        cache = None
        for step in range(max_tokens):
            logits, cache = self._next(tokens, mask, cache)
            tokens = _choose(logits / temperature, uniforms[:, step])[:, None]
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            self._collect(tokens[:, 0].tolist(), prompts, written, replies)
            if None not in replies:
                break
        return [
            self._decode(row) if reply is None else reply
            for row, reply in zip(written, replies, strict=True)
        ]

    def _prompt(self, caption: str) -> list[int]:
        ids: list[int] = self._tokenizer(completion_prompt(caption)).input_ids
        return ids[: self._context]

    def _next(self, tokens: torch.Tensor, mask: torch.Tensor, cache: Any) -> tuple[Any, Any]:
        """float32 logits (row, token) of what follows `tokens` (row, new), and the cache."""
        options: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache}
        if self._takes_positions:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            if self._context is not None:
                positions = positions.clamp(max=self._context - 1)
            options["position_ids"] = positions
        output = self._model(tokens, use_cache=True, **options)
        return output.logits[:, -1].float(), output.past_key_values

    def _collect(
        self,
        tokens: list[int],
        prompts: list[list[int]],
        written: list[list[int]],
        replies: list[str | None],
    ) -> None:
        """Appends each unfinished row's token, and closes the rows that are finished by it."""
        for row, token in enumerate(tokens):
            if replies[row] is not None:
                continue
            written[row].append(token)
            full = len(prompts[row]) + len(written[row]) >= (self._context or math.inf)
            if STOP in self._decode(written[row][-_TAIL:]):
                replies[row] = self._decode(written[row]).partition(STOP)[0] + STOP
            elif token == self._tokenizer.eos_token_id or full:
                replies[row] = self._decode(written[row])

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def _uniforms(captions: Sequence[str], seed: int, count: int) -> torch.Tensor:
    """float64 (caption, count) in [0, 1), each row from its caption's own stream."""
    rows = []
    for caption in captions:
        generator = torch.Generator().manual_seed(stream_seed(seed, "reply", caption))
        rows.append(torch.rand(count, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def _pad_left(prompts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, length) tokens that end together, and the mask that is 0 on the padding."""
    length = max(map(len, prompts))
    tokens = [[0] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def _choose(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token (row,) at which the cumulated softmax of (row, token) first exceeds the uniform."""
    cumulated = logits.softmax(dim=-1).double().cumsum(dim=-1)
    level = uniforms[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, level, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def _loaded(folder: str | Path, **options: Any) -> tuple[Any, Any]:
    """Model and tokenizer."""
    if not Path(folder).is_dir():
        raise ModelError(f"writer folder {folder} does not exist")
    loader: Any = AutoModelForCausalLM
    try:
        require_safetensors(folder, "writer folder")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **NO_CODE)
        model, found = loader.from_pretrained(
            folder,
            **options,
            local_files_only=True,
            output_loading_info=True,
            **SAFETENSORS,
            **NO_CODE,
        )
    except _BROKEN as error:
        raise ModelError(f"writer folder {folder} cannot be loaded: {error}") from error
    if found["missing_keys"]:
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise ModelError(f"writer folder {folder} lacks weights: {missing}")
    return model, tokenizer
