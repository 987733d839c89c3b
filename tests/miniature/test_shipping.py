"""What is shipped: half as large, readable by the package, and without a trace of the machine."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ip2p_ray.clip import Clip
from ip2p_ray.filtering import Thresholds
from ip2p_ray.miniature import shipping, weights
from ip2p_ray.miniature.editing import EditingConfig
from ip2p_ray.triplets.local_writer import LocalWriter

CONFIG = EditingConfig(candidates=3, sampling_steps=7, self_replace=(0.1, 0.6))
THRESHOLDS = {"text": 0.125, "image": 0.5, "direction": 0.25}
COMMAND = "python -m ip2p_ray.miniature.train --out FOLDER --seed 12"
NOTES = "These weights were made up for a test."

SCORES: dict[str, Any] = {
    "judge_accuracy_of_64": 0.911,
    "writer": {"parsed": 0.922, "true_edits": 0.933},
    "generator": {"clip": 0.5, "oracle": 0.6, "both": 0.444},
    "pairs_kept": 0.155,
    "tasks": 64,
    "editor": {
        "forced_choice_accuracy": 0.566,
        "preservation_error": 0.0377,
        "count": 64,
        "by_type": {"add": 0.188, "swap": 0.199},
    },
    "copy_input": {
        "forced_choice_accuracy": 0.0,
        "preservation_error": 0.0,
        "count": 64,
        "by_type": {"add": 0.0, "swap": 0.0},
    },
    "generator_only": {
        "forced_choice_accuracy": 0.277,
        "preservation_error": 0.0888,
        "count": 64,
        "by_type": {"add": 0.2, "swap": 0.3},
    },
    "chance": 0.0266,
}


def training(steps: int, minutes: int) -> dict[str, Any]:
    return {"steps": float(steps), "seconds": 60.0 * minutes, "device": "an abacus, 3 rows"}


RECORDS: dict[str, Any] = {
    "autoencoder": training(1_234, 11),
    "judge": training(700, 12),
    "writer": training(2_000, 13),
    "generator": training(3_200, 14),
    "editor": training(4_321, 15),
    "calibration": {
        "thresholds": THRESHOLDS,
        "true_pass": 0.977,
        "mismatched_fail": {"the unedited scene": 0.988, "another scene": 0.999},
        "device": "an abacus, 3 rows",
    },
    "pairs": {"funnel": {"captions": 10, "kept": 3, "image_similarity": 5}},
    "scores": SCORES,
}


@pytest.fixture(scope="module")
def folder(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the trainings leave."""
    folder: Path = tmp_path_factory.mktemp("trained") / "out"
    for part in ("writer", "judge", "generator", "editor"):
        shutil.copytree(untrained / part, folder / part)
    (folder / "records").mkdir()
    for name, content in RECORDS.items():
        (folder / "records" / f"{name}.json").write_text(json.dumps(content))
    config = folder / "editor" / "unet" / "config.json"
    noted = {"_name_or_path": str(folder / "generator"), **json.loads(config.read_text())}
    config.write_text(json.dumps(noted))  # as diffusers does when it saves what it has loaded
    (folder / "notes.md").write_text(NOTES)
    return folder


@pytest.fixture(scope="module")
def shipped(folder: Path) -> Path:
    found = shipping.ship(folder, CONFIG, command=COMMAND)
    assert found == folder / "weights"
    return found


@pytest.fixture(scope="module")
def card(shipped: Path) -> str:
    return (shipped / "README.md").read_text(encoding="utf-8")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_all_that_the_package_needs_is_there_and_nothing_twice(shipped: Path) -> None:
    assert weights.require(shipped) == shipped
    parts = {path.relative_to(shipped).parts[0] for path in files(shipped)}
    models = {"writer", "judge", "generator", "editor"}
    assert parts == models | {"thresholds.json", "pairs.json", "scores.json", "README.md"}
    inside = {path.relative_to(shipped / "editor").parts[0] for path in files(shipped / "editor")}
    assert inside == {"unet", "model_index.json", weights.EDITOR_DEFAULTS}


def test_every_weight_is_the_trained_one_rounded_to_float16(folder: Path, shipped: Path) -> None:
    found = [path for path in files(shipped) if path.suffix == ".safetensors"]
    assert len(found) == 6
    for path in found:
        trained, rounded = load_file(folder / path.relative_to(shipped)), load_file(path)
        assert trained.keys() == rounded.keys()
        for name, value in trained.items():
            expected = value.half() if value.is_floating_point() else value
            assert torch.equal(rounded[name], expected), name
        dtypes = {value.dtype for value in rounded.values() if value.is_floating_point()}
        assert dtypes == {torch.float16}


def test_nothing_says_where_it_was_made(folder: Path, shipped: Path) -> None:
    machine = str(folder.parent).encode()
    for path in files(shipped):
        content = path.read_bytes()
        assert b"_name_or_path" not in content, path
        assert machine not in content, path
        for root in (Path.home(), Path.cwd(), Path(shipping.__file__).parent):
            if root != Path("/"):
                assert f"{root}/".encode() not in content, path


def test_the_package_reads_the_thresholds_and_the_pairs_settings(shipped: Path) -> None:
    assert weights.thresholds(shipped) == Thresholds(**THRESHOLDS)
    assert weights.pair_config(shipped) == CONFIG.pairs(Thresholds(**THRESHOLDS))
    assert weights.pair_config(shipped).self_replace == (0.1, 0.6)
    assert weights.pair_config(shipped, candidates=9) == replace(
        CONFIG.pairs(Thresholds(**THRESHOLDS)), candidates=9
    )


def test_every_model_loads_and_works(shipped: Path) -> None:
    editor = weights.load_editor(shipped)
    assert editor.settings.steps == shipping.EDITOR_SETTINGS["steps"]
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    png = shipping.to_pil(picture)
    assert editor.edit(png, "make it night", steps=1).size == (64, 64)
    assert Clip.load(shipped / "judge").encode_images(picture[None]).isfinite().all()
    writer = LocalWriter.load(shipped / "writer")
    assert len(writer.write(["a cat"], seed=0, max_tokens=4)) == 1


def test_the_card_names_the_command_and_how_the_weights_came_about(card: str) -> None:
    assert f"`{COMMAND}`" in card
    assert NOTES in card
    assert f"torch {torch.__version__}" in card


def test_the_card_lists_the_trainings_that_were_done(card: str) -> None:
    rows = [line for line in card.splitlines() if "an abacus, 3 rows" in line]
    cells = [[cell.strip() for cell in row.strip("|").split("|")][:3] for row in rows]
    assert cells == [
        ["autoencoder", "1,234", "11"],
        ["judge", "700", "12"],
        ["writer", "2,000", "13"],
        ["generator", "3,200", "14"],
        ["editor", "4,321", "15"],
    ]


@pytest.mark.parametrize(
    ("row", "figures"),
    [
        ("judge finds", ["91.1 %"]),
        ("writer's replies", ["92.2 % / 93.3 %"]),
        ("generator's pictures", ["44.4 %"]),
        ("candidates kept", ["15.5 % / 37.5 %"]),
        ("true pairs that pass", ["97.7 %"]),
        ("mismatched pairs that fail", ["98.8 % (the unedited scene)", "99.9 % (another scene)"]),
        ("| editor | 56", ["56.6 %", "0.038"]),
        ("copying the input", ["0.0 %", "0.000"]),
        ("generator from the edited caption", ["27.7 %", "0.089"]),
        ("| chance", ["2.7 %"]),
        ("| 64 held-out edits", []),
        ("by type of edit", ["add 18.8 %", "swap 19.9 %"]),
    ],
)
def test_the_card_tells_every_score(card: str, row: str, figures: list[str]) -> None:
    [line] = [line for line in card.splitlines() if row in line]
    assert all(figure in line for figure in figures), line


def test_the_scores_travel_as_numbers(shipped: Path) -> None:
    assert json.loads((shipped / "scores.json").read_text()) == SCORES


def test_the_card_tells_the_size_of_everything_but_itself(shipped: Path, card: str) -> None:
    others = [path for path in files(shipped) if path.name != "README.md"]
    megabytes = sum(path.stat().st_size for path in others) / 1e6
    assert f"float16, {megabytes:.1f} MB" in card


def test_shipping_again_replaces_what_was_there(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "out")
    again = tmp_path / "out"
    (again / "weights").mkdir(exist_ok=True)
    (again / "weights" / "older.txt").write_text("of another run")
    (again / "notes.md").unlink()
    found = shipping.ship(again, CONFIG, command=COMMAND)
    assert not (found / "older.txt").exists()
    assert NOTES not in (found / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in again.iterdir() if path.name.startswith(".")] == []
