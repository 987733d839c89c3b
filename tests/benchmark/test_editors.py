import numpy as np
import pytest
import torch
from PIL import Image

from ip2p_ray.benchmark.editors import as_pipeline
from ip2p_ray.editor import Editor, EditSettings
from ip2p_ray.testing import tiny_stable_diffusion

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_pipeline_makes_the_editors_pictures(prediction_type):
    model = tiny_stable_diffusion(prediction_type=prediction_type, in_channels=8)
    editor = Editor(model, settings=EditSettings(steps=3, resolution=16))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    images = [Image.fromarray(each) for each in pixels]
    expected = as_pipeline(model)(
        ["a red cat", "snow"],
        image=images,
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="pil",
    ).images
    got = editor.edit_batch(images, ["a red cat", "snow"], [1, 2])
    for one, other in zip(got, expected, strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1
