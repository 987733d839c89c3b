import json

import pytest

from ip2p_ray.errors import ModelError
from ip2p_ray.filtering import Thresholds
from ip2p_ray.pairs import PairConfig
from ip2p_ray.settings import read_settings


def written(folder, content):
    path = folder / "settings.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_what_the_file_says_and_what_is_given(tmp_path):
    path = written(tmp_path, {"steps": 7, "guidance_scale": [2.0, 4.0], "keep": 1})
    found = read_settings(PairConfig, path, thresholds=Thresholds(text=0.1), keep=2)
    assert found == PairConfig(
        steps=7, guidance_scale=(2.0, 4.0), keep=2, thresholds=Thresholds(text=0.1)
    )


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"txet": 0.1}, "no such setting 'txet'; there are text, image, direction"),
        ({"text": 3.0}, r"cosine in \[-1, 1\], got 3.0"),
        ({"text": "high"}, "does not hold allowed settings"),
        ([], "does not hold a JSON object"),
        ("{", "cannot be read"),
    ],
)
def test_whatever_is_wrong_names_the_file(tmp_path, content, told):
    path = written(tmp_path, content)
    with pytest.raises(ModelError, match=rf"settings\.json.*{told}"):
        read_settings(Thresholds, path)


def test_a_file_that_has_to_be_complete_is(tmp_path):
    path = written(tmp_path, {"text": 0.1, "image": 0.2})
    assert read_settings(Thresholds, path).direction == Thresholds().direction
    assert read_settings(Thresholds, path, complete=True, direction=0.5).direction == 0.5
    with pytest.raises(ModelError, match=r"settings\.json lacks direction"):
        read_settings(Thresholds, path, complete=True)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"none\.json cannot be read"):
        read_settings(Thresholds, tmp_path / "none.json")
