"""The weights that come with the package: whole, small, loadable, and better than nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ip2p_ray.clip import Clip
from ip2p_ray.errors import ModelError
from ip2p_ray.images import to_pil
from ip2p_ray.miniature import scores, weights
from ip2p_ray.triplets.local_writer import LocalWriter


def test_they_are_whole_and_small() -> None:
    folder = weights.require()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "python -m ip2p_ray.miniature.train" in card


def test_a_missing_folder_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        weights.require(tmp_path / "nowhere")
    shutil.copytree(weights.WEIGHTS, tmp_path / "broken")
    (tmp_path / "broken" / "editor" / "unet" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="broken"):
        weights.load_editor(tmp_path / "broken")
    (tmp_path / "broken" / weights.THRESHOLDS_FILE).unlink()
    with pytest.raises(ModelError, match=weights.THRESHOLDS_FILE):
        weights.require(tmp_path / "broken")


@pytest.mark.parametrize("name", weights.CONTENT)
def test_every_file_that_a_model_reads_is_asked_for(tmp_path: Path, name: str) -> None:
    for each in weights.CONTENT:
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / each).write_text("there")
    assert weights.require(tmp_path) == tmp_path
    (tmp_path / name).unlink()
    with pytest.raises(ModelError, match=f"lacks {name}"):
        weights.require(tmp_path)


def test_all_files_of_the_shipped_weights_but_the_notes_are_asked_for() -> None:
    files = {p.relative_to(weights.WEIGHTS).as_posix() for p in weights.WEIGHTS.rglob("*.*")}
    notes = {"README.md", "scores.json", "editor/model_index.json", "writer/generation_config.json"}
    assert {name for name in files if (weights.WEIGHTS / name).is_file()} - notes == set(
        weights.CONTENT
    )


def test_the_pair_preset_has_the_calibrated_thresholds() -> None:
    config = weights.pair_config()
    assert config.thresholds == weights.thresholds()
    assert config.resolution == 64
    assert weights.pair_config(candidates=7).candidates == 7


def test_the_judge_finds_captions_of_held_out_scenes() -> None:
    clip = Clip.load(weights.WEIGHTS / "judge")
    assert scores.score_judge(clip, seed=11, count=128) >= 0.9


def test_the_writer_writes_edits() -> None:
    writer = LocalWriter.load(weights.WEIGHTS / "writer")
    shipped = json.loads((weights.WEIGHTS / "scores.json").read_text())["writer"]
    found = scores.score_writer(writer, seed=11, count=64)
    assert found["true_edits"] >= shipped["true_edits"] - 0.15


def test_the_editor_beats_copying_the_input() -> None:
    tasks = scores.edit_tasks(12, seed=11)
    sources = scores.source_pictures(tasks)
    edited = weights.load_editor().edit_batch(
        [to_pil(source) for source in sources], [task.instruction for task in tasks]
    )
    found = scores.score_edits(np.stack([np.asarray(picture) for picture in edited]), tasks)
    copied = scores.score_edits(sources, tasks)
    assert copied["forced_choice_accuracy"] == 0.0
    assert found["forced_choice_accuracy"] > 3 * scores.chance(tasks)
