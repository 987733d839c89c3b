import contextlib
import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import ray.train
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline

from ip2p_ray import presets, storage
from ip2p_ray.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.editor import Editor
from ip2p_ray.errors import Ip2pError, StageError
from ip2p_ray.latents import LatentDataset
from ip2p_ray.stages.run import Resources
from ip2p_ray.stages.training import persist, read_metrics, train_editor
from ip2p_ray.stages.training_run import METRICS, forget_after, note
from ip2p_ray.testing import killed_at
from ip2p_ray.training.ema import Ema
from ip2p_ray.training.loop import start, train
from ip2p_ray.training.state import TrainState

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


def test_a_deleted_editor_is_exported_again_without_training(made, tmp_path):
    """The checkpoints are whole, so nothing is trained; Ray is not even asked."""
    shutil.copytree(made.folder / "checkpoints", tmp_path / "checkpoints")
    preset = made.preset

    def again():
        return train_editor(
            made.uri("latents"),
            str(tmp_path),
            preset.training,
            generator=preset.generator,
            editing=preset.editing,
            models=presets.fingerprints(preset),
            resources=Resources(),
        )

    again()
    weights = "unet/diffusion_pytorch_model.safetensors"
    for name in (weights, "editor_defaults.json", "model_index.json"):
        there = (made.folder / "editor" / name).read_bytes()
        assert (tmp_path / "editor" / name).read_bytes() == there
    shutil.rmtree(tmp_path / "editor")
    shutil.rmtree(latest_checkpoint(tmp_path / "checkpoints"))
    with pytest.raises(StageError, match="has lost its last checkpoint"):
        again()


def test_a_loss_that_is_not_finite_ends_training_in_one_sentence(made, tmp_path):
    with pytest.raises(Ip2pError, match=r"the loss is .* lower learning_rate"):
        train_editor(
            made.uri("latents"),
            str(tmp_path),
            replace(made.preset.training, learning_rate=1e30, warmup_steps=0, max_grad_norm=None),
            generator=made.preset.generator,
            editing=made.preset.editing,
            models=presets.fingerprints(made.preset),
            resources=Resources(actors=1, cpus=1.0),
        )


def lost(failures):
    return ray.train.WorkerGroupError("a worker failed", failures)


@pytest.mark.parametrize(
    ("error", "raised", "count"),
    [
        (lost({0: RuntimeError("peer"), 1: Ip2pError("the loss is nan")}), Ip2pError, 1),
        (lost({1: ray.exceptions.RayActorError()}), ray.train.WorkerGroupError, 3),
        (ZeroDivisionError(), ZeroDivisionError, 1),
    ],
)
def test_only_what_another_attempt_may_mend_is_tried_again(error, raised, count):
    tried = []

    def work():
        tried.append(1)
        raise error

    with pytest.raises(raised):
        persist(work)
    assert len(tried) == count


def test_the_work_is_done_once_a_lost_worker_is_back():
    tried = []

    def work():
        tried.append(1)
        if len(tried) == 1:
            raise lost({0: ray.exceptions.RayActorError()})

    persist(work)
    assert len(tried) == 2


def train_workers():
    """Process ids of Ray Train's workers below this process."""
    parents, workers = {}, []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            stat = (process / "stat").read_text()
            parents[int(process.name)] = int(stat.rpartition(")")[2].split()[1])
            if b"RayTrainWorker" in (process / "cmdline").read_bytes():
                workers.append(int(process.name))

    def is_ours(pid):
        return pid == os.getpid() or (pid in parents and is_ours(parents[pid]))

    return [pid for pid in workers if is_ours(pid)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux only")
def test_training_goes_on_when_a_worker_is_killed(made, tmp_path):
    config = replace(made.preset.training, steps=36)
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(
            train_editor,
            made.uri("latents"),
            str(tmp_path),
            config,
            generator=made.preset.generator,
            editing=made.preset.editing,
            models=presets.fingerprints(made.preset),
            resources=Resources(actors=2, cpus=1.0),
        )
        while latest_checkpoint(tmp_path / "checkpoints") is None:
            assert not training.done(), training.result()
            time.sleep(0.1)
        os.kill(train_workers()[-1], signal.SIGKILL)
        training.result()
    noted = read_metrics(tmp_path / "checkpoints")
    assert [row["step"] for row in noted] == list(range(3, 37, 3))
    assert Editor.load(tmp_path / "editor").settings == made.preset.editing


def test_notes_of_steps_that_are_taken_again_are_dropped(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (2, 4, 6)]
    (tmp_path / METRICS).write_text("".join(lines) + '{"step": 8, "lo', encoding="utf-8")
    forget_after(str(tmp_path), 4)
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 4]


def state_at(step):
    torch.manual_seed(0)
    unet = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(unet.parameters())
    return TrainState(unet=unet, optimizer=optimizer, ema=Ema(unet, 0.9), step=step, run={})


def test_no_kill_leaves_a_gap_in_the_loss_curve(tmp_path):
    states = {step: state_at(step) for step in (1, 2, 3)}

    def saved(step):
        note(tmp_path, {"step": step, "loss": 1.0})
        save_checkpoint(tmp_path, states[step])

    def go_on(step):
        forget_after(tmp_path, step)
        for later in range(step + 1, 4):
            saved(later)

    reached, killed, event = set(), True, 0
    while killed:
        saved(1)
        killed = killed_at(event, lambda: go_on(1))
        found = int(latest_checkpoint(tmp_path).name.removeprefix("step-"))
        reached.add(found)
        go_on(found)
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        event += 1
    assert reached == {1, 2, 3}
