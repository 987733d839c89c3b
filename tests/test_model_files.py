"""Every loader of models against pickles and code that someone has put into a folder."""

import json
import shutil
from contextlib import suppress

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from ip2p_ray.checkpoint import load_checkpoint, save_checkpoint
from ip2p_ray.clip import Clip
from ip2p_ray.diffusion.folder import read_vae
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.dino import Dino
from ip2p_ray.editor import Editor
from ip2p_ray.errors import ModelError
from ip2p_ray.miniature.fit import FitConfig, fit, read_state
from ip2p_ray.miniature.weights import load_editor
from ip2p_ray.model_files import require_safetensors
from ip2p_ray.training.ema import Ema
from ip2p_ray.training.state import TrainState
from ip2p_ray.triplets.local_writer import LocalWriter
from tests.planting import pickled

RUNS = "which can run code"


@pytest.fixture
def marker(tmp_path):
    """Made by whoever unpickles; nobody may."""
    place = tmp_path / "marker"
    yield place
    assert not place.exists()


@pytest.fixture
def weights(tiny_weights, tmp_path):
    """The tiny models, to be spoilt; a DINO is with them."""
    folder = tmp_path / "weights"
    shutil.copytree(tiny_weights, folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = ViTModel(ViTConfig(**sizes, intermediate_size=32, image_size=224, patch_size=56))
    vit.save_pretrained(folder / "dino")
    return folder


LOADERS = {
    "generator/unet": lambda weights: StableDiffusion.load(weights / "generator"),
    "generator/vae": lambda weights: StableDiffusion.load(weights / "generator"),
    "generator/text_encoder": lambda weights: StableDiffusion.load(weights / "generator"),
    "generator/vae alone": lambda weights: read_vae(str(weights / "generator/vae")),
    "editor/unet": load_editor,
    "judge": lambda weights: Clip.load(weights / "judge"),
    "writer": lambda weights: LocalWriter.load(weights / "writer"),
    "dino": lambda weights: Dino.load(weights / "dino"),
}
"""By the folder of its weights: what reads them."""

NAMES = {"generator/text_encoder": "pytorch_model.bin", "judge": "open_clip_pytorch_model.bin"}
NAMES |= {"writer": "pytorch_model.bin", "dino": "pytorch_model.bin"}


def spoilt(weights, place):
    """(folder, its safetensors, the name of a pickle that its library knows)."""
    folder = weights / place.split()[0]
    [safe] = folder.glob("*.safetensors")
    return folder, safe, NAMES.get(place, "diffusion_pytorch_model.bin")


def test_the_plant_works(tmp_path):
    """What the other tests refuse does run something, where it is loaded carelessly."""
    (tmp_path / "a.bin").write_bytes(pickled(tmp_path / "made", 2))
    with pytest.raises(Exception, match="magic number"):
        torch.load(tmp_path / "a.bin", weights_only=False)
    assert (tmp_path / "made").is_dir()


@pytest.mark.parametrize("place", LOADERS)
def test_whole_folders_are_loaded(weights, place):
    assert LOADERS[place](weights)


@pytest.mark.parametrize("place", LOADERS)
def test_a_pickle_in_the_place_of_safetensors_is_refused(weights, marker, place):
    folder, safe, name = spoilt(weights, place)
    safe.unlink()
    (folder / name).write_bytes(pickled(marker, 2))
    # the miniature's own folder is known file by file
    told = "lacks editor/unet/" if place == "editor/unet" else f"{name}, {RUNS}"
    with pytest.raises(ModelError, match=told) as raised:
        LOADERS[place](weights)
    assert str(weights) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("place", LOADERS)
def test_a_pickle_under_the_name_of_safetensors_is_refused(weights, marker, place):
    _, safe, _ = spoilt(weights, place)
    safe.write_bytes(pickled(marker, 2))
    with pytest.raises(ModelError):
        LOADERS[place](weights)


@pytest.mark.parametrize("place", LOADERS)
def test_a_pickle_beside_safetensors_is_not_read(weights, marker, place):
    folder, _, name = spoilt(weights, place)
    (folder / name).write_bytes(pickled(marker, 2))
    assert LOADERS[place](weights)


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "../evil.safetensors", 3])
@pytest.mark.parametrize(
    "place", [name for name in LOADERS if name not in ("judge", "editor/unet")]
)
def test_an_index_names_safetensors_of_its_folder_only(weights, marker, place, shard):
    folder, safe, _ = spoilt(weights, place)
    index = folder / f"{safe.name}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"x": shard}}))
    for path in (folder / "pytorch_model.bin", folder.parent / "evil.safetensors"):
        path.write_bytes(pickled(marker, 2))
    safe.unlink()
    with pytest.raises(ModelError, match=r"index\.json names"):
        LOADERS[place](weights)


def test_a_clip_folder_is_read_from_safetensors_whatever_else_open_clip_would_prefer(
    weights, marker
):
    """Of these two it takes the pickle."""
    judge = weights / "judge"
    (judge / "open_clip_model.safetensors").rename(judge / "model.safetensors")
    (judge / "open_clip_pytorch_model.bin").write_bytes(pickled(marker, 2))
    with pytest.raises(ModelError, match=f"open_clip_pytorch_model.bin, {RUNS}"):
        Clip.load(judge)


@pytest.mark.parametrize("name", ["transformers_weights", "auto_map"])
@pytest.mark.parametrize("place", ["writer", "dino", "generator/text_encoder"])
def test_settings_cannot_name_a_pickle_or_code(weights, marker, place, name):
    """transformers reads both from a model's config.json."""
    folder, _, pickle = spoilt(weights, place)
    (folder / pickle).write_bytes(pickled(marker, 2))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    told = json.loads((folder / "config.json").read_text())
    told[name] = pickle if name == "transformers_weights" else dict.fromkeys(AUTO, "evil.Evil")
    (folder / "config.json").write_text(json.dumps(told))
    with suppress(ModelError):  # or it loads, by what the library itself knows
        LOADERS[place](weights)


AUTO = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")


@pytest.mark.parametrize("place", ["writer", "judge", "generator/tokenizer"])
def test_a_tokenizer_cannot_bring_code(weights, marker, place):
    folder = weights / place
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    told["tokenizer_class"] = "Evil"
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    with suppress(ModelError):
        LOADERS.get(place, LOADERS["generator/unet"])(weights)


def test_code_of_a_clip_folder_is_refused_not_asked_about(weights):
    told = json.loads((weights / "judge/tokenizer_config.json").read_text())
    told["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    (weights / "judge/tokenizer_config.json").write_text(json.dumps(told))
    with pytest.raises(ModelError, match=r"names code of its own \(auto_map\), which is not run"):
        Clip.load(weights / "judge")


@pytest.mark.parametrize("place", ["writer", "dino", "generator/text_encoder"])
def test_an_adapter_is_refused_since_it_names_another_model(weights, marker, place):
    folder = weights / place
    (folder / "adapter_model.bin").write_bytes(pickled(marker, 2))
    told = {"base_model_name_or_path": "someone/else", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(ModelError, match="is an adapter"):
        LOADERS[place](weights)


@pytest.mark.parametrize(
    "changes",
    [
        {"unet": ["my_unet", "MyUNet"]},
        {"scheduler": "evil"},
        {"_class_name": ["pipeline", "MyPipeline"]},
    ],
)
@pytest.mark.parametrize("load", [StableDiffusion.load, Editor.load])
def test_a_pipeline_of_its_own_is_refused(weights, marker, load, changes):
    folder = weights / "generator"
    (folder / "unet" / "my_unet.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    (folder / "pipeline.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    told = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**told, **changes}))
    with pytest.raises(ModelError, match=r"names code of its own in model_index\.json"):
        load(folder)


def state():
    module = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    return TrainState(unet=module, optimizer=optimizer, ema=Ema(module, 0.9), run={})


@pytest.mark.parametrize("part", ["unet", "ema", "optimizer"])
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_a_checkpoint_with_a_pickle_is_not_whole(tmp_path, marker, part, suffix):
    folder = save_checkpoint(tmp_path, state())
    safe = folder / f"{part}.safetensors"
    safe.with_suffix(suffix).write_bytes(pickled(marker, 2))
    load_checkpoint(folder, state())
    sums = json.loads((folder / "checksums.json").read_text())
    sums[f"{part}{suffix}"] = sums.pop(safe.name)
    (folder / "checksums.json").write_text(json.dumps(sums))
    safe.unlink()
    with pytest.raises(ModelError, match=f"has no {part}.safetensors"):
        load_checkpoint(folder, state())


def test_the_miniatures_own_state_is_read_as_tensors_only(tmp_path, marker):
    (tmp_path / "a.pt").write_bytes(pickled(marker, 2))
    with pytest.raises(ModelError, match=r"a\.pt cannot be read") as raised:
        read_state(tmp_path / "a.pt")
    assert "\n" not in str(raised.value)
    torch.save({"step": 3, "module": {"a": torch.ones(2)}}, tmp_path / "a.pt")
    assert read_state(tmp_path / "a.pt")["step"] == 3
    (tmp_path / "b.pt").write_bytes(pickled(marker, 2))
    with pytest.raises(ModelError, match=r"b\.pt cannot be read"):
        fit("b", nn.Linear(2, 2), lambda step: (torch.zeros(()), {}), FitConfig(steps=1), tmp_path)


def test_a_hub_id_is_left_to_the_library():
    require_safetensors("someone/model", "model")
