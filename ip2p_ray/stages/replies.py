"""captions -> replies: actors that each keep many requests to one endpoint in flight.

Each reply is in the journal before anything is made of it, so the dataset of replies can be made
again for nothing. That is what happens to one with rows that are not final: no reply came, or the
run was stopped before it asked. They are written as any other, so that a plan stays one row in, one
row out; the next run drops the unfinished dataset, reads from the journal what was answered, and
asks for the rest.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any, TextIO

import pyarrow as pa
import ray

from ip2p_ray import errors, lease, parquet, storage
from ip2p_ray.captions import surely_fits
from ip2p_ray.command import CustomResources
from ip2p_ray.errors import (
    BudgetError,
    ConfigError,
    DatasetError,
    Ip2pError,
    ReplyError,
    StageError,
)
from ip2p_ray.object_files import ObjectFolder
from ip2p_ray.report import Report
from ip2p_ray.schema import CAPTIONS
from ip2p_ray.stages import metrics, plan, run
from ip2p_ray.triplets.endpoint import Endpoint
from ip2p_ray.triplets.journal import Journal, JournalledWriter
from ip2p_ray.triplets.limits import Limits, LimitsConfig, Usage
from ip2p_ray.triplets.reply import NO_REPLY, Triplet, encodable, parse_reply, read_reply
from ip2p_ray.triplets.writer import OpenAIWriter, WriterConfig

logger = logging.getLogger(__name__)

REPLIES = pa.schema(
    [
        *CAPTIONS,
        ("reply", pa.string()),  # or what went wrong instead
        ("status", pa.string()),  # "ok", or why the reply is no triplet
        ("instruction", pa.string()),  # null unless the status is "ok"
        ("edited_caption", pa.string()),  # null unless the status is "ok"
    ]
)

AFTER_TRIPLETS = ("candidates", "scores", "pairs", "latents", "checkpoints", "editor")
"""What is made of triplets, as it is named in their folder."""

STOPPED = "stopped"
"""Begins the status, "stopped ConfigError", of a caption that was not asked about any more."""

_MOST_ROWS = 500
_BATCHES = 4  # Ray Data runs as many of a block at the same time
_PATIENCE_S = 60.0
_HEARTBEAT_S = 60.0  # these runs take hours


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How an endpoint is asked; but for `max_no_reply` no field changes what comes out."""

    journal: str
    """Folder of the replies, on a file system that all nodes share or in a bucket."""
    endpoint: Endpoint
    limits: LimitsConfig
    """Of all actors together."""
    actors: int = 1
    """Processes that ask."""
    concurrency: int = 64
    """Requests that each of them has in flight."""
    max_no_reply: float = 0.05
    """Share of captions, in [0, 1], that may be left without a reply; above it the stage fails."""
    wait_s: float = _PATIENCE_S
    """Seconds in which the actors of a run that was killed have to be gone."""
    signs: str | None = None
    """Folder that all nodes share, where actors show that they live; by default the journal's.

    Without one, as of a journal in a bucket, nobody waits for the actors of a killed run.
    """
    custom: CustomResources = ()
    """Custom resources of each actor, a pair of name and amount."""

    def __post_init__(self) -> None:
        if self.actors < 1 or self.concurrency < 1:
            raise ConfigError(
                f"actors and concurrency are at least 1, got {self.actors} and {self.concurrency}"
            )
        if not 0.0 <= self.max_no_reply <= 1.0:
            raise ConfigError(f"max_no_reply is a share in [0, 1], got {self.max_no_reply}")


class AskReplies:
    """An actor of the plan: rows of CAPTIONS in, rows of REPLIES out, many at a time."""

    def __init__(
        self,
        config: WriterConfig,
        examples: Sequence[Triplet],
        asking: Asking,
        limits: Any = None,
        tally: Any = None,
    ) -> None:
        self._count = Count(tally)
        self._sign = _sign(asking)
        if self._sign is not None:
            fcntl.flock(self._sign, fcntl.LOCK_SH)  # until this process ends
        shared = None if limits is None else RemoteLimits(limits)
        writer = OpenAIWriter(
            config,
            asking.endpoint,
            examples=examples,
            limits=shared,
            observer=metrics.WriterMetrics(asking.limits),
        )
        self._turn = _Turn(asking.concurrency)
        self._writer = JournalledWriter(writer, _journal(asking), self._turn)

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """A reply to each caption of the batch, read; or why there is none."""
        rows = batch.select(CAPTIONS.names).to_pylist()
        found = await asyncio.gather(*(self._counted(row["caption"]) for row in rows))
        verdicts = _verdicts(answer["status"] for answer in found)
        metrics.judged("replies", verdicts)
        self._count.judge(verdicts)
        for row, answer in zip(rows, found, strict=True):
            row.update(answer)
        return pa.Table.from_pylist(rows, schema=REPLIES)

    async def _counted(self, caption: str) -> Mapping[str, str | None]:
        answer = await self._answer(caption)
        self._count.add()
        return answer

    async def _answer(self, caption: str) -> Mapping[str, str | None]:
        try:
            reply = await self._writer.write(caption)
        except ReplyError as error:
            return {"reply": encodable(str(error)), "status": NO_REPLY}
        except (Ip2pError, OSError) as error:
            # Not raised: Ray would end the actors, and lose what is in flight and paid for.
            own = self._turn.stop_by(error)
            return {"reply": encodable(str(own)), "status": f"{STOPPED} {type(own).__name__}"}
        found = read_reply(caption, reply, fits=fits_openai)
        text = encodable(reply.text)  # older journals hold what a table does not
        if isinstance(found, Triplet):
            texts = {"instruction": found.instruction, "edited_caption": found.edited_caption}
            return {"reply": text, "status": "ok", **texts}
        return {"reply": text, "status": found}


class Count:
    """Tells a `plan.Tally` now and then how many more there are.

    A call for each would cost about as much as a reply.
    """

    def __init__(self, tally: Any, every_s: float = 1.0) -> None:
        self._tally, self._every_s = tally, every_s
        self._untold, self._told = 0, time.monotonic()

    def add(self) -> None:
        """One more."""
        self._untold += 1
        if time.monotonic() - self._told >= self._every_s:
            self.tell()

    def judge(self, verdicts: Mapping[str | None, int]) -> None:
        """Verdicts more; and what was not told yet."""
        self.tell()
        if self._tally is not None:
            self._tally.judge.remote(dict(verdicts))

    def tell(self) -> None:
        """What was not told yet."""
        if self._untold and self._tally is not None:
            self._tally.add.remote(self._untold)
        self._untold, self._told = 0, time.monotonic()


class _Turn(AbstractAsyncContextManager[None]):
    """So many at a time, and none after what stops them all."""

    def __init__(self, count: int) -> None:
        self.stop: Ip2pError | None = None
        self._free = asyncio.Semaphore(count)

    async def __aenter__(self) -> None:
        await self._free.acquire()
        if self.stop is not None:
            self._free.release()
            raise type(self.stop)(*self.stop.args)

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # before the turn is another's
        if isinstance(error, Ip2pError | OSError) and not isinstance(error, ReplyError):
            self.stop_by(error)
        self._free.release()

    def stop_by(self, error: Ip2pError | OSError) -> Ip2pError:
        """The error as this package tells it; from now on there are no more turns."""
        own = error if isinstance(error, Ip2pError) else StageError(f"journal: {error}")
        self.stop = self.stop or own
        return own


@ray.remote(num_cpus=0)
class SharedLimits:
    """`LocalLimits` for all actors of a plan."""

    def __init__(self, config: LimitsConfig, spent: Usage) -> None:
        from ip2p_ray.triplets.limits import LocalLimits

        self._limits = LocalLimits(config, spent=spent)

    async def acquire(self, most: Usage) -> int:
        """See `Limits.acquire`."""
        return await self._limits.acquire(Usage(*most))

    async def settle(self, ticket: int, used: Usage | None) -> None:
        """See `Limits.settle`."""
        await self._limits.settle(ticket, None if used is None else Usage(*used))


class RemoteLimits(Limits):
    """`SharedLimits` as an actor's writer asks it."""

    def __init__(self, limits: Any) -> None:
        self._limits = limits

    async def acquire(self, most: Usage) -> int:
        """See `Limits.acquire`."""
        try:
            return int(await self._limits.acquire.remote(most))
        except ray.exceptions.RayActorError as error:
            raise StageError(
                "the actor that counts what is spent was lost; the same command goes on from here"
            ) from error
        except ray.exceptions.RayTaskError as error:
            # Ray's own has a traceback for a text.
            raise run.own_error(error) or error from None

    async def settle(self, ticket: int, used: Usage | None) -> None:
        """See `Limits.settle`; told, not waited for."""
        self._limits.settle.remote(ticket, used)


def check(
    captions: str,
    folder: str,
    config: WriterConfig,
    *,
    examples: Sequence[Triplet],
    endpoint: Endpoint,
) -> None:
    """Returns if replies to the captions are in the folder, or can be asked for; spends nothing.

    Needs no Ray. A server that does not list the model is asked for one reply.

    Raises:
        ConfigError: no key, no server there, or none with that model; the text says which.
        DatasetError: the captions are not whole, or lack a column.
    """
    require_captions(captions)
    if not storage.exists(storage.join(folder, "replies", storage.MANIFEST)):
        asyncio.run(_check(config, examples, endpoint))


def require_captions(captions: str) -> None:
    """Returns if the dataset is whole and has the columns of captions.

    Raises:
        DatasetError: it is not, or lacks one.
    """
    _require_columns(plan.shards(captions))


@contextmanager
def journal_held(journal: str, folder: str) -> Iterator[None]:
    """A journal in a bucket for this process alone while the block runs, and surely writable.

    Nothing is done where the folder has all replies. A journal on disk is for those alone who
    lock it (`ask_replies`).

    Raises:
        StageError: another run is asking for it.
        StorageError: it cannot be written to.
    """
    whole = storage.exists(storage.join(folder, "replies", storage.MANIFEST))
    if whole or storage.is_local(journal):
        yield
        return
    storage.check(journal)
    with lease.held(storage.join(journal, ".lock")):
        yield


def ask_replies(
    captions: str,
    uri: str,
    origin: run.Origin,
    config: WriterConfig,
    *,
    examples: Sequence[Triplet],
    asking: Asking,
) -> storage.Manifest:
    """The dataset of replies at `uri`, REPLIES; nothing that the journal has is asked for again.

    Whether the server is there, `check` says before.

    Raises:
        ConfigError: the server refuses every request.
        DatasetError: the captions are not whole, or lack a column.
        BudgetError: a cap is reached; every reply that was paid for is kept.
        StageError: more captions than may be were left without a reply.
    """

    def ask() -> list[Report]:
        sources = plan.shards(captions)
        _require_columns(sources)
        rows = plan.count_rows(sources)
        _wait_for_others(asking)
        if _is_to_be_asked_again(uri):
            logger.info("replies: some captions have no reply yet; the others are in the journal")
            _drop(uri)
        with _journal(asking) as journal:
            spent, known = journal.usage(), len(journal)
        limits = _limits(asking, spent)
        block = min(_MOST_ROWS, max(32, rows // (8 * asking.actors)))
        step = plan.Step(
            callable=AskReplies,
            arguments={"config": config, "examples": examples, "asking": asking, "limits": limits},
            resources=run.Resources(
                actors=asking.actors,
                cpus=plan.TASK_CPUS,
                batch_size=-(-block // _BATCHES),
                custom=asking.custom,
            ),
            # so many captions at hand that none of the slots waits for the end of a block
            blocks=max(2, -(-4 * asking.concurrency // block)),
            counts=True,
        )
        try:
            plan.stream(
                sources,
                uri,
                key="caption_key",
                schema=REPLIES,
                steps=[step],
                unit="captions",
                rows_per_block=block,
                every_s=_HEARTBEAT_S,
                judged=JUDGED,
            )
        finally:
            if limits is not None:
                ray.kill(limits)
            with _journal(asking) as journal:
                _log_spent(asking.limits, journal.usage(), spent, len(journal) - known)
        _judge(uri, rows, asking.max_no_reply)
        return []

    return run.make(uri, origin, ask)


def drop_unanswered(folder: str) -> int:
    """How many captions of `<folder>/replies` have no reply.

    If any has none, that dataset and those made from it are dropped, so that they are asked again.

    Raises:
        StageError: the folder has what was made of the triplets, which would no longer match.
    """
    replies = storage.join(folder, "replies")
    if not storage.exists(storage.join(replies, storage.MANIFEST)):
        return 0  # not whole yet: what has no reply there is asked for again anyway
    count = sum(1 for _ in _unfinished(replies))
    if not count:
        return 0
    made = [name for name in AFTER_TRIPLETS if storage.any_there(storage.join(folder, name))]
    if made:
        raise StageError(
            f"{count:,} captions have no reply, but asking again would change the triplets that "
            f"{', '.join(made)} in {folder} were made of: delete these, or copy {folder}/journal "
            "to another --out and write the triplets there, which asks for nothing that it has"
        )
    for name in ("triplets", "rejects/triplets", "replies"):
        storage.remove_all(storage.join(folder, name))
    return count


def unanswered(uri: str) -> str | None:
    """A digest of which captions of the replies at `uri` have none; None where all have one."""
    keys = [
        key
        for shard in storage.list_shards(uri)
        for key, status in _columns(shard, "caption_key", "status")
        if status == NO_REPLY
    ]
    return blake2b("\n".join(sorted(keys)).encode(), digest_size=8).hexdigest() if keys else None


def origin_of(
    captions: str, config: WriterConfig, recipe: str, judge: str = "openai"
) -> run.Origin:
    """What replies of an endpoint depend on; `recipe` is the writer's."""
    return run.Origin(
        dataset="replies",
        config=asdict(config),
        models={"writer": f"{config.model} {recipe}", "judge": judge},
        sources={"captions": storage.read_manifest(captions).recipe},
    )


async def _check(config: WriterConfig, examples: Sequence[Triplet], endpoint: Endpoint) -> None:
    async with OpenAIWriter(config, endpoint, examples=examples) as writer:
        await writer.check()


def _limits(asking: Asking, spent: Usage) -> Any:
    """The actor that counts for all; None where there is nothing to count."""
    told = asking.limits
    caps = (told.requests_per_minute, told.tokens_per_minute, told.max_tokens, told.max_usd)
    if not any(cap is not None for cap in caps):
        return None
    calls = 2 * asking.actors * asking.concurrency + 16
    return run.beside_driver(SharedLimits, max_concurrency=calls).remote(told, spent)


def _journal(asking: Asking) -> Journal:
    if storage.is_local(asking.journal):
        return Journal(storage.local_path(asking.journal))
    return Journal(ObjectFolder(asking.journal))


def _sign(asking: Asking) -> TextIO | None:
    """The file that is locked as long as somebody asks for the journal."""
    place = asking.signs or asking.journal
    if not storage.is_local(place):
        return None
    folder = storage.local_path(place)
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / ".asking").open("a")


def _wait_for_others(asking: Asking) -> None:
    """Returns when no actor asks for this journal: after a kill some live on for a moment."""
    until = time.monotonic() + asking.wait_s
    sign = _sign(asking)
    if sign is None:
        return
    with sign:
        while True:
            try:
                fcntl.flock(sign, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise StageError(
                        f"another run is asking for the journal {asking.journal}; wait for it, or "
                        "give another journal"
                    ) from error
                time.sleep(0.2)
            else:
                return


def _require_columns(sources: Sequence[str]) -> None:
    for source in sources:
        names = parquet.read_schema(storage.opened(source), source).names
        missing = [name for name in CAPTIONS.names if name not in names]
        if missing:
            raise DatasetError(
                f"{source} is no shard of captions: it lacks {', '.join(missing)} and has "
                f"{', '.join(names)}; jobs/collect_captions.py makes captions of any file"
            )


def _unfinished(uri: str) -> Iterator[tuple[str, str]]:
    """(status, what was said) of each row that is not final, in whatever lies there."""
    for shard in storage.list_shards(uri):
        if any(_is_open(status) for (status,) in _columns(shard, "status")):
            for status, text in _columns(shard, "status", "reply"):
                if _is_open(status):
                    yield status, text


def _is_to_be_asked_again(uri: str) -> bool:
    """Whether what an earlier attempt left has rows that are not final, or cannot be read."""
    try:
        return any(_unfinished(uri))
    except (OSError, pa.ArrowException):
        return True  # a kill cut a shard; the journal has all that is in it


def _columns(shard: str, *names: str) -> Iterator[tuple[str, ...]]:
    table = storage.read_table(shard, columns=list(names))
    yield from zip(*(table[name].to_pylist() for name in names), strict=True)


def _is_open(status: str) -> bool:
    return status == NO_REPLY or status.startswith(STOPPED)


def _verdicts(statuses: Iterable[str | None]) -> Counter[str | None]:
    """By reason, and None for what can be used; of what is to be asked again, none."""
    found = Counter[str | None]()
    for status, count in Counter(map(str, statuses)).items():
        if not _is_open(status):
            found[None if status == "ok" else status] += count
    return found


def _verdicts_in(table: pa.Table) -> Counter[str | None]:
    return _verdicts(table["status"].to_pylist())


JUDGED = plan.Judged(columns=["status"], verdicts=_verdicts_in)
"""Of rows of REPLIES."""


def _drop(uri: str) -> None:
    """The notes of what was written, then the shards.

    After a kill in between some rows come twice, of which one is kept, but none is missing.
    """
    storage.remove_all(run.resume_folder(uri))
    storage.remove_shards(uri)


def _judge(uri: str, rows: int, max_no_reply: float) -> None:
    """Returns if the replies are what they should be.

    Raises:
        Ip2pError: whatever stopped the actors.
        StageError: too many captions have no reply.
    """
    lacking = 0
    said = ""
    for status, text in _unfinished(uri):
        if status.startswith(STOPPED):
            kind = getattr(errors, status.removeprefix(STOPPED).strip(), StageError)
            if kind is BudgetError:
                text += "; once there is more, the same command goes on, and asks for nothing twice"
            raise kind(text)
        lacking += 1
        said = said or text
    if lacking > max_no_reply * rows:
        raise StageError(
            f"replies: {lacking:,} of {rows:,} captions got none, more than the {max_no_reply:.0%} "
            f"allowed, for example: {said}; the same command asks for those again and for no other"
        )


def row_of_reply(caption: str, reply: str, fits: Callable[[str], bool]) -> dict[str, str | None]:
    """The columns that REPLIES adds to CAPTIONS, of a reply in the paper's text form."""
    found = parse_reply(caption, reply, fits=fits)
    if isinstance(found, Triplet):
        texts = {"instruction": found.instruction, "edited_caption": found.edited_caption}
        return {"reply": reply, "status": "ok", **texts}
    return {"reply": reply, "status": found, "instruction": None, "edited_caption": None}


def _log_spent(limits: LimitsConfig, usage: Usage, before: Usage, answered: int) -> None:
    now = usage.minus(before)
    price = f", {limits.usd(now):.2f} USD" if limits.usd(usage) else ""
    in_all = f", {limits.usd(usage):.2f} USD" if limits.usd(usage) else ""
    logger.info(
        "replies: %s new ones, %s tokens read and %s written%s; with earlier runs %s tokens%s",
        f"{answered:,}",
        f"{now.prompt_tokens:,}",
        f"{now.completion_tokens:,}",
        price,
        f"{usage.tokens:,}",
        in_all,
    )


def fits_openai(text: str) -> bool:
    """Whether OpenAI's CLIP reads the whole text; its vocabulary is loaded once one is long."""
    if surely_fits(text):
        return True
    from ip2p_ray.clip import openai_fits

    return openai_fits(text)
