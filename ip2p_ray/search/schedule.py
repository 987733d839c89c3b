"""Full batches from many triplets: which candidates are made together, and in which order.

With pruning there are two kinds of batches: candidates from noise to the step at which they are
pruned, and survivors from there to the end. Survivors wait until they fill a batch of their own. A
batch has room for so many rows of latents, one a source and one a candidate; it is full when no
group that waits fits into it any more. Batches are part-empty only once no
triplet is left to begin.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ip2p_ray.candidates import CandidateRequest
from ip2p_ray.errors import ConfigError
from ip2p_ray.pairs import PairConfig
from ip2p_ray.search.options import SearchConfig
from ip2p_ray.search.triplet import Made, Searched, TripletSearch


class Generator(Protocol):
    """What makes candidates; `begun` is whatever it wants to be given back of a group."""

    def predict(
        self, groups: Sequence[Sequence[CandidateRequest]]
    ) -> list[tuple[Any, list[Mapping[str, float]]]]:
        """Of each group what was begun, and the predicted similarities of its candidates."""
        ...

    def take(self, begun: Any, places: Sequence[int]) -> Any:
        """What was begun, without the group's candidates at other places."""
        ...

    def finish(self, groups: Sequence[Sequence[CandidateRequest]], begun: list[Any]) -> list[Made]:
        """The candidates of all groups; `begun` is None of a group that was not predicted."""
        ...


@dataclass(frozen=True, eq=False)
class Group:
    """Candidates of one source that go through batches together."""

    search: TripletSearch
    requests: Sequence[CandidateRequest]
    begun: Any = None

    @property
    def rows(self) -> int:
        """Rows of latents in a batch."""
        return 1 + len(self.requests)


def schedule(
    generator: Generator,
    triplets: Iterable[Mapping[str, Any]],
    config: PairConfig,
    options: SearchConfig,
    recipe: str,
    *,
    batch_size: int,
    shown_below: str = "",
) -> Iterator[Searched]:
    """Each triplet as soon as its search has ended, which need not be in the order given.

    A triplet is a row with triplet_key, caption and edited_caption. `batch_size` counts candidates
    that have a source each, so a batch has twice as many rows of latents, and the UNet four times.
    No more triplets are begun than fill a batch. Some rejected pictures of triplets whose keys are
    below `shown_below` come too, see `rules.is_shown`.

    Raises: ConfigError where a group of one source does not fit into a batch.
    """
    room = 2 * batch_size
    if 1 + (options.share_source or 1) > room:
        raise ConfigError(
            f"a batch of {batch_size} has {room} rows: too few for share_source "
            f"{options.share_source or 1}"
        )
    coming = iter(triplets)
    prunes = options.prune_step(config.steps) is not None
    new: deque[Group] = deque()
    survivors: deque[Group] = deque()
    while True:
        while max(_rows(new), _rows(survivors)) < room:
            row = next(coming, None)
            if row is None:
                break
            search = TripletSearch(row, config, options, recipe, shown_below)
            new.extend(Group(search, requests) for requests in search.ask())
        if not new and not survivors:
            return
        if prunes and new and _rows(survivors) < room:
            batch = _fill(new, room)
            survivors.extend(_prune(generator, batch))
        else:
            batch = _fill(survivors or new, room)
            _finish(generator, batch)
        for search in dict.fromkeys(group.search for group in batch):
            if not search.waiting:
                asked = search.ask()
                new.extend(Group(search, requests) for requests in asked)
                if not asked:
                    yield search.result()


def _rows(groups: Iterable[Group]) -> int:
    return sum(group.rows for group in groups)


def _fill(waiting: deque[Group], room: int) -> list[Group]:
    """Groups that fill a batch, the longest waiting first; they no longer wait."""
    batch: list[Group] = []
    passed: list[Group] = []
    while waiting and room:
        group = waiting.popleft()
        if group.rows <= room:
            batch.append(group)
            room -= group.rows
        else:
            passed.append(group)
    waiting.extendleft(reversed(passed))
    return batch


def _prune(generator: Generator, batch: Sequence[Group]) -> Iterator[Group]:
    """The groups with the candidates that have hope; none of a group that has none."""
    predicted = generator.predict([group.requests for group in batch])
    for group, (begun, scores) in zip(batch, predicted, strict=True):
        pairs = zip(group.requests, scores, strict=True)
        alive = [n for n, (one, seen) in enumerate(pairs) if not group.search.prune(one, seen)]
        if alive:
            requests = [group.requests[n] for n in alive]
            yield Group(group.search, requests, generator.take(begun, alive))


def _finish(generator: Generator, batch: Sequence[Group]) -> None:
    made = generator.finish([group.requests for group in batch], [group.begun for group in batch])
    requests = [(group.search, request) for group in batch for request in group.requests]
    for (search, request), one in zip(requests, made, strict=True):
        search.record(request, one)
