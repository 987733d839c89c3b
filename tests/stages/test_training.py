import json

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline

from ip2p_ray import storage
from ip2p_ray.checkpoint import latest_checkpoint, load_checkpoint
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.editor import Editor
from ip2p_ray.latents import LatentDataset
from ip2p_ray.stages.training import read_metrics
from ip2p_ray.training.loop import start, train

pytestmark = pytest.mark.ray


def test_two_workers_train_what_one_process_trains(made):
    """The same run in this process, without Ray and without DDP."""
    config = made.preset.training
    model = StableDiffusion.load(made.preset.generator)
    state = start(model, config)
    losses = [
        metrics.loss
        for metrics in train(model, LatentDataset(made.uri("latents")), config, state=state)
    ]
    other = start(StableDiffusion.load(made.preset.generator), config)
    other.run["dataset"] = state.run["dataset"]
    load_checkpoint(latest_checkpoint(made.uri("checkpoints")), other)
    assert other.step == config.steps
    for ours, theirs in zip(state.unet.parameters(), other.unet.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)
    noted = read_metrics(made.uri("checkpoints"))
    assert [row["step"] for row in noted] == list(range(1, config.steps + 1))
    assert [row["loss"] for row in noted] == pytest.approx(losses, rel=1e-2)


def test_the_editor_is_a_folder_that_diffusers_loads(made):
    folder = made.folder / "editor"
    assert Editor.load(folder).settings == made.preset.editing
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
    assert pipeline.unet.config.in_channels == 2 * pipeline.vae.config.latent_channels


def test_the_manifest_says_what_was_trained(made):
    manifest = storage.read_manifest(made.uri("checkpoints"))
    assert manifest.config["steps"] == made.preset.training.steps
    assert manifest.models["generator"]


def test_nothing_of_ray_train_is_left(made):
    names = {path.name for path in (made.folder / "checkpoints").iterdir()}
    assert {name for name in names if name.startswith(".")} == set()
    assert len([name for name in names if name.startswith("step-")]) == 2


def test_notes_of_steps_that_are_taken_again_are_dropped(tmp_path):
    from ip2p_ray.stages.training import METRICS, _forget_after

    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (2, 4, 6)]
    (tmp_path / METRICS).write_text("".join(lines) + '{"step": 8, "lo', encoding="utf-8")
    _forget_after(str(tmp_path), 4)
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 4]
