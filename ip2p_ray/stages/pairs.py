"""triplets -> candidates -> pairs: the generator and the judge in actors, then a cheap explosion.

    <folder>/queue        the triplets that can be used, each once, in parts
    <folder>/candidates   a row a triplet, its candidates nested in it, the images of the kept ones
    <folder>/pairs, scores, rejects/pairs       read off the candidates
    <folder>/pairs.html   what came out

A triplet's row stays one row, so that a killed plan goes on by the triplet. A part is one plan, of
so few blocks that the driver's memory does not grow with the number of triplets.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from ip2p_ray import storage
from ip2p_ray.errors import ConfigError
from ip2p_ray.generator import GeneratorWeights, Holding
from ip2p_ray.pairs import PairConfig
from ip2p_ray.report import Report
from ip2p_ray.rules import Rules
from ip2p_ray.schema import CANDIDATES
from ip2p_ray.search.options import SearchConfig, search_recipe
from ip2p_ray.stages import attempts, plan, run
from ip2p_ray.stages.compaction import compact
from ip2p_ray.stages.explosion import explode
from ip2p_ray.stages.memory import memory_line
from ip2p_ray.stages.pair_actors import GenerateCandidates, JudgeCandidates, SearchCandidates
from ip2p_ray.stages.pairs_page import shown_below, write_page
from ip2p_ray.stages.queue import PART_TRIPLETS, fill_queue

logger = logging.getLogger(__name__)

ROWS_ON_THE_WAY = 3
"""Of each actor: one that it works on, one that waits for it, one that it has made."""

WORK = ".work"
"""Folder, in that of a part, of the many small shards that the plan writes, and of its notes."""


@dataclass(frozen=True, kw_only=True)
class Making:
    """Who makes and judges candidates; only `options` and `limit` change what comes out."""

    generator: GeneratorWeights
    judge: str
    """Folder or open_clip name of the CLIP."""
    holding: Holding = field(default_factory=Holding)
    """How each generator is held."""
    generators: run.Resources = field(default_factory=run.Resources)
    """Their actors; `batch_size` is not read, the holding has it."""
    judges: run.Resources | None = field(default_factory=lambda: run.Resources(batch_size=32))
    """Theirs, `batch_size` counting candidates; None judges where the pictures are made."""
    options: SearchConfig = field(default_factory=SearchConfig)
    """What is spared on the way; these do change what comes out, and are in the recipe."""
    max_reject_share: float = 0.05
    """Share of triplets, in [0, 1], that may be unusable; above it the stage fails."""
    limit: int | None = None
    """Most triplets that are used, drawn from all; None is all."""
    part_triplets: int = PART_TRIPLETS
    """Triplets of a part."""

    def __post_init__(self) -> None:
        if self.judges is not None and self.options != SearchConfig():
            raise ConfigError(
                "what is spared is decided by the judge, which then has to be where the pictures "
                "are made: judges must be None with any option"
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit is at least 1, got {self.limit}")
        if self.part_triplets < 1:
            raise ConfigError(f"part_triplets is at least 1, got {self.part_triplets}")
        shared = self.options.share_source or 1
        if 1 + shared > 2 * self.holding.batch_size:
            raise ConfigError(
                f"share_source {shared} wants a batch_size of at least {-(-(1 + shared) // 2)}, "
                f"got {self.holding.batch_size}"
            )
        if self.judges is None and self.holding.compile:
            raise ConfigError("a search has batches of many shapes: compile needs judges")

    def store_bytes(self, config: PairConfig) -> int:
        """About what lies in Ray's object store at a time: rows on their way to the judges."""
        if self.judges is None:
            return 0
        most = [held.most_actors or held.actors for held in (self.generators, self.judges)]
        return ROWS_ON_THE_WAY * sum(most) * triplet_bytes(config)

    @property
    def actors(self) -> tuple[run.Resources, ...]:
        """All that run at the same time."""
        return (self.generators,) if self.judges is None else (self.generators, self.judges)

    def fill_queue(self, triplets: str, folder: str) -> storage.Manifest:
        """The dataset `<folder>/queue` of the triplets that are used."""
        return fill_queue(
            triplets,
            folder,
            limit=self.limit,
            max_reject_share=self.max_reject_share,
            part_triplets=self.part_triplets,
        )


def generate_pairs(
    triplets: str,
    folder: str,
    config: PairConfig,
    making: Making,
    *,
    models: Mapping[str, str],
    actors: tuple[type, type] | None = None,
) -> storage.Manifest:
    """The dataset `<folder>/pairs`, and beside it what the head of this module lists.

    `models` has the fingerprints of generator and judge. `actors` are the classes that make and
    judge, by default GenerateCandidates and JudgeCandidates; others take the same arguments.

    Raises:
        DatasetError: the triplets are not whole, or something made otherwise is in the folder.
        StageError: too many triplets are unusable, or no candidate was accepted; says why.
    """
    queue = making.fill_queue(triplets, folder)
    makers = {role: models[role] for role in ("generator", "judge")}
    options = making.options
    spared = {} if options == SearchConfig() else {"search": asdict(options)}
    origin = run.Origin(
        dataset="candidates",
        config={**asdict(config), **spared},
        models=makers,
        sources={"queue": queue.recipe},
    )
    name = search_recipe(config, options, *makers.values())
    steps = _steps(
        config, making, name, queue.rows, actors or (GenerateCandidates, JudgeCandidates)
    )
    candidates, parts = (
        storage.join(folder, "candidates"),
        plan.shards(storage.join(folder, "queue")),
    )

    def generate() -> list[Report]:
        done, verdicts = 0, Counter[str | None]()
        for number, part in enumerate(parts):
            attempts.count(done, queue.rows, "triplets", verdicts)
            name = f"candidates, part {number + 1} of {len(parts)}"
            whole = _make_part(part, candidates, replace(origin, dataset=name), number, steps)
            done += whole.rows
            verdicts += verdicts_of(whole)
        attempts.count(done, queue.rows, "triplets", verdicts)
        return []

    def seconds() -> float:
        manifests = (
            storage.read_manifest(_part(candidates, number)) for number in range(len(parts))
        )
        return sum(manifest.device_seconds for manifest in manifests)

    made = run.make(candidates, origin, generate, device_seconds=seconds)
    pairs = explode(folder, Rules(thresholds=config.thresholds, keep=config.keep), made)
    write_page(folder, config)
    return pairs


def _make_part(
    source: str, candidates: str, origin: run.Origin, number: int, steps: list[plan.Step]
) -> storage.Manifest:
    """The candidates of a part of the queue, in few shards in the order of the keys."""
    part = _part(candidates, number)
    blocks = storage.join(part, WORK, "blocks")

    def generate() -> list[Report]:
        began = time.monotonic()
        peaks = plan.stream(
            [source],
            blocks,
            name=origin.dataset,
            key="triplet_key",
            schema=CANDIDATES,
            steps=steps,
            unit="triplets",
            rows_per_block=steps[0].resources.batch_size,
            patient=True,
            judged=JUDGED,
        )
        logger.info("%s: memory at most: %s", origin.dataset, memory_line(peaks))
        shards = storage.list_shards(blocks)
        compact(shards, part, name="candidates", key="triplet_key", schema=CANDIDATES)
        counts = JUDGED.of(storage.list_shards(part))
        seconds = run.earlier_seconds(part) + time.monotonic() - began
        return [Report.count("candidates", counts.elements(), seconds)]

    of_part = replace(origin, sources={**origin.sources, "part": str(number)})
    whole = run.make(part, of_part, generate, device_seconds=lambda: _device_seconds(part))
    storage.remove_all(storage.join(part, WORK))
    return whole


def _verdicts(table: pa.Table) -> Counter[str | None]:
    """Of the candidates in rows of CANDIDATES."""
    lists = table["candidates"].combine_chunks()
    reasons = pc.struct_field(pc.list_flatten(lists), "reason")
    counts = pc.value_counts(reasons)
    return Counter({each["values"].as_py(): each["counts"].as_py() for each in counts})


JUDGED = plan.Judged(columns=["candidates.list.element.reason"], verdicts=_verdicts)
"""Of rows of CANDIDATES."""


def verdicts_of(part: storage.Manifest) -> Counter[str | None]:
    """That the manifest of a part has; none in those of earlier versions."""
    found = Counter[str | None]()
    for report in part.reports:
        found[None] += report["rows_out"]
        found.update(report["rejected"])
    return found


def _device_seconds(part: str) -> float:
    """That the generators were busy with the candidates of a part."""
    sums = (
        pc.sum(storage.read_table(shard, columns=["seconds"])["seconds"]).as_py()
        for shard in storage.list_shards(part)
    )
    return round(sum(seconds or 0.0 for seconds in sums), 3)


def _part(candidates: str, number: int) -> str:
    return storage.join(candidates, f"part-{number:05d}")


def triplet_bytes(config: PairConfig) -> int:
    """Of a triplet's pictures as they go to the judge, at most: PNG is no larger than the pixels.

    All of them are one row, which can be no smaller than a block.
    """
    return config.candidates * 2 * 3 * config.resolution**2


def triplets_at_a_time(batch_size: int, candidates: int) -> int:
    """Triplets that an actor takes, and that a kill can cost it: the fewest that fill its batches.

    Nine tenths of all places in batches, or as much as eight batches' candidates can.
    """

    def full(rows: int) -> float:
        batches = -(-rows * candidates // batch_size)
        return rows * candidates / (batches * batch_size)

    most = max(1, 8 * batch_size // candidates)
    for rows in range(1, most + 1):
        if full(rows) >= 0.9:
            return rows
    return max(range(1, most + 1), key=full)


def _steps(
    config: PairConfig, making: Making, recipe: str, triplets: int, actors: tuple[type, type]
) -> list[plan.Step]:
    rows = triplets_at_a_time(making.holding.batch_size, config.candidates)
    if making.judges is None:
        return [_search_step(config, making, recipe, rows, shown_below(triplets))]
    return [
        plan.Step(
            callable=actors[0],
            arguments={
                "weights": making.generator,
                "holding": making.holding,
                "config": config,
                "recipe": recipe,
            },
            resources=replace(making.generators, batch_size=rows),
        ),
        plan.Step(
            callable=actors[1],
            arguments={
                "judge": making.judge,
                "config": config,
                "device": "cuda" if making.judges.gpus else "cpu",
                "batch_size": making.judges.batch_size,
                "shown_below": shown_below(triplets),
            },
            resources=replace(making.judges, batch_size=rows),
            judges=True,
        ),
    ]


def _search_step(
    config: PairConfig, making: Making, recipe: str, rows: int, below: str
) -> plan.Step:
    batch = making.holding.batch_size
    if making.options.decides:  # so many that those which go on fill batches
        rows = max(rows, 2 * batch // making.options.decide_every)
    if making.options.prune_at is not None:  # and so do survivors
        rows = max(rows, -(-4 * batch // config.candidates))
    return plan.Step(
        callable=SearchCandidates,
        arguments={
            "weights": making.generator,
            "holding": making.holding,
            "judge": making.judge,
            "config": config,
            "options": making.options,
            "recipe": recipe,
            "shown_below": below,
        },
        resources=replace(making.generators, batch_size=rows),
        judges=True,
    )
