"""A folder of pictures edited into another folder, by whatever edits one; stopped runs go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path

from ip2p_ray.atomic import atomic_file, remove_leftovers
from ip2p_ray.errors import ConfigError, DeadlineError, EditError, ImageError

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".jp2")
)
"""Of files that are taken for pictures."""

RECORD = "edit.json"
"""Beside the edited pictures: what they were made with."""

OF_ONE = (ImageError, EditError, DeadlineError, OSError)
"""Errors that concern one picture; others end the run."""

Submit = Callable[[bytes], "Future[bytes]"]
"""Begins to edit the encoded picture; the future is of the edited one as PNG."""


@dataclass(kw_only=True)
class FolderReport:
    """How far a folder is."""

    total: int = 0
    """Pictures in it."""
    found: int = 0
    """Those of them that an earlier run has made."""
    made: int = 0
    """Those that this run has made."""
    failed: dict[str, str] = field(default_factory=dict)
    """Why not, by name."""

    @property
    def done(self) -> int:
        """Those that need no more work."""
        return self.found + self.made + len(self.failed)


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of the folder, by name; not those below it."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def edited_name(picture: Path) -> str:
    """The file name of its edited picture: a.png of a.png, a.jpg.png of a.jpg."""
    return picture.name if picture.suffix == ".png" else f"{picture.name}.png"


def edit_folder(
    pictures: Sequence[Path],
    out: Path,
    recipe: Mapping[str, object],
    submit: Submit,
    *,
    at_once: int,
    report: FolderReport | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> FolderReport:
    """Edits what has no edited picture in `out` yet, `at_once` in work at a time.

    Each appears in `out` whole, as soon as it is made. What of `OF_ONE` a picture raises is told in
    a sentence, and the others are made. `report` is kept up to date meanwhile.

    Raises:
        ConfigError: `out` holds pictures of another recipe, or what no such run has made; or two
            pictures would get the same name.
    """
    report = report or FolderReport()
    report.total = len(pictures)
    targets = _targets(pictures, out)
    _enter(out, recipe)
    waiting = [picture for picture in pictures if not targets[picture].exists()]
    report.found = len(pictures) - len(waiting)
    for picture, outcome in _outcomes(waiting, submit, at_once):
        if isinstance(outcome, bytes):
            with atomic_file(targets[picture]) as new:
                new.write_bytes(outcome)
            report.made += 1
        else:
            report.failed[picture.name] = str(outcome)
            tell(f"{picture}: {outcome}")
    return report


def _outcomes(
    pictures: Sequence[Path], submit: Submit, at_once: int
) -> Iterator[tuple[Path, bytes | Exception]]:
    """Each picture with its edited one or with why there is none, in the order they end."""
    left = iter(pictures)
    in_work: dict[Future[bytes], Path] = {}
    try:
        while True:
            while len(in_work) < at_once and (picture := next(left, None)) is not None:
                try:
                    in_work[submit(picture.read_bytes())] = picture
                except OF_ONE as error:
                    yield picture, error
            if not in_work:
                return
            for ended in wait(in_work, return_when=FIRST_COMPLETED).done:
                picture = in_work.pop(ended)
                try:
                    yield picture, ended.result()
                except OF_ONE as error:
                    yield picture, error
    finally:
        for future in in_work:
            future.cancel()


def _targets(pictures: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Where each edited picture goes."""
    by_name: dict[str, Path] = {}
    for picture in pictures:
        other = by_name.setdefault(edited_name(picture), picture)
        if other is not picture:
            raise ConfigError(
                f"{other.name} and {picture.name} would both become {edited_name(picture)}; "
                "rename one"
            )
    return {picture: out / name for name, picture in by_name.items()}


def _enter(out: Path, recipe: Mapping[str, object]) -> None:
    """Makes the folder, or finds one that the same recipe has begun."""
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    record = out / RECORD
    wanted = json.dumps(dict(recipe), indent=2, sort_keys=True)
    if not record.exists():
        if any(out.iterdir()):
            raise ConfigError(f"{out} is not empty, and no folder of edited pictures; give another")
        with atomic_file(record) as new:
            new.write_text(wanted, "utf-8")
    try:
        found = json.loads(record.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{record} cannot be read ({error}); give another folder") from error
    if found != json.loads(wanted):
        was = found if isinstance(found, dict) else {}
        other = sorted(name for name in {*was, *recipe} if was.get(name) != recipe.get(name))
        raise ConfigError(
            f"{out} holds pictures that were edited with another {', '.join(other)}; "
            "give another folder"
        )
