"""candidates -> pairs, scores, rejects: a row a candidate, read off the rows of the triplets.

Each part of the candidates is read by a task of its own.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from ip2p_ray import storage
from ip2p_ray.errors import StageError
from ip2p_ray.report import Report
from ip2p_ray.rules import Rules, nothing_kept, reject_row
from ip2p_ray.schema import CANDIDATES, PAIRS, REJECTS, SCORES, SPLITS, pair_key
from ip2p_ray.stages import plan, run
from ip2p_ray.stages.shards import TableShards, clear

_IMAGES = ("source_image", "edited_image")
_CANDIDATE = [field.name for field in CANDIDATES.field("candidates").type.value_type]
_TASKS = 8  # that run at the same time


def explode(folder: str, rules: Rules, made: storage.Manifest) -> storage.Manifest:
    """The dataset `<folder>/pairs`, with scores and rejects/pairs, of `<folder>/candidates`.

    `made` is the manifest of the candidates, judged by the rules.

    Raises:
        StageError: no candidate was accepted; the text says which threshold rejected how many.
    """
    candidates, scores = storage.join(folder, "candidates"), storage.join(folder, "scores")
    rejects, pairs = storage.join(folder, "rejects", "pairs"), storage.join(folder, "pairs")

    def origin(dataset: str) -> run.Origin:
        return run.Origin(
            dataset=dataset,
            config={"thresholds": vars(rules.thresholds), "keep": rules.keep},
            models=made.models,
            sources={"candidates": made.recipe},
        )

    def write(target: str, write_part: Callable[..., None]) -> list[Report]:
        clear(target)
        _each_part(write_part, candidates, target)
        return []

    def write_pairs() -> list[Report]:
        counts = _counts(scores)
        if not counts[None]:
            raise StageError(nothing_kept(counts, rules, scores))
        write(pairs, _write_pairs)
        written = plan.count_rows(storage.list_shards(pairs))
        if written != counts[None]:
            raise StageError(f"pairs: {written:,} of {counts[None]:,} kept candidates were written")
        return [Report.count("pairs", counts.elements(), made.wall_seconds)]

    run.make(scores, origin("scores"), lambda: write(scores, _write_scores))
    run.make(rejects, origin("rejects"), lambda: write(rejects, _write_rejects))
    return run.make(pairs, origin("pairs"), write_pairs, device_seconds=lambda: made.device_seconds)


def exploded(shard: str, *, images: bool = True, only: Sequence[str] | None = None) -> pa.Table:
    """A row for each candidate of a shard of candidates, with the columns of its triplet.

    Without `images` their columns are not read; with `only` those triplets are.
    """
    names = [name for name in _CANDIDATE if images or name not in _IMAGES]
    triplet = [name for name in CANDIDATES.names if name != "candidates"]
    nested = [f"candidates.list.element.{name}" for name in names]
    if only is None:
        with storage.open_parquet(shard) as file:
            table = file.read(columns=[*triplet, *nested])
    else:
        table = storage.read_table(shard, filters=pc.field("triplet_key").isin(only))
    lists = table["candidates"].combine_chunks()
    flat = pc.list_flatten(lists)
    found = table.select(triplet).take(pc.list_parent_indices(lists))
    for name in names:
        found = found.append_column(name, pc.struct_field(flat, name))
    texts = (found[name].to_pylist() for name in ("triplet_key", "index", "recipe"))
    keys = [pair_key(*each) for each in zip(*texts, strict=True)]
    return found.append_column("pair_key", pa.array(keys, pa.string()))


def _each_part(write_part: Callable[..., None], candidates: str, target: str) -> None:
    """Runs the function, as tasks, on the shards of each part of the candidates."""
    shards = plan.shards(candidates)
    parts = itertools.groupby(shards, key=lambda shard: PurePosixPath(shard).parent.name)
    task = run.task_of(write_part, num_cpus=plan.TASK_CPUS, max_retries=3)
    running: list[Any] = []
    for name, inside in parts:
        if len(running) == _TASKS:
            done, running = ray.wait(running)
            ray.get(done)
        running.append(task(list(inside), name.removeprefix("part-"), target))
    ray.get(running)


def _write_scores(shards: list[str], part: str, target: str) -> None:
    tables = (exploded(shard, images=False) for shard in shards)
    _write(TableShards(target, f"scores-{part}", SCORES), tables)


def _write_rejects(shards: list[str], part: str, target: str) -> None:
    tables = (_rejects(exploded(shard, images=False)) for shard in shards)
    _write(TableShards(target, f"rejects-{part}", REJECTS), tables)


def _write_pairs(shards: list[str], part: str, target: str) -> None:
    written = {split: TableShards(target, f"{split}-{part}", PAIRS) for split in SPLITS}
    for shard in shards:
        table = exploded(shard)
        for split, kept in written.items():
            kept.add(_kept(table, split))
    for kept in written.values():
        kept.close()


def _kept(table: pa.Table, split: str) -> pa.Table:
    of_split = pc.equal(table["split"], split)
    return table.filter(pc.and_(of_split, pc.is_null(table["reason"])))


def _rejects(table: pa.Table) -> pa.Table:
    table = table.filter(pc.is_valid(table["reason"]))
    return pa.Table.from_pylist([reject_row(row) for row in table.to_pylist()], schema=REJECTS)


def _write(shards: TableShards, tables: Iterator[pa.Table]) -> None:
    for table in tables:
        shards.add(table)
    shards.close()


def _counts(scores: str) -> Counter[str | None]:
    """Candidates by the reason why they were rejected; None for those that were kept."""
    counts = Counter[str | None]()
    for shard in plan.shards(scores):
        counts.update(storage.read_table(shard, columns=["reason"])["reason"].to_pylist())
    return counts
