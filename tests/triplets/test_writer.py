"""The official client against real HTTP: faults, limits, refusals, and what each of them means."""

import asyncio
import json
import logging
import random
import socket
import time
from collections import Counter

import pytest

from ip2p_ray.errors import BudgetError, ConfigError, ReplyError
from ip2p_ray.testing import Behaviour, Faults, FaultyServer, edit
from ip2p_ray.triplets import reply as reasons
from ip2p_ray.triplets.endpoint import Endpoint, retry_after
from ip2p_ray.triplets.limits import LimitsConfig, LocalLimits, Usage
from ip2p_ray.triplets.observer import Observer
from ip2p_ray.triplets.prompt import chat_reply, completion
from ip2p_ray.triplets.reply import Reply, Triplet, read_reply
from ip2p_ray.triplets.writer import OpenAIWriter, WriterConfig

KEY = "sk-very-secret"
EXAMPLES = [Triplet(f"caption {n}", f"do {n}", f"edited {n}") for n in range(20)]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)


class Sleeps:
    """Takes no time and remembers."""

    def __init__(self):
        self.all = []

    async def __call__(self, seconds):
        self.all.append(seconds)
        await asyncio.sleep(0)


def made(
    server, *, limits=None, sleep=None, jitter=None, examples=EXAMPLES, observer=None, **fields
):
    """A writer for a server or a URL; `fields` are those of either config."""
    url = getattr(server, "url", server)
    ours = {name: fields.pop(name) for name in list(fields) if hasattr(WriterConfig, name)}
    config = WriterConfig(model=fields.pop("model", "fake"), **ours)
    endpoint = Endpoint(base_url=url, **{"api_key_env": "TEST_KEY", **fields})
    return OpenAIWriter(
        config,
        endpoint,
        examples=examples,
        limits=limits,
        observer=observer,
        sleep=sleep or Sleeps(),
        jitter=jitter or random.Random(0).random,
    )


def run(writer, work):
    """What `work(writer)` returns."""

    async def main():
        async with writer:
            return await work(writer)

    return asyncio.run(main())


def write(writer, caption="a red boat"):
    return run(writer, lambda writer: writer.write(caption))


def test_a_chat_model_answers_in_the_schema():
    with FaultyServer() as server:
        reply = write(made(server))
        assert reply.text == chat_reply(*edit("a red boat"))
        assert (reply.finish_reason, reply.model, reply.attempts) == ("stop", "fake", 1)
        assert min(reply.usage) > 0
        assert read_reply("a red boat", reply) == Triplet("a red boat", *edit("a red boat"))


def test_what_is_sent_is_what_was_configured():
    with FaultyServer() as server:
        write(made(server, temperature=None, max_tokens=99, shots=3))
        write(made(server, structured="off", temperature=0.3, seed=4))
        first, second = server.received
        assert set(first) == {"model", "messages", "max_tokens", "response_format"}
        assert first["max_tokens"] == 99
        assert first["response_format"]["json_schema"]["strict"] is True
        assert [message["role"] for message in first["messages"]] == [
            "system",
            *["user", "assistant"] * 3,
            "user",
        ]
        assert set(second) == {"model", "messages", "max_tokens", "temperature"}
        assert second["temperature"] == 0.3
        assert len(second["messages"]) == 18


def test_a_fine_tuned_model_completes_the_text_form():
    with FaultyServer() as server:
        reply = write(made(server, form="completions"))
        assert reply.text == completion(*edit("a red boat"))
        assert read_reply("a red boat", reply) == Triplet("a red boat", *edit("a red boat"))
        (sent,) = server.received
        assert sent["prompt"] == "a red boat\n##\n"
        assert sent["stop"] == ["\nEND"]


def test_each_caption_ends_as_a_triplet_or_with_its_reason():
    """20 % faults of every kind, hundreds of captions, 64 in flight, the official client."""
    captions = [f"a red boat {n}" for n in range(400)]
    faults = Faults.evenly(0.2)
    with FaultyServer(Behaviour(seed=1, faults=faults, slow_s=0.02)) as server:

        async def outcome(writer, caption):
            try:
                return read_reply(caption, await writer.write(caption))
            except ReplyError:
                return reasons.NO_REPLY

        async def work(writer):
            return await asyncio.gather(*(outcome(writer, caption) for caption in captions))

        found = run(made(server), work)
        assert server.counts.paid == Counter(captions)  # each is answered once, none twice
        assert set(server.counts.faults) == set(vars(faults))
    triplets = [one for one in found if isinstance(one, Triplet)]
    assert triplets == [
        Triplet(caption, *edit(caption))
        for caption, one in zip(captions, found, strict=True)
        if isinstance(one, Triplet)
    ]
    rejects = Counter(one for one in found if isinstance(one, str))
    assert set(rejects) == {reasons.EMPTY_REPLY, reasons.REFUSED, reasons.UNPARSEABLE}
    assert len(triplets) + rejects.total() == 400
    assert 10 <= rejects.total() <= 60  # 30 are expected


@pytest.mark.parametrize("fault", ["too_many", "error", "hang_up", "malformed"])
def test_what_never_gets_better_is_one_captions_failure(fault):
    sleeps = Sleeps()
    with FaultyServer(Behaviour(faults=Faults(**{fault: 1.0}))) as server:
        with pytest.raises(ReplyError, match="no reply in 4 attempts, the last: "):
            write(made(server, sleep=sleeps, attempts=4))
        assert server.counts.faults == {fault: 4}
    assert len(sleeps.all) == 3


def test_a_server_that_is_too_slow_is_asked_again():
    with FaultyServer(Behaviour(faults=Faults(slow=1.0), slow_s=30.0)) as server:
        with pytest.raises(ReplyError, match="2 attempts, the last: Request timed out"):
            write(made(server, attempts=2, timeout_s=1.0))
        ends = time.monotonic() + 60
        while server.counts.faults["slow"] < 2 and time.monotonic() < ends:
            time.sleep(0.01)
        assert server.counts.faults == {"slow": 2}


class Watching(Observer):
    """Remembers what it is told."""

    def __init__(self):
        self.tokens, self.failures = [], Counter()

    def answered(self, usage):
        self.tokens.append(usage)

    def failed(self, kind):
        self.failures[kind] += 1


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("too_many", "status_429"),
        ("error", "status_500"),
        ("hang_up", "connection"),
        ("malformed", "malformed"),
    ],
)
def test_what_becomes_of_every_request_is_told(fault, kind):
    watching = Watching()
    with FaultyServer(Behaviour(faults=Faults(**{fault: 1.0}))) as server:
        writer = made(server, attempts=3, observer=watching)
        with pytest.raises(ReplyError):
            write(writer)
    assert (watching.failures, watching.tokens) == ({kind: 3}, [])


def test_the_tokens_of_every_reply_are_told():
    watching = Watching()
    with FaultyServer() as server:
        reply = write(made(server, observer=watching))
    assert (watching.tokens, watching.failures) == ([reply.usage], {})


def test_pauses_double_up_to_a_minute_and_are_jittered():
    with FaultyServer(Behaviour(faults=Faults(error=1.0))) as server:
        for jitter, share in ((0.0, 1.0), (0.5, 0.75)):
            sleeps = Sleeps()
            writer = made(server, sleep=sleeps, jitter=lambda jitter=jitter: jitter)
            with pytest.raises(ReplyError):
                write(writer)
            expected = [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
            assert sleeps.all == [pause * share for pause in expected]


@pytest.mark.parametrize("seconds", [0.05, 7.0, 90.0])
def test_a_server_that_asks_to_wait_is_obeyed(seconds):
    sleeps = Sleeps()
    behaviour = Behaviour(faults=Faults(too_many=1.0), retry_after_s=seconds)
    with FaultyServer(behaviour) as server, pytest.raises(ReplyError, match="Rate limit reached"):
        write(made(server, sleep=sleeps, attempts=5))
    assert len(sleeps.all) == 4
    assert all(seconds <= pause <= seconds + 0.5 for pause in sleeps.all)
    assert len(set(sleeps.all)) == 4  # not all of those that were told the same return at once


def test_a_server_that_asks_to_come_back_tomorrow_stops_the_run():
    behaviour = Behaviour(faults=Faults(too_many=1.0), retry_after_s=86400)
    for attempts in (1, 5):
        with FaultyServer(behaviour) as server, pytest.raises(BudgetError, match="in 86,400 s"):
            write(made(server, attempts=attempts))
        assert server.counts.requests.total() == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "1", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "2", "retry-after-ms": "soon"}, 2.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "later"}, None),
        (
            {
                "retry-after": "Wed, 21 Oct 2026 07:28:30 GMT",
                "date": "Wed, 21 Oct 2026 07:28:00 GMT",
            },
            30.0,
        ),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
    ],
)
def test_how_long_a_server_asks_to_wait(headers, seconds):
    assert retry_after(headers) == seconds


def test_a_server_without_structured_output_is_asked_without_from_then_on():
    with FaultyServer(Behaviour(structured=False)) as server:

        async def work(writer):
            return await asyncio.gather(*(writer.write(f"a cat {n}") for n in range(20)))

        replies = run(made(server), work)
        assert all(isinstance(read_reply("a cat", reply), Triplet) for reply in replies)
        assert all(reply.attempts == 1 for reply in replies)
        before = len(server.received)
        assert before <= 40
        assert write(made(server, structured="off")).attempts == 1
        with pytest.raises(ConfigError, match="refuses model 'fake': response_format is not"):
            write(made(server, structured="json_schema"))


def test_a_model_that_reasons_is_told_its_limit_by_the_other_name():
    with FaultyServer(Behaviour(max_tokens=False, structured=False)) as server:
        write(made(server, max_tokens=77))
        assert server.received[-1]["max_completion_tokens"] == 77
        assert "max_tokens" not in server.received[-1]


@pytest.mark.parametrize("captions", [["a cat", "a bomb", "a dog"], ["a bomb", "a dog"]])
def test_a_caption_that_the_server_does_not_take_is_no_failure_of_the_run(captions):
    async def work(writer):
        found = []
        for caption in captions:
            try:
                found.append((await writer.write(caption)).finish_reason)
            except ReplyError as error:
                found.append(str(error))
        return found

    with FaultyServer(Behaviour(refused=("bomb",))) as server:
        found = run(made(server), work)
    refused = "the server refuses this caption: Invalid prompt"
    assert found == [refused if "bomb" in caption else "stop" for caption in captions]


def test_a_caption_that_a_filter_keeps_from_the_model_is_flagged_and_free():
    with FaultyServer(Behaviour(filtered=("bomb",))) as server:
        reply = write(made(server), "a bomb")
        assert reply.usage == Usage(0, 0)
        assert read_reply("a bomb", reply) == reasons.FLAGGED


def test_text_that_cannot_be_sent_is_one_captions_failure():
    with FaultyServer() as server:
        with pytest.raises(ReplyError, match="cannot be sent"):
            write(made(server), "a \ud800 boat")
        assert server.counts.requests.total() == 0


def test_moderation_flags_captions_and_replies():
    with FaultyServer(Behaviour(flagged=("boat", "watercolour"))) as server:

        async def moderated(caption, text):
            async with made(server, moderation=True) as writer:
                reply = answered(text)
                moderated = await writer.moderate(caption, reply)
                assert await writer.moderate(caption, moderated) is moderated
                return moderated.flagged

        assert asyncio.run(moderated("a boat", "")) is True
        assert asyncio.run(moderated("a cat", "as a watercolour")) is True
        assert asyncio.run(moderated("a cat", "at night")) is False
        assert asyncio.run(moderated("", "")) is False
        assert server.counts.requests == {"/v1/moderations": 3}
        reply = answered("a boat")
        assert run(made(server), lambda writer: writer.moderate("a boat", reply)) is reply


def answered(text):
    tokens = {"prompt_tokens": 1, "completion_tokens": 1}
    return Reply(text=text, finish_reason="stop", model="fake", **tokens)


def test_tokens_are_estimated_where_the_server_does_not_count():
    with FaultyServer(Behaviour(counts_tokens=False)) as server:
        reply = write(made(server, form="completions"), "a red boat")
        assert 4 <= reply.prompt_tokens <= 16
        assert reply.completion_tokens == -(-len(reply.text) // 3)


def checked(writer):
    return run(writer, lambda writer: writer.check())


def test_a_check_is_one_cheap_call():
    with FaultyServer(Behaviour(api_key=KEY)) as server:
        checked(made(server))
        assert server.counts.requests == {"/v1/models": 1}


@pytest.mark.parametrize(
    "options", [{"lists_models": False}, {"models": ("other",), "unlisted": ("fake",)}]
)
def test_a_server_need_not_list_its_models(options):
    with FaultyServer(Behaviour(**options)) as server:
        checked(made(server))
        assert server.counts.paid == {"a cat": 1}


def test_a_check_outlasts_passing_faults():
    faults = Faults(error=0.3, hang_up=0.2)
    with FaultyServer(Behaviour(faults=faults, lists_models=False)) as server:
        checked(made(server))


def test_a_wrong_key_is_one_sentence_without_the_key():
    with FaultyServer(Behaviour(api_key="sk-other")) as server:
        for work in (checked, write):
            with pytest.raises(ConfigError) as caught:
                work(made(server))
            assert str(caught.value) == (
                f"{server.url} refuses the key in TEST_KEY: Incorrect API key provided: ***"
            )


def test_an_unknown_model_is_one_sentence_that_names_those_there_are():
    with FaultyServer(Behaviour(models=("a", "b"))) as server:
        with pytest.raises(ConfigError) as caught:
            checked(made(server))
        assert str(caught.value) == f"{server.url} has no model 'fake'; it has a, b"
        with pytest.raises(ConfigError, match=r"has no model 'fake': .*does not exist"):
            write(made(server))
        assert server.counts.paid == {}


def test_a_wrong_path_is_one_sentence():
    with FaultyServer() as server, pytest.raises(ConfigError) as caught:
        checked(made(server.url.removesuffix("/v1")))
    assert "has no model 'fake'; does base_url end in /v1?" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("http://127.0.0.1:9/v1", "Connect call failed"),
        ("http://no-such-host.invalid/v1", r"\[Errno"),
    ],
)
def test_an_unreachable_host_is_one_sentence(url, cause, monkeypatch):
    look_up = socket.getaddrinfo

    def known(host, *arguments, **options):
        if host == "no-such-host.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", known)  # a machine's own may take its time
    with pytest.raises(ConfigError, match=f"{url} cannot be reached: .*{cause}"):
        checked(made(url))
    with pytest.raises(ReplyError, match=cause):
        write(made(url, attempts=2))


def test_a_host_that_speaks_another_language_is_one_sentence():
    behaviour = Behaviour(faults=Faults(malformed=1.0), lists_models=False)
    with FaultyServer(behaviour) as server, pytest.raises(ConfigError) as caught:
        checked(made(server))
    assert "does not speak the OpenAI API: the body is no JSON" in str(caught.value)


def test_a_missing_key_is_one_sentence_before_anything_is_sent(monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    with FaultyServer(Behaviour(api_key=KEY)) as server:
        with pytest.raises(ConfigError, match="variable TEST_KEY holds no key for http"):
            made(server)
        with pytest.raises(ConfigError, match="refuses requests without a key; name one in api_k"):
            checked(made(server, api_key_env=None))


def test_an_exhausted_quota_stops_the_run():
    with FaultyServer(Behaviour(quota=False)) as server:
        with pytest.raises(BudgetError, match=r"the account's quota at .* is used up"):
            write(made(server))
        assert server.counts.requests.total() == 1


def test_nothing_that_is_shown_holds_the_key(caplog):
    caplog.set_level(logging.DEBUG, logger="ip2p_ray")
    with FaultyServer(Behaviour(api_key="sk-other", faults=Faults(error=1.0))) as server:
        writer = made(server, attempts=2)
        with pytest.raises(ConfigError) as caught:
            write(writer)
    shown = [repr(writer), repr(writer._connection), repr(writer._endpoint), str(caught.value)]
    assert KEY not in "".join([*shown, caplog.text])
    assert "fake" in repr(writer)


def test_a_budget_stops_cleanly_and_is_never_passed():
    """The server counts; what it counted stays below the cap with 32 in flight."""
    with FaultyServer(Behaviour(delay_s=0.01)) as server:

        async def work(writer):
            async def one(n):
                try:
                    return (await writer.write(f"a red boat {n}")).usage.tokens
                except BudgetError as error:
                    return str(error)

            return await asyncio.gather(*(one(n) for n in range(60)))

        limits = LocalLimits(LimitsConfig(max_tokens=20_000))
        found = run(made(server, limits=limits), work)
        paid = [tokens for tokens in found if isinstance(tokens, int)]
        assert sum(paid) == limits.spent.tokens <= 20_000
        assert limits.spent.tokens > 20_000 - 1500  # what one more might have cost
        assert len(paid) == server.counts.paid.total() < 60
        stopped = [text for text in found if isinstance(text, str)]
        assert all("spending cap reached (max_tokens 20,000)" in text for text in stopped)


def test_lost_replies_count_in_full_and_refused_requests_not_at_all():
    for fault, full in (("hang_up", 1), ("malformed", 1), ("error", 0), ("too_many", 0)):
        limits = LocalLimits(LimitsConfig())
        with FaultyServer(Behaviour(faults=Faults(**{fault: 1.0}))) as server:
            writer = made(server, limits=limits, attempts=3, max_tokens=100)
            with pytest.raises(ReplyError):
                write(writer)
        assert limits.spent.completion_tokens == 300 * full
        assert (limits.spent.prompt_tokens > 0) == bool(full)
    limits = LocalLimits(LimitsConfig())
    with pytest.raises(ReplyError):
        write(made("http://127.0.0.1:9/v1", limits=limits, attempts=2))
    assert limits.spent == Usage(0, 0)


def test_every_attempt_is_a_request_within_the_rate():
    waits = Sleeps()
    clock = lambda: sum(waits.all)  # noqa: E731
    limits = LocalLimits(LimitsConfig(requests_per_minute=60), clock=clock, sleep=waits)
    with FaultyServer(Behaviour(faults=Faults(error=1.0))) as server, pytest.raises(ReplyError):
        write(made(server, limits=limits, attempts=4))
    assert waits.all == [pytest.approx(1.0)] * 3


def test_a_recipe_changes_with_what_the_model_reads_and_with_nothing_else():
    def recipe(examples=EXAMPLES, **fields):
        return made("http://127.0.0.1:9/v1", examples=examples, **fields).recipe

    base = recipe()
    assert recipe(moderation=True) == recipe(structured="off") == recipe(attempts=1) == base
    assert recipe(model="other") == base
    others = [
        recipe(temperature=0.5),
        recipe(temperature=None),
        recipe(max_tokens=100),
        recipe(shots=4),
        recipe(shots=0),
        recipe(seed=1),
        recipe(form="completions"),
        recipe(EXAMPLES[1:]),
    ]
    assert len({base, *others}) == 9
    assert recipe(EXAMPLES[1:], shots=0) == recipe(shots=0)
    assert recipe(EXAMPLES[1:], form="completions", seed=1) == recipe(form="completions")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model": ""}, "model is the name"),
        ({"form": "text"}, "form is chat or completions, got 'text'"),
        ({"temperature": 2.5}, r"temperature is in \[0, 2\]"),
        ({"max_tokens": 0}, "max_tokens is at least 1"),
        ({"shots": -1}, "shots at least 0"),
    ],
)
def test_writer_configs_that_mean_nothing_are_refused(fields, sentence):
    with pytest.raises(ConfigError, match=sentence):
        WriterConfig(**{"model": "fake", **fields})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"base_url": "api.openai.com/v1"}, "base_url is like https://host/v1"),
        ({"base_url": "ftp://host/v1"}, "got ftp://host"),
        ({"base_url": "http://host:99999/v1"}, "base_url is like https://host/v1: Port out of"),
        ({"base_url": "http://host:abc/v1"}, "base_url is like https://host/v1: Port could not"),
        ({"base_url": "http://[::1/v1"}, "base_url is like https://host/v1: Invalid IPv6"),
        ({"base_url": "http://local host/v1"}, "got http://local host"),
        ({"base_url": "https://me:secret@host/v1"}, "base_url of host holds a password"),
        ({"structured": "yes"}, "structured is auto, json_schema or off, got 'yes'"),
        ({"timeout_s": 0.0}, "timeout_s is above 0"),
        ({"attempts": 0}, "attempts is at least 1"),
    ],
)
def test_endpoints_that_mean_nothing_are_refused(fields, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        Endpoint(**fields)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 7, "completion_tokens": 3}, True),
        ({"prompt_tokens": [1], "completion_tokens": {}}, False),
        ({"prompt_tokens": "many", "completion_tokens": -3}, False),
        ([1, 2], False),
    ],
)
def test_a_reply_is_kept_whatever_the_server_says_it_counted(usage, counted):
    with FaultyServer(Behaviour(usage=json.dumps(usage))) as server:
        reply = write(made(server), "a red boat")
        assert server.counts.paid == {"a red boat": 1}
    assert (reply.usage == Usage(7, 3)) is counted
    assert min(reply.usage) >= 3


def test_half_a_character_in_a_reply_does_no_harm():
    with FaultyServer(Behaviour(text="make it \ud83d")) as server:
        assert write(made(server)).text == "make it ?"


@pytest.mark.parametrize("answered_before", [True, False])
def test_a_right_that_lacks_for_one_caption_is_that_captions_failure(answered_before):
    async def work(writer):
        if answered_before:
            await writer.write("a dog")
        with pytest.raises(ReplyError, match="refuses this caption: Forbidden, said the server"):
            await writer.write("a bomb")
        return await writer.write("a boat")

    with FaultyServer(Behaviour(denied=(("bomb", 403),))) as server:
        assert run(made(server), work).finish_reason == "stop"


def test_a_right_that_is_taken_away_stops_the_run():
    async def work(writer):
        await writer.write("a dog")
        server.behaviour = Behaviour(denied=(("", 403),))
        await writer.write("a boat")

    with FaultyServer() as server, pytest.raises(ConfigError, match="refuses the key in TEST_KEY"):
        run(made(server), work)


@pytest.mark.parametrize("status", [408, 425])
def test_a_status_that_passes_is_one_captions_failure_at_most(status):
    sleeps = Sleeps()
    told = r"no reply in 3 attempts, the last: .*said the server"
    behaviour = Behaviour(denied=(("bomb", status),))
    with FaultyServer(behaviour) as server, pytest.raises(ReplyError, match=told):
        write(made(server, sleep=sleeps, attempts=3), "a bomb")
    assert len(sleeps.all) == 2


def test_an_account_without_money_is_a_budget():
    with FaultyServer(Behaviour(denied=(("boat", 402),))) as server:
        with pytest.raises(BudgetError, match="has no money left: Payment Required"):
            write(made(server))
        assert server.counts.requests.total() == 1


def test_a_key_that_may_not_list_models_may_write():
    with FaultyServer(Behaviour(lists_models=False, models_status=403)) as server:
        checked(made(server))
        assert server.counts.paid == {"a cat": 1}


def test_a_server_without_moderation_is_told_before_anything_is_paid():
    with FaultyServer(Behaviour(moderates=False, lists_models=False)) as server:
        with pytest.raises(ConfigError, match="has no moderation: Invalid URL"):
            checked(made(server, moderation=True))
        assert server.counts.paid == {}
        checked(made(server))
        server.behaviour = Behaviour()
        checked(made(server, moderation=True))


def test_a_caption_that_is_refused_first_leaves_the_schema_on():
    async def work(writer):
        with pytest.raises(ReplyError, match="refuses this caption"):
            await writer.write("a bomb")
        await writer.write("a dog")

    with FaultyServer(Behaviour(refused=("bomb",))) as server:
        run(made(server), work)
        assert "response_format" in server.received[-1]


def test_a_key_that_no_request_can_carry_is_one_sentence(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "sk-abc\N{HORIZONTAL ELLIPSIS}")
    with pytest.raises(ConfigError, match="TEST_KEY holds characters that no request") as caught:
        made("http://127.0.0.1:9/v1")
    assert "sk-abc" not in str(caught.value)


def test_nobody_waits_long_for_a_connection():
    for timeout_s, connect_s in ((120.0, 10.0), (2.0, 2.0)):
        timeout = made("http://127.0.0.1:9/v1", timeout_s=timeout_s)._connection.client.timeout
        assert (timeout.read, timeout.connect) == (timeout_s, connect_s)
