"""Which of many texts are kept: each once, one of every place, and a sample of them.

The answer depends on the texts and places alone, not on the order in which they came or on how they
were spread over files. In memory is 32 bytes a row: a digest of the text and one of its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ip2p_ray.errors import ConfigError, DatasetError

KEPT, REPEATED, SAME_PLACE, NOT_SAMPLED = range(4)
"""What `Distinct.verdicts` says of a row."""

_SIZE = 16
_NOWHERE = b"\xff" * _SIZE

WORDS = npt.NDArray[np.uint64]
Row = TypeVar("Row")
Found = TypeVar("Found")


class Distinct:
    """Rows of a text and the place where it was found, such as a URL, told one after the other."""

    def __init__(self) -> None:
        self._digests = bytearray()

    def __len__(self) -> int:
        return len(self._digests) // (2 * _SIZE)

    def add(self, text: str, place: str | None = None) -> None:
        """One more row."""
        self._digests += _digest(text)
        self._digests += _NOWHERE if place is None else _digest(place)

    def verdicts(
        self, *, sample: int | None = None, seed: int = 0, one_a_place: bool = True
    ) -> npt.NDArray[np.uint8]:
        """What becomes of each row, in the order in which they were added.

        Of equal texts the one of a certain place is KEPT and the others are REPEATED; of the texts
        left in one place one is KEPT and the others are SAME_PLACE (unless `one_a_place` is off).
        Of what is left then, `sample` texts are KEPT, drawn by `seed`; those of a smaller sample
        are in every larger one.
        """
        found = np.zeros(len(self), np.uint8)
        if not len(self):
            return found
        words = np.frombuffer(self._digests, "<u8").reshape(-1, 4)
        left = np.lexsort((words[:, 3], words[:, 2], words[:, 1], words[:, 0]))
        left = _drop(found, left, _repeats(words[left, :2]), REPEATED)
        if one_a_place:
            known = left[words[left, 2] != np.uint64(2**64 - 1)]
            order = (words[known, 1], words[known, 0], words[known, 3], words[known, 2])
            known = known[np.lexsort(order)]
            _drop(found, known, _repeats(words[known, 2:]), SAME_PLACE)
            left = left[found[left] == KEPT]
        if sample is not None and sample < len(left):
            ranks = np.fromiter((_rank(words[row], seed) for row in left), np.uint64, len(left))
            left = left[np.argsort(ranks, kind="stable")]
            found[left[sample:]] = NOT_SAMPLED
        return found


def keep_distinct(
    rows: Iterable[Row],
    clean: Callable[[Row], Found],
    judge: Callable[[Found], str | None],
    identify: Callable[[Found], tuple[str, str | None]],
    reasons: Mapping[int, str],
    *,
    sample: int | None,
    seed: int,
    one_a_place: bool = True,
) -> Iterator[tuple[Found, str | None]]:
    """What `clean` makes of each row, in order, with the reason to drop it or None.

    The reason is that of `judge`, else that of `Distinct.verdicts` on what `identify` says is the
    text and the place; `reasons` names these. The rows are read, and cleaned, twice.

    Raises:
        ConfigError: the rows can be read only once.
        DatasetError: there were more or fewer rows the second time.
    """
    if isinstance(rows, Iterator):
        raise ConfigError("rows are read twice: give a list or the like, not an iterator")
    distinct, codes, names = Distinct(), bytearray(), [""]
    for row in rows:
        found = clean(row)
        reason = judge(found) or ""
        if reason not in names:
            names.append(reason)
        codes.append(names.index(reason))
        if not reason:
            distinct.add(*identify(found))
    verdicts = distinct.verdicts(sample=sample, seed=seed, one_a_place=one_a_place)
    others = iter(verdicts.tolist())
    left = iter(codes)
    for row in rows:
        code = next(left, None)
        if code is None:
            raise DatasetError("rows were added while they were read; run the same command again")
        yield clean(row), names[code] or reasons.get(next(others))
    if next(left, None) is not None:
        raise DatasetError("rows were removed while they were read; run the same command again")


def _repeats(words: WORDS) -> npt.NDArray[np.bool_]:
    """(row,) whether a row of sorted (row, word) equals the one before."""
    same: npt.NDArray[np.bool_] = np.zeros(len(words), np.bool_)
    same[1:] = (words[1:] == words[:-1]).all(axis=1)
    return same


def _drop(
    found: npt.NDArray[np.uint8],
    rows: npt.NDArray[np.intp],
    dropped: npt.NDArray[np.bool_],
    verdict: int,
) -> npt.NDArray[np.intp]:
    """The rows that are not dropped; of the others the verdict is noted."""
    found[rows[dropped]] = verdict
    return rows[~dropped]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_SIZE).digest()


def _rank(words: Any, seed: int) -> int:
    """A number in [0, 2**64) drawn by the seed for the text of a row."""
    key = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(words[:2].tobytes(), digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little")
