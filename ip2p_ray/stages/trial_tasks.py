"""What editors are asked -> the dataset of tasks: the miniature's, held-out pairs, or a set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ip2p_ray import files, objects, s3, storage
from ip2p_ray.copies import local_file, local_folder
from ip2p_ray.edit_sets import Asked, Turns, inputs, read_edits
from ip2p_ray.errors import ConfigError, ImageError, LargeImageError, StageError
from ip2p_ray.images import decode_stored, encode_png, to_pil
from ip2p_ray.miniature import scores
from ip2p_ray.miniature.scenes import draw
from ip2p_ray.own_pairs import BROKEN, EMPTY_INSTRUCTION, MISSING, TOO_LARGE, pixel_digest
from ip2p_ray.report import Report
from ip2p_ray.schema import PAIRS, stream_seed
from ip2p_ray.stages import run
from ip2p_ray.stages.shards import PICTURE_ROWS, TableShards, clear, read_tables
from ip2p_ray.trials import TASKS, task_key

DRAWN = "miniature"
"""The name of the drawn world's tasks, instead of a folder."""

MAX_DROPPED = 0.05
"""Share of tasks that may be unusable; above it the stage fails."""

_COLUMNS = ("triplet_key", "split", "caption", "instruction", "edited_caption", "pair_key")


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """Where tasks come from, and how many are taken."""

    data: str
    """DRAWN; or a pairs dataset, whose held-out pairs are taken; or a set of `edit_sets`."""
    tasks: int | None = None
    """Most tasks, drawn from all; None is all. DRAWN has as many as are wanted."""
    turns: Turns = "single"
    seed: int = 0
    """Of which tasks are taken, and of the scenes of DRAWN."""

    def __post_init__(self) -> None:
        if self.tasks is not None and self.tasks < 1:
            raise ConfigError(f"tasks is at least 1, got {self.tasks}")
        if self.data == DRAWN and self.tasks is None:
            raise ConfigError(f"tasks of {DRAWN} have to be a number")
        if self.turns == "multi" and (self.data == DRAWN or self.is_pairs):
            raise ConfigError("turns multi needs a set whose turns build on one another")

    @property
    def is_pairs(self) -> bool:
        """Whether it is a dataset of this package's pairs."""
        return self.data != DRAWN and storage.exists(storage.join(self.data, storage.MANIFEST))

    @property
    def drawn(self) -> tuple[int, int] | None:
        """Count and seed of the miniature's tasks, None for others."""
        return (self.tasks or 0, self.seed) if self.data == DRAWN else None


def make_tasks(source: TaskSource, folder: str) -> storage.Manifest:
    """The dataset `<folder>/tasks`.

    Raises:
        DatasetError: the data are missing, broken, or of no known layout.
        StageError: there is no task, or too many are unusable; says why.
    """
    uri = storage.join(folder, "tasks")
    asked = {name: value for name, value in asdict(source).items() if name != "data"}
    sources: dict[str, str] = {}
    if source.is_pairs:
        sources["pairs"] = storage.read_manifest(source.data).recipe
    elif source.data == DRAWN:
        asked["data"] = DRAWN
    else:
        asked["data"] = inputs(_path(source))
    origin = run.Origin(dataset="tasks", config=asked, sources=sources)
    return run.make(uri, origin, lambda: _write(source, uri))


def task_rows(source: TaskSource) -> list[dict[str, Any]]:
    """All rows of TASKS at once, for few tasks; without pictures of others."""
    made = (_row(asked, number)[0] for number, asked in enumerate(_asked(source)))
    return [row for row in made if row is not None]


def _write(source: TaskSource, uri: str) -> list[Report]:
    began = time.monotonic()
    clear(uri)
    places = [asked.place for asked in _asked(source)]
    if not places:
        what = "held-out pair" if source.is_pairs else "task"
        raise StageError(f"tasks: there is no {what} in {source.data}")
    if len(set(places)) != len(places):
        raise StageError(f"tasks: {source.data} names two tasks alike")
    numbers = _numbers(places, source)
    shards = TableShards(uri, "tasks", TASKS)
    reasons: list[str | None] = []
    neighbours = _Neighbours(lambda row: shards.add_rows([row]))
    for asked in _asked(source):
        if asked.place not in numbers:
            continue
        row, reason = _row(asked, numbers[asked.place])
        reasons.append(reason)
        if row is not None:
            neighbours.add(row)
    neighbours.close()
    dropped = [reason for reason in reasons if reason is not None]
    if len(dropped) > MAX_DROPPED * len(reasons):
        raise StageError(
            f"tasks: {len(dropped)} of {len(reasons)} tasks of {source.data} are unusable, more "
            f"than a share of {MAX_DROPPED:g}: the first because of {dropped[0]}"
        )
    shards.close()
    return [Report.count("tasks", reasons, time.monotonic() - began)]


def _numbers(places: list[str], source: TaskSource) -> dict[str, int]:
    """The tasks that are taken, numbered in random order; those of fewer are among those of more.

    The drawn ones keep their order, by which the oracle knows them.
    """
    if source.data != DRAWN:
        places = sorted(places, key=lambda place: stream_seed("take", source.seed, place))
    return {place: number for number, place in enumerate(places[: source.tasks])}


def _asked(source: TaskSource) -> Iterator[Asked]:
    if source.data == DRAWN:
        return _drawn(source)
    if source.is_pairs:
        return _held_out(source.data)
    return read_edits(_path(source), turns=source.turns)


def _path(source: TaskSource) -> Path:
    """Of the set; from a bucket it is copied once, with all its pictures.

    A Parquet file has them in it; beside another file of a set lie those that it names.
    """
    uri = source.data.rstrip("/")
    if not s3.is_object(uri) or objects.size(uri) is None:
        return Path(local_folder(source.data))
    if uri.endswith(".parquet"):
        return Path(local_file(uri))
    above, _, name = uri.rpartition("/")
    return Path(local_folder(above)) / name


def _drawn(source: TaskSource) -> Iterator[Asked]:
    for number, task in enumerate(scores.edit_tasks(source.tasks or 0, source.seed)):
        yield Asked(
            place=f"{DRAWN}/{source.seed}/{number}",
            group=f"{DRAWN}/{number}",
            instructions=(task.instruction,),
            source=encode_png(to_pil(draw(task.scene))),
            truth=encode_png(to_pil(draw(task.edit.edited))),
            caption=task.caption,
            edited_caption=task.edited_caption,
            edit_type=task.edit.type,
        )


def _held_out(pairs: str) -> Iterator[Asked]:
    """Held-out pairs; what the generator made of a caption is the truth there is."""
    names = [*_COLUMNS, "source_image", "edited_image"]
    for table in read_tables(pairs, PAIRS, rows=PICTURE_ROWS, columns=names):
        for row in table.to_pylist():
            if row["split"] == "held_out":
                yield Asked(
                    place=row["pair_key"],
                    group=row["triplet_key"],
                    instructions=(row["instruction"],),
                    source=row["source_image"]["bytes"],
                    truth=row["edited_image"]["bytes"],
                    caption=row["caption"],
                    edited_caption=row["edited_caption"],
                )


def _row(asked: Asked, number: int) -> tuple[dict[str, Any] | None, str | None]:
    """The row of TASKS without its neighbour, or the reason to drop it."""
    if not all(text.strip() for text in asked.instructions):
        return None, EMPTY_INSTRUCTION
    images: dict[str, dict[str, Any] | None] = {"source_image": None, "edited_image": None}
    digests = []
    if asked.source is None:
        return None, MISSING
    for name, picture in zip(images, (asked.source, asked.truth), strict=True):
        if picture is None:
            continue
        try:
            data = picture if isinstance(picture, bytes) else files.read(picture)
            image, plain = decode_stored(data)
        except OSError:
            return None, MISSING
        except LargeImageError:
            return None, TOO_LARGE
        except ImageError:
            return None, BROKEN
        images[name] = {"bytes": data if plain else encode_png(image), "path": None}
        digests.append(pixel_digest(image))
    row = {name: getattr(asked, name) for name in ("place", "group", "edit_type")}
    row |= {"caption": asked.caption or None, "edited_caption": asked.edited_caption or None}
    key = task_key(asked.place, asked.group, asked.instructions, *digests)
    row |= {"task_key": key, "number": number, "instructions": list(asked.instructions)}
    return {**row, **images, "another_image": None}, None


class _Neighbours:
    """Gives each row the picture of the nearest row before it that is of another group.

    The first group gets that of the second; where there is one group, there is no such picture.
    """

    def __init__(self, write: Callable[[dict[str, Any]], None]) -> None:
        self._write = write
        self._waiting: list[dict[str, Any]] = []
        self._group: str | None = None
        self._own: Any = None
        self._other: Any = None

    def add(self, row: dict[str, Any]) -> None:
        """One more row, in order."""
        if self._group is not None and row["group"] != self._group:
            self._other = self._own
            self._release(row["source_image"])
        self._group, self._own = row["group"], row["source_image"]
        if self._other is None:
            self._waiting.append(row)
        else:
            self._write({**row, "another_image": self._other})

    def close(self) -> None:
        """No row follows."""
        self._release(None)

    def _release(self, picture: Any) -> None:
        for row in self._waiting:
            self._write({**row, "another_image": picture})
        self._waiting.clear()
