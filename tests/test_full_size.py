"""Every piece, one after another, on random weights in the shapes of Stable Diffusion 1.5.

The sizes that code could take for granted are the real ones: 77 tokens of 768 channels from twelve
text layers, an autoencoder of factor 8 with 4 channels, a UNet of 320, 640, 1280 and 1280 channels.
Reduced are the pictures, 64 pixels for 512, and the layers of each UNet block, one for two. That is
580 million weights for 860, whose training state (weights, gradients, two moments, an average, all
float32) is 12 GB for 17. The whole depth is in the slow tests of test_pairs, test_editor and
training/test_unet, which hold no optimizer.

Needs 12 GB of memory and 12 GB of disk, which it gives back, and some minutes.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from ip2p_ray.checkpoint import export_editor, load_checkpoint, save_checkpoint
from ip2p_ray.editor import Editor, EditRequest, EditSettings
from ip2p_ray.filtering import Thresholds
from ip2p_ray.images import to_pil, to_tensor
from ip2p_ray.latents import LatentDataset, encode_pairs
from ip2p_ray.pairs import (
    CandidateRequest,
    PairConfig,
    candidate_latents,
    generate_candidates,
)
from ip2p_ray.schema import LATENTS
from ip2p_ray.testing import stable_diffusion_1_5
from ip2p_ray.training.loop import Metrics, TrainConfig, start, train
from ip2p_ray.training.state import TrainState

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]
PIPELINE: Any = diffusers.StableDiffusionInstructPix2PixPipeline

SIZE = 64
CAPTION, INSTRUCTION, EDITED_CAPTION = "a red cat", "make the cat blue", "a blue cat"
PAIRS = PairConfig(
    resolution=SIZE, steps=2, candidates=1, thresholds=Thresholds(text=-1, image=-1, direction=-1)
)
REQUEST = CandidateRequest(
    triplet_key="cat",
    index=0,
    caption=CAPTION,
    edited_caption=EDITED_CAPTION,
    seed=7,
    self_replace=0.0,
    guidance_scale=7.5,
)
SETTINGS = EditSettings(steps=2, resolution=SIZE, max_pixels=SIZE * SIZE)


def digest(state: TrainState) -> str:
    """Of every weight, average and moment."""
    found = hashlib.blake2b()
    for part, tensors in state.tensors().items():
        for name, value in sorted(tensors.items()):
            found.update(f"{part} {name}".encode())
            found.update(value.flatten().numpy().data)
    return found.hexdigest()


@torch.no_grad()
def wipe(state: TrainState) -> None:
    """Nothing of the state is left."""
    for tensors in state.tensors().values():
        for value in tensors.values():
            value.zero_()
    state.step = 0


@dataclass(kw_only=True)
class Journey:
    """What the pieces made; the models themselves are gone, their memory is needed."""

    folder: Path
    text: Tensor
    decoded: Tensor
    candidates: dict[str, Tensor]
    """Latents of the source and edited picture, by how the second follows the first."""
    pictures: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    latent_shape: tuple[int, int, int]
    widened_difference: float
    metrics: list[Metrics]
    conv_in: list[Tensor]
    """The UNet's first weights before and after the step."""
    average: Tensor
    """The moving average of the same weights."""
    digests: list[str]
    """Of the state when saved and when loaded again."""
    step: int
    """The loaded state's."""
    conv_in_after_export: Tensor


@pytest.fixture(scope="module")
def journey() -> Iterator[Journey]:
    with TemporaryDirectory() as folder:
        found = travel(Path(folder))
        gc.collect()
        yield found


def travel(folder: Path) -> Journey:
    torch.manual_seed(0)
    model = stable_diffusion_1_5(layers_per_block=1)
    facts: dict[str, Any] = {"folder": folder}
    with torch.inference_mode():
        facts["text"] = model.encode_text(["", CAPTION])
        facts["decoded"] = model.decode(torch.randn(1, 4, 8, 8))
    following = replace(REQUEST, self_replace=1.0)
    crossing = replace(PAIRS, cross_replace=1.0)
    facts["candidates"] = {
        "not at all": candidate_latents(model, [REQUEST], PAIRS),
        "self-attention": candidate_latents(model, [following], PAIRS),
        "cross-attention": candidate_latents(model, [REQUEST], crossing),
    }
    facts["pictures"] = generate_candidates(model, [following], PAIRS)

    keys = {"pair_key": "pair", "triplet_key": "cat", "instruction": INSTRUCTION, "split": "train"}
    encoded = encode_pairs(model, *facts["pictures"])[0]
    pq.write_table(pa.Table.from_pylist([keys | encoded], schema=LATENTS), folder / "pair.parquet")
    dataset = LatentDataset(folder / "pair.parquet")
    facts["latent_shape"] = dataset.shape

    config = TrainConfig(steps=1, batch_size=1, dropout=0.0)
    narrow, wide = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    with torch.inference_mode():
        before = model.denoise(narrow, torch.tensor([5.0]), facts["text"][1:])
    state = start(model, config)
    with torch.inference_mode():
        after = model.denoise(narrow, torch.tensor([5.0]), facts["text"][1:], wide)
    facts["widened_difference"] = float((after - before).abs().max())

    untrained = model.unet.conv_in.weight.detach().clone()
    facts["metrics"] = list(train(model, dataset, config, state=state))
    facts["conv_in"] = [untrained, model.unet.conv_in.weight.detach().clone()]
    facts["average"] = state.ema.shadow["conv_in.weight"].clone()

    checkpoint = save_checkpoint(folder / "checkpoints", state)
    saved = digest(state)
    wipe(state)
    load_checkpoint(checkpoint, state)
    facts["digests"], facts["step"] = [saved, digest(state)], state.step

    export_editor(model, state.ema, folder / "editor", asdict(SETTINGS))
    facts["conv_in_after_export"] = model.unet.conv_in.weight.detach().clone()
    return Journey(**facts)


def test_text_becomes_77_rows_of_768_channels(journey: Journey) -> None:
    assert journey.text.shape == (2, 77, 768)
    assert bool(journey.text.isfinite().all())
    assert not torch.equal(journey.text[0], journey.text[1])


def test_latents_are_8_times_smaller_than_their_picture(journey: Journey) -> None:
    assert journey.decoded.shape == (1, 3, 64, 64)
    assert bool(journey.decoded.isfinite().all())
    assert journey.latent_shape == (4, 8, 8)


def test_candidates_follow_their_source_as_they_are_told(journey: Journey) -> None:
    sources, edited = zip(*journey.candidates.values(), strict=True)
    assert all(torch.equal(source, sources[0]) for source in sources)
    assert sources[0].shape == (4, 8, 8)
    assert all(bool(latents.isfinite().all()) for latents in edited)
    different = [*edited, sources[0]]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(different, 2))


def test_pictures_of_a_candidate_are_not_plain(journey: Journey) -> None:
    for picture in journey.pictures:
        assert picture.shape == (1, SIZE, SIZE, 3)
        assert picture.std() > 0


def test_the_wider_unet_is_the_narrow_one_before_its_first_step(journey: Journey) -> None:
    assert journey.widened_difference <= 1e-5
    assert journey.conv_in[0].shape == (320, 8, 3, 3)
    assert not journey.conv_in[0][:, 4:].any()


def test_one_step_of_training_reaches_the_new_channels_and_the_average(journey: Journey) -> None:
    [metrics] = journey.metrics
    assert (metrics.step, metrics.learning_rate) == (1, 1e-4)
    assert np.isfinite([metrics.loss, metrics.grad_norm]).all()
    assert metrics.grad_norm > 0
    before, after = journey.conv_in
    assert bool(after[:, 4:].any())
    averaged = torch.lerp(before, after, 1 - metrics.ema_decay)
    torch.testing.assert_close(journey.average, averaged)
    assert not torch.equal(journey.average, after)


def test_a_checkpoint_brings_back_every_number(journey: Journey) -> None:
    saved, loaded = journey.digests
    assert loaded == saved
    assert journey.step == 1


def test_the_export_holds_the_average_and_leaves_the_model_its_own(journey: Journey) -> None:
    path = journey.folder / "editor" / "unet" / "diffusion_pytorch_model.safetensors"
    with safe_open(path, "pt") as stored:
        assert torch.equal(stored.get_tensor("conv_in.weight"), journey.average)
    assert torch.equal(journey.conv_in_after_export, journey.conv_in[1])


def test_the_export_edits_here_as_in_diffusers(journey: Journey) -> None:
    source = to_pil(journey.pictures[0][0])
    got = edited_here(journey.folder / "editor", source)
    gc.collect()
    pipeline = PIPELINE.from_pretrained(journey.folder / "editor")
    expected = pipeline(
        INSTRUCTION,
        image=source,
        num_inference_steps=SETTINGS.steps,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images
    assert got.shape == (1, 4, 8, 8)
    assert float((got - expected).abs().max()) <= 1e-3


def edited_here(folder: Path, source: Image.Image) -> Tensor:
    """The edited latents of an editor whose pictures come out at their size."""
    editor = Editor.load(folder)
    assert editor.settings == SETTINGS
    picture = editor.edit(source, INSTRUCTION, seed=5)
    assert picture.size == (SIZE, SIZE)
    assert not torch.equal(to_tensor(picture), to_tensor(source))
    request = EditRequest(
        image=source,
        instruction=INSTRUCTION,
        seed=5,
        text_guidance_scale=SETTINGS.text_guidance_scale,
        image_guidance_scale=SETTINGS.image_guidance_scale,
    )
    return editor.edit_latents([source], [request], SETTINGS)
