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
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import ray

from ip2p_ray import parquet, storage
from ip2p_ray.command import CustomResources
from ip2p_ray.errors import (
    ConfigError,
    DatasetError,
    Ip2pError,
    ReplyError,
    StageError,
)
from ip2p_ray.report import Report
from ip2p_ray.schema import CAPTIONS
from ip2p_ray.stages import journals, metrics, plan, reply_rows, run, shared_limits
from ip2p_ray.stages.reply_rows import JUDGED, REPLIES, STOPPED, fits_openai
from ip2p_ray.triplets.endpoint import Endpoint
from ip2p_ray.triplets.journal import JournalledWriter
from ip2p_ray.triplets.limits import LimitsConfig, Usage
from ip2p_ray.triplets.reply import NO_REPLY, Triplet, encodable, read_reply
from ip2p_ray.triplets.writer import OpenAIWriter, WriterConfig

logger = logging.getLogger(__name__)


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
        self._sign = journals.sign(asking.signs or asking.journal)
        if self._sign is not None:
            fcntl.flock(self._sign, fcntl.LOCK_SH)  # until this process ends
        shared = None if limits is None else shared_limits.RemoteLimits(limits)
        writer = OpenAIWriter(
            config,
            asking.endpoint,
            examples=examples,
            limits=shared,
            observer=metrics.WriterMetrics(asking.limits),
        )
        self._turn = _Turn(asking.concurrency)
        self._writer = JournalledWriter(writer, journals.opened(asking.journal), self._turn)

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """A reply to each caption of the batch, read; or why there is none."""
        rows = batch.select(CAPTIONS.names).to_pylist()
        found = await asyncio.gather(*(self._counted(row["caption"]) for row in rows))
        verdicts = reply_rows.verdicts(answer["status"] for answer in found)
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
        journals.wait_for_others(asking.journal, asking.signs, asking.wait_s)
        if reply_rows.is_to_be_asked_again(uri):
            logger.info("replies: some captions have no reply yet; the others are in the journal")
            reply_rows.drop(uri)
        with journals.opened(asking.journal) as journal:
            spent, known = journal.usage(), len(journal)
        calls = 2 * asking.actors * asking.concurrency + 16
        limits = shared_limits.start(asking.limits, spent, calls)
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
            with journals.opened(asking.journal) as journal:
                _log_spent(asking.limits, journal.usage(), spent, len(journal) - known)
        reply_rows.judge(uri, rows, asking.max_no_reply)
        return []

    return run.make(uri, origin, ask)


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


def _require_columns(sources: Sequence[str]) -> None:
    for source in sources:
        names = parquet.read_schema(storage.opened(source), source).names
        missing = [name for name in CAPTIONS.names if name not in names]
        if missing:
            raise DatasetError(
                f"{source} is no shard of captions: it lacks {', '.join(missing)} and has "
                f"{', '.join(names)}; jobs/collect_captions.py makes captions of any file"
            )


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
