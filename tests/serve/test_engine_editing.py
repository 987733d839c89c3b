import asyncio
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ip2p_ray.engine import EngineConfig
from ip2p_ray.errors import ImageError
from serve.engine_editing import EngineEditing, check_upload
from serve.orders import Order
from tests.serve.running import PICTURE, encoded, noise, opened, problem

RGB = Image.fromarray(noise(32, 32))
FRAMES = {"save_all": True, "append_images": [RGB.rotate(90), RGB.rotate(180)]}


def edited(service, image, **fields):
    answer = service.ask(image, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"][0]["b64_json"]


def refused(service, image, **options):
    error = problem(service.ask(image, **options), 400)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_image")
    return error["param"], error["message"]


@pytest.mark.parametrize(
    "data",
    [
        *(b"hello", b"\0" * 1000, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n"),
        *(b"%!PS-Adobe-3.0 EPSF-3.0\n", PICTURE[8:], b"GIF89a", b"\x89PNG\r\n\x1a\n", b"BM", b"P6"),
    ],
)
def test_what_is_no_image_is_told(service, data):
    param, message = refused(service, data)
    assert param == "image"
    assert message.startswith("image cannot be decoded (")
    assert message.endswith(
        "send a whole file in one of PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM, AVIF, JPEG2000"
    )


@pytest.mark.parametrize(
    "image_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"]
)
def test_every_format_is_edited_and_no_part_of_a_file_is(service, image_format):
    data = encoded(Image.fromarray(noise(40, 40)), image_format)
    assert opened(edited(service, data)).shape == (32, 32, 3)
    for share in (0.1, 0.5, 0.9):
        param, message = refused(service, data[: int(len(data) * share)])
        assert param == "image"
        assert "cannot be decoded" in message


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_animations_are_refused(service, image_format):
    fast = {"speed": 10} if image_format == "AVIF" else {}
    param, message = refused(service, encoded(RGB, image_format, **FRAMES, **fast))
    assert (param, message) == ("image", "image has several frames or pages; send one of them")
    edited(service, encoded(RGB, image_format))


def calls_of(work):
    """How many calls of Python functions some work takes, and what it raises."""
    calls = []
    sys.setprofile(lambda _frame, event, _argument: calls.append(1) if event == "call" else None)
    try:
        with pytest.raises(ImageError, match="several frames"):
            work()
    finally:
        sys.setprofile(None)
    return len(calls)


def test_a_gif_of_a_great_many_frames_is_refused_at_its_second():
    one = encoded(Image.new("P", (1, 1)), "GIF")
    frame = one[one.index(b",") : -1]
    few, many = (one[:-1] + frame * count + b";" for count in (2, 100_000))
    check_upload(one)
    assert calls_of(lambda: check_upload(many)) < 2 * calls_of(lambda: check_upload(few))


def test_the_second_eye_of_a_stereo_picture_is_left_out(service):
    both = encoded(RGB, "MPO", save_all=True, append_images=[RGB.rotate(90)], quality=95)
    assert edited(service, both) == edited(service, encoded(RGB, "JPEG", quality=95))


def modes():
    """Encoded pictures that all show what the RGB picture does, or nearly, and how nearly."""
    pixels = noise(8, 8).repeat(4, 0).repeat(4, 1)
    rgb = Image.fromarray(pixels)
    grey = rgb.convert("L")
    deep = np.asarray(grey).astype(np.uint16) * 257
    palette = rgb.quantize(64, dither=Image.Dither.NONE)
    seen = Image.fromarray(np.dstack([pixels, np.full((32, 32), 255, np.uint8)]))
    return {
        "CMYK": (encoded(rgb.convert("CMYK"), "TIFF"), rgb),
        "CMYK in a JPEG": (encoded(rgb.convert("CMYK"), "JPEG", quality=100), rgb),
        "palette": (encoded(palette), palette.convert("RGB")),
        "grey": (encoded(grey), grey.convert("RGB")),
        "16 bits": (encoded(Image.fromarray(deep)), grey.convert("RGB")),
        "16 bits in a TIFF": (encoded(Image.fromarray(deep), "TIFF"), grey.convert("RGB")),
        "16 bits of colour": (deep_png(pixels), rgb),
        "1 bit": (encoded(grey.convert("1")), grey.convert("1").convert("RGB")),
        "opaque alpha": (encoded(seen), rgb),
        "grey and alpha": (encoded(seen.convert("LA")), grey.convert("RGB")),
    }


def deep_png(pixels):
    """A PNG of 16 bits a channel, which Pillow reads and does not write."""
    height, width, _ = pixels.shape
    deep = (pixels.astype(">u2") * 257).reshape(height, -1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def as_seen(service, image, size=(32, 32), **fields):
    """The pixels that the service takes a picture for: what it sends back where nothing is to
    change."""
    opaque = Image.new("RGBA", size, (0, 0, 0, 255))
    files = {"image": image, "mask": encoded(opaque)}
    answer = service.ask(files=files, size=f"{size[0]}x{size[1]}", **fields)
    assert answer.status_code == 200, answer.text
    return opened(answer.json()["data"][0]["b64_json"]).astype(int)


@pytest.mark.parametrize("name", modes())
def test_pictures_of_every_mode_are_seen_as_they_look(service, name):
    data, looks = modes()[name]
    difference = np.abs(as_seen(service, data) - np.asarray(looks).astype(int))
    assert difference.mean() <= 4
    assert np.percentile(difference, 90) <= 8


def test_transparent_pixels_are_white(service):
    pixels = np.dstack([noise(32, 32), np.full((32, 32), 255, np.uint8)])
    pixels[:16, :, 3] = 0
    seen = as_seen(service, encoded(Image.fromarray(pixels)))
    assert (seen[:16] == 255).all()
    np.testing.assert_array_equal(seen[16:], pixels[16:, :, :3])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
def test_the_exif_orientation_is_honoured(service, orientation, image_format):
    """Each value against the turn or flip that the EXIF standard names for it."""
    stored = noise(48, 32)
    across = stored.transpose(1, 0, 2)
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: across,
        6: across[:, ::-1],  # turned to the right
        7: across[::-1, ::-1],
        8: across[::-1],  # turned to the left
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encoded(Image.fromarray(stored), image_format, exif=exif, **options)
    seen = as_seen(service, data, size=(upright.shape[1], upright.shape[0]))
    np.testing.assert_array_equal(seen, upright)


def test_an_orientation_that_makes_no_sense_is_passed_over(service):
    exif = Image.Exif()
    exif[0x0112] = 99
    pixels = noise(32, 32)
    seen = as_seen(service, encoded(Image.fromarray(pixels), exif=exif))
    np.testing.assert_array_equal(seen, pixels)


@pytest.mark.parametrize("size", [(1, 1), (1, 16), (16, 1), (3, 2)])
def test_the_smallest_pictures_are_edited(service, size):
    data = encoded(Image.fromarray(noise(*size)))
    made = opened(edited(service, data))
    assert max(made.shape) >= 16


def test_strips_are_refused(service):
    param, message = refused(service, encoded(Image.new("RGB", (17, 1))))
    assert param == "image"
    assert message == "image has 17 x 1 pixels; one side is at most 16 times as long as the other"


def png(width, height, *, has_pixels=True):
    """Of one bit a pixel, all of them white."""
    rows = zlib.compressobj(1)
    row = b"\0" + b"\xff" * -(-width // 8)
    packed = b"".join(rows.compress(row) for _ in range(height)) if has_pixels else b""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", packed + rows.flush()), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def claiming(image_format, said, claimed, **options):
    """An 8 x 8 picture in whose header other sides stand."""
    data = encoded(Image.new("RGB", (8, 8)), image_format, **options)
    assert said in data
    return data.replace(said, claimed, 1)


def sides(kind, side=20_000):
    return struct.pack(kind, side, side)


def tiff(side):
    return b"".join(struct.pack("<HHII", tag, 4, 1, side) for tag in (256, 257))


BOMBS = {
    "PNG of 20,000 x 20,000": lambda: png(20_000, 20_000),
    "PNG of 8,000 x 8,000": lambda: png(8_000, 8_000),
    "PNG of 10,000 x 10,000": lambda: png(10_000, 10_000),
    "PNG without pixels": lambda: png(2**31 - 1, 2**31 - 1, has_pixels=False),
    "GIF": lambda: claiming("GIF", sides("<HH", 8), sides("<HH")),
    "BMP": lambda: claiming("BMP", sides("<ii", 8), sides("<ii")),
    "JPEG": lambda: claiming("JPEG", sides(">HH", 8) + b"\3", sides(">HH") + b"\3"),
    "PPM": lambda: b"P6\n20000 20000\n255\n" + b"\0" * 1000,
    "TIFF": lambda: claiming("TIFF", tiff(8), tiff(20_000)),
    # two sides of 14 bits each, less one
    "WEBP": lambda: claiming("WEBP", b"/\7\xc0\1\0", b"/\xff\xff\xff\7", lossless=True),
}
"""Files of at most some kilobytes whose headers name a great many pixels."""


def peak_bytes():
    """The most memory that this process held since `forget_peak`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


@pytest.fixture
def refused_in_little_memory(service):
    """Asserts that a request is refused, and that little memory was held meanwhile."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells what a process held at most")
    edited(service, PICTURE)

    def refused_so(*arguments, **options):
        forget_peak()
        before = peak_bytes()
        told = refused(service, *arguments, **options)
        assert peak_bytes() - before < 16 * 2**20
        return told

    return refused_so


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_by_their_headers(refused_in_little_memory, name):
    """The smallest would take 64 MB as grey, and 192 as colours."""
    data = BOMBS[name]()
    assert len(data) < 300_000
    param, message = refused_in_little_memory(data)
    assert param == "image"
    assert "at most 50000000" in message
    assert "pixels" in message


@pytest.mark.parametrize("side", [8_000, 20_000])
def test_a_bomb_as_a_mask_is_refused_by_its_header(refused_in_little_memory, side):
    files = {"image": PICTURE, "mask": png(side, side)}
    assert refused_in_little_memory(None, files=files)[0] == "mask"


def mask_of(mode="RGBA", size=(32, 32)):
    return encoded(Image.new(mode, size))


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (mask_of(size=(32, 31)), "mask has 32 x 31 pixels, the image 32 x 32"),
        (mask_of("RGB"), "mask has no transparency; it is transparent where to edit"),
        (mask_of("L"), "mask has no transparency"),
        (encoded(Image.new("RGB", (32, 32)), "JPEG"), "mask cannot be decoded (unknown format)"),
        (b"", "mask cannot be decoded (unknown format); send a PNG that is transparent where"),
        (mask_of()[:60], "mask cannot be decoded"),
    ],
)
def test_masks_that_cannot_be_used_are_told(service, mask, told):
    files = {"image": PICTURE, "mask": mask}
    param, message = refused(service, None, files=files)
    assert param == "mask"
    assert told in message


def test_a_mask_of_a_turned_picture_is_as_it_is_seen(service):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encoded(Image.fromarray(noise(48, 32)), exif=exif)
    assert as_seen(service, image, size=(32, 48)).shape == (48, 32, 3)
    lying = {"image": image, "mask": mask_of(size=(48, 32))}
    assert refused(service, None, files=lying)[1] == ("mask has 48 x 32 pixels, the image 32 x 48")
    # but one that is stored as the picture is, is turned with it
    turned = encoded(Image.new("RGBA", (48, 32)), exif=exif)
    assert service.ask(files={"image": image, "mask": turned}).status_code == 200


def test_nothing_that_lies_in_a_file_is_warned_about(service):
    """Pillow warns of broken EXIF, which is nobody's business."""
    exif = Image.Exif()
    exif[0x010E] = "something"
    data = encoded(RGB, "JPEG", exif=exif)
    at = data.index(b"Exif\0\0")
    broken = data[: at + 16] + b"\xff" * 12 + data[at + 28 :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edited(service, broken)


def order(**options):
    given = {"image": PICTURE, "instruction": "make it night", "seeds": (3,), "steps": 1}
    return Order(**given | options)


def test_what_comes_of_an_order(tiny_editor):
    async def use():
        editing = EngineEditing(tiny_editor, EngineConfig())
        made = await editing.edit(order(seeds=(3, 4), steps=None, text_guidance_scale=2.0))
        shown = [each async for each in editing.stream(order(steps=4, previews=3))]
        await editing.close()
        return made, shown

    made, shown = asyncio.run(use())
    settings = tiny_editor.settings
    assert [(each.seed, each.steps, each.step) for each in made] == [(3, 2, 2), (4, 2, 2)]
    assert {each.text_guidance_scale for each in made} == {2.0}
    assert {each.image_guidance_scale for each in made} == {settings.image_guidance_scale}
    assert [(each.step, each.is_preview) for each in shown] == [
        (1, True),
        (2, True),
        (3, True),
        (4, False),
    ]
    asked = {"text_guidance_scale": 2.0, "image_guidance_scale": None}
    alone = tiny_editor.edit(PICTURE, "make it night", seed=4, **asked)
    difference = np.asarray(alone).astype(int) - opened(made[1].data).astype(int)
    assert np.abs(difference).max() <= 1


def test_an_order_that_is_given_up_frees_its_places(tiny_editor):
    async def use():
        editing = EngineEditing(tiny_editor, EngineConfig(batch_size=1))
        stream = editing.stream(order(steps=5000, previews=1000))
        assert (await anext(stream)).is_preview
        work = asyncio.create_task(editing.edit(order(seeds=(1, 2, 3), steps=5000)))
        while editing.engine.load[0] < 3:
            await asyncio.sleep(0.01)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        await stream.aclose()
        while editing.engine.load != (0, 0):  # the test's own deadline ends this
            await asyncio.sleep(0.01)
        await editing.close()

    asyncio.run(use())


def test_an_editor_is_exchanged_while_requests_run(tiny_editor):
    from ip2p_ray.editor import Editor
    from ip2p_ray.testing import tiny_stable_diffusion

    other = Editor(tiny_stable_diffusion(seed=1, in_channels=8), settings=tiny_editor.settings)

    async def use():
        editing = EngineEditing(tiny_editor, EngineConfig())
        begun = asyncio.create_task(editing.edit(order(steps=10)))
        while editing.engine.load == (0, 0) and not begun.done():
            await asyncio.sleep(0.001)
        await editing.exchange(other)
        pictures = [(await begun)[0].data, (await editing.edit(order(steps=10)))[0].data]
        assert await editing.ready()
        await editing.close()
        return pictures

    before, after = asyncio.run(use())
    alone = tiny_editor.edit(PICTURE, "make it night", seed=3, steps=10)
    assert np.abs(np.asarray(alone).astype(int) - opened(before).astype(int)).max() <= 1
    assert before != after
