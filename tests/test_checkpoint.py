import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from ip2p_ray.checkpoint import (
    export_editor,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    set_aside_broken,
    write_checkpoint,
)
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import ConfigError, ModelError
from ip2p_ray.testing import killed_at, tiny_stable_diffusion
from ip2p_ray.training.ema import Ema
from ip2p_ray.training.state import TrainState

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def new_state(steps: int = 0, *, width: int = 3, seed: int = 0) -> TrainState:
    """A state of a module of a few weights, some optimizer steps on."""
    torch.manual_seed(seed)
    module = nn.Linear(width, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    state = TrainState(
        unet=module, optimizer=optimizer, ema=Ema(module, 0.9), run={"seed": 1, "batch_size": 4}
    )
    for _ in range(steps):
        advance(state)
    return state


def advance(state: TrainState) -> None:
    state.unet(torch.ones(1, 3) * (state.step + 1)).square().sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.ema.update(state.unet)
    state.step += 1


def contents(state: TrainState) -> Any:
    tensors = state.tensors()
    return {
        f"{part} {name}": (value.shape, value.numpy().tobytes())
        for part in tensors
        for name, value in tensors[part].items()
    }


@pytest.mark.parametrize("steps", [0, 3])
def test_round_trip_and_the_steps_after_it(tmp_path: Path, steps: int) -> None:
    state = new_state(steps)
    folder = save_checkpoint(tmp_path, state)
    assert folder == latest_checkpoint(tmp_path) == tmp_path / f"step-{steps:08}"
    other = new_state(seed=5)
    load_checkpoint(folder, other)
    assert contents(other) == contents(state)
    assert other.facts() == state.facts()
    for each in (state, other):
        advance(each)
    assert contents(other) == contents(state)


def test_a_whole_model(tmp_path: Path) -> None:
    model = tiny_stable_diffusion(in_channels=8)
    unet = nn.Module.to(model.unet, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(unet.parameters(), fused=True)
    for parameter in unet.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    ema = Ema(unet, 0.9)
    state = TrainState(unet=unet, optimizer=optimizer, ema=ema, step=1, run={})
    save_checkpoint(tmp_path, state)
    other = tiny_stable_diffusion(seed=3, in_channels=8).unet
    nn.Module.to(other, memory_format=torch.channels_last)
    restored = TrainState(
        unet=other,
        optimizer=torch.optim.AdamW(other.parameters(), fused=True),
        ema=Ema(other, 0.9),
        run={},
    )
    load_checkpoint(tmp_path / "step-00000001", restored)
    assert contents(restored) == contents(state)
    weight = other.conv_in.weight
    moment = restored.optimizer.state[weight]["exp_avg"]
    assert weight.stride() == moment.stride() == model.unet.conv_in.weight.stride()


def test_nothing_is_pickled(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, new_state(1))
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "checksums.json",
        "ema.safetensors",
        "optimizer.safetensors",
        "state.json",
        "unet.safetensors",
    ]


def test_keeps_the_newest(tmp_path: Path) -> None:
    state = new_state()
    for _ in range(4):
        advance(state)
        save_checkpoint(tmp_path, state, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    save_checkpoint(tmp_path, new_state(5), keep=None)
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ConfigError, match="keep is at least 1"):
        save_checkpoint(tmp_path, state, keep=0)


def test_the_one_just_written_is_never_removed(tmp_path: Path) -> None:
    for step in (8, 9):
        save_checkpoint(tmp_path, new_state(step))
    written = save_checkpoint(tmp_path, new_state(2), keep=1)
    assert written.is_dir()


def test_saving_a_step_twice_leaves_the_first(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, new_state(2))
    stamp = (folder / "unet.safetensors").stat().st_mtime_ns
    assert save_checkpoint(tmp_path, new_state(2)) == folder
    assert (folder / "unet.safetensors").stat().st_mtime_ns == stamp


def test_half_written_ones_are_passed_over_and_replaced(tmp_path: Path) -> None:
    good = save_checkpoint(tmp_path, new_state(1))
    for name in ("ema.safetensors", "checksums.json"):
        broken = save_checkpoint(tmp_path, new_state(2))
        (broken / name).write_bytes((broken / name).read_bytes()[:-5])
        assert latest_checkpoint(tmp_path) == good
        with pytest.raises(ModelError, match="step-00000002"):
            load_checkpoint(broken, new_state())
        (broken / name).unlink()
        assert latest_checkpoint(tmp_path) == good
        with pytest.raises(ModelError, match="step-00000002"):
            load_checkpoint(broken, new_state())
    assert latest_checkpoint(save_checkpoint(tmp_path, new_state(2)).parent) == broken
    assert latest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", ["unet.safetensors", "state.json"])
def test_changed_bytes_are_refused_and_change_nothing(tmp_path: Path, name: str) -> None:
    folder = save_checkpoint(tmp_path, new_state(1))
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(data)
    state = new_state(seed=4)
    before = contents(state)
    with pytest.raises(ModelError, match=f"{name} differs from its checksum"):
        load_checkpoint(folder, state)
    assert contents(state) == before


def test_another_model_or_run_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, new_state(1))
    wide = new_state(width=5)
    before = contents(wide)
    with pytest.raises(ModelError, match=r"first weight \(\(2, 3\) saved, \(2, 5\) here\)"):
        load_checkpoint(folder, wide)
    assert contents(wide) == before
    other = new_state()
    other.run["seed"] = 2
    with pytest.raises(ConfigError, match="seed it began with: 1, now 2"):
        load_checkpoint(folder, other)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_killed_at_any_file_operation(tmp_path: Path) -> None:
    first, second = new_state(1), new_state(2)
    expected = {1: contents(first), 2: contents(second)}
    root = tmp_path / "run"
    steps, killed, event = [], True, 0
    while killed:
        save_checkpoint(root, first)
        killed = killed_at(event, lambda: save_checkpoint(root, second, keep=1))
        latest = latest_checkpoint(root)
        assert latest is not None
        found = new_state()
        load_checkpoint(latest, found)
        assert contents(found) == expected[found.step]
        steps.append(found.step)
        save_checkpoint(root, second, keep=1)
        assert [path.name for path in root.iterdir()] == ["step-00000002"]
        shutil.rmtree(root)
        event += 1
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}
    assert event > 20, event


def test_into_a_folder_of_the_callers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, new_state(2))
    state = new_state()
    load_checkpoint(tmp_path, state)
    assert state.step == 2


def averaged_editor() -> tuple[StableDiffusion, Ema]:
    model = tiny_stable_diffusion(in_channels=8)
    ema = Ema(model.unet, 0.9)
    with torch.no_grad():
        for parameter in model.unet.parameters():
            parameter.add_(1.0)
    return model, ema


def test_export_loads_in_diffusers_with_the_averaged_weights(tmp_path: Path) -> None:
    model, ema = averaged_editor()
    own = model.unet.conv_in.weight.clone()
    export_editor(model, ema, tmp_path / "editor", {"steps": 3})
    assert torch.equal(model.unet.conv_in.weight, own)
    pipeline_class: Any = diffusers.StableDiffusionInstructPix2PixPipeline
    pipeline = pipeline_class.from_pretrained(tmp_path / "editor")
    for name, value in pipeline.unet.named_parameters():
        assert torch.equal(value, ema.shadow[name])
    assert json.loads((tmp_path / "editor" / "editor_defaults.json").read_text()) == {"steps": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["editor"]


def test_export_without_an_average_replaces_an_older_one(tmp_path: Path) -> None:
    model, ema = averaged_editor()
    export_editor(model, ema, tmp_path / "editor", {"steps": 3})
    export_editor(model, None, tmp_path / "editor", dtype=torch.float16)
    loaded = StableDiffusion.load(tmp_path / "editor")
    expected = model.unet.conv_in.weight.half().float()
    assert torch.equal(loaded.unet.conv_in.weight, expected)
    assert not (tmp_path / "editor" / "editor_defaults.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["editor"]


def test_a_failed_export_leaves_the_older_one(tmp_path: Path) -> None:
    model, ema = averaged_editor()
    export_editor(model, None, tmp_path / "editor")
    own = model.unet.conv_in.weight.clone()
    with pytest.raises(TypeError):
        export_editor(model, ema, tmp_path / "editor", {"steps": object()})
    assert torch.equal(model.unet.conv_in.weight, own)
    assert torch.equal(StableDiffusion.load(tmp_path / "editor").unet.conv_in.weight, own)
    assert [path.name for path in tmp_path.iterdir()] == ["editor"]


def damaged(folder: Path) -> None:
    path = folder / "ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_broken_checkpoint_is_set_aside_for_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, new_state(step), keep=3)
    assert set_aside_broken(tmp_path) == []
    damaged(tmp_path / "step-00000003")
    assert set_aside_broken(tmp_path) == [tmp_path / "broken-step-00000003"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000002"
    save_checkpoint(tmp_path, new_state(3), keep=3)
    assert set_aside_broken(tmp_path) == []
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000003"


def test_nothing_is_set_aside_where_no_checkpoint_is_good(tmp_path: Path) -> None:
    assert set_aside_broken(tmp_path / "none") == []
    damaged(save_checkpoint(tmp_path, new_state(1)))
    with pytest.raises(ModelError, match=r"every checkpoint.*delete the folder"):
        set_aside_broken(tmp_path)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000001"


LIMITED = """
import resource
import sys
from pathlib import Path

from ip2p_ray.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from tests.test_checkpoint import new_state

root, limit = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    save_checkpoint(root, new_state(2), keep=1)
except Exception as error:
    print(type(error).__name__)
    sys.exit(3)
"""


@pytest.mark.parametrize("limit", [0, 100, 300])
def test_a_disk_without_room_never_costs_the_one_before(tmp_path: Path, limit: int) -> None:
    """The limit is the system's own on a file's size: every larger write fails."""
    root = tmp_path / "run"
    first = new_state(1)
    save_checkpoint(root, first)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(root), str(limit)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout.split()[-1] in ("OSError", "SafetensorError")
    assert [path.name for path in root.iterdir()] == ["step-00000001"]
    found = new_state()
    load_checkpoint(root / "step-00000001", found)
    assert contents(found) == contents(first)
    save_checkpoint(root, new_state(2), keep=1)
    assert latest_checkpoint(root) == root / "step-00000002"
