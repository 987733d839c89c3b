"""Hand-written triplets: those that come with the package, or anybody's own.

They are what a writer is shown, or is trained on. The package's, in examples.jsonl, carry one of
KINDS each, which no writer sees; their captions are of the sort that alternative texts of pictures
are, and none of their edits moves the camera, swaps places or writes text, which Prompt-to-Prompt
cannot do.

Source: the reference's 700 human-written prompts, which are not published under a licence that
would let them be shipped; these are our own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ip2p_ray import files
from ip2p_ray.errors import DatasetError
from ip2p_ray.triplets import published
from ip2p_ray.triplets.reply import Triplet

EXAMPLES = Path(__file__).with_name("examples.jsonl")
"""The package's own."""

KINDS = (
    "style",
    "medium",
    "season",
    "weather",
    "time_of_day",
    "material",
    "colour",
    "subject_swap",
    "addition",
    "removal",
    "expression",
    "clothing",
    "place",
    "era",
    "mix",
)
"""What the instruction of an example changes; a mix changes several of them, or else."""


@dataclass(frozen=True)
class Example:
    """A triplet and where it stands."""

    triplet: Triplet
    kind: str | None
    """One of KINDS; None where the file does not say."""
    where: str
    """Its file and line."""


def load_examples(path: files.File | None = None) -> list[Triplet]:
    """The triplets of a file in its order, by default the package's own.

    Raises:
        DatasetError: the file has none, or one that cannot be used; says which line and why.
    """
    return [example.triplet for example in read_examples(path)]


def read_examples(path: files.File | None = None) -> list[Example]:
    """The examples of a file of any form that `published` reads; the rest as `load_examples`."""
    path = path or EXAMPLES
    examples = list(_examples(path))
    if not examples:
        raise DatasetError(f"{path} holds no example")
    seen: dict[tuple[str, str], str] = {}
    for example in examples:
        texts = example.triplet.caption.lower(), example.triplet.instruction.lower()
        if texts in seen:
            raise DatasetError(f"{example.where}: the caption and instruction of {seen[texts]}")
        seen[texts] = example.where
    return examples


def repeated_captions(examples: Iterable[Example]) -> list[str]:
    """A sentence for each caption that an earlier one equals, but for its capitals.

    Of the package's own no caption comes twice; in other files a caption may have many edits.
    """
    seen: dict[str, str] = {}
    found = []
    for example in examples:
        first = seen.setdefault(example.triplet.caption.lower(), example.where)
        if first != example.where:
            found.append(f"{example.where}: the caption of {first}")
    return found


def count_kinds(examples: Iterable[Example]) -> dict[str, int]:
    """How many examples there are of each of KINDS.

    Raises:
        DatasetError: an example has no kind, or an unknown one; names its line.
    """
    counts = Counter[str]()
    for example in examples:
        if example.kind not in KINDS:
            raise DatasetError(
                f"{example.where}: kind is one of {', '.join(KINDS)}, got {example.kind!r}"
            )
        counts[example.kind] += 1
    return {kind: counts[kind] for kind in KINDS}


def _examples(path: files.File) -> Iterator[Example]:
    names = published.columns_of(path)
    for number, row in files.read_numbered(path, names):
        where = f"{path}:{number}"
        [(triplet, reason)] = published.collect([published.texts_of(row, names)])
        if reason is not None:
            raise DatasetError(f"{where}: {reason}: {triplet}")
        kind = row.get("kind")
        yield Example(triplet, kind if isinstance(kind, str) else None, where)
