"""The engine: threads that prepare, step and decode."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import torch
from PIL import Image

from ip2p_ray.editor import Editor
from ip2p_ray.engine.decoding import Decoding
from ip2p_ray.engine.observer import Guarded, Observer
from ip2p_ray.engine.preparation import Preparation
from ip2p_ray.engine.request import EngineRequest, Preview, Ticket
from ip2p_ray.engine.row import Batch, Row
from ip2p_ray.errors import ConfigError, DeadlineError, Ip2pError, QueueFullError, StoppedError
from ip2p_ray.memory import is_out_of_memory

logger = logging.getLogger(__name__)

GOOD_STEPS = 200
"""After so many without a lack of memory, a batch that was made smaller grows by one."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much an engine takes on; nothing here changes a picture."""

    batch_size: int = 8
    """Requests that take their steps together, of pictures of the editor's usual size; larger
    ones count by their pixels, and one request is always taken."""
    max_waiting: int = 64
    """Requests that may wait for a place in the batch; one more is refused."""
    cache_bytes: int = 64 * 2**20
    """Of the texts that are kept encoded, and as many of the images; where the model lies."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is at least 1, got {self.batch_size}")
        for name in ("max_waiting", "cache_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is at least 0, got {getattr(self, name)}")


class Engine:
    """Edits pictures, many at once, each with steps, scales, seed and size of its own.

    A request joins the batch at the next step and leaves it when it is done.

    What a request returns depends on the request alone, as with `Editor.edit`, whose picture it
    is: the noise streams are the same, and who shares the batch changes only how arithmetic is
    rounded, on float32 latents by less than 1e-4. Requests of different sizes take turns.

    One thread takes the steps. Images are decoded and encoded in a second, and edited latents
    decoded in a third, so that neither holds up a step; on a GPU they use streams of their own.
    All methods may be called from any thread.
    """

    def __init__(
        self,
        editor: Editor,
        config: EngineConfig | None = None,
        *,
        observer: Observer | None = None,
    ) -> None:
        self.editor = editor
        self.config = config or EngineConfig()
        self._observer = Guarded(observer or Observer())
        self._preparation = Preparation(editor, self._observer, cache_bytes=self.config.cache_bytes)
        self._null_text = self._preparation.text("")
        self._changed = threading.Condition()
        self._waiting = 0  # submitted, and not yet in the batch
        self._ready: deque[Row] = deque()
        self._running: list[Row] = []
        self._decoding = 0
        self._most = float(self.config.batch_size)  # what `Row.cost` may add up to
        self._formed: dict[tuple[int, int], Batch] = {}
        self._closing = False
        self._failures = 0  # of steps, in a row
        self._good_steps = 0  # since the batch was last made smaller or larger
        self._failure: BaseException | None = None
        self._open: weakref.WeakSet[Ticket] = weakref.WeakSet()
        device = editor.model.device
        self._preparing_stream = _own_stream(device)
        self._decoding_stream = _own_stream(device)
        self._preparing_pool = ThreadPoolExecutor(1, thread_name_prefix="engine-preparation")
        self._decoder = Decoding()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # weights may be on their way on another stream
        self._thread = threading.Thread(target=self._run, name="engine-steps", daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest, on_preview: Preview | None = None) -> Ticket:
        """The ticket of an edit that was begun; its picture comes out of the ticket.

        `on_preview` is called from the engine's thread, and must return soon.

        Raises:
            QueueFullError: `max_waiting` requests wait already.
            StoppedError: the engine was closed, or its device failed.
        """
        return self.submit_all([request], on_preview)[0]

    def submit_all(
        self, requests: list[EngineRequest], on_preview: Preview | None = None
    ) -> list[Ticket]:
        """As `submit`, of all the requests or of none."""
        with self._changed:
            if self._closing or self._failure is not None:
                raise StoppedError("the engine takes no requests any more")
            # a place in the batch that is free is no place in the queue
            free = max(0, self._most - len(self._running))
            if self._waiting + len(requests) > self.config.max_waiting + free:
                raise QueueFullError(
                    f"{self._waiting} requests are waiting, at most {self.config.max_waiting} may"
                )
            self._waiting += len(requests)
            tickets = [Ticket(request, on_preview) for request in requests]
            self._open.update(tickets)
            for ticket in tickets:
                self._preparing_pool.submit(self._prepare, ticket)
            self._changed.notify_all()  # one of them may have the next deadline
        return tickets

    def check(self) -> None:
        """Raises: Ip2pError, if the engine takes no steps any more."""
        if self._failure is not None or not (self._thread.is_alive() or self._closing):
            raise Ip2pError(f"the engine has stopped: {self._failure}") from self._failure

    @property
    def load(self) -> tuple[int, int]:
        """How many requests wait, and how many are in the batch or being decoded."""
        with self._changed:
            return self._waiting, len(self._running) + self._decoding

    def close(self, *, drain: bool = True) -> None:
        """Ends the threads, after what was submitted is done, or cancelled without `drain`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            tickets = list(self._open)
        if not drain:
            for ticket in tickets:
                ticket.cancel()
        self._preparing_pool.shutdown()
        with self._changed:
            self._changed.notify_all()
        self._thread.join()
        self._decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(drain=kind is None)

    def _prepare(self, ticket: Ticket) -> None:
        began = time.monotonic()
        try:
            if ticket.future.done():
                self._leave_queue()
                return
            with self._stream(self._preparing_stream):
                row = self._preparation.row(ticket)
        except BaseException as error:  # noqa: BLE001 whatever it is, it reaches whoever asked
            self._leave_queue()
            _settle(ticket, error)
            return
        self._observer.staged("preparation", time.monotonic() - began)
        if not ticket.request.instruction.strip():
            self._leave_queue()
            _settle(ticket, row.picture)
            return
        with self._changed:
            self._ready.append(row)
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._admit():
                    for batch in self._batches():
                        self._step(batch)
        except BaseException as error:
            logger.exception("the engine has stopped")
            with self._changed:
                self._failure = error
                tickets = list(self._open)
                self._running.clear()
                self._ready.clear()
            for ticket in tickets:
                _settle(ticket, StoppedError(f"the engine has stopped: {error}"))

    def _admit(self) -> bool:
        """Waits until there is something to do; False once there never will be."""
        with self._changed:
            while True:
                until_next = self._give_up_late()
                self._running = [row for row in self._running if not row.ticket.future.done()]
                gone = [row for row in self._ready if row.ticket.future.done()]
                for row in gone:
                    self._ready.remove(row)
                self._waiting -= len(gone)
                while self._ready and self._has_room_for(self._ready[0]):
                    row = self._ready.popleft()
                    self._waiting -= 1
                    self._enter(row)
                self._tell()
                if self._running:
                    return True
                if self._closing and not self._waiting:
                    return False
                self._changed.wait(until_next)

    def _give_up_late(self) -> float | None:
        """Tells those whose time is over; seconds until the next is, None where none has a time."""
        now = time.monotonic()
        soonest = math.inf
        for ticket in list(self._open):
            if ticket.future.done() or ticket.expires == math.inf:
                continue
            if ticket.expires <= now:
                seconds = ticket.request.deadline_s
                _settle(ticket, DeadlineError(f"not done after {seconds:g} s"))
            else:
                soonest = min(soonest, ticket.expires)
        return None if soonest == math.inf else soonest - now

    def _has_room_for(self, row: Row) -> bool:
        # decoding that cannot keep up holds admission back, or its latents would pile up
        if self._decoding >= 2 * self.config.batch_size:
            return False
        held = sum(other.cost for other in self._running)
        return not self._running or held + row.cost <= self._most

    def _enter(self, row: Row) -> None:
        now = time.monotonic()
        self._observer.staged("admission", now - row.since)
        row.since = now
        self._running.append(row)

    def _batches(self) -> list[Batch]:
        """The running rows by size; those whose rows are the same as before go on as they are."""
        by_size: dict[tuple[int, int], list[Row]] = defaultdict(list)
        for row in self._running:
            by_size[row.picture.size].append(row)
        former, self._formed = self._formed, {}
        for size, rows in by_size.items():
            known = former.pop(size, None)
            if known is not None and known.rows != rows:
                known.scatter()
                known = None
            self._formed[size] = known or Batch(self.editor, self._null_text, rows)
        return list(self._formed.values())

    def _step(self, batch: Batch) -> None:
        began = time.monotonic()
        failure: Exception | None = None
        try:
            batch.advance()
            self._synchronize()
        except Exception as error:  # noqa: BLE001 `_mend` tells whoever asked, or raises it
            # without the traceback, which holds the tensors that there was no memory for
            failure = error.with_traceback(None)
        if failure is not None:
            self._mend(batch, failure)
            return
        self._failures = 0
        now = time.monotonic()
        self._observer.stepped(len(batch.rows), self._most, now - began)
        self._grow()
        for row in batch.rows:
            if row.wants_preview:
                show = partial(self._show, row, row.step, batch.guess(row))
                self._decoder.submit(row, show)
        arrived = [row for row in batch.rows if row.arrived]
        if not arrived:
            return
        batch.scatter()
        with self._changed:
            for row in arrived:
                self._observer.staged("steps", now - row.since)
                row.since = now
                self._running.remove(row)
                self._decoding += 1
        for row in arrived:
            self._decoder.submit(row, partial(self._finish, row))

    def _mend(self, batch: Batch, error: Exception) -> None:
        """A smaller batch where memory was short; otherwise whoever asked is told.

        A step that failed has changed nothing, so its rows can take it again.

        Raises: `error`, where steps fail again and again, as they do on a broken device.
        """
        rows = batch.rows
        short = is_out_of_memory(error)
        if short and self.editor.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if short and len(rows) > 1:
            self._most = max(1.0, min(self._most, sum(row.cost for row in rows) / 2))
            self._good_steps = 0
            logger.warning("memory is short: batches of %g from here on", self._most)
            batch.scatter()
            with self._changed:
                kept = list(rows)
                while len(kept) > 1 and sum(row.cost for row in kept) > self._most:
                    row = kept.pop()
                    self._running.remove(row)
                    self._ready.appendleft(row)
                    self._waiting += 1
            return
        if short:
            width, height = rows[0].picture.size
            error = ConfigError(f"size {width}x{height} takes more memory than there is here")
        else:
            self._failures += 1
        with self._changed:
            for row in rows:
                self._running.remove(row)
        for row in rows:
            _settle(row.ticket, error)
        if self._failures == 3:
            raise error

    def _grow(self) -> None:
        """Tries a larger batch again, long after memory was short."""
        self._good_steps += 1
        if self._most < self.config.batch_size and self._good_steps >= GOOD_STEPS:
            self._most = min(float(self.config.batch_size), self._most + 1)
            self._good_steps = 0

    def _show(self, row: Row, step: int, latents: torch.Tensor) -> None:
        """A preview, to whoever asked for one."""
        ticket = row.ticket
        if ticket.on_preview is None or ticket.future.done():
            return
        with self._stream(self._decoding_stream):
            picture = row.finished_picture(self.editor.decode(latents)[0])
        ticket.on_preview(step, ticket.request.steps, picture)

    def _finish(self, row: Row) -> None:
        try:
            if not row.ticket.future.done():
                with self._stream(self._decoding_stream):
                    edited = self.editor.decode(row.progress.x)[0]
                self._observer.staged("decoding", time.monotonic() - row.since)
                _settle(row.ticket, row.finished_picture(edited))
        except BaseException as error:  # noqa: BLE001 whatever it is, it reaches whoever asked
            _settle(row.ticket, error)
        finally:
            with self._changed:
                self._decoding -= 1
                self._changed.notify_all()
                self._tell()

    def _leave_queue(self) -> None:
        with self._changed:
            self._waiting -= 1
            self._changed.notify_all()
            self._tell()

    def _tell(self) -> None:
        # under the lock, so that what is told last is true
        with self._changed:
            self._observer.queued(self._waiting, len(self._running) + self._decoding)

    def _synchronize(self) -> None:
        """Until the device has done what it was given, so that other streams may read it."""
        if self.editor.model.device.type == "cuda":
            torch.cuda.current_stream(self.editor.model.device).synchronize()

    @contextlib.contextmanager
    def _stream(self, stream: torch.cuda.Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        with torch.cuda.stream(stream):
            yield
            stream.synchronize()


def _own_stream(device: torch.device) -> torch.cuda.Stream | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _settle(ticket: Ticket, outcome: Image.Image | BaseException) -> None:
    """The outcome becomes the ticket's, unless it was cancelled meanwhile."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(outcome, BaseException):
            ticket.future.set_exception(outcome)
        else:
            ticket.future.set_result(outcome)
