import asyncio
import base64
import contextlib
import io
import json
import logging
import re
import time

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from ip2p_ray.engine import EngineConfig
from ip2p_ray.errors import ConfigError
from serve.api import ApiConfig, create_api
from serve.counting import Counting
from serve.form import Limits
from serve.keys import Keys
from serve.orders import ReplicaLostError
from tests.serve.running import (
    EDITS,
    PICTURE,
    checked_problem,
    encoded,
    head,
    heard,
    listening,
    multipart,
    noise,
    opened,
    problem,
)

KEY = "a-key-of-sixteen-and-more"
LONG = {"steps": "5000", "deadline_s": "60"}
PATIENT = Limits(steps=5000, deadline_s=60.0, previews=500)


def client(service, **options):
    return openai.OpenAI(
        base_url=f"{service.url}/v1", **{"api_key": "none", "max_retries": 0} | options
    )


def own(**fields):
    return {"extra_body": {"steps": 1, "seed": 3} | fields}


def test_openais_client_edits(service):
    with client(service) as api:
        answer = api.images.edit(
            image=("cat.png", PICTURE, "image/png"),
            prompt="make it night",
            model="tiny",
            n=2,
            size="48x32",
            response_format="b64_json",
            output_format="webp",
            output_compression=90,
            quality="auto",
            background="opaque",
            user="somebody",
            **own(text_guidance_scale=2.5, image_guidance_scale=1.25),
        )
    pictures = [base64.b64decode(each.b64_json) for each in answer.data]
    assert [Image.open(io.BytesIO(each)).format for each in pictures] == ["WEBP"] * 2
    assert [opened(each).shape for each in pictures] == [(32, 48, 3)] * 2
    assert [each.seed for each in answer.data] == [3, 4]
    assert (answer.size, answer.output_format, answer.quality) == ("48x32", "webp", "auto")
    assert (answer.steps, answer.background) == (1, "opaque")
    assert (answer.text_guidance_scale, answer.image_guidance_scale) == (2.5, 1.25)
    assert abs(answer.created - time.time()) < 60


def test_openais_client_sends_a_list_of_one_picture_too(service):
    with client(service) as api:
        answer = api.images.edit(image=[io.BytesIO(PICTURE)], prompt="make it night", **own())
    assert len(answer.data) == 1


def test_openais_asynchronous_client_edits_many_at_once(service):
    async def edit_all():
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none") as api:
            edits = [
                api.images.edit(image=PICTURE, prompt="make it night", **own(seed=seed))
                for seed in range(6)
            ]
            return await asyncio.gather(*edits)

    answers = asyncio.run(edit_all())
    assert [answer.data[0].seed for answer in answers] == list(range(6))
    assert len({answer.data[0].b64_json for answer in answers}) == 6


def test_openais_client_streams_previews_and_the_picture(service):
    with client(service) as api:
        asked = {"image": PICTURE, "prompt": "make it night"}
        plain = api.images.edit(**asked, **own(steps=4))
        with api.images.edit(**asked, **own(steps=4), stream=True, partial_images=2) as stream:
            events = list(stream)
    kinds = [event.type for event in events]
    assert kinds == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert [(event.step, event.steps) for event in events] == [(1, 4), (2, 4), (4, 4)]
    for event in events:
        assert opened(event.b64_json).shape == (32, 32, 3)
        assert (event.size, event.output_format, event.quality) == ("32x32", "png", "auto")
    assert len({event.b64_json for event in events}) == 3
    assert events[2].b64_json == plain.data[0].b64_json
    assert events[2].seed == 3
    assert events[2].usage.total_tokens == 0


def test_openais_asynchronous_client_streams(service):
    async def stream():
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none") as api:
            events = await api.images.edit(
                image=PICTURE, prompt="make it night", stream=True, partial_images=1, **own(steps=2)
            )
            return [event async for event in events]

    assert [event.type for event in asyncio.run(stream())] == [
        "image_edit.partial_image",
        "image_edit.completed",
    ]


def test_a_stream_without_previews_is_the_picture_alone(service):
    with (
        client(service) as api,
        api.images.edit(image=PICTURE, prompt="make it night", stream=True, **own()) as stream,
    ):
        assert [event.type for event in stream] == ["image_edit.completed"]


def test_a_stream_is_server_sent_events_that_no_proxy_keeps(service):
    answer = service.ask(stream="true", partial_images="1", steps="2")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    for event in answer.text.strip().split("\n\n"):
        kind, data = event.split("\n")
        assert kind == "event: " + json.loads(data.removeprefix("data: "))["type"]


def test_a_stream_that_fails_on_its_way_says_so(start):
    service = start(limits=PATIENT)
    with (
        client(service) as api,
        api.images.edit(
            image=PICTURE,
            prompt="make it night",
            stream=True,
            partial_images=500,
            **own(steps=5000, deadline_s=10.0),
        ) as stream,
    ):
        assert next(stream).type == "image_edit.partial_image"
        with pytest.raises(openai.APIError, match="not done after 10 s") as raised:
            list(stream)
    assert raised.value.code == "deadline_exceeded"
    assert service.is_idle()


def test_a_stream_that_fails_before_its_first_event_has_a_status(start):
    service = start(limits=PATIENT)
    answer = service.ask(stream="true", **LONG | {"deadline_s": "0.2"})
    assert problem(answer, 408)["code"] == "deadline_exceeded"
    assert problem(service.ask(b"none", stream="true"), 400)["param"] == "image"


def test_the_models_are_listed_with_what_they_are_used_with(service):
    with client(service) as api:
        [model] = api.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "ip2p_ray")
    assert abs(model.created - time.time()) < 3600
    settings = service.editing.engine.editor.settings
    assert model.model_extra["defaults"] == {
        "steps": settings.steps,
        "text_guidance_scale": settings.text_guidance_scale,
        "image_guidance_scale": settings.image_guidance_scale,
    }


def test_the_seed_that_comes_back_makes_the_same_picture(service):
    [drawn] = service.ask(seed=None).json()["data"]
    assert drawn["seed"] != service.ask(seed=None).json()["data"][0]["seed"]
    assert service.ask(seed=str(drawn["seed"])).json()["data"] == [drawn]
    # beside a neighbour the same but for rounding
    together = service.ask(seed=str(drawn["seed"]), n="2").json()["data"]
    assert together[0]["seed"] == drawn["seed"]
    difference = opened(together[0]["b64_json"]).astype(int) - opened(drawn["b64_json"])
    assert np.abs(difference).max() <= 1


def test_seeds_go_on_from_the_greatest_to_the_least(service):
    made = service.ask(seed=str(2**63 - 1), n="2").json()["data"]
    assert [each["seed"] for each in made] == [2**63 - 1, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_outside_of_the_mask_nothing_changes(service, mode):
    pixels = noise(64, 64)
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[10:30, 20:50] = 0
    mask = Image.fromarray(np.dstack([noise(64, 64), alpha]))
    mask = mask.convert("RGBA").quantize(16) if mode == "P" else mask.convert(mode)
    files = {"image": encoded(Image.fromarray(pixels)), "mask": encoded(mask)}
    transparent = np.asarray(mask.convert("RGBA"))[..., 3] < 128
    assert transparent.any()
    assert not transparent.all()
    # the picture is edited at its own size, so that not even resizing touches a pixel
    made = opened(service.ask(files=files, size="64x64").json()["data"][0]["b64_json"])
    np.testing.assert_array_equal(made[~transparent], pixels[~transparent])
    assert (made[transparent] != pixels[transparent]).any(axis=1).mean() > 0.9


def test_outside_of_the_mask_previews_change_nothing_either(service):
    pixels = noise(32, 32)
    alpha = np.full((32, 32), 255, np.uint8)
    alpha[:16] = 0
    mask = encoded(Image.fromarray(np.dstack([pixels, alpha])))
    with (
        client(service) as api,
        api.images.edit(
            image=PICTURE,
            mask=mask,
            prompt="make it night",
            stream=True,
            partial_images=1,
            **own(steps=2),
        ) as stream,
    ):
        for event in stream:
            np.testing.assert_array_equal(opened(event.b64_json)[16:], pixels[16:])


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_pictures_come_back_in_the_format_that_is_asked_for(service, output_format):
    for quality in (None, "0", "100"):
        answer = service.ask(output_format=output_format, output_compression=quality).json()
        data = base64.b64decode(answer["data"][0]["b64_json"])
        with Image.open(io.BytesIO(data)) as image:
            assert image.format == output_format.upper()
            assert image.size == (32, 32)


def test_lower_quality_is_fewer_bytes(service):
    low, high = (
        len(service.ask(output_format="jpeg", output_compression=quality).content)
        for quality in ("10", "95")
    )
    assert low < high / 2


def test_health_and_readiness(service):
    assert httpx.get(f"{service.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{service.url}/readyz").json() == {"status": "ready"}


class Lost:
    """Edits nothing any more."""

    async def edit(self, _order):
        raise ReplicaLostError

    async def stream(self, _order):
        raise ReplicaLostError
        yield

    async def ready(self):
        return False


def test_whoever_edits_may_be_lost():
    with listening(create_api(ApiConfig(model="tiny"), Lost())) as port:
        url = f"http://127.0.0.1:{port}"
        asked = {"data": {"prompt": "x"}, "files": {"image": PICTURE}}
        streamed = {**asked, "data": {"prompt": "x", "stream": "true"}}
        answers = [httpx.get(f"{url}/readyz")]
        answers += [httpx.post(url + EDITS, **each) for each in (asked, streamed)]
        assert httpx.get(f"{url}/healthz").status_code == 200
    for answer in answers:
        assert problem(answer, 503)["type"] == "server_error"
        assert int(answer.headers["retry-after"]) > 0


class Broken(Lost):
    """Fails as nobody thought it would."""

    async def edit(self, order):
        raise LookupError(f"something about {order.instruction}")


class Noting(Counting):
    """Notes what it is told."""

    def __init__(self):
        self.notes = []

    def answered(self, path, status, seconds):
        self.notes.append((path, status))

    def refused(self, reason):
        self.notes.append(reason)


class Endless(Lost):
    """Edits, and is never done."""

    def __init__(self):
        self.begun = asyncio.Event()

    async def edit(self, _order):
        self.begun.set()
        await asyncio.Event().wait()


def test_a_request_that_is_cancelled_is_one_whose_asker_left():
    """Ray Serve cancels it."""
    counting = Noting()

    async def use():
        editing = Endless()
        app = httpx.ASGITransport(create_api(ApiConfig(model="tiny"), editing, counting))
        async with httpx.AsyncClient(transport=app, base_url="http://localhost") as api:
            asked = {"data": {"prompt": "x"}, "files": {"image": PICTURE}}
            request = asyncio.create_task(api.post(EDITS, **asked))
            await editing.begun.wait()
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request

    asyncio.run(asyncio.wait_for(use(), 60))
    assert counting.notes == [(EDITS, 499)]


def test_what_nobody_thought_of_is_answered_without_its_details(caplog):
    counting = Noting()
    app = create_api(ApiConfig(model="tiny"), Broken(), counting)
    with caplog.at_level(logging.INFO), listening(app) as port:
        asked = {"data": {"prompt": "marker-of-a-prompt"}, "files": {"image": PICTURE}}
        answer = httpx.post(f"http://127.0.0.1:{port}{EDITS}", **asked)
    assert "marker" not in problem(answer, 500)["message"]
    assert counting.notes == [(EDITS, 500)]
    assert f"POST '{EDITS}' 500" in caplog.text


def test_a_path_or_method_that_is_not_there_is_told_in_the_same_shape(service):
    for path in (
        "/v1/images/generations",
        "/nothing",
        "/docs/x",
        "/static-offline-docs/no",
        "/%00",
    ):
        assert "there is no" in problem(httpx.get(service.url + path), 404)["message"]
    answer = httpx.get(service.url + EDITS)
    assert problem(answer, 405)["message"] == f"'{EDITS}' takes POST, got GET"
    assert answer.headers["allow"] == "POST"
    problem(httpx.delete(f"{service.url}/v1/models"), 405)


def test_the_door_leads_to_the_page(start):
    service = start(page="/page")
    answer = httpx.get(service.url)
    assert (answer.status_code, answer.headers["location"]) == (307, "/page/")


def test_documentation_names_only_paths_of_its_own(service):
    page = httpx.get(f"{service.url}/docs")
    assert page.status_code == 200
    named = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page.text)
    named += re.findall(r"""(?i)url["']?\s*:\s*["']([^"']*)""", page.text)
    assert len(named) >= 4
    assert "//" not in re.sub(r"//.*|\s", "", "".join(named))
    assert "http:" not in page.text
    assert "https:" not in page.text
    assert '"validatorUrl": null' in page.text  # or a site outside is asked what it thinks
    for path in named:
        answer = httpx.get(service.url + path)
        assert answer.status_code == 200, path
    assert httpx.get(f"{service.url}/redoc").status_code == 404


def test_the_openapi_document_is_valid_and_names_every_field(service):
    from openapi_spec_validator import validate

    document = httpx.get(f"{service.url}/openapi.json").json()
    validate(document)
    body = document["paths"][EDITS]["post"]["requestBody"]["content"]["multipart/form-data"]
    fields = body["schema"]["properties"]
    assert {"image", "mask", "prompt", "n", "seed", "steps", "stream"} <= set(fields)
    assert body["schema"]["required"] == ["image", "prompt"]
    assert fields["n"]["maximum"] == 4
    assert {"400", "401", "408", "413", "415", "429", "503"} <= set(
        document["paths"][EDITS]["post"]["responses"]
    )


def slow_edit(service, seconds=120.0, **fields):
    """A line on which a long edit was asked for; when it is closed, whoever asked is gone."""
    fields = {"prompt": "make it night", **LONG, **fields}
    body = multipart([*fields.items(), ("image", PICTURE)])
    line = service.connect()
    line.settimeout(seconds)
    line.sendall(head(f"Content-Length: {len(body)}") + body)
    return line


@pytest.mark.parametrize("stream", ["false", "true"])
def test_whoever_disconnects_frees_the_place(start, stream):
    service = start(limits=PATIENT, engine=EngineConfig(batch_size=1, max_waiting=1))
    with slow_edit(service, stream=stream):
        assert service.wait_for(lambda _, running: running == 1)
        with slow_edit(service, stream=stream):
            assert service.wait_for(lambda waiting, _: waiting == 1)
        assert service.wait_for(lambda waiting, running: (waiting, running) == (0, 1))
    assert service.is_idle()
    assert service.ask().status_code == 200


def test_whoever_disconnects_from_a_stream_that_began_frees_the_place(start):
    service = start(limits=PATIENT)
    with slow_edit(service, stream="true", partial_images="500") as line:
        while b"partial_image_index" not in line.recv(65536):
            pass
    assert service.is_idle()


def test_beyond_the_queue_requests_are_refused_at_once(start):
    service = start(limits=PATIENT, engine=EngineConfig(batch_size=1, max_waiting=1))
    with contextlib.ExitStack() as lines:
        for _ in range(2):
            lines.enter_context(slow_edit(service))
        assert service.wait_for(lambda waiting, running: (waiting, running) == (1, 1))
        for stream in ("false", "true"):
            answer = service.ask(stream=stream)
            error = problem(answer, 429)
            assert (error["code"], error["type"]) == ("queue_full", "rate_limit_error")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        # nor is one request of several pictures taken by halves
        assert problem(service.ask(n="2"), 429)["code"] == "queue_full"
    assert service.is_idle()
    assert service.ask().status_code == 200


def test_openais_client_comes_again_when_the_queue_was_full(start):
    service = start(limits=PATIENT, engine=EngineConfig(batch_size=1, max_waiting=0))
    with slow_edit(service, steps="40"), client(service, max_retries=60) as api:
        assert service.wait_for(lambda _, running: running == 1)
        answer = api.images.edit(image=PICTURE, prompt="make it night", **own())
    assert answer.data[0].seed == 3


def test_a_deadline_that_passes_is_told_once(start, caplog):
    service = start(limits=PATIENT)
    with caplog.at_level(logging.INFO, "ip2p_ray.service"), client(service, max_retries=3) as api:
        with pytest.raises(openai.APIStatusError, match=r"not done after 0\.3 s") as raised:
            api.images.edit(
                image=PICTURE, prompt="make it night", **own(steps=5000, deadline_s=0.3)
            )
        assert service.is_idle()
        assert len(lines_of_log(caplog, 1)) == 1
    assert raised.value.status_code == 408
    assert raised.value.code == "deadline_exceeded"
    assert raised.value.response.headers["x-should-retry"] == "false"


def test_the_service_has_a_deadline_of_its_own(start):
    service = start(limits=Limits(steps=5000, deadline_s=0.3))
    assert problem(service.ask(steps="5000"), 408)["code"] == "deadline_exceeded"
    error = problem(service.ask(deadline_s="0.4"), 400)
    assert error["message"] == "deadline_s is at most 0.3, got 0.4"


SMALL = Limits(body_bytes=100_000)


def test_a_body_that_says_it_is_too_long_is_not_read(start):
    service = start(limits=SMALL)
    for length in ("100001", "9" * 18):
        status, headers, body = service.say(head(f"Content-Length: {length}"))
        assert status == 413
        assert checked_problem(body)["code"] == "body_too_large"
        assert headers["connection"] == "close"


@pytest.mark.parametrize("chunk", [b"x" * 1000, b"\r\n" * 500], ids=["text", "lines"])
def test_a_body_without_an_end_is_cut_off(start, chunk):
    """The server takes little more than it may, answers, and closes the line."""
    service = start(limits=SMALL)
    start_of_file = multipart([("image", b"")]).partition(b"\r\n--frontier--")[0]
    with service.connect() as line:
        line.sendall(head("Transfer-Encoding: chunked"))
        line.sendall(b"%x\r\n%s\r\n" % (len(start_of_file), start_of_file))
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 500 * 2**20:
                line.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                sent += len(chunk)
                time.sleep(0.001 if sent > 200_000 else 0)  # no faster than it is read
        assert sent < 10_000_000
        status, _, body = heard(line)
    assert status == 413
    assert checked_problem(body)["code"] == "body_too_large"
    assert service.ask().status_code == 200


def test_a_body_that_comes_slowly_is_cut_off_too(start):
    service = start(limits=Limits(body_bytes=1000))
    with service.connect() as line:
        line.sendall(head("Transfer-Encoding: chunked"))
        body = multipart([("image", b"x" * 2000)])
        for start_of_chunk in range(0, 1200, 100):
            line.sendall(b"64\r\n" + body[start_of_chunk : start_of_chunk + 100] + b"\r\n")
            time.sleep(0.01)
        assert heard(line)[0] == 413


def test_a_body_that_does_not_come_is_not_waited_for(start):
    service = start(limits=Limits(upload_s=0.2))
    with service.connect() as line:
        line.sendall(head("Content-Length: 1000"))
        status, headers, body = heard(line)
        assert status == 408
        assert checked_problem(body)["message"] == "the body did not come within 0.2 s"
        assert headers["x-should-retry"] == "false"
        assert line.recv(1) == b""


def test_openais_client_is_told_that_its_picture_is_too_large(start):
    service = start(limits=SMALL)
    with client(service) as api:
        for _ in range(5):
            with pytest.raises(openai.APIStatusError, match="longer than 100000 bytes") as raised:
                api.images.edit(image=b"x" * 30_000_000, prompt="make it night")
            assert raised.value.status_code == 413


def test_a_body_that_ends_too_early_leaves_nothing_behind(start, caplog):
    service = start()
    with caplog.at_level(logging.INFO):
        with service.connect() as line:
            line.sendall(head("Content-Length: 1000") + b"--frontier\r\n")
        until = time.monotonic() + 60
        while not caplog.records and time.monotonic() < until:
            time.sleep(0.01)
        assert service.ask().status_code == 200
        lines_of_log(caplog, 2)
    assert [record.levelname for record in caplog.records if record.name != "httpx"] == ["INFO"] * 2
    assert " 499 " in caplog.records[0].getMessage()


def test_refused_requests_do_not_go_on_reading(start):
    """Whoever has no key, or asks for what is not there, sends in vain."""
    service = start(keys=Keys([KEY]))
    for asked in (head("Content-Length: 9000"), head("Content-Length: 9000", path="/nothing")):
        with service.connect() as line:
            line.sendall(asked)
            status, headers, _ = heard(line)
            assert (status, headers["connection"]) == (401, "close")
            assert line.recv(1) == b""


def test_what_was_read_leaves_the_line_open(service):
    with httpx.Client(base_url=service.url) as line:
        for _ in range(2):
            answer = line.post(EDITS, data={"prompt": ""}, files={"image": PICTURE})
            assert answer.status_code == 400
            assert "connection" not in answer.headers
            assert line.get("/healthz").status_code == 200


@pytest.mark.parametrize("host", ["x/healthz?", "x/healthz#", "[", "a b", "@/healthz\\", "\xff"])
def test_no_host_header_lets_anybody_in(start, host):
    service = start(keys=Keys([KEY]))
    asked = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1")
    status, _, body = service.say(asked)
    assert status == 401
    assert checked_problem(body)["code"] == "invalid_api_key"


def test_query_strings_of_any_bytes_are_ignored(service):
    status, _, _ = service.say(b"GET /healthz?\xff\xfe=%zz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert status in (200, 400)


def test_no_page_of_another_origin_may_read_answers(service, start):
    origin = {"Origin": "https://elsewhere.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST"}
    shut = httpx.get(f"{service.url}/v1/models", headers=origin)
    assert not [name for name in shut.headers if name.startswith("access-control")]
    assert httpx.options(service.url + EDITS, headers=preflight).status_code == 403
    opened_to = start(cors_origins=("https://elsewhere.example",), keys=Keys([KEY]))
    allowed = "access-control-allow-origin"
    answer = httpx.options(opened_to.url + EDITS, headers=preflight)
    assert (answer.status_code, answer.headers[allowed]) == (200, origin["Origin"])
    # an error can be read there as well
    answer = httpx.get(f"{opened_to.url}/v1/models", headers=origin)
    assert (answer.status_code, answer.headers[allowed]) == (401, origin["Origin"])
    other = httpx.get(f"{opened_to.url}/v1/models", headers={"Origin": "https://third.example"})
    assert allowed not in other.headers


MARKER = "marker-of-a-prompt"


def lines_of_log(caplog, count):
    """The service's, once there are so many: they are written after the answers."""

    def found():
        return [record for record in caplog.records if record.name == "ip2p_ray.service"]

    until = time.monotonic() + 60
    while len(found()) < count and time.monotonic() < until:
        time.sleep(0.01)
    return found()


def logged(service, caplog):
    """All that is logged while things go well and wrong."""
    headers = {"Authorization": f"Bearer {KEY}"}
    picture = b"marker-of-a-picture" + PICTURE
    with caplog.at_level(logging.DEBUG):
        for fields in ({}, {"n": "0"}, {"stream": "true"}, {"size": "1x1"}, {MARKER: MARKER}):
            service.ask(prompt=MARKER, headers=headers, **fields)
        service.ask(picture, prompt=MARKER, headers=headers)
        service.ask(prompt=MARKER, headers={"Authorization": "Bearer wrong-" + KEY})
        service.ask(prompt=MARKER, headers=headers, deadline_s="0.0001")
        httpx.get(f"{service.url}/v1/models?api_key={KEY}", headers=headers)
        lines_of_log(caplog, 9)
    ours = [record for record in caplog.records if not record.name.startswith("httpcore")]
    return "\n".join(f"{record.getMessage()} {record.exc_text}" for record in ours)


def test_logs_hold_no_picture_no_prompt_and_no_key(start, caplog):
    service = start(keys=Keys([KEY]))
    # the client's own log is not the service's
    logging.getLogger("httpx").setLevel(logging.WARNING)
    told = logged(service, caplog)
    assert told.count(EDITS) == 8
    assert f"POST '{EDITS}' 401" in told
    assert "marker" not in told
    assert KEY not in told
    assert base64.b64encode(PICTURE).decode()[:40] not in told
    assert "iVBOR" not in told  # how a PNG begins in base64


def test_logs_hold_prompts_when_that_is_asked_for(start, caplog):
    service = start(keys=Keys([KEY]), log_prompts=True)
    told = logged(service, caplog)
    assert f"prompt='{MARKER}'" in told
    assert KEY not in re.sub(r"api_key=\S+", "", told)


def test_a_path_cannot_write_a_line_of_the_log(service, caplog):
    with caplog.at_level(logging.INFO, "ip2p_ray.service"):
        httpx.get(f"{service.url}/a%0aINFO%20forged")
        [record] = lines_of_log(caplog, 1)
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_a_rate_is_a_number_above_0(rate):
    with pytest.raises(ConfigError, match="requests_per_minute is a number above 0"):
        ApiConfig(model="tiny", requests_per_minute=rate)
