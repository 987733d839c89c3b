"""`jobs/benchmark.py scale`: memory and time of what grows with the rows; heavy imports wait.

Each figure is that of a row, so that it can be multiplied; the processor's seconds are told, for
they hardly depend on what else the machine does. Nothing here starts Ray or a model.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.request import Request, urlopen

from ip2p_ray.atomic import atomic_file
from ip2p_ray.command import require_place

Part = Literal[
    "distinct", "places", "index", "order", "queue", "explosion", "manifest", "listing", "footers"
]
PARTS: tuple[Part, ...] = get_args(Part)

GROUP = 3
"""Pairs of a triplet, in the index."""

CANDIDATES = 100
"""Of a triplet, in the explosion."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the parts that grow with the data take for each row, shard and object."""

    parts: tuple[Part, ...] = PARTS
    """Which of them are measured."""
    rows: int = 1_000_000
    """Of distinct texts, keys, the index and an epoch's order; some 300 bytes of memory each."""
    triplets: int = 100_000
    """Of the queue."""
    exploded: int = 2_000
    """Triplets of 100 candidates each that are read off."""
    shards: int = 5_000
    """Of the manifest, in a folder."""
    objects: int = 5_000
    """In a bucket of a server on this machine, that are listed; of them 200 are shards."""
    json: Path | None = None
    """File for the figures."""

    def __post_init__(self) -> None:
        for name in ("rows", "triplets", "exploded", "shards", "objects"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is at least 1")
        if not self.parts:
            raise ValueError(f"--parts are some of {', '.join(PARTS)}")
        if self.json is not None:
            require_place("--json", self.json, folder=False)


def run(job: Options) -> str:
    """A line for each figure; the JSON file is written."""
    import torch

    from ip2p_ray.benchmark.measure import LIBRARIES, facts

    found: dict[str, Any] = facts(torch.device("cpu"), (*LIBRARIES, "pyarrow", "boto3"))
    measures: dict[str, Callable[[Options, Path], list[Figure]]] = {
        "distinct": _distinct,
        "places": _places,
        "index": _index,
        "order": _order,
        "queue": _queue,
        "explosion": _explosion,
        "manifest": _manifest,
        "listing": _listing,
        "footers": _footers,
    }
    figures: list[Figure] = []
    for part in job.parts:
        with tempfile.TemporaryDirectory() as folder:
            figures += measures[part](job, Path(folder))
    found["figures"] = [vars(figure) for figure in figures]
    if job.json is not None:
        with atomic_file(job.json) as new:
            new.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    head = f"scale: {found['device_name']}, load {found['load'][0]}; CPU seconds and peak memory"
    return "\n".join([head, *(f"scale: {figure.line()}" for figure in figures)])


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What one thing took."""

    name: str
    count: int
    unit: str
    cpu_s: float
    """Of this process."""
    wall_s: float
    peak_bytes: int | None
    """More than was held before; pages of mapped files count."""
    stored_bytes: int | None = None

    def line(self) -> str:
        """For people: in all, and for each."""
        text = f"{self.name}: {self.count:,} {self.unit}, {self.cpu_s:.2f} s of CPU "
        text += f"({1e6 * self.cpu_s / self.count:.2f} us each), {self.wall_s:.2f} s"
        if self.peak_bytes is not None:
            text += f"; {self.peak_bytes / self.count:,.0f} B of memory each"
        if self.stored_bytes is not None:
            text += f"; {self.stored_bytes / self.count:,.1f} B stored each"
        return text


def _figure(
    name: str, count: int, unit: str, work: Callable[[], object], *, stored: Path | None = None
) -> Figure:
    """Does the work once."""
    import torch

    from ip2p_ray.benchmark.measure import peak_bytes

    took: dict[str, float] = {}

    def timed() -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        took["cpu"], took["wall"] = time.process_time() - cpu, time.perf_counter() - wall

    peak = peak_bytes(torch.device("cpu"), timed)
    return Figure(
        name=name,
        count=count,
        unit=unit,
        cpu_s=round(took["cpu"], 4),
        wall_s=round(took["wall"], 4),
        peak_bytes=peak,
        stored_bytes=None if stored is None else _bytes_of(stored),
    )


def _bytes_of(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)


def _distinct(job: Options, _: Path) -> list[Figure]:
    """Texts and places of which each is kept once, and a sample drawn."""
    from ip2p_ray.distinct import Distinct

    distinct = Distinct()

    def add() -> None:
        for number in range(job.rows):
            distinct.add(f"a red boat number {number} at sea", f"https://example.org/{number}")

    return [
        _figure("distinct, told", job.rows, "rows", add),
        _figure(
            "distinct, judged",
            job.rows,
            "rows",
            lambda: distinct.verdicts(sample=job.rows // 2),
        ),
    ]


def _places(job: Options, _: Path) -> list[Figure]:
    """The keys of a finished plan, each looked for and put; and those of the journal."""
    from ip2p_ray.places import Places

    def put() -> None:
        places = Places()
        for number in range(job.rows):
            digest = blake2b(str(number).encode(), digest_size=16).digest()
            places.get(digest)
            places.put(digest, number)

    return [_figure("places, keys put", job.rows, "keys", put)]


def _index(job: Options, folder: Path) -> list[Figure]:
    """The index of mapped rows, as every worker of training has one."""
    import pyarrow as pa

    from ip2p_ray.mapped import MappedRows

    names = ("pair_key", "triplet_key", "instruction", "split")
    schema = pa.schema([(name, pa.string()) for name in names])
    path, rng = folder / "rows.arrow", random.Random(0)
    with pa.ipc.new_file(str(path), schema) as writer:
        for start in range(0, job.rows, 1024):
            count = min(1024, job.rows - start)
            groups = [rng.randbytes(16).hex() for _ in range(-(-count // GROUP))]
            rows = {
                "pair_key": [rng.randbytes(16).hex() for _ in range(count)],
                "triplet_key": [groups[number // GROUP] for number in range(count)],
                "instruction": ["make it night"] * count,
                "split": ["train"] * count,
            }
            writer.write_table(pa.table(rows, schema=schema))
    held: list[Any] = []
    opened = _figure(
        "index, opened",
        job.rows,
        "pairs",
        lambda: held.append(MappedRows(path, schema, name="rows")),
    )
    part = _figure("index, of a split", job.rows, "pairs", lambda: held.append(held[0].of("train")))
    return [opened, part]


def _order(job: Options, _: Path) -> list[Figure]:
    """The order of an epoch, of which two are held where one ends."""
    from ip2p_ray.training.feed import Feed

    feed = Feed(job.rows, 64, 0)
    return [_figure("order of an epoch", job.rows, "groups", lambda: feed.batch(0))]


def _queue(job: Options, folder: Path) -> list[Figure]:
    """Triplets that are judged and put into parts."""
    from ip2p_ray.stages.queue import fill_queue
    from ip2p_ray.testing.pairs import write_triplets

    triplets, out = str(folder / "triplets"), folder / "out"
    write_triplets(triplets, job.triplets)
    made = _figure(
        "queue, filled", job.triplets, "triplets", lambda: fill_queue(triplets, str(out))
    )
    size = _bytes_of(out / "queue")
    return [Figure(**{**vars(made), "stored_bytes": size})]


def _explosion(job: Options, folder: Path) -> list[Figure]:
    """Candidates read off their triplets' rows, none of which has pictures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ip2p_ray.schema import CANDIDATES as SCHEMA
    from ip2p_ray.schema import SCORES
    from ip2p_ray.stages.explosion import exploded

    rng, rows = random.Random(0), []
    for number in range(job.exploded):
        key = rng.randbytes(16).hex()
        candidates = [
            {
                "index": index,
                "seed": rng.getrandbits(62),
                **{
                    name: rng.random()
                    for name in (
                        *("self_replace", "guidance_scale", "caption_similarity"),
                        *("edited_caption_similarity", "image_similarity"),
                        "direction_similarity",
                    )
                },
                "reason": "image_similarity",
            }
            for index in range(CANDIDATES)
        ]
        rows.append(
            {
                "triplet_key": key,
                "caption": f"a red boat number {number} at sea in the evening light",
                "instruction": "make it a sailing ship",
                "edited_caption": f"a sailing ship number {number} at sea in the evening light",
                "caption_key": rng.randbytes(16).hex(),
                "split": "train",
                "writer": "a writer",
                "recipe": "0123456789abcdef",
                "status": "ok",
                "seconds": 1.0,
                "candidates": candidates,
            }
        )
    nested, flat = folder / "candidates.parquet", folder / "scores.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), nested)
    del rows
    count = job.exploded * CANDIDATES

    def explode() -> None:
        table = exploded(str(nested), images=False)
        pq.write_table(table.select(SCORES.names).cast(SCORES), flat, row_group_size=20_000)

    made = _figure("explosion", count, "candidates", explode, stored=flat)
    inside = Figure(
        name="candidates in their triplets' rows",
        count=count,
        unit="candidates",
        cpu_s=0.0,
        wall_s=0.0,
        peak_bytes=None,
        stored_bytes=_bytes_of(nested),
    )
    return [made, inside]


def _manifest(job: Options, folder: Path) -> list[Figure]:
    """A manifest written, read and checked against the shards."""
    from ip2p_ray import storage

    uri = str(folder / "dataset")
    storage.write_shard(uri, "shard-000000", _small())
    first = Path(uri, "shard-000000.parquet")
    for number in range(1, job.shards):
        shutil.copyfile(first, first.with_name(f"shard-{number:06d}.parquet"))
    written = Path(uri, storage.MANIFEST)
    manifest = storage.Manifest(dataset="scores")

    def write() -> None:
        storage.write_manifest(uri, manifest)

    made = _figure("manifest, written", job.shards, "shards", write)
    return [
        Figure(**{**vars(made), "stored_bytes": _bytes_of(written)}),
        _figure("manifest, read", job.shards, "shards", lambda: storage.read_manifest(uri)),
        _figure("manifest, checked", job.shards, "shards", lambda: storage.require_manifest(uri)),
    ]


def _listing(job: Options, _: Path) -> list[Figure]:
    """Objects listed, a thousand a page, by moto's server: a real S3 differs."""
    from ip2p_ray import objects

    with _bucket() as uri:
        for number in range(job.objects):
            objects.write(f"{uri}/listed/object-{number:07d}", b"x")

        def count() -> int:
            return len([found.name for found in objects.listing(f"{uri}/listed")])

        return [_figure("listing by the server", job.objects, "objects", count)]


def _footers(job: Options, folder: Path) -> list[Figure]:
    """Rows of shards counted in a folder, and in the server's bucket as a manifest is written."""
    from ip2p_ray import storage

    count = min(200, job.objects)

    def fill(uri: str) -> list[str]:
        for number in range(count):
            storage.write_shard(uri, f"shard-{number:06d}", _small())
        return [storage.join(uri, f"shard-{number:06d}.parquet") for number in range(count)]

    def one_by_one(shards: Sequence[str]) -> Callable[[], object]:
        return lambda: [storage.count_rows(shard) for shard in shards]

    local = _figure("footers of files", count, "shards", one_by_one(fill(str(folder / "local"))))
    with _bucket() as uri:
        shards = fill(f"{uri}/shards")
        remote = _figure("footers of objects", count, "shards", one_by_one(shards))
        manifest = storage.Manifest(dataset="scores")
        whole = _figure(
            "manifest of objects, written",
            count,
            "shards",
            lambda: storage.write_manifest(f"{uri}/shards", manifest),
        )
    return [local, remote, whole]


def _small() -> Any:
    """A shard's table: what a footer takes depends on the columns and not on the rows."""
    from ip2p_ray.schema import SCORES

    return SCORES.empty_table()


@contextmanager
def _bucket() -> Iterator[str]:
    """A bucket of a server in a process of its own, which this one uses meanwhile."""
    from ip2p_ray.testing.buckets import bucket_process

    with bucket_process() as endpoint:
        asked = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        before = {name: os.environ.get(name) for name in asked}
        os.environ.update(asked)
        try:
            with urlopen(Request(f"{endpoint}/scale", method="PUT")):
                pass
            yield "s3://scale"
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
