"""A language model behind an OpenAI-compatible server that writes a reply to each caption."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import openai
from openai.types import Completion
from openai.types.chat import ChatCompletion

from ip2p_ray.errors import ConfigError, ReplyError
from ip2p_ray.schema import recipe
from ip2p_ray.triplets.endpoint import AGAIN, Connection, Endpoint, MalformedError, never_arrived
from ip2p_ray.triplets.limits import (
    NOTHING,
    Limits,
    LimitsConfig,
    LocalLimits,
    Usage,
    estimated_tokens,
)
from ip2p_ray.triplets.observer import Observer
from ip2p_ray.triplets.prompt import (
    MAX_TOKENS,
    REPLY_SCHEMA,
    STOP,
    SYSTEM,
    TEMPERATURE,
    chat_messages,
    completion_prompt,
)
from ip2p_ray.triplets.reply import Reply, Triplet, encodable

_log = logging.getLogger(__name__)

_HARMLESS = "a cat"
_CHECK_ATTEMPTS = 3
_MOST_TOKENS = 2**40  # that a response may be said to have; above it the count is none
_MESSAGE_TOKENS = 4  # that a chat model reads around each message
_FILTER_CODES = ("content_filter", "content_policy_violation", "moderation_blocked")
_FORMS: dict[str, tuple[str, Any]] = {
    "chat": ("/chat/completions", ChatCompletion),
    "completions": ("/completions", Completion),
}
_REFUSED = (openai.BadRequestError, openai.UnprocessableEntityError)


@dataclass(frozen=True, kw_only=True)
class WriterConfig:
    """Which model writes, and how it is asked."""

    model: str
    """Its name at the server."""
    form: Literal["chat", "completions"] = "chat"
    """"chat" shows examples to any chat model; "completions" is the paper's text form, for a model
    that was fine-tuned for it."""
    temperature: float | None = TEMPERATURE
    """The paper's, in [0, 2]; None leaves it to the server, as models that reason want it."""
    max_tokens: int = MAX_TOKENS
    """Tokens of the longest reply, thoughts included."""
    shots: int = 8
    """Examples shown with each caption in the chat form."""
    seed: int = 0
    """Of the choice of examples. Another seed asks for other replies."""
    moderation: bool = False
    """Whether caption and reply are shown to the server's moderation endpoint."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model is the name of a model at the server, got nothing")
        if self.form not in ("chat", "completions"):
            raise ConfigError(f"form is chat or completions, got {self.form!r}")
        if self.temperature is not None and not 0.0 <= self.temperature <= 2.0:
            raise ConfigError(f"temperature is in [0, 2], or None, got {self.temperature}")
        if self.max_tokens < 1 or self.shots < 0:
            raise ConfigError(
                f"max_tokens is at least 1 and shots at least 0, got {self.max_tokens} and "
                f"{self.shots}"
            )


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What, of a WriterConfig, a reply depends on besides the model."""

    form: str
    temperature: float | None
    max_tokens: int
    shots: int
    seed: int


class OpenAIWriter:
    """Asks one model for replies, any number at a time, within limits. Of one event loop."""

    def __init__(
        self,
        config: WriterConfig,
        endpoint: Endpoint | None = None,
        *,
        examples: Sequence[Triplet] = (),
        limits: Limits | None = None,
        observer: Observer | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Sends nothing. `sleep` and `jitter` are as in `Connection`.

        Raises:
            ConfigError: the environment has no key.
        """
        self._config = config
        self._examples = tuple(examples)
        self._limits: Limits = limits or LocalLimits(LimitsConfig())
        self._observer = observer or Observer()
        self._connection = Connection(endpoint or Endpoint(), sleep=sleep, jitter=jitter)
        self._structured = config.form == "chat" and self._endpoint.structured != "off"
        self._length_name = "max_tokens"
        self._answered = False
        self._recipe = writer_recipe(config, self._examples)

    def __repr__(self) -> str:
        return f"OpenAIWriter({self._config.model!r} at {self._endpoint.base_url})"

    async def __aenter__(self) -> OpenAIWriter:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._connection.client.close()

    @property
    def model(self) -> str:
        """Its name at the server."""
        return self._config.model

    @property
    def recipe(self) -> str:
        """16 hex digits of all that decides what the model reads and how it writes.

        Neither the server nor structured output nor moderation is in it: the same question may be
        asked elsewhere, and replies are moderated after they are kept.
        """
        return self._recipe

    async def check(self) -> None:
        """Returns if the server is there, takes the key and has the model, before any spending.

        The list of models tells. Where there is none, or it fails, or lacks the model, as lists of
        servers that load a folder do, the reply to one harmless caption decides.

        Raises:
            ConfigError: one of them is wrong, or there is no moderation to show replies to; the
            text says which.
        BudgetError: the account has nothing left.
        """
        where = self._endpoint.base_url
        names: set[str] = set()
        try:
            with contextlib.suppress(openai.InternalServerError):  # `transformers serve`, no cache
                names = await self._connection.attempts(self._names, _CHECK_ATTEMPTS)
            await self._check_moderation()
            if self.model not in names:
                await self._connection.attempts(self._try_out, _CHECK_ATTEMPTS)
        except openai.APIConnectionError as error:
            said = self._connection.said(error)
            raise ConfigError(f"{where} cannot be reached: {said}") from error
        except MalformedError as error:
            raise ConfigError(f"{where} does not speak the OpenAI API: {error}") from error
        except openai.NotFoundError as error:
            has = f"it has {', '.join(sorted(names)[:5])}" if names else "does base_url end in /v1?"
            raise ConfigError(f"{where} has no model {self.model!r}; {has}") from error
        except openai.APIStatusError as error:
            self._connection.refuse(error, self._what)

    async def write(self, caption: str) -> Reply:
        """The reply of the model to a caption.

        Raises:
            ReplyError: no attempt had a reply, or the server takes others but not this caption.
            ConfigError: the server refuses the key, the model or every request.
            BudgetError: a limit or the account's quota allows no further request.
        """
        question = self._question(caption)
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise ReplyError(f"the caption cannot be sent: {error}") from error
        try:
            return await self._connection.attempts(lambda attempt: self._paid(question, attempt))
        except AGAIN as error:
            raise ReplyError(
                f"no reply in {self._endpoint.attempts} attempts, the last: "
                f"{self._connection.said(error)}"
            ) from error
        except openai.APIStatusError as error:
            if error.code in _FILTER_CODES:
                return _filtered(self.model)
            denied = isinstance(error, openai.PermissionDeniedError)
            if (denied or isinstance(error, _REFUSED)) and (
                # a right may have been taken away since the last reply
                await self._takes_others(afresh=denied)
            ):
                said = self._connection.said(error)
                raise ReplyError(f"the server refuses this caption: {said}") from error
            self._connection.refuse(error, self._what)

    async def moderate(self, caption: str, reply: Reply) -> Reply:
        """The reply with `flagged` set, unless moderation is off or has set it before.

        Raises:
            ReplyError: no attempt had an answer.
            ConfigError: the server has no moderation, or refuses it.
        """
        if not self._config.moderation or reply.flagged is not None:
            return reply
        texts = [encodable(text) for text in (caption, reply.text) if text.strip()]
        try:
            flagged = await self._connection.attempts(lambda _: self._flagged(texts))
        except AGAIN as error:
            said = self._connection.said(error)
            raise ReplyError(f"moderation does not answer: {said}") from error
        except openai.APIStatusError as error:
            self._connection.refuse(error, "moderation")
        return replace(reply, flagged=flagged)

    @property
    def _endpoint(self) -> Endpoint:
        return self._connection.endpoint

    @property
    def _what(self) -> str:
        return f"model {self.model!r}"

    def _question(self, caption: str) -> dict[str, Any]:
        """What is asked about a caption, as the API names it."""
        config = self._config
        if config.form == "completions":
            return {"prompt": completion_prompt(caption), "stop": [STOP]}
        messages = chat_messages(caption, self._examples, shots=config.shots, seed=config.seed)
        return {"messages": messages}

    async def _paid(self, question: dict[str, Any], attempt: int) -> Reply:
        """One request within the limits."""
        most = Usage(_read_tokens(question), self._config.max_tokens)
        ticket = await self._limits.acquire(most)
        used: Usage | None = None  # a request whose reply was lost may have been charged for
        try:
            reply = await self._asked(question)
            used = reply.usage
            self._observer.answered(used)
        except openai.APIStatusError as error:
            used = NOTHING
            self._observer.failed(f"status_{error.status_code}")
            raise
        except openai.APIConnectionError as error:
            used = NOTHING if never_arrived(error) else None
            timeout = isinstance(error, openai.APITimeoutError)
            self._observer.failed("timeout" if timeout else "connection")
            raise
        except MalformedError:
            self._observer.failed("malformed")
            raise
        finally:
            await self._limits.settle(ticket, used)
        self._answered = True
        return replace(reply, attempts=attempt)

    async def _asked(self, question: dict[str, Any]) -> Reply:
        """The reply to one request, sent again only without what the server does not know."""
        # `post` and not `create`: this walks through every message, for half of the time of a call
        path, form = _FORMS[self._config.form]
        options = self._options()
        while True:
            try:
                body = {**question, **options}
                answer = await self._connection.client.post(path, cast_to=form, body=body)
                reply = self._reply(question, answer)
                self._learn(options)
                return reply
            except _REFUSED as error:
                conceded = self._conceded(error, options)
                if conceded is None:
                    raise
                options = conceded
            except (ValueError, RecursionError) as error:
                # no OpenAIError: the client could not read the body
                raise MalformedError(f"the body is no JSON ({error})") from error

    def _options(self) -> dict[str, Any]:
        options = {"model": self.model, self._length_name: self._config.max_tokens}
        if self._config.temperature is not None:
            options["temperature"] = self._config.temperature
        if self._structured:
            schema = {"name": "edit", "strict": True, "schema": REPLY_SCHEMA}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        return options

    def _conceded(
        self, error: openai.APIStatusError, options: dict[str, Any]
    ) -> dict[str, Any] | None:
        """The options with which a refused request may be sent again; None if it may not.

        Only before the first reply: afterwards a refusal is about the caption.
        """
        if self._answered:
            return None
        others = dict(options)
        if "max_tokens" in options and "max_completion_tokens" in error.message:
            others["max_completion_tokens"] = others.pop("max_tokens")
            return others
        if "response_format" in options and self._endpoint.structured == "auto":
            del others["response_format"]
            return others
        return None

    def _learn(self, options: dict[str, Any]) -> None:
        """Asks from now on as it was just answered.

        Not as soon as something is conceded: the refusal may have been about the caption.
        """
        if "max_tokens" not in options:
            self._length_name = "max_completion_tokens"
        if self._structured and "response_format" not in options:
            _log.info("%r takes no JSON schema, goes on without", self)
            self._structured = False

    def _reply(self, question: dict[str, Any], answer: Any) -> Reply:
        """The Reply in a response, whose form the client has not checked."""
        try:
            choice = answer.choices[0]
            finish_reason = str(choice.finish_reason or "stop")
            if self._config.form == "chat":
                refusal = getattr(choice.message, "refusal", None)
                text = str(refusal or choice.message.content or "")
                finish_reason = "refusal" if refusal else finish_reason
            else:
                text = str(choice.text or "")
                if text and finish_reason == "stop" and STOP not in text:
                    text += STOP  # the server leaves out what it stopped at
        except (AttributeError, IndexError, TypeError) as error:
            raise MalformedError(f"the body is no reply ({error})") from error
        text = encodable(text)
        read = _counted(answer, "prompt_tokens")
        wrote = _counted(answer, "completion_tokens")
        return Reply(
            text=text,
            finish_reason=finish_reason,
            model=str(getattr(answer, "model", None) or self.model),
            prompt_tokens=_read_tokens(question) if read is None else read,
            completion_tokens=estimated_tokens(text) if wrote is None else wrote,
        )

    async def _names(self, _: int) -> set[str]:
        """Names of the models that the server lists; none if it has no list."""
        try:
            page = await self._connection.client.models.list()
        except openai.APIStatusError as error:
            if error.status_code in (403, 404, 405, 501):  # 403: a key for less than that
                return set()
            raise
        except ValueError:
            return set()
        return {str(model.id) for model in getattr(page, "data", None) or ()}

    async def _try_out(self, attempt: int) -> Reply:
        return await self._paid(self._question(_HARMLESS), attempt)

    async def _takes_others(self, *, afresh: bool) -> bool:
        """Whether the server answers some other caption than the one it has just refused.

        A reply from before is enough to say so, unless it is to be asked `afresh`.
        """
        if afresh or not self._answered:
            try:
                await self._connection.attempts(self._try_out, _CHECK_ATTEMPTS)
            except (*AGAIN, openai.APIStatusError):
                return False
        return True

    async def _check_moderation(self) -> None:
        if not self._config.moderation:
            return
        where = self._endpoint.base_url
        try:
            await self._connection.attempts(lambda _: self._flagged([_HARMLESS]), _CHECK_ATTEMPTS)
        except AGAIN as error:
            said = self._connection.said(error)
            raise ConfigError(f"{where}: moderation does not answer: {said}") from error
        except openai.APIStatusError as error:
            self._connection.refuse(error, "moderation")

    async def _flagged(self, texts: list[str]) -> bool:
        if not texts:
            return False
        try:
            answer = await self._connection.client.moderations.create(input=texts)
            return bool(sum(bool(result.flagged) for result in answer.results))
        except (ValueError, AttributeError, TypeError) as error:
            raise MalformedError(f"the body is no moderation ({error})") from error


def writer_recipe(config: WriterConfig, examples: Sequence[Triplet]) -> str:
    """See `OpenAIWriter.recipe`; needs no key."""
    chat = config.form == "chat"
    asked = _Asked(
        form=config.form,
        temperature=config.temperature,
        max_tokens=config.max_tokens,
        shots=config.shots if chat else 0,
        seed=config.seed if chat else 0,
    )
    shown = [SYSTEM] if chat else []
    if chat and config.shots:
        shown += [example.key for example in examples]
    return recipe(asked, hashlib.blake2b("\n".join(shown).encode()).hexdigest())


def _read_tokens(question: dict[str, Any]) -> int:
    """About as many tokens as the model reads, rather too many."""
    texts = [message["content"] for message in question.get("messages", ())]
    texts = texts or [question["prompt"]]
    return sum(estimated_tokens(text) + _MESSAGE_TOKENS for text in texts)


def _counted(answer: Any, name: str) -> int | None:
    """The tokens of a response that its server counted; None where it says nothing usable."""
    told = getattr(getattr(answer, "usage", None), name, None)
    if isinstance(told, int | float) and 0 <= told < _MOST_TOKENS:
        return int(told)
    return None


def _filtered(model: str) -> Reply:
    """What stands for a reply when the server's filter kept the caption from the model."""
    return Reply(
        text="",
        finish_reason="content_filter",
        model=model,
        prompt_tokens=0,
        completion_tokens=0,
    )
