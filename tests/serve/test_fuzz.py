"""Requests that nobody would write: none may end in a 5xx, leave memory behind or hurt the next.

Every draw is of a seed, so that what fails once fails again.
"""

import contextlib
import http.client
import io
import logging
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from PIL import Image, PngImagePlugin
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.jobs.running import ROOT
from tests.serve.running import EDITS, multipart, opened

logger = logging.getLogger(__name__)

SHARE = 4
"""Of the bytes that are sent in pictures, at most one in so many may seem to stay: far more than
memory moves by itself, and a leak of one picture a request is all of them."""


@dataclass
class Fuzzed:
    """A service in a process of its own, and what it answered."""

    process: subprocess.Popen
    url: str
    document: dict
    session: httpx.Client
    answered: Counter = field(default_factory=Counter)
    sent_bytes: int = 0

    def held_bytes(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def edits(self):
        """Whether a proper edit is answered as it should be."""
        answer = self.post(SOUND, {"prompt": "make it night", "size": "16x16", "seed": "1"})
        return opened(answer.json()["data"][0]["b64_json"]).shape == (16, 16, 3)

    def post(self, image, fields):
        files = {"image": ("picture", image)}
        self.sent_bytes += len(image)
        return self.checked(self.session.post(EDITS, data=fields, files=files))

    def checked(self, answer):
        """The answer, which is one of those that the document names."""
        self.answered[answer.status_code] += 1
        assert answer.status_code < 500, answer.text
        described = self.document["paths"][EDITS]["post"]["responses"][str(answer.status_code)]
        kind = answer.headers["content-type"].partition(";")[0]
        schema = described["content"][kind]["schema"]
        if kind == "application/json":
            Draft202012Validator(schema).validate(answer.json())
        return answer


@contextlib.contextmanager
def fuzzed(*arguments):
    command = [sys.executable, "-m", "tests.serve.fuzzed_service", *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # libtiff and Pillow tell a terminal of every broken file
    quiet = {"stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, **pipes, **quiet) as process:
        try:
            url = f"http://127.0.0.1:{int(process.stdout.readline())}"
            with httpx.Client(base_url=url, timeout=150) as session:
                document = session.get("/openapi.json").json()
                yield Fuzzed(process, url, document, session)
        finally:
            process.stdin.close()
            process.wait(timeout=60)


def picture(side, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def files():
    """One file of every format and of every mode that Pillow writes it in, and the odder kinds."""
    rgb = picture(96)
    deep = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    modes = [rgb.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "F")]
    found = []
    for image_format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"):
        for image in (*modes, deep):
            with contextlib.suppress(OSError, ValueError):
                found.append(saved(image, image_format))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    told = {"exif": exif, "icc_profile": b"x" * 200}
    text = PngImagePlugin.PngInfo()
    text.add_itxt("key", "value" * 50, zip=True)
    found += [
        saved(rgb, "PNG", **told, pnginfo=text, transparency=(1, 2, 3)),
        saved(rgb, "JPEG", **told, progressive=True, comment="comment"),
        saved(rgb, "WEBP", **told, lossless=True),
        saved(rgb, "AVIF", **told, speed=10),
        saved(rgb, "TIFF", tile=(16, 16), compression="tiff_lzw"),
    ]
    compressions = ("tiff_deflate", "packbits", "jpeg", "lzma", "zstd", "tiff_lzw")
    found += [saved(rgb, "TIFF", **told, compression=each) for each in compressions]
    found += [saved(modes[0], "TIFF", compression=each) for each in ("group3", "group4")]
    frames = {"save_all": True, "append_images": [rgb.rotate(90)]}
    found += [saved(rgb, each, **frames) for each in ("GIF", "WEBP", "PNG", "TIFF", "MPO")]
    return found


def saved(image, image_format, **options):
    stream = io.BytesIO()
    fast = {"speed": 10} if image_format == "AVIF" else {}
    image.save(stream, image_format, **fast | options)
    return stream.getvalue()


SOUND = saved(picture(96), "PNG")
NUMBERS = [b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1", b"\1\0\0\0", b"\x80\0\0\0"]


def mutated(data, rng, others):
    """The data with one thing changed."""
    data = bytearray(data or b"\0")
    at, length = rng.randrange(len(data)), rng.randrange(1, 64)
    # most of what a file says of itself stands at its beginning
    near = rng.randrange(min(len(data), 64))
    match rng.randrange(9):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            for _ in range(16):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 2:
            del data[at:]
        case 3:
            data[near] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        case 4:
            data[near : near + 4] = rng.choice(NUMBERS)
        case 5:  # two pieces change places
            first, second = sorted((at, rng.randrange(len(data))))
            pieces = data[first : first + length], data[second : second + length]
            data[second : second + length], data[first : first + length] = pieces
        case 6:
            data[at:at] = data[at : at + length] * rng.randrange(1, 20)
        case 7:
            del data[at : at + length]
        case 8:
            data[at:] = rng.choice(others)[at:]
    return bytes(data)


def several(data, rng, others):
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = mutated(data, rng, others)
    return data


def send_pictures(service, count, seed):
    """Mutated files as images and as masks, with fields that are as they should be."""
    rng, corpus = random.Random(seed), files()
    for number in range(count):
        data = several(rng.choice(corpus), rng, corpus)
        fields = {
            "prompt": "make it night",
            "steps": "1",
            "output_format": rng.choice(("png", "jpeg", "webp")),
            **rng.choice(({}, {}, {"stream": "true"}, {"n": "2"})),
        }
        if number % 5:
            service.post(data, fields)
        else:
            service.sent_bytes += len(SOUND) + len(data)
            sent = {"image": ("picture", SOUND), "mask": ("mask", data)}
            service.checked(service.session.post(EDITS, data=fields, files=sent))


KINDS = [
    "multipart/form-data; boundary=frontier",
    'multipart/form-data; boundary="frontier"; charset=utf-8',
    "multipart/form-data; charset=unicode_escape; boundary=frontier",
    "multipart/form-data; boundary=frontier; charset=idna; filename*=utf-8''x",
]
FIELDS = {
    "prompt": ["make it night", "", "\0", "\u20ac", "\\ud800"],
    "n": ["1", "2", "-1", "nan"],
    "size": ["auto", "16x16", "16x32", "0x0"],
    "steps": ["1", "1e9", " 1 "],
    "seed": ["1", str(2**63), "\u0661"],
    "text_guidance_scale": ["2.5", "nan", "-100"],
    "stream": ["true", "false", "TRUE"],
    "partial_images": ["0", "1"],
    "deadline_s": ["1e-9", "30"],
    "output_compression": ["0", "100"],
}


def send_bodies(service, count, seed):
    """Mutated multipart bodies under mutated headers."""
    rng = random.Random(seed)
    host = service.url.removeprefix("http://")
    for number in range(count):
        fields = [("image", SOUND), ("prompt", "make it night"), ("steps", "1")]
        others = rng.sample(sorted(FIELDS), rng.randrange(3))
        fields += [(name, rng.choice(FIELDS[name])) for name in others]
        rng.shuffle(fields)
        kind = rng.choice(KINDS).encode()
        body = multipart(fields)
        if number % 3:
            # the picture is the most of the body, and what is around it is meant
            frame = multipart([each for each in fields if each[0] != "image"])
            body = several(frame, rng, [body]) if number % 3 == 1 else several(body, rng, [frame])
        else:
            kind = several(kind, rng, [b"multipart/form-data", b"; boundary=x", b"a/b; c=d"])
        kind = bytes(byte for byte in kind if byte >= 32 and byte != 127)
        service.sent_bytes += len(body)
        line = http.client.HTTPConnection(host, timeout=150)
        with contextlib.closing(line):
            line.request("POST", EDITS, body, {"Content-Type": kind})
            answer = line.getresponse()
            content = answer.read()
        headers = {"content-type": answer.headers["content-type"]}
        service.checked(httpx.Response(answer.status, headers=headers, content=content))


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@st.composite
def drawn(draw, strategy):
    """What a strategy gives, but where schemathesis 4.32 cannot read bytes that it made itself."""
    try:
        return draw(strategy)
    except ValueError as error:
        if "Unsupported type: 'Binary'" in str(error):
            reject()
        raise


def send_described(service, count):
    """What schemathesis makes of the document, half of it against the document's word."""
    schema = schemathesis.openapi.from_dict(service.document)
    operation = schema[EDITS]["POST"]
    for mode in GenerationMode:
        strategy = operation.as_strategy(generation_mode=mode)

        @settings(max_examples=count // 2, suppress_health_check=list(HealthCheck), database=None)
        @given(case=drawn(strategy), is_sound=st.booleans())
        def send(case, is_sound):
            if is_sound and isinstance(case.body, dict) and "image" in case.body:
                case.body["image"] = SOUND
                service.sent_bytes += len(SOUND)
            answer = case.call(base_url=service.url, timeout=120)
            service.answered[answer.status_code] += 1
            case.validate_response(answer, checks=CHECKS)

        send()


def send_all(service, count, seed):
    send_described(service, count * 3 // 10)
    send_pictures(service, count * 4 // 10, seed)
    send_bodies(service, count * 3 // 10, seed)


def grown(service, send):
    """Bytes that the service holds more of after some requests than before, and those sent."""
    before, sent = service.held_bytes(), service.sent_bytes
    send()
    return service.held_bytes() - before, service.sent_bytes - sent


def test_some_hundred_requests_that_nobody_would_write():
    with fuzzed() as service:
        assert service.edits()
        send_all(service, 200, seed=1)
        assert {200, 400} <= set(service.answered)
        assert service.edits()


@pytest.mark.slow
def test_a_leak_of_pictures_would_be_noticed():
    """What the bound of the great run is good for, on a service that keeps what it is sent."""

    def send():
        for _ in range(200):
            service.post(SOUND, {"prompt": "make it night", "steps": "1"})

    with fuzzed("leaky") as service:
        send()
        more, sent = grown(service, send)
    assert more > sent / SHARE


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_requests_that_nobody_would_write():
    with fuzzed() as service:
        send_all(service, 1000, seed=1)
        service.answered.clear()
        began, before = time.monotonic(), service.held_bytes()
        more, sent = grown(service, lambda: send_all(service, 10_000, seed=2))
        seconds = time.monotonic() - began
        logger.info(
            "%d requests in %.0f s, %.0f MiB of pictures: %s; memory %.1f MiB, then %+.1f MiB",
            service.answered.total(),
            seconds,
            sent / 2**20,
            dict(sorted(service.answered.items())),
            before / 2**20,
            more / 2**20,
        )
        assert service.answered.total() >= 10_000
        assert more < sent / SHARE
        assert service.edits()
