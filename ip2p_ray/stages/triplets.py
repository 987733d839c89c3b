"""captions -> triplets: a language model writes replies, and parsing keeps the usable.

The replies are a dataset of their own, so none is ever asked for twice. A model in this cluster
writes them in actors (`write_triplets`); one at an endpoint is asked by `replies.AskReplies`
(`ask_triplets`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any, Literal

import pyarrow as pa

from ip2p_ray import storage
from ip2p_ray.copies import local_folder
from ip2p_ray.errors import ConfigError, StageError
from ip2p_ray.gallery import triplets_page
from ip2p_ray.places import Places
from ip2p_ray.report import Report
from ip2p_ray.schema import CAPTIONS, REJECTS, TRIPLETS, split_of
from ip2p_ray.stages import plan, run, vllm_writer
from ip2p_ray.stages.captions import Shards
from ip2p_ray.stages.ordering import in_order
from ip2p_ray.stages.replies import Asking, ask_replies, origin_of
from ip2p_ray.stages.reply_rows import JUDGED, REPLIES, fits_openai, row_of_reply, unanswered
from ip2p_ray.triplets.quality import Quality, Tally
from ip2p_ray.triplets.reply import DUPLICATE, Triplet
from ip2p_ray.triplets.writer import WriterConfig, writer_recipe

_ROWS_AT_ONCE = 1_000  # as objects a row takes ten times the memory that it takes in a table


@dataclass(frozen=True, kw_only=True)
class TripletConfig:
    """How triplets are written."""

    seed: int = 0
    """Of the writer's draws."""
    held_out: float = 0.05
    """Share of triplets, in [0, 1], that no editor is trained on."""


class WriteReplies:
    """An actor of the plan: rows of CAPTIONS in, rows of REPLIES out."""

    def __init__(self, writer: str, judge: str | None, seed: int, device: str = "cpu") -> None:
        # Here, so that the stage needs no torch where an endpoint writes.
        from ip2p_ray.clip import Clip
        from ip2p_ray.triplets.local_writer import LocalWriter

        self._writer = LocalWriter.load(local_folder(writer), device)
        self._fits = Clip.load(local_folder(judge)).fits if judge else fits_openai
        self._seed = seed

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A reply to each caption of the batch, parsed."""
        rows = batch.select(CAPTIONS.names).to_pylist()
        replies = self._writer.write([row["caption"] for row in rows], seed=self._seed)
        for row, reply in zip(rows, replies, strict=True):
            row.update(row_of_reply(row["caption"], reply, self._fits))
        return pa.Table.from_pylist(rows, schema=REPLIES)


def write_triplets(
    captions: str,
    folder: str,
    config: TripletConfig,
    *,
    writer: str,
    judge: str | None,
    models: Mapping[str, str],
    resources: run.Resources,
    engine: Literal["transformers", "vllm"] = "transformers",
) -> storage.Manifest:
    """The dataset `<folder>/triplets`, with `<folder>/replies` and `<folder>/rejects/triplets`.

    `writer` is the folder of a causal LM, and `engine` what runs it (`vllm_writer.chosen`); vLLM
    knows no judge but OpenAI's. What is too long for the CLIP `judge`, by default
    OpenAI's, is rejected. `models` has the fingerprint of each. The page triplets.html in the
    folder says what the triplets are like.

    Raises:
        StageError: no reply was usable; the text says why not.
    """
    replies = storage.join(folder, "replies")
    asked = run.Origin(
        dataset="replies",
        config={"seed": config.seed, **({"engine": engine} if engine != "transformers" else {})},
        models={"writer": models["writer"], "judge": models["judge"]},
        sources={"captions": storage.read_manifest(captions).recipe},
    )
    if engine == "vllm" and judge is not None:
        raise ConfigError(f"vLLM's replies are not judged by {judge}: only by OpenAI's CLIP")
    if engine == "vllm" and resources.custom:
        raise ConfigError("Ray Data places vLLM's engines by their GPUs, not by custom resources")

    def step() -> plan.Step | Callable[[Any], Any]:
        if engine == "vllm":
            return vllm_writer.step(writer, config.seed, resources)
        device = "cuda" if resources.gpus else "cpu"
        arguments = {"writer": writer, "judge": judge, "seed": config.seed, "device": device}
        return plan.Step(
            callable=WriteReplies, arguments=arguments, resources=resources, judges=True
        )

    def write() -> list[Report]:
        plan.stream(
            plan.shards(captions),
            replies,
            key="caption_key",
            schema=REPLIES,
            steps=[step()],
            unit="captions",
            rows_per_block=resources.batch_size,
            judged=JUDGED,
        )
        return []

    wrote = run.make(replies, asked, write)
    return _made(folder, asked, asdict(config), config.held_out, wrote.wall_seconds)


def ask_triplets(
    captions: str,
    folder: str,
    config: WriterConfig,
    *,
    examples: Sequence[Triplet],
    asking: Asking,
    held_out: float = 0.05,
) -> storage.Manifest:
    """What `write_triplets` makes, by a model at an endpoint.

    Raises:
        Ip2pError: as `replies.ask_replies`, and if no reply was usable.
    """
    replies = storage.join(folder, "replies")
    asked = origin_of(captions, config, writer_recipe(config, examples))
    wrote = ask_replies(captions, replies, asked, config, examples=examples, asking=asking)
    lacking = unanswered(replies)
    if lacking is not None:
        # They may be asked again; what was made of these triplets is then not of the new ones.
        asked = replace(asked, sources={**asked.sources, "unanswered": lacking})
    settings = {**asdict(config), "held_out": held_out}
    return _made(folder, asked, settings, held_out, wrote.wall_seconds)


def _made(
    folder: str,
    asked: run.Origin,
    settings: Mapping[str, Any],
    held_out: float,
    seconds: float,
) -> storage.Manifest:
    """The triplets of the replies in the folder, their rejects and their page."""
    replies, triplets = storage.join(folder, "replies"), storage.join(folder, "triplets")
    rejects = storage.join(folder, "rejects", "triplets")
    origin = run.Origin(
        dataset="triplets", config=settings, models=asked.models, sources=asked.sources
    )
    run.make(rejects, origin, lambda: _write_rejects(replies, rejects))

    def write() -> list[Report]:
        quality, report = _write_triplets(
            replies, triplets, held_out, origin.models["writer"], seconds
        )
        show(report, quality)
        return [report]

    def show(report: Report, quality: Quality) -> None:
        text = triplets_page(report, quality, writer=origin.models["writer"])
        storage.write_bytes(page, text.encode())

    page = storage.join(folder, "triplets.html")
    manifest = run.make(triplets, origin, write)
    if not storage.exists(page):
        show(Report(**manifest.reports[0]), _quality(triplets))
    return manifest


def _write_triplets(
    replies: str, triplets: str, held_out: float, writer: str, seconds: float
) -> tuple[Quality, Report]:
    """Writes rows of TRIPLETS in the order of the caption keys, and counts them."""
    storage.remove_shards(triplets)
    shards, tally = Shards(triplets, "triplets", TRIPLETS), Tally()
    reasons = []
    for row, reason in _judged(replies):
        reasons.append(reason)
        if reason is not None:
            continue
        texts = {name: row[name] for name in ("caption", "instruction", "edited_caption")}
        triplet = Triplet(**texts)
        tally.add(triplet)
        shards.add(
            {
                "triplet_key": triplet.key,
                **texts,
                "caption_key": row["caption_key"],
                "split": split_of(triplet.key, held_out),
                "writer": writer,
            }
        )
    report = Report.count("triplets", reasons, seconds)
    if not report.rows_out:
        raise StageError(f"triplets: no reply was usable: {report.line()}")
    shards.close()
    return tally.quality(), report


def _quality(triplets: str) -> Quality:
    """Of the triplets of a whole dataset."""
    tally = Tally()
    names = list(Triplet.__dataclass_fields__)
    for shard in plan.shards(triplets):
        table = storage.read_table(shard, columns=names)
        for batch in table.to_batches(_ROWS_AT_ONCE):
            for row in batch.to_pylist():
                tally.add(Triplet(**row))
    return tally.quality()


def _write_rejects(replies: str, rejects: str) -> list[Report]:
    storage.remove_shards(rejects)
    shards = Shards(rejects, "rejects", REJECTS)
    for row, reason in _judged(replies):
        if reason is not None:
            shards.add(
                {
                    "stage": "triplets",
                    "key": row["caption_key"],
                    "reason": reason,
                    "detail": row["reply"],
                }
            )
    shards.close()
    return []


def _judged(replies: str) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Each reply with the reason why it gives no triplet, in the order of the caption keys."""
    seen = Places()
    for row in _in_order(replies):
        reason = None if row["status"] == "ok" else str(row["status"])
        if reason is None:
            texts = f"{row['caption']}\n{row['instruction']}".casefold()
            digest = blake2b(texts.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if seen.get(digest) is not None:
                reason = DUPLICATE
            seen.put(digest, 0)
        yield row, reason


def _in_order(replies: str) -> Iterator[dict[str, Any]]:
    """The rows of REPLIES by their keys."""
    rows = storage.read_manifest(replies).rows
    for table in in_order(plan.shards(replies), "caption_key", REPLIES, rows=rows):
        for batch in table.to_batches(_ROWS_AT_ONCE):
            yield from batch.to_pylist()
