"""A run in a bucket, as its workers have it; what Ray does with them is in test_training."""

import pickle
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from ip2p_ray import objects, storage
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.editor import Editor, EditSettings
from ip2p_ray.errors import ConfigError, StorageError
from ip2p_ray.latents import encode_pairs
from ip2p_ray.schema import LATENTS
from ip2p_ray.stages.training_run import (
    METRICS,
    Carried,
    Source,
    TrainingRun,
    export,
    forget_after,
    forget_here,
    note,
    noted_lines,
    restored,
    save,
)
from ip2p_ray.testing import FaultyWay, WayFaults, tiny_stable_diffusion
from ip2p_ray.training.loop import TrainConfig, train

STEPS = 6
PARTS = ("unet", "ema", "optimizer")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a generator with random weights."""
    folder = tmp_path_factory.mktemp("model") / "generator"
    tiny_stable_diffusion().save(folder)
    return folder


@pytest.fixture
def told(bucket, model, tmp_path):
    """A run of which everything lies in the bucket."""
    pictures = np.random.default_rng(0).integers(0, 256, (2, 6, 64, 64, 3), dtype=np.uint8)
    rows = [
        {
            "pair_key": f"pair {number}",
            "triplet_key": f"triplet {number}",
            "instruction": f"make it {number % 3}",
            "split": "train",
            **latents,
        }
        for number, latents in enumerate(encode_pairs(StableDiffusion.load(model), *pictures))
    ]
    for part in range(2):
        table = pa.Table.from_pylist(rows[part::2], schema=LATENTS)
        storage.write_shard(f"{bucket}/latents", f"part-{part}", table)
    storage.write_manifest(f"{bucket}/latents", storage.Manifest(dataset="latents", recipe="noise"))
    storage.upload(model, f"{bucket}/generator")
    return TrainingRun(
        config=TrainConfig(steps=STEPS, batch_size=2, learning_rate=1e-3),
        generator=f"{bucket}/generator",
        fingerprint="abc",
        recipe="abc",
        source=Source(uri=f"{bucket}/latents", cache=str(tmp_path / "cache")),
        data={"dataset": "latents", "rows": 6, "recipe": "noise"},
        out=f"{bucket}/run",
        editing=EditSettings(resolution=64),
        carried=Carried(save_every=2),
    )


def on_another_machine(told, tmp_path, number):
    return replace(told, source=replace(told.source, cache=str(tmp_path / f"cache-{number}")))


def trained(told, until=STEPS):
    """What the first worker does up to a step, at which it is killed; returns where it began."""
    model, state = restored(told, "cpu")
    began = state.step
    forget_after(told.here, began)
    data = told.source.open(model)
    for metrics in train(model, data.of("train"), told.config, micro_batch=2, state=state):
        note(told.here, {"step": metrics.step, "loss": metrics.loss})
        if told.carried.saves(metrics.step, STEPS):
            save(told, state)
        if metrics.step == until:
            break
    if until == STEPS:
        export(told, model, state)
        forget_here(told)
    return began


def weights(told):
    return {
        part: storage.read_bytes(
            storage.join(told.checkpoints, f"step-{STEPS:08d}", f"{part}.safetensors")
        )
        for part in PARTS
    }


@pytest.fixture
def undisturbed(told, tmp_path):
    """The same run in a folder."""
    here = replace(told, out=str(tmp_path / "here"))
    trained(here)
    return here


def test_lost_machines_leave_the_bytes_of_a_run_in_a_folder(told, undisturbed, tmp_path):
    machines = [on_another_machine(told, tmp_path, number) for number in range(4)]
    began = [
        trained(machine, until) for machine, until in zip(machines, (1, 3, 5, STEPS), strict=True)
    ]
    assert began == [0, 0, 2, 4]
    assert weights(told) == weights(undisturbed)
    assert noted_lines(told.checkpoints) == noted_lines(undisturbed.checkpoints)
    assert told.newest_step == undisturbed.newest_step == STEPS
    ours, theirs = (
        storage.read_bytes(storage.join(run.editor, "unet/diffusion_pytorch_model.safetensors"))
        for run in (told, undisturbed)
    )
    assert ours == theirs
    folder = tmp_path / "editor"
    storage.download(told.editor, folder)
    assert Editor.load(folder).settings == told.editing
    assert not machines[-1].here.parent.exists()


def test_a_machine_that_was_ahead_of_the_bucket_goes_back(told, undisturbed, tmp_path):
    trained(told, 3)
    objects.remove_below(told.checkpoints)
    trained(on_another_machine(told, tmp_path, 1), 2)  # another begins again
    assert trained(told) == 2
    assert weights(told) == weights(undisturbed)
    assert noted_lines(told.checkpoints) == noted_lines(undisturbed.checkpoints)


def test_faults_on_the_way_change_no_byte(told, undisturbed, bucket_endpoint, monkeypatch):
    faults = WayFaults(slow_down=0.05, hang_up=0.05, lost=0.05, cut=0.05)
    with FaultyWay(bucket_endpoint, faults) as way, monkeypatch.context() as other:
        other.setenv("AWS_ENDPOINT_URL", way.url)
        trained(told, 3)
        shutil.rmtree(told.source.cache)
        trained(told)
    assert weights(told) == weights(undisturbed)


def test_only_the_newest_checkpoints_are_kept_and_one_here(told):
    trained(replace(told, carried=replace(told.carried, keep=1)), 5)
    found = {found.name.split("/")[0] for found in objects.listing(told.checkpoints)}
    assert found == {METRICS, "step-00000004"}
    assert [path.name for path in told.here.glob("step-*")] == ["step-00000004"]


def test_a_bucket_that_refuses_ends_it_and_costs_no_checkpoint(told, bucket_endpoint, monkeypatch):
    trained(told, 2)
    refused = WayFaults(refusal=(403, "ExpiredToken"), methods=("PUT", "POST"))
    with FaultyWay(bucket_endpoint, refused) as way, monkeypatch.context() as other:
        other.setenv("AWS_ENDPOINT_URL", way.url)
        refuse = way.faults
        way.faults = WayFaults()
        model, state = restored(told, "cpu")
        steps = train(model, told.source.open(model), told.config, micro_batch=2, state=state)
        next(steps)
        way.faults = refuse
        with pytest.raises(StorageError, match="the credentials have expired; renew them"):
            save(told, state)
    assert told.newest_step == 2
    assert restored(told, "cpu")[1].step == 2


def test_checkpoints_of_another_run_are_not_gone_on_with(told):
    trained(told, 2)
    with pytest.raises(ConfigError, match="made differently"):
        restored(replace(told, recipe="other"), "cpu")


RESTORE = """
import pickle
import sys
from pathlib import Path
import torch
from ip2p_ray.stages.training_run import restored_alike

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
)
told = pickle.loads((folder / f"told-{rank}").read_bytes())
print(restored_alike(told, "cpu", rank=rank)[1].step)
torch.distributed.destroy_process_group()
"""


def test_all_go_back_where_one_finds_the_newest_broken_in_the_bucket(told, tmp_path):
    trained(told, 4)
    broken = storage.join(told.checkpoints, "step-00000004", "unet.safetensors")
    content = storage.read_bytes(broken)
    objects.write(broken, content[:-1] + bytes([content[-1] ^ 1]))
    assert restored(told, "cpu")[1].step == 4  # this machine has it still
    for rank, one in enumerate((told, on_another_machine(told, tmp_path, 1))):
        (tmp_path / f"told-{rank}").write_bytes(pickle.dumps(one))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RESTORE, tmp_path, str(rank)], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=250)[0] for rank in ranks] == ["2\n", "2\n"]
