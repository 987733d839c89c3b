"""The actors of the pairs stage: who generates, who judges, and who does both."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from ip2p_ray.clip import Clip
from ip2p_ray.copies import local_folder
from ip2p_ray.filtering import select
from ip2p_ray.generator import Batch, Generator, GeneratorWeights, Holding
from ip2p_ray.images import decode_image, encode_image, encode_png, to_pil
from ip2p_ray.memory import halved, is_out_of_memory
from ip2p_ray.pairs import CandidateRequest, PairConfig, Pictures, candidate_requests
from ip2p_ray.rules import is_shown
from ip2p_ray.schema import CANDIDATES, TRIPLETS
from ip2p_ray.search.options import SearchConfig
from ip2p_ray.search.triplet import Searched
from ip2p_ray.stages import metrics
from ip2p_ray.stages.models import local_weights

_TRANSPORT_LEVEL = 1  # PNG on its way to the judge; what is kept is packed closer


class GenerateCandidates:
    """An actor of the plan: rows of TRIPLETS in, rows of CANDIDATES that nobody has judged out."""

    def __init__(
        self, weights: GeneratorWeights, holding: Holding, config: PairConfig, recipe: str
    ) -> None:
        holding = held_here(holding)
        model = local_weights(weights).load(holding.device)
        self._generator = Generator(model, holding, filled=metrics.filled)
        self._config, self._recipe = config, recipe
        self._encoders = ThreadPoolExecutor(2)  # beside the device, which makes the next batch

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """A table for each triplet of the batch, as soon as its last candidate is made."""
        rows = batch.select(TRIPLETS.names).to_pylist()
        requests = [request for row in rows for request in self._requests(row)]
        waiting: list[dict[str, Any]] = []
        each = self._config.candidates
        for made in self._generator.make(requests, self._config):
            waiting += self._candidates(made)
            while len(waiting) >= each:
                row, own, waiting = rows.pop(0), waiting[:each], waiting[each:]
                seconds = sum(candidate.pop("seconds") for candidate in own)
                for candidate in own:
                    for name in ("source_image", "edited_image"):
                        candidate[name] = {"bytes": candidate[name].result(), "path": None}
                row.update(recipe=self._recipe, status="ok", candidates=own, seconds=seconds)
                yield pa.Table.from_pylist([row], schema=CANDIDATES)

    def _requests(self, row: Mapping[str, Any]) -> list[CandidateRequest]:
        texts = (row["triplet_key"], row["caption"], row["edited_caption"])
        return candidate_requests(*texts, self._config, self._recipe)

    def _candidates(self, made: Batch) -> list[dict[str, Any]]:
        return [
            {
                "index": request.index,
                "seed": request.seed,
                "self_replace": request.self_replace,
                "guidance_scale": request.guidance_scale,
                "source_image": self._encoders.submit(_transported, made.source[row]),
                "edited_image": self._encoders.submit(_transported, made.edited[row]),
                "seconds": made.seconds / len(made.requests),
            }
            for row, request in enumerate(made.requests)
        ]


class SearchCandidates:
    """An actor of the plan that generates and judges: rows of TRIPLETS in, of CANDIDATES out.

    Pictures of rejects, but for a few to be shown, never leave it, and what the judge says of a
    triplet's first candidates may spare the rest.
    """

    def __init__(
        self,
        *,
        weights: GeneratorWeights,
        holding: Holding,
        judge: str,
        config: PairConfig,
        options: SearchConfig,
        recipe: str,
        shown_below: str = "",
    ) -> None:
        holding = held_here(holding)
        model = local_weights(weights).load(holding.device)
        self._generator = Generator(model, holding, filled=metrics.filled)
        self._clip = Clip.load(local_folder(judge), holding.device)
        self._config, self._options, self._recipe = config, options, recipe
        self._shown_below = shown_below

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """A table for each triplet of the batch, as soon as its search has ended."""
        rows = batch.select(TRIPLETS.names).to_pylist()
        searched = self._generator.search(
            self._clip,
            rows,
            self._config,
            self._options,
            self._recipe,
            shown_below=self._shown_below,
        )
        while True:
            began = time.monotonic()
            found = next(searched, None)
            seconds = time.monotonic() - began
            if found is None:
                return
            yield pa.Table.from_pylist([self._row(found, seconds)], schema=CANDIDATES)

    def _row(self, found: Searched, seconds: float) -> dict[str, Any]:
        status = "ok" if found.ended == "all" else found.ended
        return {
            **found.triplet,
            "recipe": self._recipe,
            "status": status,
            "seconds": seconds,
            "candidates": [
                {
                    "index": candidate.request.index,
                    "seed": candidate.request.seed,
                    "self_replace": candidate.request.self_replace,
                    "guidance_scale": candidate.request.guidance_scale,
                    **(candidate.similarities or {}),
                    "reason": candidate.reason,
                    "source_image": self._stored(candidate.source_image),
                    "edited_image": self._stored(candidate.edited_image),
                }
                for candidate in found.candidates
            ],
        }

    def _stored(self, picture: Pictures | None) -> dict[str, Any] | None:
        if picture is None:
            return None
        return {"bytes": encode_image(to_pil(picture), self._config.image_format), "path": None}


class JudgeCandidates:
    """An actor of the plan: adds similarities and reasons, and drops the images of rejects."""

    def __init__(
        self,
        judge: str,
        config: PairConfig,
        device: str = "cpu",
        batch_size: int = 32,
        shown_below: str = "",
    ) -> None:
        self._clip = Clip.load(local_folder(judge), device)
        self._config, self._batch_size, self._shown_below = config, batch_size, shown_below

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """A table for each triplet of the batch."""
        for row in batch.to_pylist():
            self._judge(row)
            yield pa.Table.from_pylist([row], schema=CANDIDATES)

    def _judge(self, row: dict[str, Any]) -> None:
        candidates = row["candidates"]
        done = 0
        while done < len(candidates):
            part = candidates[done : done + self._batch_size]
            too_large: str | None = None
            try:
                self._score(row, part)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                too_large = str(error)
            if too_large is None:
                done += len(part)
            else:  # the candidates are judged again
                self._batch_size = halved("judge", len(part), too_large, self._clip.device)
        reasons = select(candidates, self._config.thresholds, self._config.keep)
        for candidate, reason in zip(candidates, reasons, strict=True):
            candidate["reason"] = reason
            shown = is_shown(row["triplet_key"], candidate["index"], self._shown_below)
            for name in ("source_image", "edited_image"):
                candidate[name] = self._stored(candidate[name]) if reason is None or shown else None

    def _score(self, row: Mapping[str, Any], candidates: list[dict[str, Any]]) -> None:
        source, edited = (
            np.stack([np.asarray(decode_image(c[name]["bytes"])) for c in candidates])
            for name in ("source_image", "edited_image")
        )
        captions = [row["caption"]] * len(candidates)
        edited_captions = [row["edited_caption"]] * len(candidates)
        scores = self._clip.similarities(source, edited, captions, edited_captions).rows()
        for candidate, values in zip(candidates, scores, strict=True):
            candidate.update(values)

    def _stored(self, image: Mapping[str, Any]) -> dict[str, Any]:
        picture = decode_image(image["bytes"])
        return {"bytes": encode_image(picture, self._config.image_format), "path": None}


def held_here(holding: Holding) -> Holding:
    """The same on the CPU where this actor was given no GPU, as some of a mixed pool are not."""
    if holding.device == "cpu" or not ray.is_initialized():
        return holding
    if ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        return holding
    return replace(holding, device="cpu", channels_last=False, compile=False)


def _transported(array: Pictures) -> bytes:
    return encode_png(to_pil(array), level=_TRANSPORT_LEVEL)
