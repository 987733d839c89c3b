import io
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.diffusion.noise import NoiseSchedule
from ip2p_ray.editor import Editor, EditRequest, EditSettings
from ip2p_ray.errors import ConfigError, ImageError, ModelError
from ip2p_ray.testing import (
    stable_diffusion_1_5,
    tiny_stable_diffusion,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
PIPELINE: Any = diffusers.StableDiffusionInstructPix2PixPipeline
SETTINGS = EditSettings(steps=2, resolution=16)


def picture(width: int = 16, height: int = 16, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def request(
    image: Image.Image, *, text: float = 7.5, keep: float = 1.5, seed: int = 5
) -> EditRequest:
    return EditRequest(
        image=image,
        instruction="make the cat blue",
        seed=seed,
        text_guidance_scale=text,
        image_guidance_scale=keep,
    )


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor(tiny_stable_diffusion(in_channels=8), settings=SETTINGS)


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


@pytest.mark.parametrize(
    ("prediction_type", "channels", "spacing"),
    [
        ("epsilon", 4, "linspace"),
        ("v_prediction", 4, "linspace"),
        ("v_prediction", 8, "linspace"),
        ("epsilon", 4, "trailing"),
    ],
)
def test_parity_with_diffusers(
    tmp_path: Path, prediction_type: str, channels: int, spacing: str
) -> None:
    model = tiny_stable_diffusion(
        prediction_type=prediction_type, latent_channels=channels, in_channels=2 * channels
    )
    model.scheduler_config["timestep_spacing"] = spacing
    Editor(model).save(tmp_path / "editor")
    pipeline = PIPELINE.from_pretrained(tmp_path / "editor")
    pipeline.set_progress_bar_config(disable=True)
    loaded = Editor.load(tmp_path / "editor")
    for (width, height), steps, text, keep in (
        ((16, 16), 4, 7.5, 1.5),
        ((24, 16), 2, 3.0, 1.0),
        ((16, 40), 2, 1.5, 2.2),
    ):
        image = picture(width, height)
        expected = pipeline(
            "make the cat blue",
            image=image,
            num_inference_steps=steps,
            guidance_scale=text,
            image_guidance_scale=keep,
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
        ).images
        settings = EditSettings(steps=steps)
        got = loaded.edit_latents([image], [request(image, text=text, keep=keep)], settings)
        assert (got - expected).abs().max().item() <= 1e-3


def test_parity_of_a_batch_with_diffusers(tmp_path: Path, editor: Editor) -> None:
    editor.save(tmp_path / "editor")
    pipeline = PIPELINE.from_pretrained(tmp_path / "editor")
    pipeline.set_progress_bar_config(disable=True)
    images = [picture(seed=seed) for seed in range(3)]
    expected = pipeline(
        ["make the cat blue"] * 3,
        image=images,
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2, 3)],
        output_type="pil",
    ).images
    got = editor.edit_batch(images, ["make the cat blue"] * 3, [1, 2, 3], steps=3)
    assert max(map(largest_difference, got, expected)) <= 1


def test_scales_mean_what_the_formula_says(editor: Editor) -> None:
    """One Euler step to zero noise is the guided denoised picture itself, for any scales."""
    model, image = editor.model, picture()
    settings = EditSettings(steps=1, sampler="euler")
    scales = [(0.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.5, 0.25), (7.5, 0.5), (-1.0, 1.5)]
    requests = [request(image, text=text, keep=keep) for text, keep in scales]
    got = editor.edit_latents([image] * len(scales), requests, settings)
    with torch.inference_mode():
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        mode = model.encode_image(pixels)[0]
        sigma = model.schedule.sigmas(1)[:1]
        x = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5))[None] * sigma
        text = model.encode_text(["", "make the cat blue"])
        none, kept, both = (
            model.denoise(x, sigma, words, condition)
            for words, condition in (
                (text[:1], torch.zeros_like(mode)),
                (text[:1], mode),
                (text[1:], mode),
            )
        )
    for row, (text_scale, image_scale) in enumerate(scales):
        expected = none + image_scale * (kept - none) + text_scale * (both - kept)
        assert torch.allclose(got[row], expected[0], rtol=1e-4, atol=1e-3)
    assert not torch.allclose(got[0], got[1], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m"])
def test_a_row_does_not_depend_on_its_neighbours(editor: Editor, sampler: Any) -> None:
    settings = EditSettings(steps=4, sampler=sampler)
    images = [picture(seed=seed) for seed in range(3)]
    requests = [
        request(image, text=2.0 + row, keep=0.5 + row / 2, seed=row)
        for row, image in enumerate(images)
    ]
    together = editor.edit_latents(images, requests, settings)
    for row in range(3):
        alone = editor.edit_latents(images[row : row + 1], requests[row : row + 1], settings)
        assert (alone[0] - together[row]).abs().max() <= 1e-5 * together.abs().max()


def test_same_seed_same_picture(editor: Editor) -> None:
    one, again, other = (editor.edit(picture(), "a boat", seed=seed) for seed in (1, 1, 2))
    assert one.tobytes() == again.tobytes() != other.tobytes()


def test_batches_of_mixed_sizes_keep_their_order() -> None:
    editor = Editor(tiny_stable_diffusion(in_channels=8), settings=SETTINGS, batch_size=2)
    sizes = [(16, 16), (32, 16), (16, 16), (16, 32), (16, 16), (32, 16)]
    images = [picture(*size, seed=row) for row, size in enumerate(sizes)]
    texts = ["a boat", "a red car", "", "snow", "at night", "the sea"]
    scales = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    got = editor.edit_batch(images, texts, range(6), text_guidance_scale=scales)
    for row, image in enumerate(images):
        alone = editor.edit(image, texts[row], seed=row, text_guidance_scale=scales[row])
        assert got[row].size == alone.size
        assert largest_difference(got[row], alone) <= 1


@pytest.mark.parametrize("instruction", ["", "  \n"])
def test_empty_instruction_returns_the_resized_picture(editor: Editor, instruction: str) -> None:
    image = picture(32, 32)
    got = editor.edit(image, instruction)
    assert got.size == (16, 16)
    assert got.tobytes() == editor.prepare(image, SETTINGS).tobytes()
    assert editor.edit(image, instruction, resolution=32).tobytes() == image.tobytes()


def test_nothing_to_edit(editor: Editor) -> None:
    assert editor.edit_batch([], [], []) == []


def test_sizes_are_multiples_with_a_cap(editor: Editor) -> None:
    assert editor.size_multiple == 4
    wide = editor.edit(picture(100, 30), "snow", resolution=50)
    assert wide.size == (52, 16)
    capped = editor.edit(picture(64, 64), "snow", resolution=64, max_pixels=300)
    assert capped.size == (16, 16)


def test_mode_and_orientation_are_handled(editor: Editor) -> None:
    upright = picture(16, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = io.BytesIO()
    upright.rotate(90, expand=True).save(stored, "PNG", exif=exif)
    expected = editor.edit(upright, "snow").tobytes()
    assert editor.edit(Image.open(stored), "snow").tobytes() == expected
    assert editor.edit(stored.getvalue(), "snow").tobytes() == expected
    assert editor.edit(upright.convert("RGBA"), "snow").tobytes() == expected


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I", "I;16", "HSV"])
def test_any_mode(editor: Editor, mode: str) -> None:
    grey = Image.new("L", (16, 16), 255)
    image = Image.new(mode, (16, 16), 65535) if mode.startswith("I") else grey.convert(mode)
    prepared = editor.prepare(image, SETTINGS)
    assert prepared.mode == "RGB"
    assert largest_difference(prepared, grey.convert("RGB")) <= 1


def test_transparency_lies_on_white(editor: Editor) -> None:
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert editor.prepare(clear, SETTINGS).getpixel((8, 8)) == (255, 255, 255)


def test_guidance_rescale_is_off_by_default_and_changes_the_picture(editor: Editor) -> None:
    plain = editor.edit(picture(), "snow", guidance_rescale=0.0)
    assert editor.edit(picture(), "snow").tobytes() == plain.tobytes()
    assert editor.edit(picture(), "snow", guidance_rescale=0.7).tobytes() != plain.tobytes()


@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": 0},
        {"steps": 2.0},
        {"steps": True},
        {"steps": "4"},
        {"text_guidance_scale": float("nan")},
        {"text_guidance_scale": "7"},
        {"image_guidance_scale": float("-inf")},
        {"image_guidance_scale": float("inf")},
        {"image_guidance_scale": True},
        {"image_guidance_scale": 10**400},
        {"guidance_rescale": 1.5},
        {"guidance_rescale": float("nan")},
        {"resolution": 0},
        {"max_pixels": 1},
        {"sampler": "ddim"},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 1.5},
        {"setps": 4},
    ],
)
def test_bad_settings(editor: Editor, arguments: dict[str, Any]) -> None:
    name = next(iter(arguments))
    with pytest.raises(ConfigError, match=f"{name}.*(got|there are)"):
        editor.edit(picture(), "snow", **arguments)


def test_numpy_numbers_are_numbers(editor: Editor) -> None:
    expected = editor.edit(picture(), "snow", seed=3, text_guidance_scale=2.5).tobytes()
    numpy: Any = np
    got = editor.edit(
        picture(), "snow", seed=numpy.int64(3), text_guidance_scale=numpy.float32(2.5)
    )
    assert got.tobytes() == expected


def test_bad_requests(editor: Editor) -> None:
    with pytest.raises(ConfigError, match="instruction is a text"):
        editor.edit(picture(), None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="image is a PIL image or bytes, got str"):
        editor.edit("cat.png", "snow")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="2 images but 1 values of instruction"):
        editor.edit_batch([picture(), picture()], ["snow"], [0, 1])
    with pytest.raises(ConfigError, match="1 images but 2 values of text_guidance_scale"):
        editor.edit_batch([picture()], ["snow"], [0], text_guidance_scale=[1.0, 2.0])
    with pytest.raises(ConfigError, match="text_guidance_scale is a finite number, got None"):
        editor.edit_batch([picture()], ["snow"], [0], text_guidance_scale=[None])  # type: ignore[list-item]
    with pytest.raises(ImageError, match="cannot be decoded"):
        editor.edit(b"no image", "snow")


def test_settings_travel_with_the_folder(tmp_path: Path, editor: Editor) -> None:
    editor.save(tmp_path / "editor")
    loaded = Editor.load(tmp_path / "editor")
    assert loaded.settings == SETTINGS
    edits = [each.edit(picture(), "snow", seed=3).tobytes() for each in (editor, loaded)]
    assert edits[0] == edits[1]
    (tmp_path / "editor" / "editor_defaults.json").unlink()
    assert Editor.load(tmp_path / "editor").settings == EditSettings()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"steps": 0}', ".*at least 1, got 0"),
        ('{"stops": 1}', ": no such setting 'stops'; there are steps, "),
        ("[]", ".*object"),
        ("{", ".*cannot be read"),
    ],
)
def test_broken_settings_name_the_file(
    tmp_path: Path, editor: Editor, content: str, told: str
) -> None:
    editor.save(tmp_path / "editor")
    (tmp_path / "editor" / "editor_defaults.json").write_text(content)
    with pytest.raises(ModelError, match=r"editor_defaults\.json" + told):
        Editor.load(tmp_path / "editor")


def test_a_generator_is_no_editor(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"takes 8 channels .* this one 4"):
        Editor(tiny_stable_diffusion())
    with pytest.raises(ModelError, match="nowhere"):
        Editor.load(tmp_path / "nowhere")


def test_defaults_are_the_papers() -> None:
    settings = EditSettings()
    assert (settings.steps, settings.sampler, settings.resolution) == (100, "euler_ancestral", 512)
    assert (settings.text_guidance_scale, settings.image_guidance_scale) == (7.5, 1.5)


@pytest.mark.slow
def test_parity_at_the_size_of_stable_diffusion_1_5() -> None:
    model = stable_diffusion_1_5(in_channels=8)
    editor, image = Editor(model), picture(64, 128)
    assert editor.size_multiple == 64
    pipeline = PIPELINE(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=diffusers.EulerAncestralDiscreteScheduler(**scheduler_arguments(model)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    expected = pipeline(
        "make the cat blue",
        image=image,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images
    got = editor.edit_latents([image], [request(image)], EditSettings(steps=3))
    assert (got - expected).abs().max().item() <= 1e-3


def scheduler_arguments(model: StableDiffusion) -> dict[str, Any]:
    return {k: v for k, v in model.scheduler_config.items() if not k.startswith("_")}


def test_zero_terminal_snr_with_trailing_steps() -> None:
    model = tiny_stable_diffusion(prediction_type="v_prediction", in_channels=8)
    model.scheduler_config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    model.schedule = NoiseSchedule.from_config(model.scheduler_config)
    image = picture()
    latents = Editor(model).edit_latents([image], [request(image)], SETTINGS)
    assert bool(latents.isfinite().all())


@pytest.mark.parametrize(("mode", "premultiplied"), [("LA", "La"), ("RGBA", "RGBa")])
def test_premultiplied_pictures_are_edited(editor, mode, premultiplied):
    image = Image.new(mode, (16, 16)).convert(premultiplied)
    assert editor.edit(image, "x", steps=1).mode == "RGB"


def test_a_picture_without_pixels_and_a_text_that_is_none_are_refused(editor):
    with pytest.raises(ImageError, match="no pixels: 0 x 4"):
        editor.edit(Image.new("RGB", (0, 4)), "x")
    with pytest.raises(ConfigError, match="no Unicode text"):
        editor.edit(Image.new("RGB", (16, 16)), "\ud800")
