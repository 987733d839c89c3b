"""triplets -> candidates -> pairs: the generator and the judge in actors, then a cheap explosion.

A triplet's row stays one row, with its candidates nested in it and the images of the kept ones, so
that a killed plan goes on by the triplet. Pairs, scores and rejects are read off it afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ip2p_ray import storage
from ip2p_ray.clip import Clip
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import StageError
from ip2p_ray.filtering import NOT_BEST, select
from ip2p_ray.images import decode_image, encode_png, to_pil
from ip2p_ray.pairs import (
    CandidateRequest,
    PairConfig,
    Pictures,
    candidate_requests,
    generate_candidates,
)
from ip2p_ray.report import Report
from ip2p_ray.schema import (
    CANDIDATES,
    PAIRS,
    REJECTS,
    SCORES,
    TRIPLETS,
    pair_key,
    recipe,
)
from ip2p_ray.stages import plan, run

ROWS_PER_SHARD = 1024


class GenerateCandidates:
    """An actor of the plan: rows of TRIPLETS in, rows of CANDIDATES that nobody has judged out."""

    def __init__(self, generator: str, config: PairConfig, recipe: str, batch_size: int) -> None:
        self._model = StableDiffusion.load(generator)
        self._config, self._recipe, self._batch_size = config, recipe, batch_size

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """A table for each triplet of the batch."""
        rows = batch.select(TRIPLETS.names).to_pylist()
        requests = [request for row in rows for request in self._requests(row)]
        made: list[dict[str, Any]] = []
        for start in range(0, len(requests), self._batch_size):
            made += self._candidates(requests[start : start + self._batch_size])
        each = self._config.candidates
        for place, row in enumerate(rows):
            own = made[place * each : (place + 1) * each]
            row.update(recipe=self._recipe, status="ok", candidates=own)
            yield pa.Table.from_pylist([row], schema=CANDIDATES)

    def _requests(self, row: Mapping[str, Any]) -> list[CandidateRequest]:
        texts = (row["triplet_key"], row["caption"], row["edited_caption"])
        return candidate_requests(*texts, self._config, self._recipe)

    def _candidates(self, requests: list[CandidateRequest]) -> list[dict[str, Any]]:
        source, edited = generate_candidates(self._model, requests, self._config)
        return [
            {
                "index": request.index,
                "seed": request.seed,
                "self_replace": request.self_replace,
                "guidance_scale": request.guidance_scale,
                "source_image": _image(source[row]),
                "edited_image": _image(edited[row]),
            }
            for row, request in enumerate(requests)
        ]


class JudgeCandidates:
    """An actor of the plan: adds similarities and reasons, and drops the images of rejects."""

    def __init__(self, judge: str, config: PairConfig) -> None:
        self._clip = Clip.load(judge)
        self._config = config

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """A table for each triplet of the batch."""
        for row in batch.to_pylist():
            self._judge(row)
            yield pa.Table.from_pylist([row], schema=CANDIDATES)

    def _judge(self, row: dict[str, Any]) -> None:
        candidates = row["candidates"]
        source, edited = (
            np.stack([np.asarray(decode_image(c[name]["bytes"])) for c in candidates])
            for name in ("source_image", "edited_image")
        )
        captions = [row["caption"]] * len(candidates)
        edited_captions = [row["edited_caption"]] * len(candidates)
        scores = self._clip.similarities(source, edited, captions, edited_captions).rows()
        for candidate, values in zip(candidates, scores, strict=True):
            candidate.update(values)
        reasons = select(candidates, self._config.thresholds, self._config.keep)
        for candidate, reason in zip(candidates, reasons, strict=True):
            candidate["reason"] = reason
            if reason is not None:
                candidate.update(source_image=None, edited_image=None)


def generate_pairs(
    triplets: str,
    folder: str,
    config: PairConfig,
    *,
    generator: str,
    judge: str,
    models: Mapping[str, str],
    resources: run.Resources,
) -> storage.Manifest:
    """The dataset `<folder>/pairs`, with candidates, scores and rejects/pairs beside it.

    `resources.batch_size` counts candidates; the judge is one more actor.

    Raises:
        StageError: no candidate was accepted; the text says which threshold rejected how many.
    """
    candidates = storage.join(folder, "candidates")
    makers = {role: models[role] for role in ("generator", "judge")}
    sources = {"triplets": storage.read_manifest(triplets).recipe}
    origin = run.Origin(dataset="candidates", config=asdict(config), models=makers, sources=sources)
    # What an actor makes at a time, and so what a kill can cost it.
    rows = max(1, resources.batch_size // config.candidates)
    steps = _steps(generator, judge, config, recipe(config, *makers.values()), rows, resources)

    def generate() -> list[Report]:
        plan.stream(
            plan.shards(triplets),
            candidates,
            key="triplet_key",
            schema=CANDIDATES,
            steps=steps,
            unit="triplets",
            rows_per_block=rows,
        )
        return []

    made = run.make(candidates, origin, generate)
    return _explode(folder, config, made)


def _steps(
    generator: str, judge: str, config: PairConfig, recipe: str, rows: int, held: run.Resources
) -> list[plan.Step]:
    return [
        plan.Step(
            callable=GenerateCandidates,
            arguments={
                "generator": generator,
                "config": config,
                "recipe": recipe,
                "batch_size": held.batch_size,
            },
            resources=replace(held, batch_size=rows),
        ),
        plan.Step(
            callable=JudgeCandidates,
            arguments={"judge": judge, "config": config},
            resources=replace(held, actors=1, batch_size=rows),
        ),
    ]


def _explode(folder: str, config: PairConfig, candidates: storage.Manifest) -> storage.Manifest:
    """Scores and rejects, then pairs."""
    source = storage.join(folder, "candidates")
    scores, pairs = storage.join(folder, "scores"), storage.join(folder, "pairs")
    rejects = storage.join(folder, "rejects", "pairs")

    def origin(dataset: str) -> run.Origin:
        return run.Origin(dataset=dataset, config={}, sources={"candidates": candidates.recipe})

    def write_pairs() -> list[Report]:
        reasons = [row["reason"] for row in _exploded(source)]
        report = Report.count("pairs", reasons, candidates.wall_seconds)
        if not report.rows_out:
            raise StageError(_nothing_kept(report, config, scores))
        for split in ("train", "held_out"):
            kept = (row for row in _exploded(source) if row["reason"] is None)
            _write(pairs, split, PAIRS, (row for row in kept if row["split"] == split))
        return [report]

    def write_scores() -> list[Report]:
        _write(scores, "scores", SCORES, _exploded(source))
        return []

    def write_rejects() -> list[Report]:
        dropped = (row for row in _exploded(source) if row["reason"] is not None)
        _write(rejects, "rejects", REJECTS, map(_reject, dropped))
        return []

    run.make(scores, origin("scores"), write_scores)
    run.make(rejects, origin("rejects"), write_rejects)
    return run.make(pairs, origin("pairs"), write_pairs)


def _exploded(candidates: str) -> Iterator[dict[str, Any]]:
    """A row for each candidate, with its triplet's columns."""
    for shard in plan.shards(candidates):
        for row in pq.read_table(shard).cast(CANDIDATES).to_pylist():
            for candidate in row.pop("candidates"):
                key = pair_key(row["triplet_key"], candidate["index"], row["recipe"])
                yield {**row, **candidate, "pair_key": key}


def _reject(row: Mapping[str, Any]) -> dict[str, Any]:
    reason = row["reason"]
    value = row["direction_similarity" if reason == NOT_BEST else reason]
    return {"stage": "pairs", "key": row["pair_key"], "reason": reason, "detail": f"{value:.3f}"}


def _write(uri: str, prefix: str, schema: pa.Schema, rows: Iterator[dict[str, Any]]) -> None:
    """Shards of at most ROWS_PER_SHARD rows; one even where there are no rows."""
    for number in itertools.count():
        part = list(itertools.islice(rows, ROWS_PER_SHARD))
        if part or not number:
            kept = [{name: row[name] for name in schema.names} for row in part]
            table = pa.Table.from_pylist(kept, schema=schema)
            storage.write_shard(uri, f"{prefix}-{number:05d}", table)
        if len(part) < ROWS_PER_SHARD:
            return


def _nothing_kept(report: Report, config: PairConfig, scores: str) -> str:
    limits = config.thresholds
    least = {
        "caption_similarity": limits.text,
        "edited_caption_similarity": limits.text,
        "image_similarity": limits.image,
        "direction_similarity": limits.direction,
    }
    counts = ", ".join(
        f"{count:,} by {reason} below {least[reason]:g}"
        for reason, count in report.rejected.items()
    )
    return (
        f"pairs: none of {report.rows_in:,} candidates was accepted: {counts}. Their scores are in "
        f"{scores}; generate more candidates or lower that threshold"
    )


def _image(array: Pictures) -> dict[str, Any]:
    return {"bytes": encode_png(to_pil(array)), "path": None}
