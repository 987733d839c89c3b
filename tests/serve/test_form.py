import json
import random

import httpx
import pytest

from serve.form import Limits
from tests.serve.running import (
    EDITS,
    PICTURE,
    checked_problem,
    head,
    multipart,
    problem,
)

REFUSED = {
    "an empty prompt": ({"prompt": ""}, "prompt", "prompt is empty"),
    "a blank prompt": ({"prompt": " \t\n\u3000"}, "prompt", "prompt is empty"),
    "no prompt": ({"prompt": None}, "prompt", "prompt is missing"),
    "a prompt of 10,000 characters": (
        {"prompt": "x" * 10_000},
        "prompt",
        "prompt has 10000 characters, at most 1000 are read",
    ),
    "n of nothing": ({"n": ""}, "n", "n should be a valid integer"),
    "n of 0": ({"n": "0"}, "n", "n should be greater than or equal to 1"),
    "n too big": ({"n": "5"}, "n", "n is at most 4, got 5"),
    "n far too big": ({"n": "9" * 400}, "n", "n is at most 4, got 9"),
    "n beyond what Python reads": ({"n": "9" * 5000}, "n", "n "),
    "half a picture": ({"n": "1.5"}, "n", "n should be a valid integer"),
    "a size in words": ({"size": "large"}, "size", "size should be 'auto' or WIDTHxHEIGHT"),
    "a size of nothing": ({"size": "0x64"}, "size", "size should be 'auto' or WIDTHxHEIGHT"),
    "an odd size": ({"size": "33x33"}, "size", "each a multiple of 4, got 33x33"),
    "a size too large": ({"size": "64x68"}, "size", "size is at most 4096 pixels, got 64x68"),
    "a size far too large": ({"size": "99996x99996"}, "size", "size is at most 4096 pixels"),
    "a URL": ({"response_format": "url"}, "response_format", "should be 'b64_json'"),
    "a GIF": ({"output_format": "gif"}, "output_format", "should be 'png', 'jpeg' or 'webp'"),
    "a quality of 101": ({"output_compression": "101"}, "output_compression", "less than or equal"),
    "a stream perhaps": ({"stream": "perhaps"}, "stream", "should be a valid boolean"),
    "a stream of two": ({"stream": "true", "n": "2"}, "n", "a stream is of one picture"),
    "previews of no stream": ({"partial_images": "1"}, "partial_images", "needs stream"),
    "too many previews": (
        {"stream": "true", "partial_images": "11"},
        "partial_images",
        "partial_images is at most 10, got 11",
    ),
    "high quality": ({"quality": "high"}, "quality", "quality should be 'auto' or 'standard'"),
    "no background": ({"background": "transparent"}, "background", "should be 'auto' or 'opaque'"),
    "a negative seed": ({"seed": "-1"}, "seed", "seed should be greater than or equal to 0"),
    "a great seed": ({"seed": str(2**63)}, "seed", "seed should be less than"),
    "a seed in words": ({"seed": "seven"}, "seed", "seed should be a valid integer"),
    "no steps": ({"steps": "0"}, "steps", "steps should be greater than or equal to 1"),
    "too many steps": ({"steps": "101"}, "steps", "steps is at most 100, got 101"),
    "a deadline of 0": ({"deadline_s": "0"}, "deadline_s", "deadline_s should be greater than 0"),
    "a late deadline": ({"deadline_s": "301"}, "deadline_s", "deadline_s is at most 300, got 301"),
    "a deadline of inf": ({"deadline_s": "inf"}, "deadline_s", "should be a finite number"),
    "an unknown field": ({"style": "vivid"}, "style", "there is no field 'style'; there are image"),
    "a list of prompts": ({"prompt[]": "x"}, "prompt[]", "there is no field 'prompt[]'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_told(service, name):
    fields, param, told = REFUSED[name]
    answer = service.ask(**fields)
    error = problem(answer, 400)
    assert told in error["message"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


@pytest.mark.parametrize("name", ["text_guidance_scale", "image_guidance_scale"])
@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("nan", "should be a finite number"),
        ("-inf", "should be a finite number"),
        ("1e999", "should be a finite number"),
        ("101", "lies in [-100, 100], got 101"),
        ("-1e30", "lies in [-100, 100], got -1e+30"),
        ("strong", "should be a valid number"),
        ("", "should be a valid number"),
    ],
)
def test_scales_are_numbers_that_make_sense(service, name, value, told):
    error = problem(service.ask(**{name: value}), 400)
    assert (error["param"], error["message"].removeprefix(f"{name} ")[: len(told)]) == (name, told)


@pytest.mark.parametrize("value", ["-100", "0", "1e-9", "100"])
def test_scales_within_their_range_are_taken(service, value):
    answer = service.ask(text_guidance_scale=value, image_guidance_scale=value)
    assert answer.json()["text_guidance_scale"] == float(value)


def test_a_prompt_of_just_the_allowed_length_is_taken(service):
    assert service.ask(prompt="x" * 1000).status_code == 200
    assert service.ask(prompt=f"  {'x' * 1000}\n").status_code == 200
    assert problem(service.ask(prompt="x" * 1001), 400)["param"] == "prompt"


def test_space_around_a_prompt_changes_no_picture(service):
    plain, spaced = (service.ask(prompt=each) for each in ("make it night", " make it night\n"))
    assert plain.json()["data"] == spaced.json()["data"]


@pytest.mark.parametrize("prompt", ["\0", "\u200b\ufeff", "\U0001f600" * 1000, "<|endoftext|>"])
def test_prompts_of_any_characters_are_taken(service, prompt):
    assert service.ask(prompt=prompt).status_code == 200


def test_another_model_is_not_found(service):
    error = problem(service.ask(model="gpt-image-1"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert error["message"] == "there is no model 'gpt-image-1' here, there is 'tiny'"
    assert service.ask(model="tiny").status_code == 200
    assert service.ask(model="").status_code == 200


def send(service, fields, **options):
    body = multipart(fields)
    return httpx.post(
        service.url + EDITS,
        content=body,
        headers={"Content-Type": "multipart/form-data; boundary=frontier"},
        timeout=60,
        **options,
    )


EDIT = [("image", PICTURE), ("prompt", "make it night"), ("steps", "1")]


def test_a_body_by_hand_is_an_edit(service):
    assert send(service, EDIT).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ([*EDIT, ("prompt", "x")], "prompt", "'prompt' is given more than once"),
        ([*EDIT, ("n", "1"), ("n", "1")], "n", "'n' is given more than once"),
        ([*EDIT, ("image", PICTURE)], "image", "one picture is edited at a time"),
        ([*EDIT, ("image[]", PICTURE)], "image", "one picture is edited at a time"),
        ([*EDIT, ("mask", PICTURE), ("mask", PICTURE)], "mask", "'mask' is given more than once"),
        ([*EDIT, ("n", b"1")], "n", "'n' is sent as a text, got a file"),
        ([*EDIT, ("other", b"1")], "other", "'other' is no field, got a file"),
        ([*EDIT, ("mask", "1")], "mask", "'mask' is sent as a file, got a text"),
        ([("image", "1"), *EDIT[1:]], "image", "'image' is sent as a file, got a text"),
        (EDIT[1:], "image", "image is missing or empty"),
        ([("image", b""), *EDIT[1:]], "image", "image is missing or empty"),
        ([], "image", "image is missing or empty"),
        ([*EDIT, ("", "x")], "", "there is no field ''"),
        ([*EDIT, ("x" * 3000, "x")], "x" * 100, "there is no field 'xx"),
        ([*EDIT, ("\u00e9", "x")], "\u00e9", "there is no field"),
        ([*EDIT, ("user", "x" * 70_000)], None, "a text in the body is longer than 65536 bytes"),
        ([*EDIT, *[("user", "x")] * 50], None, "at most 40 and 3 are read"),
        ([*EDIT, *[("image", b"x")] * 5], None, "at most 40 and 3 are read"),
    ],
)
def test_files_and_texts_are_told_apart_and_given_once(service, fields, param, told):
    error = problem(send(service, fields), 400)
    assert told in error["message"]
    assert error["param"] == param
    assert len(error["message"]) < 600


@pytest.mark.parametrize(
    "kind", ["application/json", "application/x-www-form-urlencoded", "text/plain", "", "image/png"]
)
def test_other_content_types_are_refused(service, kind):
    headers = {"Content-Type": kind}
    body = json.dumps({"prompt": "make it night"})
    error = problem(httpx.post(service.url + EDITS, content=body, headers=headers), 415)
    assert error["message"] == f"send multipart/form-data, got {kind!r}"


def test_no_content_type_is_refused(service):
    status, _, body = service.say(f"POST {EDITS} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert status == 415
    assert checked_problem(body)["message"] == "send multipart/form-data, got ''"


BROKEN = {
    "no boundary": ("multipart/form-data", multipart(EDIT)),
    "an empty boundary": ("multipart/form-data; boundary=", multipart(EDIT)),
    "another boundary": ("multipart/form-data; boundary=other", multipart(EDIT)),
    "a long boundary": (f"multipart/form-data; boundary={'x' * 1000}", multipart(EDIT)),
    "no body": ("multipart/form-data; boundary=frontier", b""),
    "no name": (
        "multipart/form-data; boundary=frontier",
        multipart([("x", "y")]).replace(b'name="x"', b""),
    ),
    "no disposition": (
        "multipart/form-data; boundary=frontier",
        multipart([("x", "y")]).replace(b"Content-Disposition", b"Content-Other"),
    ),
    "a header without an end": (
        "multipart/form-data; boundary=frontier",
        b"--frontier\r\nContent-Disposition: form-data; " + b"x" * 100_000,
    ),
    "headers without number": (
        "multipart/form-data; boundary=frontier",
        b"--frontier\r\n" + b"A: b\r\n" * 10_000,
    ),
    "no text": ("multipart/form-data; boundary=frontier", b"\x00" * 1000),
    "no part": ("multipart/form-data; boundary=frontier", b"--frontier--\r\n"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_body_is_told(service, name):
    kind, body = BROKEN[name]
    answer = httpx.post(service.url + EDITS, content=body, headers={"Content-Type": kind})
    error = problem(answer, 400)
    assert "multipart" in error["message"] or error["param"] == "image"


@pytest.mark.parametrize(
    "charset", ["utf-8", "latin-1", "utf-16", "utf-7", "idna", "hex", "undefined", "none", ""]
)
def test_no_charset_breaks_anything(service, charset):
    headers = {"Content-Type": f"multipart/form-data; boundary=frontier; charset={charset}"}
    for fields in (EDIT, [*EDIT, ("caf\u00e9\\ud800", "\\ud800 \x80")]):
        answer = httpx.post(service.url + EDITS, content=multipart(fields), headers=headers)
        if answer.status_code != 200:
            problem(answer, 400)


def test_a_name_that_no_encoding_can_express_is_told(service):
    headers = {"Content-Type": "multipart/form-data; boundary=frontier; charset=unicode_escape"}
    body = multipart([*EDIT, ("\\ud800", "x")])
    error = problem(httpx.post(service.url + EDITS, content=body, headers=headers), 400)
    assert error["param"] == "\\ud800"


def test_every_cut_of_a_body_is_told(service):
    body = multipart([("prompt", "make it night"), ("image", b"no picture")])
    for length in range(0, len(body) - 4, 7):
        status, _, told = service.say(head(f"Content-Length: {length}") + body[:length])
        assert status == 400
        checked_problem(told)


def test_a_body_may_come_in_pieces_of_any_size(service):
    body, rng = multipart(EDIT), random.Random(0)
    chunks = []
    while body:
        length = rng.choice((1, 2, 3, 100, 1000))
        chunk, body = body[:length], body[length:]
        chunks.append(b"%x\r\n%s\r\n" % (len(chunk), chunk))
    status, _, _ = service.say(head("Transfer-Encoding: chunked"), *chunks, b"0\r\n\r\n")
    assert status == 200


def test_limits_are_those_of_the_service(start):
    limits = Limits(pictures=1, steps=3, prompt_characters=5, scale=2.0, previews=1)
    service = start(limits=limits)
    assert service.ask(prompt="night", steps="3", text_guidance_scale="-2").status_code == 200
    for name, value in (("n", "2"), ("steps", "4"), ("image_guidance_scale", "2.1")):
        assert problem(service.ask(prompt="night", **{name: value}), 400)["param"] == name
    assert problem(service.ask(prompt="nights"), 400)["param"] == "prompt"
    document = httpx.get(f"{service.url}/openapi.json").json()
    body = document["paths"][EDITS]["post"]["requestBody"]["content"]["multipart/form-data"]
    fields = body["schema"]["properties"]
    assert (fields["n"]["maximum"], fields["steps"]["maximum"]) == (1, 3)
    assert (fields["prompt"]["minLength"], fields["prompt"]["maxLength"]) == (1, 5)
    assert fields["seed"] == {
        "title": "Seed",
        "type": "integer",
        "minimum": 0,
        "exclusiveMaximum": 2**63,
        "description": "The same seed gives the same picture.",
    }
