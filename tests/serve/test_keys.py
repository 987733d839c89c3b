import hmac
import pickle
import socket
from types import SimpleNamespace

import httpx
import openai
import psutil
import pytest

from ip2p_ray.errors import ConfigError
from serve import keys
from serve.keys import KEYS, KEYS_FILE, Keys, RateLimit
from tests.serve.running import PICTURE, problem

KEY, OTHER = "a-key-of-sixteen-and-more", "another-key-of-sixteen"


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def test_a_key_is_found_by_its_number():
    keys = Keys([KEY, OTHER])
    assert len(keys) == 2
    assert keys.find(f"Bearer {KEY}") == 0
    assert keys.find(f"bearer  {OTHER} ") == 1


@pytest.mark.parametrize(
    "header",
    [
        *(
            None,
            "",
            KEY,
            "Bearer",
            "Bearer ",
            f"Basic {KEY}",
            f"Bearer {KEY}x",
            f"Bearer {KEY[:-1]}",
        ),
        *(f"Bearer {KEY.upper()}", f"Bearer {KEY} {KEY}", f"Bearer {KEY},{OTHER}", "Bearer \udcff"),
    ],
)
def test_anything_else_is_no_key(header):
    assert Keys([KEY, OTHER]).find(header) is None


def test_without_keys_nothing_is_found():
    assert Keys([]).find("Bearer ") is None


class Counted(bytes):
    """A digest that notes with what it is compared byte by byte, as `==` would."""

    def __eq__(self, other):
        raise AssertionError("digests are compared by hmac.compare_digest alone")

    __hash__ = bytes.__hash__


def test_all_keys_are_compared_and_none_by_its_first_bytes():
    """Digests are of one length, whatever was sent, so that not even lengths are told by time."""
    keys = Keys([KEY, OTHER, KEY])
    keys._digests = [Counted(digest) for digest in keys._digests]
    assert {len(digest) for digest in keys._digests} == {32}
    import sys

    compared = []

    def watch(_frame, event, argument):
        if event == "c_call" and argument is hmac.compare_digest:
            compared.append(argument)

    for header in (f"Bearer {KEY}", f"Bearer {OTHER}", "Bearer x", "Bearer " + "x" * 5000, None):
        sys.setprofile(watch)
        try:
            keys.find(header)
        finally:
            sys.setprofile(None)
        assert len(compared) == 3, header
        compared.clear()


def test_nothing_shows_a_key():
    keys = Keys([KEY])
    assert KEY not in f"{keys!r} {keys} {vars(keys)}"
    assert KEY.encode() not in pickle.dumps(keys)


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.delenv(KEYS, raising=False)
    monkeypatch.delenv(KEYS_FILE, raising=False)
    return monkeypatch


def test_keys_come_from_the_environment(environment, tmp_path):
    assert len(Keys.from_environment()) == 0
    environment.setenv(KEYS, f" {KEY}, ,{OTHER},")
    assert Keys.from_environment().find(f"Bearer {OTHER}") == 1
    path = tmp_path / "keys"
    third, fourth = "a-third#key-of-sixteen", "a-fourth-key-of-sixteen"
    path.write_text(f"# whose\n{third}\n\n  {fourth}  # somebody's\r\n", "utf-8-sig")
    environment.setenv(KEYS_FILE, str(path))
    keys = Keys.from_environment()
    assert len(keys) == 4
    assert keys.find(f"Bearer {third}") == 2
    assert keys.find(f"Bearer {fourth}") == 3
    # a key with a sign that begins comments elsewhere is not cut down to its first half
    assert keys.find(f"Bearer {third.partition('#')[0]}") is None


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("# none\n\n", "holds no key"),
        ("too-short", "at least 16 characters"),
        ("two words of one key", "without spaces"),
        ("a-key-with-an-\u00e4-in-it", "ASCII"),
        (None, "cannot be read"),
        (b"\xff\xfe\xfd", "cannot be read"),
    ],
)
def test_keys_that_cannot_be_used_are_told_without_telling_them(
    environment, tmp_path, content, told
):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    environment.setenv(KEYS_FILE, str(path))
    with pytest.raises(ConfigError, match=told) as raised:
        Keys.from_environment()
    if isinstance(content, str):
        assert content not in str(raised.value)


def test_a_rate_is_a_quarter_at_once_and_then_as_time_goes():
    rate = RateLimit(60.0)
    assert [rate.wait_s(0, now=0.0) for _ in range(15)] == [0.0] * 15
    assert rate.wait_s(0, now=0.0) == pytest.approx(1.0)
    assert rate.wait_s(1, now=0.0) == 0.0  # another key's are its own
    assert rate.wait_s(0, now=0.5) == pytest.approx(0.5)
    assert rate.wait_s(0, now=1.0) == 0.0
    assert rate.wait_s(0, now=1.0) == pytest.approx(1.0)
    # however long nothing was asked for, a quarter at once
    assert [rate.wait_s(0, now=1000.0) for _ in range(16)][-2:] == [0.0, pytest.approx(1.0)]


def test_several_pictures_take_as_many():
    rate = RateLimit(8.0)
    assert rate.wait_s(0, 4, now=0.0) == 0.0  # two at once, and a debt of two
    assert rate.wait_s(0, 1, now=0.0) == pytest.approx(3 * 7.5)
    assert rate.wait_s(0, 1, now=3 * 7.5) == 0.0


def test_a_rate_below_one_a_quarter_is_one_at_a_time():
    rate = RateLimit(0.5)
    assert rate.wait_s(0, now=0.0) == 0.0
    assert rate.wait_s(0, now=0.0) == pytest.approx(120.0)


def test_what_is_not_made_costs_nothing(start, monkeypatch):
    monkeypatch.setattr(keys, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    service = start(keys=Keys([KEY]), requests_per_minute=4.0)  # one at once
    for _ in range(5):
        assert service.ask(b"no picture", headers=bearer(KEY)).status_code == 400
    assert service.ask(headers=bearer(KEY)).status_code == 200
    assert service.ask(headers=bearer(KEY)).status_code == 429


@pytest.fixture
def guarded(start):
    return start(keys=Keys([KEY, OTHER]))


def test_with_keys_nothing_is_answered_without_one(guarded):
    for path in ("/v1/models", "/docs", "/openapi.json", "/", "/nothing", "/healthz/", "//healthz"):
        for headers in ({}, bearer("wrong"), bearer(KEY + "x"), {"Authorization": KEY}):
            answer = httpx.get(guarded.url + path, headers=headers)
            error = problem(answer, 401)
            assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert KEY not in answer.text
    assert problem(guarded.ask(), 401)["code"] == "invalid_api_key"
    for path in ("/healthz", "/readyz"):
        assert httpx.get(guarded.url + path).status_code == 200


def test_either_key_is_let_in(guarded):
    for key in (KEY, OTHER):
        assert guarded.ask(headers=bearer(key)).status_code == 200
        with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key) as api:
            assert api.models.list().data[0].id == "tiny"
    with (
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong") as api,
        pytest.raises(openai.AuthenticationError, match="send one as 'Authorization: Bearer KEY'"),
    ):
        api.images.edit(image=PICTURE, prompt="make it night")


def test_a_key_has_a_rate_of_its_own(start, monkeypatch):
    monkeypatch.setattr(keys, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    service = start(keys=Keys([KEY, OTHER]), requests_per_minute=12.0)
    assert service.ask(headers=bearer(KEY), n="2").status_code == 200
    # what is refused for another reason takes nothing
    assert service.ask(headers=bearer(KEY), n="9").status_code == 400
    assert service.ask(headers=bearer(KEY)).status_code == 200
    answer = service.ask(headers=bearer(KEY))
    error = problem(answer, 429)
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert "this key may ask for 12 pictures a minute; come again in" in error["message"]
    assert 1 <= int(answer.headers["retry-after"]) <= 5
    assert service.ask(headers=bearer(OTHER)).status_code == 200
    # what makes no picture is not counted
    assert httpx.get(f"{service.url}/v1/models", headers=bearer(KEY)).status_code == 200


def own_address():
    """An address of this machine that others reach, or a skipped test."""
    for addresses in psutil.net_if_addrs().values():
        for each in addresses:
            if each.family == socket.AF_INET and not each.address.startswith("127."):
                return each.address
    pytest.skip("this machine has no address but its own")


def test_without_keys_only_the_machine_itself_is_answered(start):
    service = start(host="0.0.0.0", address=own_address())
    for answer in (service.ask(), httpx.get(f"{service.url}/docs")):
        error = problem(answer, 403)
        assert (error["code"], error["type"]) == ("keys_required", "permission_error")
    assert httpx.get(f"{service.url}/healthz").status_code == 200
    # nor does it help to say otherwise
    for headers in ({"Host": "127.0.0.1"}, {"X-Forwarded-For": "127.0.0.1", "X-Real-IP": "::1"}):
        assert httpx.get(f"{service.url}/v1/models", headers=headers).status_code == 403
    port = service.url.rpartition(":")[2]
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models").status_code == 200


def test_without_keys_no_page_from_elsewhere_is_answered(start):
    """Though the browser that it sends is on this machine."""
    service = start()
    told, edits = {"image": PICTURE}, f"{service.url}/v1/images/edits"
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example"},
        {"Host": "["},
    ):
        answer = httpx.post(edits, headers=headers, files=told, data={"prompt": "x"})
        assert problem(answer, 403)["code"] == "keys_required"
    for headers in ({"Origin": service.url}, {"Host": "localhost:8000"}, {"Host": "[::1]"}):
        assert httpx.get(f"{service.url}/v1/models", headers=headers).status_code == 200
    opened_to = start(cors_origins=("https://friend.example",))
    answer = httpx.get(f"{opened_to.url}/v1/models", headers={"Origin": "https://friend.example"})
    assert answer.status_code == 200


def test_with_keys_or_waived_others_are_answered(start):
    address = own_address()
    waived = start(host="0.0.0.0", address=address, allow_unauthenticated=True)
    assert waived.ask().status_code == 200
    keyed = start(host="0.0.0.0", address=address, keys=Keys([KEY]))
    assert keyed.ask(headers=bearer(KEY)).status_code == 200
    assert problem(keyed.ask(), 401)["code"] == "invalid_api_key"


def test_the_local_service_listens_at_home_by_default():
    from serve.local import Local

    assert Local().host == "127.0.0.1"
