import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from ip2p_ray.dino import CROP, MEAN, STD, Dino, preprocess
from ip2p_ray.errors import ModelError

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 56,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A ViT and a DINOv2, small and random, as transformers saves them."""
    root = tmp_path_factory.mktemp("dino")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = ViTModel(ViTConfig(**SIZES, intermediate_size=32, image_size=224))
        vit.save_pretrained(root / "vit")
        # trained at another size, as the published ones are
        Dinov2Model(Dinov2Config(**SIZES, image_size=112)).save_pretrained(root / "dinov2")
    return root


def picture(width=40, height=30, seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_features_are_those_of_the_class_token(folders, kind):
    dino = Dino.load(folders / kind)
    pictures = [picture(), picture(seed=1), picture(64, 64)]
    found = dino.encode_images(pictures)
    assert found.shape == (3, 16)
    assert torch.allclose(found.norm(dim=-1), torch.ones(3))
    reference = (ViTModel if kind == "vit" else Dinov2Model).from_pretrained(folders / kind).eval()
    with torch.inference_mode():
        hidden = reference(pixel_values=preprocess(pictures[1])[None]).last_hidden_state
    expected = hidden[0, 0] / hidden[0, 0].norm()
    assert torch.allclose(found[1], expected, atol=1e-5)


def test_the_middle_is_seen_and_the_range_is_imagenets():
    wide = Image.new("RGB", (600, 300), (255, 0, 0))
    wide.paste((0, 0, 255), (200, 0, 400, 300))
    pixels = preprocess(wide)
    assert pixels.shape == (3, CROP, CROP)
    middle = pixels[:, CROP // 2, CROP // 2]
    assert torch.allclose(
        middle, (torch.tensor([0.0, 0, 1]) - torch.tensor(MEAN)) / torch.tensor(STD)
    )
    # 600 x 300 becomes 512 x 256, of which the columns from 144 to 368 are kept
    red = (pixels[0, 112] > 0).float().mean()
    assert red == pytest.approx(54 / 224, abs=0.02)


def test_what_cannot_be_loaded_is_named(folders, tmp_path):
    with pytest.raises(ModelError, match="no-such-folder"):
        Dino.load(tmp_path / "no-such-folder")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="is a bert, not one of vit"):
        Dino.load(tmp_path / "bert")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((folders / "vit" / "config.json").read_bytes())
    with pytest.raises(ModelError, match="broken"):
        Dino.load(broken)
