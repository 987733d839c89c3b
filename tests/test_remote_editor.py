import asyncio
import contextlib
import io
import pickle
import socket
import time

import pytest
from PIL import Image, ImageChops, ImageOps

from ip2p_ray.errors import AccessError, ConfigError, EditError, ImageError, ServiceError
from ip2p_ray.images import encode_png
from ip2p_ray.remote_editor import Edited, Preview, RemoteEditor
from ip2p_ray.testing import FakeService, ServiceBehaviour

PICTURE = Image.linear_gradient("L").resize((24, 16)).convert("RGB")


@pytest.fixture
def service():
    with FakeService() as running:
        yield running


@pytest.fixture
def remote():
    """Makes editors, and closes them after the test."""
    with contextlib.ExitStack() as opened:
        yield lambda *args, **kwargs: opened.enter_context(RemoteEditor(*args, **kwargs))


def is_negative(edited):
    return ImageChops.difference(edited.image, ImageOps.invert(PICTURE)).getbbox() is None


async def collected(events):
    return [event async for event in events]


def test_a_picture_comes_back_with_what_was_used(service, remote):
    edited = remote(service.url).edit(
        PICTURE,
        "make it night",
        seed=5,
        steps=3,
        text_guidance_scale=4.5,
        image_guidance_scale=1.25,
    )
    assert is_negative(edited)
    assert (edited.seed, edited.steps) == (5, 3)
    assert (edited.text_guidance_scale, edited.image_guidance_scale) == (4.5, 1.25)
    sent = service.received[0]
    assert sent["prompt"] == "make it night"
    assert sent["image"] == encode_png(PICTURE)
    assert set(sent) == {
        *("image", "prompt", "seed", "steps", "text_guidance_scale", "image_guidance_scale")
    }


def test_what_is_not_stated_is_not_sent_and_the_seed_is_told(service, remote):
    edited = remote(service.url + "/v1/").edit(encode_png(PICTURE), "x", seed=None)
    assert edited.seed == 17
    assert set(service.received[0]) == {"image", "prompt"}


def test_a_mask_travels_as_a_file(service, remote):
    mask = encode_png(Image.new("RGBA", PICTURE.size))
    remote(service.url).edit(PICTURE, "x", mask=mask, size="24x16")
    assert service.received[0]["mask"] == mask
    assert service.received[0]["size"] == "24x16"


def test_a_stream_shows_pictures_on_their_way_and_ends_with_the_edited_one(service):
    async def watch():
        async with RemoteEditor(service.url) as editor:
            return await collected(editor.stream(PICTURE, "x", previews=3, seed=2, steps=6))

    *previews, edited = asyncio.run(watch())
    assert [(shown.step, shown.steps) for shown in previews] == [(2, 6), (4, 6)]
    assert all(isinstance(shown, Preview) for shown in previews)
    assert Image.open(io.BytesIO(previews[0].data)).size == PICTURE.size
    assert isinstance(edited, Edited)
    assert is_negative(edited)
    assert (edited.seed, edited.steps) == (2, 6)


def test_a_reader_who_leaves_frees_the_place():
    async def leave(service):
        async with RemoteEditor(service.url) as editor:
            events = editor.stream(PICTURE, "x", previews=10, steps=10)
            assert isinstance(await anext(events), Preview)
            assert service.in_flight == 1
            await events.aclose()
            ends = time.monotonic() + 60
            while service.in_flight and time.monotonic() < ends:
                await asyncio.sleep(0.02)
            return service.in_flight

    with FakeService(ServiceBehaviour(step_s=0.5)) as service:
        assert asyncio.run(leave(service)) == 0


def test_no_key_and_a_wrong_key_are_told_and_never_shown(remote):
    async def streamed(url, key):
        async with RemoteEditor(url) as editor:
            await editor.amodels(api_key=key)
            return await collected(editor.stream(PICTURE, "x", api_key=key))

    with FakeService(ServiceBehaviour(api_key="right-key")) as service:
        with pytest.raises(AccessError, match=r"refuses requests without a key: no API key"):
            remote(service.url).models()
        with pytest.raises(AccessError, match=r"refuses the key: the API key is wrong") as caught:
            remote(service.url, "wrong-key").edit(PICTURE, "x")
        assert "wrong-key" not in str(caught.value)
        assert "wrong-key" not in repr(remote(service.url, "wrong-key"))
        assert remote(service.url, "right-key").models() == ["negative"]
        assert remote(service.url, " right-key\n").edit(PICTURE, "x").seed == 17
        with pytest.raises(AccessError, match="API key is wrong"):
            asyncio.run(streamed(service.url, "wrong-key"))
        assert asyncio.run(streamed(service.url, "right-key"))
    with pytest.raises(ConfigError, match="no request can carry"):
        remote("http://localhost", "k\u00e9y")


def test_a_refused_picture_and_a_refused_value_are_told_apart(service, remote):
    with pytest.raises(ImageError, match="cannot be decoded as an image"):
        remote(service.url).edit(b"no image", "x")
    with pytest.raises(ConfigError, match="address is like"):
        remote("127.0.0.1:8000")


def test_a_full_queue_says_how_long_to_wait(remote):
    with FakeService(ServiceBehaviour(full=1)) as service:
        with pytest.raises(ServiceError, match=r"the queue is full; come back in 3 s") as caught:
            remote(service.url).edit(PICTURE, "x")
        assert caught.value.retry_after_s == 3.0
        assert pickle.loads(pickle.dumps(caught.value)).retry_after_s == 3.0


def test_who_has_patience_waits_as_long_as_is_asked(remote):
    waited = []
    with FakeService(ServiceBehaviour(full=3, retry_after_s=2.5)) as service:
        editor = remote(service.url, patience_s=60, sleep=waited.append, jitter=lambda: 0.0)
        assert is_negative(editor.edit(PICTURE, "x"))
    assert waited == [2.5, 2.5, 2.5]


def test_patience_ends(remote):
    waited = []
    with FakeService(ServiceBehaviour(full=9, retry_after_s=2.5)) as service:
        editor = remote(service.url, patience_s=6, sleep=waited.append, jitter=lambda: 0.0)
        with pytest.raises(ServiceError, match="the queue is full"):
            editor.edit(PICTURE, "x")
    assert waited == [2.5, 2.5]


def test_an_edit_that_breaks_is_told_and_not_tried_again(remote):
    async def streamed(url):
        async with RemoteEditor(url) as editor:
            return await collected(editor.stream(PICTURE, "x"))

    with FakeService(ServiceBehaviour(fails=1, breaks_at=2)) as service:
        with pytest.raises(EditError, match="could not finish the edit: the model broke"):
            remote(service.url, patience_s=60).edit(PICTURE, "x")
        assert len(service.received) == 1
        with pytest.raises(EditError, match="could not finish the edit: the model broke"):
            asyncio.run(streamed(service.url))


def test_a_server_that_is_gone_or_is_another_one_is_named(service, remote):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        waited = []
        editor = remote(url, patience_s=3, sleep=waited.append, jitter=lambda: 0.0)
        with pytest.raises(ServiceError, match=f"{url} cannot be reached: .*refused") as caught:
            editor.edit(PICTURE, "x")
        assert caught.value.retry_after_s
        assert waited == [1.0, 1.0, 1.0]
    with pytest.raises(ServiceError, match="has nothing of that name"):
        remote(service.url + "/elsewhere").edit(PICTURE, "x")
