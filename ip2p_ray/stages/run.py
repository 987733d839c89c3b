"""What all stages share: a Ray, datasets that are made once, errors that keep their sentence."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import ip2p_ray
from ip2p_ray import lease, logs, notes, object_files, storage
from ip2p_ray.atomic import remove_leftovers
from ip2p_ray.command import CustomResources, require_resources
from ip2p_ray.errors import (
    BudgetError,
    ConfigError,
    DatasetError,
    Ip2pError,
    StageError,
    StorageError,
)
from ip2p_ray.notes import NOTE_EVERY_S, read_noted, read_origin
from ip2p_ray.report import Report, duration
from ip2p_ray.schema import recipe
from ip2p_ray.stages import attempts, metrics, starting

logger = logging.getLogger(__name__)

ORIGIN = notes.ORIGIN
RESUME = ".resume"
REJECTED = "rejects"

_OF_THE_DISK = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "EACCES", "EPERM", "EMFILE")
}

BUDGET_REACHED = 3
"""Exit status of a job that a spending cap stopped."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What the actors of one step hold; it never changes what they make."""

    actors: int = 1
    """Processes, at least 1."""
    most_actors: int | None = None
    """As many there may become while work is waiting and the cluster has room; None is `actors`."""
    cpus: float = 0.5
    """Logical CPUs of each actor; Ray counts them, threads are bounded by OMP_NUM_THREADS."""
    gpus: float = 0.0
    """GPUs of each actor."""
    batch_size: int = 8
    """Rows that an actor takes at a time."""
    cpu_actors: int = 0
    """Further ones that hold no GPU, beside those that do: a mixed pool."""
    cpu_actor_cpus: float = 1.0
    """Logical CPUs of each of those."""
    custom: CustomResources = ()
    """Custom resources of each actor, a pair of name and amount: they keep it to the nodes that
    declare them (`ray start --resources`)."""

    def __post_init__(self) -> None:
        require_resources("custom", self.custom)
        if self.actors < 1 or self.batch_size < 1:
            raise ConfigError(
                f"actors and batch_size are at least 1, got {self.actors} and {self.batch_size}"
            )
        if self.most_actors is not None and self.most_actors < self.actors:
            raise ConfigError(
                f"most_actors is at least actors, got {self.most_actors} and {self.actors}"
            )
        if self.cpus < 0 or self.gpus < 0 or self.cpu_actor_cpus < 0:
            raise ConfigError(
                f"cpus and gpus are not negative, got {self.cpus}, {self.cpu_actor_cpus} and "
                f"{self.gpus}"
            )
        if self.cpu_actors < 0 or (self.cpu_actors and not self.gpus):
            raise ConfigError(
                f"cpu_actors is not negative, and stands beside actors with gpus, got "
                f"{self.cpu_actors}"
            )

    @property
    def all_cpus(self) -> float:
        """Logical CPUs of all actors that there are at least."""
        return self.actors * self.cpus + self.cpu_actors * self.cpu_actor_cpus

    @property
    def of_task(self) -> dict[str, Any]:
        """What a task of Ray is told that runs where such an actor would."""
        held = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        return {**held, **({"resources": dict(self.custom)} if self.custom else {})}

    @property
    def of_worker(self) -> dict[str, float]:
        """The same as Ray Train and nodes name it: CPU, GPU, custom ones."""
        held = {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}
        return {**held, **dict(self.custom)}

    @property
    def in_all(self) -> dict[str, float]:
        """GPUs and custom resources of all actors that there are at least."""
        held = {"GPU": self.actors * self.gpus} if self.gpus else {}
        every = self.actors + self.cpu_actors
        return {**held, **{name: every * amount for name, amount in self.custom}}


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a dataset is made from; equal origins make equal rows."""

    dataset: str
    """Its name in the flow."""
    config: Mapping[str, Any]
    """The algorithm's settings, as JSON can express them."""
    models: Mapping[str, str] = field(default_factory=dict)
    """Fingerprint of each model, by role."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Digest of the origin of each dataset that is read, by name."""

    @property
    def digest(self) -> str:
        """16 hex digits of all fields."""
        return recipe(self)


@contextmanager
def local_ray(
    *, workers: int, actors: Sequence[Resources] = (), store_bytes: int = 0
) -> Iterator[None]:
    """A Ray for the block: that of RAY_ADDRESS, else a small one that only this machine reaches.

    `workers` processes compute at the same time and share the machine's cores. There is room for
    the `actors`, and in its object store for at least `store_bytes`, as far as memory goes.

    Raises:
        ConfigError: there are not as many GPUs, or custom resources, as the actors hold.
        StageError: Ray did not start in time.
    """
    cpus = sum(held.all_cpus for held in actors)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if "RAY_ADDRESS" not in os.environ:
        threads = max(1, usable_cores() // workers)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        _make_importable()
        options |= {
            "address": "local",
            # Actors and tasks hold fractions; below 4 a plan's tasks may find none left.
            "num_cpus": max(4, workers + 2, math.ceil(cpus) + 2),
            "include_dashboard": False,
            "object_store_memory": max(256 << 20, min(store_bytes, _free_memory() // 3)),
        }
    starting.start(local="address" in options, **options)
    for name in ("ray", "ray.data", "ray.train"):
        # Whatever fails is raised as well; Ray would log it with its traceback before.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        _require_held(actors)
        yield
    finally:
        ray.shutdown()


def _free_memory() -> int:
    return int(psutil.virtual_memory().available)


def _require_held(actors: Sequence[Resources]) -> None:
    """Checks that the actors can be placed: Ray would wait for ever without a word.

    A cluster of RAY_ADDRESS may grow, so there it is only told.
    """
    have = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for name in dict.fromkeys(name for held in actors for name in held.in_all):
        every = [
            (held.in_all[name], held.of_worker[name]) for held in actors if name in held.in_all
        ]
        amount, there = sum(all_of for all_of, _ in every), have.get(name, 0.0)
        if amount <= there:
            continue
        each = " + ".join(f"{all_of / one:g} x {one:g}" for all_of, one in every)
        what = "GPUs" if name == "GPU" else f"of the custom resource {name}"
        told = f"the actors want {amount:g} {what} ({each}), the cluster has {there:g}"
        if "RAY_ADDRESS" in os.environ:
            logger.warning("%s; they wait until it has grown", told)
        elif name == "GPU":
            raise ConfigError(f"{told}: fewer actors, or a smaller share of a GPU for each")
        else:
            raise ConfigError(f"{told}: only nodes of a cluster (RAY_ADDRESS) can have some")


@contextmanager
def ray_to_make(uri: str, *, workers: int, actors: Sequence[Resources] = ()) -> Iterator[None]:
    """`local_ray` for the block, or nothing where the dataset lies whole already."""
    if storage.exists(storage.join(uri, storage.MANIFEST)):
        yield
    else:
        with local_ray(workers=workers, actors=actors):
            yield


def usable_cores() -> int:
    """The cores that this process may use, which can be fewer than the machine has."""
    counted = getattr(os, "process_cpu_count", None)  # from Python 3.13 on
    if counted is not None:
        return counted() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """The folder, made if need be, for this process alone while the block runs.

    What killed runs left half-written in it is cleared away first. In a bucket a run that was
    killed is waited for (`lease.GONE_S`; on its own machine, where it is seen to be gone, less).

    Raises:
        ConfigError: it cannot be made or written to.
        StageError: another process works there.
        StorageError: object storage refuses.
    """
    if not storage.is_local(folder):
        storage.check(folder)
        with lease.held(storage.join(folder, ".lock")):
            yield
        return
    folder = storage.local_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"{folder} cannot be written to ({reason}); give another --out"
        ) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StageError(
                f"another run is working in {folder}; wait for it or give another folder"
            ) from error
        remove_leftovers(folder)
        yield


def make(
    uri: str,
    origin: Origin,
    build: Callable[[], Sequence[Report]],
    *,
    device_seconds: Callable[[], float] | None = None,
    note_every_s: float = NOTE_EVERY_S,
) -> storage.Manifest:
    """The manifest of the dataset at `uri`, made by `build` unless it lies there whole.

    Its device_seconds are asked for once it is built. Its wall_seconds are those of all attempts
    at it: each notes in ORIGIN its time, how far it is and how it ended (`notes`), when it ends and
    every `note_every_s` seconds, which is the most that kill -9 loses.

    Raises:
        DatasetError: something made from another origin lies there.
    """
    with logs.about(**_names(origin, build)):
        return _make(uri, origin, build, device_seconds, note_every_s)


def _make(
    uri: str,
    origin: Origin,
    build: Callable[[], Sequence[Report]],
    device_seconds: Callable[[], float] | None,
    note_every_s: float,
) -> storage.Manifest:
    _check_origin(uri, origin)
    if storage.exists(storage.join(uri, storage.MANIFEST)):
        manifest = storage.require_manifest(uri)
        assert manifest is not None
        logger.info("%s: there already, %s rows", _told(uri, origin), f"{manifest.rows:,}")
        return manifest
    if not storage.exists(storage.join(uri, ORIGIN)):
        # The dataset was deleted, and with it what these notes say was written.
        storage.remove_all(resume_folder(uri))
    for place in (uri, resume_folder(uri)):
        storage.abort_uploads(place)
    content = {**vars(origin), "digest": origin.digest}
    with attempts.attempt(uri, content, note_every_s, sentence) as seconds:
        reports = build()
        made = storage.Manifest(
            dataset=origin.dataset,
            config=origin.config,
            recipe=origin.digest,
            models=origin.models,
            reports=[report.as_dict() for report in reports],
            wall_seconds=seconds(),
            device_seconds=device_seconds() if device_seconds else 0.0,
        )
        manifest = storage.write_manifest(uri, made)  # of many shards it takes minutes
    storage.remove_all(resume_folder(uri))
    for report in reports:
        logger.info("%s", report.line())
        metrics.reported(report)
    if not reports and manifest.wall_seconds > 1.0:
        logger.info("%s: made in %s", _told(uri, origin), duration(manifest.wall_seconds))
    return manifest


def _names(origin: Origin, build: Callable[..., Any]) -> dict[str, str]:
    """What log lines are told to be of: the dataset, the module that makes it, the part."""
    dataset, _, part = origin.dataset.partition(", part ")
    module = str(getattr(build, "__module__", ""))
    stage = module.rpartition(".")[2] if ".stages." in module else dataset
    return {"dataset": dataset, "stage": stage, **({"part": part} if part else {})}


def _told(uri: str, origin: Origin) -> str:
    """The dataset's name for people: rejects may have the origin of what they are not in."""
    *_, above, name = ("", *storage.absolute(uri).split("/"))
    return f"{REJECTED}/{name}" if above == REJECTED else origin.dataset


def earlier_seconds(uri: str) -> float:
    """What earlier attempts at the dataset took, asked while it is being made."""
    noted = read_noted(uri)
    return sum(noted.attempts[:-1]) if noted else 0.0


def _check_origin(uri: str, origin: Origin) -> None:
    try:
        found = read_origin(uri)
    except DatasetError as error:
        raise DatasetError(f"{error}; delete {uri} to have it made again") from error
    if not found and storage.exists(storage.join(uri, storage.MANIFEST)):
        manifest = storage.read_manifest(uri)
        found = {**vars(manifest), "digest": manifest.recipe}
    if not found or found.get("digest") == origin.digest:
        return
    changes = [
        f"{name} {found.get(part, {}).get(name)!r} there, {value!r} now"
        for part in ("config", "models", "sources")
        for name, value in json.loads(json.dumps(dict(getattr(origin, part)))).items()
        if found.get(part, {}).get(name) != value
    ]
    raise DatasetError(
        f"{uri} was made differently ({'; '.join(changes) or 'by other code'}): give "
        f"another --out, the settings it was made with, or delete it to have it made again"
    )


def resume_folder(uri: str) -> str:
    """Where Ray Data notes which rows of the dataset are written.

    Not in the dataset's folder: there it deletes, after a kill, whatever is named as its notes are.
    """
    parent, _, name = storage.absolute(uri).rpartition("/")
    return storage.join(parent, RESUME, name)


def guarded(name: str, work: Callable[[], object]) -> int:
    """The exit status of a job: 0 for done, 1 for an error of this package, 130 for Ctrl-C.

    It is BUDGET_REACHED for a spending cap, after which the same command goes on. An error is told
    in one sentence; one that is not this package's is a bug and is raised. Logging is set up here,
    once: this package's lines, and of other libraries only errors. Where lines are objects, these
    are too.
    """
    logs.configure(sys.stdout)
    with logs.about(job=name):
        try:
            with logs.printed_too():
                work()
        except KeyboardInterrupt:
            _say(name, "stopped; the same command goes on from here")
            return 130
        except Exception as error:
            told = own_error(error)
            if told is None:
                raise
            with logs.about(**{**logs.about_error(error), **logs.about_error(told)}):
                _say(name, sentence(told))
            return BUDGET_REACHED if isinstance(told, BudgetError) else 1
    return 0


def _say(name: str, text: str) -> None:
    if logs.wants_json():
        logger.error("%s", text)
    else:
        sys.stderr.write(f"{name}: {text}\n")


def sentence(error: Exception) -> str:
    """What an error says, in one line: of this package's own without what Ray adds."""
    told = own_error(error)
    if told is not None:
        return str(told).splitlines()[0]
    said = str(getattr(error, "cause", None) or error).strip().splitlines()
    return ": ".join([type(error).__name__, *said[-1:]])


def own_error(error: BaseException | None) -> Ip2pError | None:
    """The error of this package that caused one of Ray's, in the process where it was raised.

    What the disk or, in the midst of a run, a bucket refuses is one too, a StorageError.
    """
    if error is None:
        return None
    if not isinstance(error, ray.exceptions.RayTaskError):
        if isinstance(error, Ip2pError):
            return error
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            told = error.strerror or str(error)
            where = f"{error.filename}: " if error.filename else ""
            return StorageError(f"{where}{told}; once that is mended the same command goes on")
        if isinstance(error, OSError) and object_files.is_refusal(error):
            told = str(error).splitlines()[0]
            return StorageError(f"{told}; once that is mended the same command goes on")
    failures = getattr(error, "worker_failures", None)
    # Workers that only miss the one that failed are named beside it.
    causes = list(failures.values()) if isinstance(failures, Mapping) else []
    causes.append(getattr(error, "cause", None) or error.__cause__)
    return next(filter(None, map(own_error, causes)), None)


def _make_importable() -> None:
    """Lets the processes of a local Ray import this package where it is not installed."""
    root = str(Path(ip2p_ray.__file__).resolve().parent.parent)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{root}{os.pathsep}{before}" if before else root


def in_task(resources: Resources, work: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, run where an actor of such resources would be.

    Raises:
        Ip2pError: as the function.
    """
    task = task_of(work, **resources.of_task, max_retries=0)
    try:
        return ray.get(task(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise own_error(error) or error from None


def task_of(work: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Starts the function as a task of Ray's with such options; its lines are of what ours are."""
    task: Any = ray.remote(**options)(logs.followed)
    return partial(task.options(name=work.__name__).remote, logs.names(), work)


def nodes_for(resources: Resources) -> int:
    """How many nodes could hold at least one such actor, if nothing else were there."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return sum(
        all(node["Resources"].get(name, 0.0) >= held for name, held in resources.of_worker.items())
        for node in nodes
        if node["Alive"]
    )


def beside_driver(actor: Any, **options: Any) -> Any:
    """The actor class, whose actors live on the driver's node: a lost one takes none of them."""
    here = ray.get_runtime_context().get_node_id()
    place = NodeAffinitySchedulingStrategy(here, soft=False)
    return actor.options(scheduling_strategy=place, **options)
