import re

import pytest
from PIL import Image

from tests.jobs.running import Job

run_job = Job("edit.py").run

FLAGS = {
    "--image",
    "--instruction",
    "--model",
    "--out",
    "--seed",
    "--text-guidance-scale",
    "--image-guidance-scale",
    "--steps",
}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "boat.png"
    Image.new("RGB", (64, 64), "blue").save(path)
    return path


def test_the_flags_are_those_that_were_promised():
    done = run_job("--help")
    assert done.returncode == 0
    assert set(re.findall(r"--[a-z][a-z-]+", done.stdout)) - {"--help"} == FLAGS


def test_bad_flags_end_in_status_2_and_a_sentence(picture, tmp_path):
    for arguments, told in (
        (["--image", tmp_path / "none.png", "--instruction", "x"], "is no file"),
        (["--image", picture, "--instruction", " "], "--instruction is empty"),
        (["--image", picture], "--instruction"),
        (["--image", picture, "--instruction", "x", "--steps", "0"], "--steps is at least 1"),
        (["--image", picture, "--instruction", "x", "--out", tmp_path], "does not end in .png"),
        (["--image", picture, "--instruction", "x", "--out", "x.jpg"], "does not end in .png"),
        (["--image", picture, "--instruction", "x", "--out", picture], "is the picture itself"),
        (["--image", picture, "--instruction", "x", "--text-guidance-scale", "nan"], "finite"),
        (["--image", picture, "--instruction", "x", "--out", picture / "y.png"], "is no folder"),
    ):
        done = run_job(*arguments)
        assert done.returncode == 2
        assert told in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.ray
def test_a_picture_is_edited_beside_itself(made, picture):
    """Marked for the editor, which the run of the whole flow trained; this job starts no Ray."""
    command = ["--image", picture, "--instruction", "make it night", "--model", made.uri("editor")]
    done = run_job(*command)
    assert done.returncode == 0, done.stderr
    edited = picture.with_name("boat-edited.png")
    assert done.stdout == f"edit: {edited} (64 x 64)\n"
    first = edited.read_bytes()
    assert run_job(*command, "--out", picture.with_name("again.png")).returncode == 0
    assert picture.with_name("again.png").read_bytes() == first


@pytest.mark.ray
def test_a_missing_model_is_named_in_one_sentence(picture, tmp_path):
    done = run_job("--image", picture, "--instruction", "x", "--model", tmp_path / "none")
    assert done.returncode == 1
    assert done.stderr.startswith(f"edit: no model folder {tmp_path / 'none'}")
    assert done.stderr.count("\n") == 1
