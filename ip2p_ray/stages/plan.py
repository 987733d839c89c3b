"""Plans of Ray Data that can be killed and continued: shards in, actors between, shards out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data.checkpoint import CheckpointConfig

from ip2p_ray import logs, parquet, storage
from ip2p_ray.errors import StageError
from ip2p_ray.places import Places
from ip2p_ray.stages import attempts, metrics, run
from ip2p_ray.stages.memory import peak_memory
from ip2p_ray.stages.progress import HEARTBEAT_S, Progress, shown
from ip2p_ray.stages.watching import Known, Tally, Verdicts, watched

logger = logging.getLogger(__name__)

BLOCK_BYTES = 16 << 20
TASK_CPUS = 0.25
FILTER_CPUS = 1.0
"""Of the actor in which Ray Data leaves out what an earlier run wrote; it cannot be told less."""

_LAST_WORDS_S = 60.0
_READERS = 16  # of shards in a bucket, at a time


@dataclass(frozen=True, kw_only=True)
class Step:
    """A map callable of a plan: a class whose objects take and yield tables."""

    callable: type
    arguments: Mapping[str, Any]
    """Of its constructor."""
    resources: run.Resources
    blocks: int | None = None
    """Blocks that an actor works on at the same time; only where `__call__` is a coroutine."""
    counts: bool = False
    """Whether it counts rows itself, finer than by blocks: its constructor gets a Tally, `tally`.
    At most one step of a plan does."""
    judges: bool = False
    """Whether what comes out of it is judged, as the plan's `Judged` can tell."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Where a table says what was judged."""

    columns: Sequence[str]
    """That are read of it, as Parquet names them."""
    verdicts: Verdicts
    """What these say."""

    def of(self, shards: Iterable[str]) -> Counter[str | None]:
        """The verdicts of all rows of the shards; a shard that a kill cut has none."""
        found = Counter[str | None]()
        with ThreadPoolExecutor(_READERS) as pool:
            for verdicts in pool.map(self._within, shards):
                found.update(verdicts)
        return found

    def _within(self, shard: str) -> Counter[str | None]:
        try:
            with storage.open_parquet(shard) as file:
                return self.verdicts(file.read(columns=list(self.columns)))
        except (OSError, pa.ArrowException):
            return Counter()


def shards(uri: str, prefix: str = "") -> list[str]:
    """The shards of a whole dataset whose names begin with `prefix`.

    Raises:
        DatasetError: the dataset is not whole.
    """
    manifest = storage.read_manifest(uri)
    names = [shard.name for shard in manifest.shards]
    return [storage.join(uri, name) for name in names if Path(name).name.startswith(prefix)]


def stream(
    sources: Sequence[str],
    uri: str,
    *,
    key: str,
    schema: pa.Schema,
    steps: Sequence[Step | Callable[[Any], Any]],
    unit: str,
    rows_per_block: int,
    name: str | None = None,
    every_s: float = HEARTBEAT_S,
    patient: bool = False,
    judged: Judged | None = None,
) -> dict[str, int]:
    """The rows of the shards `sources`, sent through the steps, as shards of the dataset at `uri`.

    A step may also be what makes a Dataset of Ray Data of another, such as a processor of
    `ray.data.llm`.

    One row in, one row out, identified by its column `key`. A killed plan goes on where it
    stopped: at most the blocks that were being worked on are made again, and no row is lost or
    written twice. The dataset is not whole before `make` writes its manifest. `name`, by default
    that of its folder, is what the progress is told of, every `every_s` seconds. A plan in which
    nothing arrives for half an hour is ended by Ray, unless it is `patient`. `judged` says what its
    rows say of survival, for whoever looks at the run.

    Returns the most memory that was used, in bytes: of the driver, of Ray's object store, and of
    the largest actor of each step that is a class whose `__call__` is no coroutine.
    """
    rows = count_rows(sources)
    if not rows:
        return {}
    resume = run.resume_folder(uri)
    if storage.is_local(resume):
        storage.local_path(resume).mkdir(parents=True, exist_ok=True)
    blocks = -(-rows // rows_per_block)
    already = _noted(resume)
    dataset = logs.names().get("dataset", "")
    progress = Progress(
        name or Path(uri).name,
        total=rows,
        unit=unit,
        done=already,
        verdicts=judged.of(storage.list_shards(uri)) if judged and already else None,
        more=partial(metrics.rows_made, dataset),
    )
    warning = cpus_lacking(steps, resumes=already > 0)
    if warning is not None:
        logger.warning("%s: %s", progress.stage, warning)
    context = _context(key, resume)
    if patient or any(isinstance(step, Step) and step.blocks for step in steps):
        context.execution_no_progress_timeout_s = -1  # who waits for others has timeouts of its own
    with (
        peak_memory() as peaks,
        counted(progress, every_s=every_s) as tally,
        ray.data.DataContext.current(context),
    ):
        places = [storage.arrow_place(source) for source in sources]
        data: Any = ray.data.read_parquet(
            [path for _, path in places],
            filesystem=places[0][0],
            override_num_blocks=blocks,
            num_cpus=TASK_CPUS,
        )
        for step in steps:
            data = _sent(data, step, blocks, tally, judged)
        if not any(isinstance(step, Step) and step.counts for step in steps):
            data = data.map_batches(
                _count,
                batch_format="pyarrow",
                fn_kwargs={"tally": tally},
                num_cpus=TASK_CPUS,
                udf_modifying_row_count=False,
            )
        filesystem, path = storage.arrow_place(uri)
        data.write_parquet(
            path,
            filesystem=filesystem,
            schema=schema,
            ray_remote_args={"num_cpus": TASK_CPUS},
        )
        actors = _peaks(tally)
    _remove_duplicates(uri, key, rows)
    progress.update(rows)  # the last to tell may not have been heard
    metrics.progressed(attempts.reached())
    return {**peaks, **actors}


def cpus_lacking(
    steps: Sequence[Step | Callable[[Any], Any]], *, resumes: bool = False
) -> str | None:
    """What a person should know if reading and writing find no CPU; Ray would wait without a word.

    A plan that `resumes` has an actor more, which holds a whole CPU.
    """
    have = ray.cluster_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
    held = sum(step.resources.all_cpus for step in steps if isinstance(step, Step))
    held += FILTER_CPUS if resumes else 0.0
    if held + TASK_CPUS <= have:
        return None
    return (
        f"the actors hold {held:g} CPUs and reading and writing want {TASK_CPUS:g}, the cluster "
        f"has {have:g}; it waits until that has grown"
    )


def _sent(
    data: Any,
    step: Step | Callable[[Any], Any],
    blocks: int,
    tally: Any,
    judged: Judged | None,
) -> Any:
    """The data of Ray Data, sent through a step."""
    if not isinstance(step, Step):
        return step(data)
    resources = step.resources
    arguments = {**step.arguments, **({"tally": tally} if step.counts else {})}
    actor = step.callable
    if step.blocks is None:
        verdicts = judged.verdicts if judged is not None and step.judges else None
        actor = watched(actor, verdicts)
        arguments = {**arguments, "watching": tally, "about": logs.names()}
    options: dict[str, Any] = {"num_gpus": resources.gpus} if resources.gpus else {}
    if resources.custom:
        options["resources"] = dict(resources.custom)
    if resources.cpu_actors:
        options["ray_remote_args_fn"] = _Mixed(resources)
    return data.map_batches(
        actor,
        fn_constructor_kwargs=arguments,
        batch_size=resources.batch_size,
        batch_format="pyarrow",
        compute=_pool(resources, blocks, step.blocks),
        num_cpus=resources.cpus,
        udf_modifying_row_count=False,
        **options,
    )


def _pool(resources: run.Resources, blocks: int, calls: int | None) -> Any:
    """Actors of a step, never more than there are blocks."""
    least = min(resources.actors + resources.cpu_actors, blocks)
    most = min((resources.most_actors or resources.actors) + resources.cpu_actors, blocks)
    size: dict[str, Any] = {"size": least}
    if most > least:
        size = {"min_size": least, "max_size": most, "initial_size": least}
    return ray.data.ActorPoolStrategy(**size, max_concurrent_calls_per_actor=calls)


class _Mixed:
    """What the next actor of a mixed pool holds: those without a GPU are begun first.

    What all of them hold, custom resources, Ray Data adds.
    """

    def __init__(self, resources: run.Resources) -> None:
        self._resources, self._begun = resources, 0

    def __call__(self) -> dict[str, float]:
        self._begun += 1
        if self._begun <= self._resources.cpu_actors:
            return {"num_gpus": 0, "num_cpus": self._resources.cpu_actor_cpus}
        return {"num_gpus": self._resources.gpus, "num_cpus": self._resources.cpus}


def _context(key: str, resume: str) -> Any:
    """Settings of a resumable plan; each was found to matter (RAY.md 1.3 to 1.5)."""
    context = ray.data.DataContext.get_current().copy()
    context.use_datasource_v2 = False  # it packs small inputs into one block
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    filesystem, path = storage.arrow_place(resume)
    checkpoint = CheckpointConfig(
        id_column=key,
        checkpoint_path=path,
        delete_checkpoint_on_success=False,
        override_filesystem=filesystem,
    )
    checkpoint.checkpoint_actor_pool_max_size = 1
    checkpoint.checkpoint_actor_memory_bytes = 64 << 20
    context.checkpoint_config = checkpoint
    return context


@contextmanager
def counted(progress: Progress, *, every_s: float = HEARTBEAT_S) -> Iterator[Any]:
    """A Tally whose `add` advances the progress, which is shown while the block runs."""
    tally = run.beside_driver(Tally).remote()
    before, warned = progress.done, 0
    asked: list[Any] = []

    def poll(wait_s: float = 0.0) -> int:
        """What was counted when the tally last answered; it may be slow, or lost with its node."""
        nonlocal warned
        if not asked:
            asked.append(tally.known.remote())
        if not ray.wait(asked, timeout=wait_s)[0]:
            return progress.done
        try:
            known: Known = ray.get(asked.pop())
        except ray.exceptions.RayActorError:
            return progress.done
        for text in known.warnings[warned:]:
            logger.warning("%s: %s", progress.stage, text)
        warned = len(known.warnings)
        progress.heard(known.busy, known.verdicts)
        metrics.progressed(attempts.reached())
        return before + known.total

    try:
        with shown(progress, poll, every_s=every_s):
            yield tally
        asked.clear()
        poll(_LAST_WORDS_S)
    finally:
        ray.kill(tally)


def _peaks(tally: Any) -> dict[str, int]:
    try:
        known: Known = ray.get(tally.known.remote(), timeout=_LAST_WORDS_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):  # lost with its node
        return {}
    return known.peaks


def _count(table: pa.Table, tally: Any) -> pa.Table:
    tally.add.remote(table.num_rows)
    return table


def _noted(resume: str) -> int:
    """The rows that Ray's notes say are written; it reads notes, so they are of plain columns."""
    rows = 0
    for note in storage.list_shards(resume):
        if not note.endswith(".pending.parquet"):
            rows += storage.count_rows(note)
            continue
        with suppress(OSError, pa.ArrowException):  # a kill may have cut it
            parquet.read_schema(storage.opened(note), note)
    return rows


def count_rows(shards: Iterable[str | Path]) -> int:
    """The rows of Parquet files, from their footers."""
    return sum(storage.row_counts(list(shards)))


def _remove_duplicates(uri: str, key: str, rows: int) -> None:
    """Each key once.

    Raises:
        StageError: keys are missing.
    """
    seen = Places()

    def is_fresh(value: str) -> bool:
        digest = blake2b(value.encode(), digest_size=16).digest()
        known = seen.get(digest) is not None
        seen.put(digest, 0)
        return not known

    for shard in storage.list_shards(uri):
        table = storage.read_table(shard, columns=[key])
        fresh = [is_fresh(value) for value in table[key].to_pylist()]
        if not all(fresh):
            logger.warning("%s: %d rows were there already", shard, len(fresh) - sum(fresh))
            whole = storage.read_table(shard)
            storage.write_shard(uri, Path(shard).stem, whole.filter(fresh))
    if len(seen) != rows:
        raise StageError(
            f"{uri}: {len(seen)} of {rows} rows arrived; run the same command again, and delete "
            "the folder if that does not help"
        )
