"""One row at a time: what is wrong with it, its keys, its pictures, its group."""

import io
import itertools
import math
import struct
import zlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given as examples
from hypothesis import strategies as st
from PIL import Image

from ip2p_ray import own_pairs
from ip2p_ray.errors import ConfigError, ImageError
from ip2p_ray.filtering import Thresholds, rejection
from ip2p_ray.images import decode_image
from ip2p_ray.layouts import Given
from ip2p_ray.own_pairs import (
    Groups,
    OwnPairsConfig,
    check,
    fitted,
    pixel_digest,
    stored_picture,
)
from ip2p_ray.schema import SCORES, SIMILARITIES, own_triplet_key, triplet_key

CONFIG = OwnPairsConfig(min_side=16)


def pixels(seed=0, size=(32, 24)):
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(levels)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def turned(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, "JPEG", exif=exif)


def row(source=None, edited=None, instruction="make it red", **more):
    source = encoded(pixels(0)) if source is None else source
    edited = encoded(pixels(1)) if edited is None else edited
    return Given(place="a:1", source=source, edited=edited, instruction=instruction, **more)


def bomb():
    """A PNG file whose header promises 30,000 x 30,000 pixels."""
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        check_sum = zlib.crc32(name + content)
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", check_sum)
    return data


def test_a_good_row_gets_its_keys_and_keeps_its_pictures():
    found, (source, edited) = check(row(), CONFIG)
    assert found["reason"] is None
    assert (found["width"], found["height"]) == (32, 24)
    assert pixel_digest(source) == found["source_digest"] == pixel_digest(pixels(0))
    assert pixel_digest(edited) == found["edited_digest"]
    assert found["triplet_key"] == own_triplet_key(found["source_digest"], "make it red")
    assert found["caption"] is None
    assert {found[name] for name in SIMILARITIES} == {None}


def test_with_captions_the_triplet_is_that_of_the_texts():
    found, _ = check(row(caption=" a\n cat ", edited_caption="a red cat"), CONFIG)
    assert found["triplet_key"] == triplet_key("a cat", "make it red", "a red cat")
    half, _ = check(row(caption="a cat", edited_caption=" "), CONFIG)
    assert half["edited_caption"] is None
    assert half["triplet_key"] == own_triplet_key(half["source_digest"], "make it red")


def test_keys_are_of_pixels_and_not_of_files():
    plain, _ = check(row(), CONFIG)
    other, _ = check(row(encoded(pixels(0), "BMP"), encoded(pixels(1), "TIFF")), CONFIG)
    assert other["pair_key"] == plain["pair_key"]
    for changed in (row(instruction="make it blue"), row(edited=encoded(pixels(2)))):
        assert check(changed, CONFIG)[0]["pair_key"] != plain["pair_key"]


GOOD = encoded(pixels())


@pytest.mark.parametrize(
    ("given", "reason", "detail"),
    [
        (row(instruction=""), "empty_instruction", "''"),
        (row(instruction=" \n\x00"), "empty_instruction", "x00"),
        (row(instruction=None), "empty_instruction", "None"),
        (row(instruction=["a"]), "not_text", "['a']"),
        (row(unread="a:1: not a line of JSON"), "unreadable_row", "a:1: not a line of JSON"),
        (row(source=b"no picture"), "image_broken", "source: 10 bytes cannot be decoded"),
        (row(edited=GOOD[: len(GOOD) // 2]), "image_broken", "edited: "),
        (row(source=encoded(pixels(), "JPEG")[:-400]), "image_broken", "source: "),
        (row(source=b""), "image_broken", "source: 0 bytes"),
        (row(source=bomb()), "image_too_large", "far too many pixels"),
        (row(edited=bomb()), "image_too_large", "edited: "),
        (row(edited=encoded(pixels(1, (24, 32)))), "sizes_differ", "32 x 24 and 24 x 32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_is_said(given, reason, detail):
    found, pictures = check(given, CONFIG)
    assert pictures is None
    assert found["reason"] == reason
    assert reason in own_pairs.REASONS
    assert detail in found["detail"]
    assert "pair_key" not in found


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "1.png").write_bytes(GOOD)
    found, _ = check(row(source=tmp_path / "1.png", edited=tmp_path / "2.png"), CONFIG)
    assert found["reason"] == "image_missing"
    assert "2.png cannot be read" in found["detail"]
    for nothing in (tmp_path, tmp_path / "a\0b"):
        assert check(row(source=nothing), CONFIG)[0]["reason"] == "image_missing"
    none = Given(place="a", source=None, edited=None, instruction="do")
    assert check(none, CONFIG)[0]["detail"] == "source: there is none"


def test_a_file_too_large_to_be_a_picture_is_not_read(tmp_path):
    with (tmp_path / "1.png").open("wb") as file:
        file.truncate(own_pairs.MAX_BYTES + 1)  # sparse: it takes no room
    found, _ = check(row(source=tmp_path / "1.png"), CONFIG)
    assert found["reason"] == "image_too_large"


def test_small_pictures_are_refused_by_the_shorter_side():
    assert check(row(), OwnPairsConfig(min_side=25))[0]["reason"] == "image_too_small"
    assert check(row(), OwnPairsConfig(min_side=24))[0]["reason"] is None
    assert check(row(), OwnPairsConfig())[0]["detail"] == "32 x 24"


def test_sizes_are_compared_upright():
    upright, lying = pixels(0, (24, 32)), pixels(1, (32, 24))
    found, (_, edited) = check(row(encoded(upright), turned(lying, 6)), CONFIG)
    assert found["reason"] is None
    assert edited.size == (24, 32)
    digest = found["edited_digest"]
    stored = stored_picture(turned(lying, 6), digest=digest, config=CONFIG)["bytes"]
    assert pixel_digest(decode_image(stored)) == found["edited_digest"]


@pytest.mark.parametrize(
    ("data", "plain"),
    [
        (encoded(pixels(), "PNG"), True),
        (encoded(pixels(), "JPEG"), True),
        (turned(pixels(), 1), True),
        (turned(pixels(), 3), False),
        (encoded(pixels(), "WEBP", lossless=True), False),
        (encoded(pixels().convert("L"), "JPEG"), False),
        (encoded(pixels().convert("CMYK"), "JPEG"), False),
        (encoded(pixels().convert("RGBA"), "PNG"), False),
        (encoded(pixels().convert("P"), "PNG"), False),
        (encoded(pixels(), "PNG", transparency=(0, 0, 0)), False),
    ],
)
def test_only_what_would_read_differently_is_encoded_anew(data, plain):
    found, (source, _) = check(row(source=data), CONFIG)
    stored = stored_picture(data, digest=found["source_digest"], config=CONFIG)["bytes"]
    assert (stored == data) is plain
    with Image.open(io.BytesIO(stored)) as image:
        assert image.mode == "RGB"
        assert image.getexif().get(0x0112, 1) == 1
        assert pixel_digest(image) == pixel_digest(source)


def test_a_resolution_brings_both_pictures_to_it_and_leaves_those_that_have_it():
    config = OwnPairsConfig(min_side=16, resolution=16)
    found, (source, _) = check(row(), config)
    assert found["source_digest"] == pixel_digest(pixels(0)), "a key does not depend on it"
    digest = found["source_digest"]
    stored = stored_picture(encoded(pixels(0)), digest=digest, config=config)["bytes"]
    small = fitted(source, config)
    assert small.size == (16, 16)
    assert pixel_digest(decode_image(stored)) == pixel_digest(small)
    exact = encoded(pixels(0, (16, 16)), "JPEG")
    digest = pixel_digest(decode_image(exact))
    assert stored_picture(exact, digest=digest, config=config)["bytes"] == exact


def test_what_the_data_brought_along_is_kept():
    made_with = {"seed": 7, "self_replace": 0.5, "image_similarity": 0.8, "guidance_scale": True}
    found, _ = check(row(made_with=made_with | {"direction_similarity": "high"}), CONFIG)
    assert (found["seed"], found["self_replace"], found["image_similarity"]) == (7, 0.5, 0.8)
    assert (found["guidance_scale"], found["edited_caption_similarity"]) == (None, None)
    assert math.isnan(found["direction_similarity"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, 10**400, "0.3", True, [1]])
def test_a_similarity_that_is_there_but_no_number_reaches_no_threshold(value):
    found, _ = check(row(made_with={"direction_similarity": value}), CONFIG)
    assert found["reason"] is None
    scores = {name: found[name] for name in SIMILARITIES}
    assert rejection(scores, Thresholds(direction=-1)) == "direction_similarity"
    for nothing in ({}, {"direction_similarity": None}):
        found, _ = check(row(made_with=nothing), CONFIG)
        assert found["direction_similarity"] is None


def test_integers_fit_into_the_columns_of_floats():
    made_with = {"caption_similarity": 10**18, "guidance_scale": 16777217, "self_replace": 10**400}
    found, _ = check(row(made_with=made_with), CONFIG)
    names = list(made_with)
    schema = pa.schema([SCORES.field(name) for name in names])
    [stored] = pa.Table.from_pylist([{n: found[n] for n in names}], schema=schema).to_pylist()
    assert stored["caption_similarity"] == pytest.approx(1e18)
    assert (stored["guidance_scale"], stored["self_replace"]) == (16777216.0, None)


@pytest.mark.parametrize("seed", [1.5, 2**63, -(2**63) - 1, math.nan, "1", True])
def test_a_seed_that_is_no_integer_is_a_reason(seed):
    found, pictures = check(row(made_with={"seed": seed}), CONFIG)
    assert (found["reason"], pictures) == ("bad_seed", None)
    assert found["detail"] == f"{seed!r} is no integer of 64 bits"


@pytest.mark.parametrize("seed", [None, 0, 7, 2.0, 2**63 - 1, -(2**63)])
def test_a_seed_that_is_an_integer_is_kept(seed):
    found, _ = check(row(made_with={"seed": seed}), CONFIG)
    assert (found["reason"], found["seed"]) == (None, seed)


def test_a_picture_that_is_gone_meanwhile_is_told(tmp_path):
    with pytest.raises(ImageError, match="cannot be read"):
        stored_picture(tmp_path / "gone.png", digest="", config=CONFIG)


def test_a_picture_that_is_another_one_meanwhile_is_told():
    digest = pixel_digest(pixels(0))
    assert stored_picture(encoded(pixels(0)), digest=digest, config=CONFIG)
    with pytest.raises(ImageError, match="another picture"):
        stored_picture(encoded(pixels(1)), digest=digest, config=CONFIG)


@examples(st.lists(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=3), max_size=8))
def test_groups_are_connected_parts_in_any_order(joined):
    def parts(order):
        groups = Groups()
        for names in order:
            groups.join(names)
        return {name: groups.of(name) for name in "abcdefg"}

    found = parts(joined)
    assert found == parts(joined[::-1])
    sets = [{name} for name in "abcdefg"]
    for names in joined:
        touched = [part for part in sets if part & set(names)]
        sets = [part for part in sets if part not in touched] + [set().union(*touched)]
    for left, right in itertools.combinations("abcdefg", 2):
        together = any({left, right} <= part for part in sets)
        assert (found[left] == found[right]) is together


def test_groups_fall_into_splits_by_the_share():
    groups = Groups()
    for number in range(1000):
        groups.join([f"{number}", f"picture {number}"])
    splits = [groups.split(f"{number}", 0.2) for number in range(1000)]
    assert splits == [groups.split(f"picture {number}", 0.2) for number in range(1000)]
    assert 150 < splits.count("held_out") < 250


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="min_side is at least 1, got 0"):
        OwnPairsConfig(min_side=0)
    for resolution in (0, 7, 100):
        with pytest.raises(ConfigError, match="resolution is a multiple of 8"):
            OwnPairsConfig(resolution=resolution)
