"""captions -> triplets: a language model in actors writes replies, and parsing keeps the usable.

The replies are a dataset of their own, so none is ever asked for twice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from ip2p_ray import storage
from ip2p_ray.clip import Clip
from ip2p_ray.errors import StageError
from ip2p_ray.report import Report
from ip2p_ray.schema import CAPTIONS, REJECTS, TRIPLETS, split_of
from ip2p_ray.stages import plan, run
from ip2p_ray.triplets.local_writer import LocalWriter
from ip2p_ray.triplets.reply import Triplet, parse_reply

DUPLICATE = "duplicate_triplet"

REPLIES = pa.schema(
    [
        *CAPTIONS,
        ("reply", pa.string()),
        ("status", pa.string()),  # "ok", or why the reply is no triplet
        ("instruction", pa.string()),  # null unless the status is "ok"
        ("edited_caption", pa.string()),  # null unless the status is "ok"
    ]
)


@dataclass(frozen=True, kw_only=True)
class TripletConfig:
    """How triplets are written."""

    seed: int = 0
    """Of the writer's draws."""
    held_out: float = 0.05
    """Share of triplets, in [0, 1], that no editor is trained on."""


class WriteReplies:
    """An actor of the plan: rows of CAPTIONS in, rows of REPLIES out."""

    def __init__(self, writer: str, judge: str, seed: int) -> None:
        self._writer = LocalWriter.load(writer)
        self._fits = Clip.load(judge).fits
        self._seed = seed

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A reply to each caption of the batch, parsed."""
        rows = batch.select(CAPTIONS.names).to_pylist()
        replies = self._writer.write([row["caption"] for row in rows], seed=self._seed)
        for row, reply in zip(rows, replies, strict=True):
            row.update(self._parsed(row["caption"], reply))
        return pa.Table.from_pylist(rows, schema=REPLIES)

    def _parsed(self, caption: str, reply: str) -> dict[str, str | None]:
        found = parse_reply(caption, reply, fits=self._fits)
        if isinstance(found, Triplet):
            texts = {"instruction": found.instruction, "edited_caption": found.edited_caption}
            return {"reply": reply, "status": "ok", **texts}
        return {"reply": reply, "status": found}


def write_triplets(
    captions: str,
    folder: str,
    config: TripletConfig,
    *,
    writer: str,
    judge: str,
    models: dict[str, str],
    resources: run.Resources,
) -> storage.Manifest:
    """The dataset `<folder>/triplets`, with `<folder>/replies` and `<folder>/rejects/triplets`.

    Raises:
        StageError: no reply was usable; the text says why not.
    """
    replies, triplets = storage.join(folder, "replies"), storage.join(folder, "triplets")
    rejects = storage.join(folder, "rejects", "triplets")
    asked = run.Origin(
        dataset="replies",
        config={"seed": config.seed},
        models={"writer": models["writer"], "judge": models["judge"]},
        sources={"captions": storage.read_manifest(captions).recipe},
    )
    step = plan.Step(
        callable=WriteReplies,
        arguments={"writer": writer, "judge": judge, "seed": config.seed},
        resources=resources,
    )

    def ask() -> list[Report]:
        plan.stream(
            plan.shards(captions),
            replies,
            key="caption_key",
            schema=REPLIES,
            steps=[step],
            unit="captions",
            rows_per_block=resources.batch_size,
        )
        return []

    wrote = run.make(replies, asked, ask)
    origin = run.Origin(
        dataset="triplets", config=asdict(config), models=asked.models, sources=asked.sources
    )
    run.make(rejects, origin, lambda: _write_rejects(replies, rejects))
    seconds = wrote.wall_seconds

    def write() -> list[Report]:
        rows, report = _triplets(replies, config, models["writer"], seconds)
        if not rows:
            raise StageError(f"triplets: no reply was usable: {report.line()}")
        table = pa.Table.from_pylist(rows, schema=TRIPLETS)
        storage.write_shard(triplets, "triplets-00000", table)
        return [report]

    return run.make(triplets, origin, write)


def _triplets(
    replies: str, config: TripletConfig, writer: str, seconds: float
) -> tuple[list[dict[str, Any]], Report]:
    """Rows of TRIPLETS by their keys, and what became of the replies."""
    judged = _judged(replies)
    rows = []
    for row, reason in judged:
        if reason is None:
            texts = {name: row[name] for name in ("caption", "instruction", "edited_caption")}
            key = Triplet(**texts).key
            rows.append(
                {
                    "triplet_key": key,
                    **texts,
                    "caption_key": row["caption_key"],
                    "split": split_of(key, config.held_out),
                    "writer": writer,
                }
            )
    rows.sort(key=lambda row: str(row["triplet_key"]))
    return rows, Report.count("triplets", [reason for _, reason in judged], seconds)


def _write_rejects(replies: str, rejects: str) -> list[Report]:
    rows = [
        {"stage": "triplets", "key": row["caption_key"], "reason": reason, "detail": row["reply"]}
        for row, reason in _judged(replies)
        if reason is not None
    ]
    storage.write_shard(rejects, "rejects-00000", pa.Table.from_pylist(rows, schema=REJECTS))
    return []


def _judged(replies: str) -> list[tuple[dict[str, Any], str | None]]:
    """Each reply with the reason why it gives no triplet, in the order of the caption keys."""
    rows = storage.read_dataset(replies, REPLIES).sort_by("caption_key").to_pylist()
    seen: set[tuple[str, str]] = set()
    judged = []
    for row in rows:
        reason = None if row["status"] == "ok" else row["status"]
        if reason is None and (row["caption"], row["instruction"]) in seen:
            reason = DUPLICATE
        seen.add((row["caption"], row["instruction"]))
        judged.append((row, reason))
    return judged
