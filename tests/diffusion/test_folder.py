from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from safetensors.torch import load_file, save_file

from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import ModelError
from ip2p_ray.testing import tiny_stable_diffusion, tiny_tokenizer

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_stable_diffusion().save(folder)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop("conv_in.weight")
    save_file(tensors, path, metadata={"format": "pt"})


def reshape_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors["conv_in.weight"] = torch.zeros(3, 3)
    save_file(tensors, path, metadata={"format": "pt"})


def set_schedule(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_schedule": "cubic"}))


def add_token(path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["newword"])
    tokenizer.save_pretrained(path)


def write_nonsense(path: Path) -> None:
    path.write_text("{ nonsense")


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("unet", shutil.rmtree, "has no unet/"),
    ("scheduler", shutil.rmtree, "has no scheduler/"),
    ("unet/config.json", Path.unlink, "unet of model"),
    (UNET, Path.unlink, "unet of model"),
    (UNET, cut, "unet of model"),
    (UNET, drop_tensor, "conv_in.weight"),
    (UNET, reshape_tensor, "unet of model"),
    ("vae/config.json", write_nonsense, "vae of model"),
    ("vae/diffusion_pytorch_model.safetensors", cut, "vae of model"),
    ("text_encoder/model.safetensors", cut, "text_encoder of model"),
    ("text_encoder/model.safetensors", Path.unlink, "text_encoder of model"),
    ("text_encoder/config.json", write_nonsense, "text_encoder of model"),
    ("tokenizer/tokenizer.json", Path.unlink, "tokenizer of model"),
    ("tokenizer/tokenizer.json", write_nonsense, "tokenizer of model"),
    ("tokenizer", add_token, "do not belong together"),
    ("scheduler/scheduler_config.json", Path.unlink, "scheduler of model"),
    ("scheduler/scheduler_config.json", write_nonsense, "scheduler of model"),
    ("scheduler/scheduler_config.json", set_schedule, "got 'cubic'"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "damage", "text"), DAMAGES)
def test_a_broken_folder_is_named_with_its_broken_part(
    name: str, damage: Callable[[Path], object], text: str, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    damage(folder / name)
    with pytest.raises(ModelError, match=text) as caught:
        StableDiffusion.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "nowhere"])
def test_a_missing_folder_is_named(source: str) -> None:
    with pytest.raises(ModelError, match=f"no model folder {source}"):
        StableDiffusion.load(source)


@pytest.mark.skipif(not HF_HUB_OFFLINE, reason="would ask the hub")
@pytest.mark.filterwarnings("ignore")
def test_an_unreachable_hub_id_is_named() -> None:
    with pytest.raises(ModelError, match=r"model someone/nothing \(no folder here"):
        StableDiffusion.load("someone/nothing")


def test_saving_replaces_a_folder_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    tiny_stable_diffusion(seed=0).save(folder)
    (folder / "stray.txt").write_text("old")
    second = tiny_stable_diffusion(seed=1)
    second.save(folder)
    assert StableDiffusion.load(folder).fingerprint() == second.fingerprint()
    assert not (folder / "stray.txt").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = tiny_stable_diffusion()
    model.save(folder)
    before = model.fingerprint()
    model.scheduler_config["unwritable"] = object()
    with pytest.raises(TypeError):
        model.save(folder)
    assert StableDiffusion.load(folder).fingerprint() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_has_worked_is_saved_as_one_that_has_not(tmp_path: Path) -> None:
    model = tiny_stable_diffusion()
    model.save(tmp_path / "before")
    model.encode_text(["make it night"])
    model.save(tmp_path / "after")
    names = [
        path.relative_to(tmp_path / "before") for path in (tmp_path / "before").rglob("*.json")
    ]
    assert len(names) > 4
    for name in names:
        before, after = (tmp_path / place / name for place in ("before", "after"))
        assert before.read_bytes() == after.read_bytes(), name
