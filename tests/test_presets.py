import json
import shutil

import pytest

from ip2p_ray import presets
from ip2p_ray.errors import ConfigError, ModelError
from ip2p_ray.miniature import weights
from ip2p_ray.pairs import PairConfig


def test_the_paper_is_the_papers():
    preset = presets.by_name("paper")
    assert preset.pairs == PairConfig()
    assert (preset.training.steps, preset.training.batch_size) == (10_000, 1024)
    assert preset.training.learning_rate == 1e-4
    assert (preset.editing.steps, preset.editing.text_guidance_scale) == (100, 7.5)


def test_fast_makes_the_same_kind_of_data_cheaper():
    paper, fast = presets.by_name("paper"), presets.by_name("fast")
    assert fast.generator == paper.generator
    assert fast.judge == paper.judge
    assert fast.pairs.thresholds == paper.pairs.thresholds
    work = [preset.pairs.steps * preset.pairs.candidates for preset in (paper, fast)]
    assert work[0] == 12.5 * work[1]


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match="paper, fast, miniature, got 'papers'"):
        presets.by_name("papers")


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(ModelError, match="none does not exist"):
        presets.miniature(tmp_path / "none")


@pytest.mark.parametrize("name", ["pairs.json", "thresholds.json"])
def test_an_unknown_setting_of_the_weights_is_named_with_its_file(tmp_path, name):
    folder = tmp_path / "weights"
    shutil.copytree(weights.WEIGHTS, folder)
    content = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps({**content, "colour": 1}), encoding="utf-8")
    with pytest.raises(ModelError, match=rf"{name}: no such setting 'colour'"):
        presets.miniature(folder)
