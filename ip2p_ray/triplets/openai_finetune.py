"""Fine-tuning at a server of the OpenAI API: upload the examples, create a job, follow it.

The state is a small file: whenever this process ends, the same call goes on, and nothing is
uploaded or created, nor paid for, twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import openai

from ip2p_ray.atomic import atomic_file
from ip2p_ray.errors import ConfigError, DatasetError, StageError
from ip2p_ray.triplets.endpoint import Endpoint, key_of
from ip2p_ray.triplets.finetune import Form, training_file
from ip2p_ray.triplets.reply import Triplet

logger = logging.getLogger(__name__)

FINISHED = ("succeeded", "failed", "cancelled")
"""What the server calls a job on which it works no more."""

_UPLOADING, _CREATING = "uploading", "creating"
_AGAIN = (openai.APIConnectionError, openai.InternalServerError, openai.RateLimitError)
_NO_KEY = (openai.AuthenticationError, openai.PermissionDeniedError)
_REFUSED = (
    *_NO_KEY,
    openai.BadRequestError,
    openai.NotFoundError,
    openai.UnprocessableEntityError,
)
_PATIENCE = 10  # looks at a job that may fail in a row, each after the client's own attempts


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """What a server is asked to train."""

    model: str = "davinci-002"
    """The server's name of the model to start from."""
    form: Form = "completion"
    """Delimiters as in the paper, or messages for a model that only chats."""
    epochs: int = 1
    """Passes over the examples."""
    suffix: str | None = None
    """Part of the new model's name; None leaves it to the server."""
    seed: int = 0
    """Of the server's order of the examples, where it takes one."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model is the name of a model, got an empty one")
        if self.form not in ("completion", "chat"):
            raise ConfigError(f"form is completion or chat, got {self.form!r}")
        if self.epochs < 1:
            raise ConfigError(f"epochs is at least 1, got {self.epochs}")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How far a server's job is, as the state's file has it."""

    digest: str
    """Of the examples and the config."""
    status: str = "new"
    """What is being done, or what the server calls its job."""
    file_id: str | None = None
    """The server's name of the uploaded examples."""
    job_id: str | None = None
    """The server's name of the job."""
    model: str | None = None
    """Name of the new model, once the job succeeded."""
    event_id: str | None = None
    """The newest event that was told."""
    message: str = ""
    """What the server said last."""

    @property
    def done(self) -> bool:
        """Whether the new model is there."""
        return self.model is not None


def connect(endpoint: Endpoint) -> openai.OpenAI:
    """The official client of an endpoint.

    Raises:
        ConfigError: the environment has no key.
    """
    return openai.OpenAI(
        base_url=endpoint.base_url,
        api_key=key_of(endpoint) or "none",
        timeout=endpoint.timeout_s,
    )


def finetune_openai(
    client: openai.OpenAI,
    examples: Sequence[Triplet],
    config: TuningConfig,
    state: Path,
    *,
    poll_s: float = 15.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Tuning]:
    """How far the job is, at each change and each message of the server, until its model is there.

    The file `state` is written before and after each thing that is asked for only once. After a
    kill in between, the server's lists say whether it was heard. One process at a time.

    Raises:
        ConfigError: the server refuses the key, the model or the file, or `state` is of a job
            with other examples or another config.
        DatasetError: `state` cannot be read.
        StageError: the job failed or was cancelled, or the server does not answer; says what it
            said.
    """
    data = training_file(examples, config.form)
    tuning = read_tuning(state) or Tuning(digest=_digest(data, config))
    if tuning.digest != _digest(data, config):
        if tuning.job_id is not None or tuning.status == _CREATING:
            raise ConfigError(
                f"{state} is of a job with other examples or another config; give another file, or "
                "delete it to begin anew"
            )
        tuning = Tuning(digest=_digest(data, config))
    server = _Server(client)
    try:
        if tuning.file_id is None:
            tuning = _upload(server, data, tuning, state)
            yield tuning
        if tuning.job_id is None:
            tuning = _create(server, config, tuning, state)
            yield tuning
        if not tuning.done:
            yield from _follow(server, tuning, state, poll_s, sleep)
        else:
            yield tuning
    except openai.OpenAIError as error:
        _refuse(error, config, state)


def read_tuning(state: Path) -> Tuning | None:
    """What the file says, or None where there is none.

    Raises:
        DatasetError: it cannot be read.
    """
    try:
        return Tuning(**json.loads(state.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DatasetError(f"state {state} cannot be read: {error}") from error


def _upload(server: _Server, data: bytes, tuning: Tuning, state: Path) -> Tuning:
    name = f"triplets-{tuning.digest}.jsonl"
    found = server.find_file(name) if tuning.status == _UPLOADING else None
    _write(state, replace(tuning, status=_UPLOADING))
    try:
        file_id = found or server.upload(name, data)
    except _REFUSED:
        _write(state, replace(tuning, status="new"))
        raise
    tuning = replace(tuning, status="uploaded", file_id=file_id)
    _write(state, tuning)
    return tuning


def _create(server: _Server, config: TuningConfig, tuning: Tuning, state: Path) -> Tuning:
    assert tuning.file_id is not None
    found = server.find_job(tuning.file_id) if tuning.status == _CREATING else None
    _write(state, replace(tuning, status=_CREATING))
    try:
        job_id = found or server.create(tuning.file_id, tuning.digest, config)
    except _REFUSED:
        _write(state, replace(tuning, status="uploaded"))
        raise
    tuning = replace(tuning, status="created", job_id=job_id)
    _write(state, tuning)
    return tuning


def _follow(
    server: _Server, tuning: Tuning, state: Path, poll_s: float, sleep: Callable[[float], None]
) -> Iterator[Tuning]:
    failures = 0
    while True:
        try:
            told = list(server.look(tuning))
            failures = 0
        except _AGAIN:
            failures += 1
            if failures == _PATIENCE:
                raise
            told = []
        for news in told:
            tuning = news
            _write(state, tuning)
            yield tuning
        if tuning.status in FINISHED:
            break
        sleep(poll_s)
    if not tuning.done:
        raise StageError(
            f"fine-tuning job {tuning.job_id} is {tuning.status}: {tuning.message or 'no reason'}; "
            f"delete {state} to begin anew"
        )


class _Server:
    """The calls, by what they are for."""

    def __init__(self, client: openai.OpenAI) -> None:
        self._client = client
        # What must not happen twice is not tried twice: whether it happened is looked up.
        self._once = client.with_options(max_retries=0)

    def upload(self, name: str, data: bytes) -> str:
        return self._once.files.create(file=(name, data), purpose="fine-tune").id

    def find_file(self, name: str) -> str | None:
        files = self._client.files.list(purpose="fine-tune")
        return next((file.id for file in files if file.filename == name), None)

    def create(self, file_id: str, digest: str, config: TuningConfig) -> str:
        options: dict[str, Any] = {"suffix": config.suffix} if config.suffix else {}
        return self._once.fine_tuning.jobs.create(
            model=config.model,
            training_file=file_id,
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": config.epochs}},
            },
            seed=config.seed,
            metadata={"ip2p_ray": digest},
            **options,
        ).id

    def find_job(self, file_id: str) -> str | None:
        jobs = self._client.fine_tuning.jobs.list()
        return next((job.id for job in jobs if job.training_file == file_id), None)

    def look(self, tuning: Tuning) -> Iterator[Tuning]:
        """The tuning after each event that was not told, and last as the job is now."""
        assert tuning.job_id is not None
        # Asked first, so that no event of a finished job is missed.
        job = self._client.fine_tuning.jobs.retrieve(tuning.job_id)
        for event_id, message in self._events(tuning.job_id, tuning.event_id):
            tuning = replace(tuning, event_id=event_id, message=message)
            yield tuning
        if job.status == tuning.status:
            return
        message = getattr(job.error, "message", None) or tuning.message
        model = job.fine_tuned_model if job.status == "succeeded" else None
        yield replace(tuning, status=job.status, message=message, model=model)

    def _events(self, job_id: str, last: str | None) -> list[tuple[str, str]]:
        """(id, message) of the events after `last`, the oldest first."""
        found: list[tuple[str, str]] = []
        try:
            for event in self._client.fine_tuning.jobs.list_events(job_id, limit=100):
                if event.id == last:
                    break
                found.append((event.id, event.message))
        except openai.NotFoundError:
            logger.debug("job %s: the server has no events", job_id)
        return found[::-1]


def _refuse(error: openai.OpenAIError, config: TuningConfig, state: Path) -> NoReturn:
    """Raises the sentence for an error of the client."""
    said = " ".join(str(getattr(error, "message", "") or error).split())[:300]
    if isinstance(error, _NO_KEY):
        raise ConfigError(f"the server refuses the API key: {said}") from error
    if isinstance(error, _REFUSED):
        raise ConfigError(f"the server does not fine-tune {config.model}: {said}") from error
    raise StageError(
        f"the server does not answer: {said}; the same command goes on from {state}"
    ) from error


def _digest(data: bytes, config: TuningConfig) -> str:
    content = json.dumps(asdict(config), sort_keys=True).encode()
    return hashlib.blake2b(content + b"\n" + data, digest_size=16).hexdigest()


def _write(state: Path, tuning: Tuning) -> None:
    """The file with the tuning, whole at any moment and on the disk."""
    state.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(state) as new:
        new.write_text(json.dumps(asdict(tuning), indent=2) + "\n", encoding="utf-8")
