"""Whatever people upload becomes upright 8-bit RGB, or a sentence that says why not."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ip2p_ray.errors import ConfigError, ImageError
from ip2p_ray.images import (
    decode_image,
    decode_stored,
    edit_size,
    encode_png,
    fit_image,
    to_pil,
    to_tensor,
    to_uint8,
)

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def picture(height=6, width=9):
    """Every pixel another colour."""
    values = np.arange(height * width * 3).reshape(height, width, 3) * 7 % 256
    return values.astype(np.uint8)


def pixels(data, **options):
    image = decode_image(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_png_round_trips_exactly():
    assert np.array_equal(pixels(encode_png(to_pil(picture()))), picture())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    upright = picture()
    # Source: the Exif standard's table; what a camera stores so that a viewer shows `upright`.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, 3),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(to_pil(stored), exif=exif)
    assert np.array_equal(pixels(data), upright)


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert pixels(encoded(image)).tolist() == [[[*RED], [*WHITE]]]
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 51))
    assert pixels(encoded(half)).tolist() == [[[204, 204, 204]]]
    grey = Image.new("LA", (1, 1), (0, 0))
    assert pixels(encoded(grey)).tolist() == [[[*WHITE]]]


def test_palettes_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 255])
    image.putpixel((1, 0), 1)
    assert pixels(encoded(image)).tolist() == [[[*RED], [0, 0, 255]]]
    assert pixels(encoded(image, transparency=1)).tolist() == [[[*RED], [*WHITE]]]
    assert pixels(encoded(image, "GIF", transparency=1)).tolist() == [[[*RED], [*WHITE]]]


def test_a_transparent_colour_of_an_rgb_image():
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), (1, 2, 3))
    assert pixels(encoded(image, transparency=(1, 2, 3))).tolist() == [[[*RED], [*WHITE]]]


def test_grey_and_black_and_white():
    assert pixels(encoded(Image.new("L", (1, 1), 77))).tolist() == [[[77, 77, 77]]]
    assert pixels(encoded(Image.new("1", (1, 1), 1))).tolist() == [[[*WHITE]]]


def test_sixteen_bits_are_scaled_and_not_cut():
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        decoded = pixels(encoded(Image.fromarray(values), kind))
        assert decoded[..., 0].tolist() == [[0, 1, 128, 255]], kind
        assert np.array_equal(decoded[..., 0], decoded[..., 2])


def test_cmyk():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    decoded = pixels(encoded(image, "JPEG", quality=100)).astype(int)
    assert np.abs(decoded - np.array(RED)).max() <= 3
    assert np.array_equal(pixels(encoded(image, "TIFF")), np.broadcast_to(RED, (8, 8, 3)))


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (2, 2), colour) for colour in (RED, (0, 0, 255))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(data)[0, 0].tolist() == [*RED]


def test_floating_point_is_refused():
    with pytest.raises(ImageError, match="save it as 8-bit"):
        decode_image(encoded(Image.new("F", (1, 1)), "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_file_cut_short_is_refused(kind):
    data = encoded(to_pil(picture(40, 40)), kind)
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x89PNG"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(ImageError, match=f"{len(data)} bytes cannot be decoded"):
        decode_image(data)


def png_header(width, height):
    """A PNG that claims a size and has no pixels behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    check = struct.pack(">I", zlib.crc32(chunk))
    first = struct.pack(">I", len(header)) + chunk + check
    return b"\x89PNG\r\n\x1a\n" + first + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.parametrize("side", [1009, 12_000, 60_000, 2**31 - 1])
def test_a_large_image_is_refused_by_its_header_alone(side):
    with pytest.raises(ImageError, match=r"at most 1000000 (pixels )?are accepted"):
        decode_image(png_header(side, side), max_pixels=1_000_000)


def test_an_image_of_just_the_allowed_size_passes():
    data = encode_png(to_pil(picture(6, 9)))
    assert decode_image(data, max_pixels=54).size == (9, 6)
    with pytest.raises(ImageError, match="9 x 6 = 54 pixels, at most 53"):
        decode_image(data, max_pixels=53)


def test_tensors_and_arrays_round_trip_every_value():
    array = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    tensor = to_tensor(to_pil(array))
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert (tensor.min(), tensor.max()) == (-1.0, 1.0)
    assert np.array_equal(to_uint8(tensor[None])[0], array)


def test_rows_columns_and_channels_keep_their_places():
    tensor = to_tensor(to_pil(picture()))
    assert tensor[2, 4, 7] == pytest.approx(picture()[4, 7, 2] / 127.5 - 1)
    assert np.array_equal(to_uint8(torch.stack([tensor, -tensor]))[0], picture())


def test_values_outside_are_clamped_and_others_rounded():
    values = torch.tensor([-9.0, 9.0, 0.9999, -0.997]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 255, 255, 0]
    assert to_uint8(values.to(torch.bfloat16)).dtype == np.uint8


NO_CAP = 10**12


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((500, 333), (576, 384)),
        ((3000, 400), (960, 128)),
        ((64, 2000), (64, 1984)),
        ((1920, 1080), (512, 320)),
        ((512, 512), (512, 512)),
        ((100, 100), (512, 512)),
    ],
)
def test_sizes_are_the_references(size, expected):
    assert edit_size(*size, resolution=512, multiple=64, max_pixels=NO_CAP) == expected


SIDES = st.integers(1, 20_000)


@given(SIDES, SIDES, st.integers(8, 1024), st.sampled_from([1, 8, 16, 64]), st.integers(64, 2**20))
def test_every_size_is_a_multiple_and_under_the_cap(width, height, resolution, multiple, cap):
    cap = max(cap, multiple**2)
    size = edit_size(width, height, resolution=resolution, multiple=multiple, max_pixels=cap)
    assert all(side >= multiple and side % multiple == 0 for side in size)
    assert size[0] * size[1] <= cap
    turned = edit_size(height, width, resolution=resolution, multiple=multiple, max_pixels=cap)
    assert turned == size[::-1]
    assert (size[0] >= size[1]) == (width >= height) or size[0] == size[1]


@given(st.integers(200, 5000), st.integers(200, 5000))
def test_the_cap_keeps_the_proportions(width, height):
    free = edit_size(width, height, resolution=4096, max_pixels=NO_CAP)
    capped = edit_size(width, height, resolution=4096, max_pixels=512 * 512)
    assert max(capped) / min(capped) == pytest.approx(max(free) / min(free), rel=0.2)


def test_a_cap_that_is_not_reached_changes_nothing():
    options = {"resolution": 512, "multiple": 64}
    free = edit_size(500, 333, max_pixels=NO_CAP, **options)
    assert edit_size(500, 333, max_pixels=576 * 384, **options) == free
    assert edit_size(500, 333, max_pixels=576 * 384 - 1, **options) == (512, 320)


def test_bad_sizes_are_refused():
    with pytest.raises(ConfigError, match="at least 1, got 0, 5, 512, 8"):
        edit_size(0, 5, resolution=512, max_pixels=NO_CAP)
    with pytest.raises(ConfigError, match="max_pixels is at least 64, got 63"):
        edit_size(5, 5, resolution=512, max_pixels=63)


def test_fitting_cuts_the_longer_side_equally():
    image = Image.new("RGB", (30, 10), RED)
    image.paste((0, 0, 255), (10, 0, 20, 10))
    fitted = fit_image(image, (10, 10))
    assert fitted.size == (10, 10)
    assert np.array_equal(np.asarray(fitted), np.broadcast_to((0, 0, 255), (10, 10, 3)))
    same = to_pil(picture())
    assert np.array_equal(np.asarray(fit_image(same, same.size)), picture())


@pytest.mark.parametrize(
    ("kind", "mode", "stored"),
    [
        ("PNG", "RGB", True),
        ("JPEG", "RGB", True),
        ("BMP", "RGB", False),
        ("PNG", "RGBA", False),
        ("PNG", "L", False),
        ("JPEG", "CMYK", False),
    ],
)
def test_files_that_read_the_same_everywhere_may_be_stored(kind, mode, stored):
    data = encoded(Image.fromarray(picture()).convert(mode), kind)
    image, may_be = decode_stored(data)
    assert may_be is stored
    assert image.tobytes() == decode_image(data).tobytes()


def test_a_picture_that_lies_on_its_side_may_not_be_stored():
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(Image.fromarray(picture()), "PNG", exif=exif)
        assert decode_stored(data)[1] is (orientation == 1)
