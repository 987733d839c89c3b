"""From the body of a request to an order; whatever cannot be used ends in a sentence."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Literal

import python_multipart.exceptions
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from serve.orders import Order, OutputFormat
from serve.problems import Problem

SEED_LIMIT = 2**63
TEXT_BYTES = 64 * 1024
"""Of a field that is no file."""
FILES, FIELDS = 3, 40
"""More of them are not read; a file and a field too many, so that they can be named."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    body_bytes: int = 20 * 2**20
    """Of the whole body; what is longer is cut off while it is read."""
    upload_s: float = 120.0
    """Seconds in which the body must have come."""
    pictures: int = 4
    """The largest n."""
    steps: int = 100
    prompt_characters: int = 1000
    scale: float = 100.0
    """The largest guidance scale, either sign."""
    previews: int = 10
    deadline_s: float = 300.0
    """Seconds a request may take when it states none, and the most that it may state."""


class EditForm(BaseModel):
    """The fields of a request that are no files; those of OpenAI's API and some of ours."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(description="What to change, for example 'make it night'.")
    n: int = Field(1, ge=1, description="How many pictures; each has a seed of its own.")
    size: str = Field(
        "auto",
        pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$",
        description="WIDTHxHEIGHT at which the picture is edited and sent back, or 'auto'.",
    )
    response_format: Literal["b64_json"] = Field(
        "b64_json", description="Pictures are in the answer; none is stored, so there is no URL."
    )
    output_format: OutputFormat = "png"
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of JPEG and WebP."
    )
    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: int = Field(0, ge=0, description="Previews on the way, with stream.")
    model: str | None = Field(None, description="As GET /v1/models names it; may be left out.")
    user: str | None = Field(None, description="Accepted and not used.")
    quality: Literal["auto", "standard"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    seed: int | None = Field(
        None, ge=0, lt=SEED_LIMIT, description="The same seed gives the same picture."
    )
    steps: int | None = Field(None, ge=1, description="Denoising steps.")
    text_guidance_scale: float | None = Field(
        None, allow_inf_nan=False, description="How strongly the instruction is followed."
    )
    image_guidance_scale: float | None = Field(
        None, allow_inf_nan=False, description="How strongly the picture is kept."
    )
    deadline_s: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Seconds after which it is given up."
    )

    @field_validator("prompt")
    @classmethod
    def _no_empty_prompt(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("is empty")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError("is no Unicode text") from error
        return prompt.strip()


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request, understood."""

    order: Order
    form: EditForm


def request_schema(limits: Limits) -> dict[str, Any]:
    """The body in the OpenAPI document, with what these limits say."""
    schema = EditForm.model_json_schema()
    fields: dict[str, dict[str, Any]] = schema["properties"]
    for field in fields.values():
        # a form knows no null: what is not stated is left out
        kinds = [kind for kind in field.pop("anyOf", ()) if kind["type"] != "null"]
        field.update(*kinds)
        if field.get("default", ...) is None:
            del field["default"]
    fields["prompt"].update(minLength=1, maxLength=limits.prompt_characters)
    fields["n"]["maximum"] = limits.pictures
    fields["steps"]["maximum"] = limits.steps
    fields["partial_images"]["maximum"] = limits.previews
    fields["deadline_s"]["maximum"] = limits.deadline_s
    for name in ("text_guidance_scale", "image_guidance_scale"):
        fields[name].update(minimum=-limits.scale, maximum=limits.scale)
    schema["properties"] = {
        "image": {"type": "string", "format": "binary", "description": "The picture to edit."},
        "mask": {
            "type": "string",
            "format": "binary",
            "description": "A PNG of the picture's size, transparent where to edit.",
        },
        **schema["properties"],
    }
    schema["required"] = ["image", *schema["required"]]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


async def read_form(request: Request, limits: Limits) -> FormData:
    """The fields of a multipart body, not longer than it may be.

    Raises: Problem 413, 415, 408 for a body that does not come, or 400 for one that is broken.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        raise Problem(415, f"send multipart/form-data, got {kind[:100]!r}")
    too_long = Problem(
        413,
        f"the body is longer than {limits.body_bytes} bytes; send a smaller picture",
        code="body_too_large",
    )
    length = request.headers.get("content-length", "")
    # so long a number says enough, and `int` reads no number of any length
    if length.isdecimal() and (len(length) > 18 or int(length) > limits.body_bytes):
        raise too_long

    async def bounded() -> AsyncGenerator[bytes, None]:
        read = 0
        async for chunk in request.stream():
            read += len(chunk)
            if read > limits.body_bytes:
                raise too_long
            yield chunk
        if not parser.has_ended:  # raised in here, so that the parser closes its files
            raise MultiPartException("it ends before its last boundary")

    parser = _Parser(
        request.headers, bounded(), max_files=FILES, max_fields=FIELDS, max_part_size=TEXT_BYTES
    )
    # in memory as a whole: pictures of others are not written to a disk
    parser.spool_max_size = limits.body_bytes
    try:
        async with asyncio.timeout(limits.upload_s):
            return await parser.parse()
    except TimeoutError as error:
        raise Problem(
            408,
            f"the body did not come within {limits.upload_s:g} s",
            code="upload_timeout",
            headers={"x-should-retry": "false"},
        ) from error
    except ClientDisconnect as error:
        raise Problem(499, "whoever asked is gone", code="client_gone") from error
    except MultiPartException as error:
        raise Problem(400, _of_the_body(error.message)) from error
    except (
        *(python_multipart.exceptions.FormParserError, LookupError),
        *(UnicodeError, ValueError, AssertionError),
    ) as error:
        raise Problem(400, _of_the_body(str(error))) from error


class _Parser(MultiPartParser):
    """Knows whether the last boundary was there."""

    has_ended = False

    def on_end(self) -> None:
        self.has_ended = True


def _of_the_body(told: str) -> str:
    """A sentence for what the parser of multipart bodies says."""
    if told.startswith("Part exceeded"):
        return f"a text in the body is longer than {TEXT_BYTES} bytes"
    if told.startswith("Too many"):
        return f"the body has too many fields or files: at most {FIELDS} and {FILES} are read"
    return f"the body is no multipart/form-data: {told.rstrip('.')}"


async def understand(data: FormData, limits: Limits, served: str) -> Asked:
    """The order in a form.

    Raises: Problem 400 that names the field, or 404 for another model.
    """
    texts: dict[str, str] = {}
    files: dict[str, bytes] = {}
    for name, value in data.multi_items():
        # as OpenAI's clients call a list of pictures
        plain = "image" if name == "image[]" else name
        if plain in texts or plain in files:
            one = "; one picture is edited at a time" if plain == "image" else ""
            raise Problem(400, f"{plain[:100]!r} is given more than once{one}", param=plain)
        if isinstance(value, UploadFile):
            if plain not in ("image", "mask"):
                told = "is sent as a text" if plain in EditForm.model_fields else "is no field"
                raise Problem(400, f"{plain[:100]!r} {told}, got a file", param=plain)
            files[plain] = await value.read()
        elif plain in ("image", "mask"):
            raise Problem(400, f"{plain!r} is sent as a file, got a text", param=plain)
        elif plain not in EditForm.model_fields:
            known = ", ".join(["image", "mask", *EditForm.model_fields])
            told = f"there is no field {plain[:100]!r}; there are {known}"
            raise Problem(400, told, param=plain)
        else:
            texts[plain] = value
    if not files.get("image"):
        raise Problem(
            400, "image is missing or empty: the picture to edit, sent as a file", param="image"
        )
    form = _validated(texts)
    _check(form, limits, served)
    seed = secrets.randbelow(2**32) if form.seed is None else form.seed
    order = Order(
        image=files["image"],
        mask=files.get("mask"),
        instruction=form.prompt,
        seeds=tuple((seed + k) % SEED_LIMIT for k in range(form.n)),
        size=_size(form.size),
        steps=form.steps,
        text_guidance_scale=form.text_guidance_scale,
        image_guidance_scale=form.image_guidance_scale,
        previews=form.partial_images,
        deadline_s=form.deadline_s or limits.deadline_s,
        output_format=form.output_format,
        output_compression=form.output_compression,
    )
    return Asked(order=order, form=form)


def _validated(texts: dict[str, str]) -> EditForm:
    try:
        return EditForm.model_validate(texts)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = str(first["loc"][0])
        told = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if first["type"] == "missing":
            told = "is missing"
        elif first["type"] == "string_pattern_mismatch":  # only size has a pattern
            told = "should be 'auto' or WIDTHxHEIGHT, for example 512x512"
        raise Problem(400, f"{name} {told}", param=name) from error


def _check(form: EditForm, limits: Limits, served: str) -> None:
    """What the limits of this service say; raises a Problem."""
    if form.model not in (None, "", served):
        raise Problem(
            404,
            f"there is no model {form.model[:100]!r} here, there is {served!r}",
            param="model",
            code="model_not_found",
        )
    most = {
        "n": limits.pictures,
        "steps": limits.steps,
        "partial_images": limits.previews,
        "deadline_s": limits.deadline_s,
    }
    for name, value in most.items():
        given = getattr(form, name)
        if given is not None and given > value:
            raise Problem(400, f"{name} is at most {value:g}, got {given}", param=name)
    for name in ("text_guidance_scale", "image_guidance_scale"):
        given = getattr(form, name)
        if given is not None and abs(given) > limits.scale:
            raise Problem(
                400,
                f"{name} lies in [{-limits.scale:g}, {limits.scale:g}], got {given:g}",
                param=name,
            )
    if len(form.prompt) > limits.prompt_characters:
        raise Problem(
            400,
            f"prompt has {len(form.prompt)} characters, at most {limits.prompt_characters} are "
            "read",
            param="prompt",
        )
    if form.stream and form.n != 1:
        raise Problem(400, f"a stream is of one picture, got n = {form.n}", param="n")
    if form.partial_images and not form.stream:
        raise Problem(400, "partial_images needs stream", param="partial_images")


def _size(size: str) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d+)x(\d+)", size)
    return None if found is None else (int(found[1]), int(found[2]))
