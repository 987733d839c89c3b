import re

import pytest
from PIL import Image, ImageChops, ImageOps

from ip2p_ray import objects
from ip2p_ray.images import decode_image
from ip2p_ray.miniature.weights import load_editor
from ip2p_ray.testing import FakeService, ServiceBehaviour
from tests.jobs.running import Job

run_job = Job("edit.py").run

FLAGS = {
    "--image",
    "--instruction",
    "--model",
    "--server",
    "--api-key-env",
    "--at-once",
    "--patience-s",
    "--out",
    "--mask",
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
        (["--image", tmp_path / "none.png", "--instruction", "x"], "is no file and no folder"),
        (["--image", picture, "--instruction", " "], "--instruction is empty"),
        (["--image", picture], "--instruction"),
        (["--image", picture, "--instruction", "x", "--steps", "0"], "--steps is at least 1"),
        (["--image", picture, "--instruction", "x", "--out", tmp_path], "does not end in .png"),
        (["--image", picture, "--instruction", "x", "--out", "x.jpg"], "does not end in .png"),
        (["--image", picture, "--instruction", "x", "--out", picture], "is the picture itself"),
        (["--image", picture, "--instruction", "x", "--text-guidance-scale", "nan"], "finite"),
        (["--image", picture, "--instruction", "x", "--out", picture / "y.png"], "is no folder"),
        (["--image", picture, "--instruction", "x", "--server", "localhost:8000"], "--server is"),
        (["--image", picture, "--instruction", "x", "--mask", tmp_path], "--mask"),
        (["--image", tmp_path, "--instruction", "x", "--mask", picture], "is for one picture"),
        (["--image", tmp_path, "--instruction", "x", "--out", tmp_path], "pictures itself"),
        (["--image", tmp_path, "--instruction", "x", "--out", picture], "is a file"),
        (
            [*("--image", picture, "--instruction", "x"), "--server", "http://a", "--model", "b"],
            "has its own",
        ),
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


def is_negative(path, colour):
    edited = decode_image(path.read_bytes())
    return edited.getpixel((0, 0)) == ImageOps.invert(Image.new("RGB", (1, 1), colour)).getpixel(
        (0, 0)
    )


def test_a_picture_may_lie_in_a_bucket(picture, bucket, tmp_path):
    objects.write_file(f"{bucket}/pictures/boat.png", picture)
    command = ["--image", f"{bucket}/pictures/boat.png", "--instruction", "x"]
    with FakeService(ServiceBehaviour()) as service:
        done = run_job(*command, "--server", service.url, "--out", tmp_path / "edited.png")
        assert done.returncode == 0, done.stderr
        assert is_negative(tmp_path / "edited.png", "blue")
        command[1] = f"{bucket}/pictures/none.png"
        done = run_job(*command, "--server", service.url, "--out", tmp_path / "other.png")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pictures/none.png cannot be read: there is no such object" in done.stderr


def test_a_picture_is_edited_by_a_service_that_wants_a_key(picture, tmp_path):
    command = ["--image", picture, "--instruction", "x", "--seed", "5", "--steps", "3"]
    mask = tmp_path / "mask.png"
    Image.new("RGBA", (64, 64)).save(mask)
    with FakeService(ServiceBehaviour(api_key="secret-key")) as service:
        command += ["--server", service.url, "--mask", mask]
        refused = run_job(*command, IP2P_API_KEY="")
        assert refused.returncode == 1
        assert "refuses requests without a key" in refused.stderr
        done = run_job(*command, "--api-key-env", "OTHER", OTHER="secret-key")
        assert done.returncode == 0, done.stderr
        assert "secret-key" not in done.stdout + done.stderr
        [sent] = service.received
    assert (sent["seed"], sent["steps"], sent["mask"]) == ("5", "3", mask.read_bytes())
    assert is_negative(picture.with_name("boat-edited.png"), "blue")


def test_a_service_that_is_away_is_named(picture):
    command = ["--image", picture, "--instruction", "x", "--patience-s", "0"]
    done = run_job(*command, "--server", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert done.stderr.startswith("edit: http://127.0.0.1:9 cannot be reached")
    assert done.stderr.count("\n") == 1


def test_a_folder_is_edited_by_a_busy_service_a_few_at_a_time(tmp_path):
    folder = tmp_path / "boats"
    folder.mkdir()
    colours = {f"{name}.png": name for name in ("red", "green", "blue", "black", "white")}
    for name, colour in colours.items():
        Image.new("RGB", (8, 8), colour).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not taken for a picture")
    command = ["--image", folder, "--instruction", "x", "--at-once", "2"]
    behaviour = ServiceBehaviour(full=3, retry_after_s=0.05, step_s=0.25)
    with FakeService(behaviour) as service:
        done = run_job(*command, "--server", service.url)
        assert service.edits == 5
        assert service.most_in_flight == 2
        edited = tmp_path / "boats-edited"
        assert done.returncode == 1
        assert done.stdout == f"edit: {edited}: 5 of 6 pictures; 1 failed\n"
        assert done.stderr.startswith(f"edit: {folder / 'broken.jpg'}: ")
        assert "cannot be decoded as an image" in done.stderr
        assert all(is_negative(edited / name, colour) for name, colour in colours.items())
        assert {path.name for path in edited.iterdir()} == {*colours, "edit.json"}

        (edited / "red.png").unlink()
        (folder / "broken.jpg").unlink()
        again = run_job(*command, "--server", service.url)
        assert again.returncode == 0, again.stderr
        assert again.stdout == f"edit: {edited}: 5 of 5 pictures, 4 of them before\n"
        assert service.edits == 6

        other = run_job(*command, "--seed", "1", "--server", service.url)
        assert other.returncode == 1
        assert "were edited with another seed" in other.stderr


def test_a_folder_is_edited_here_as_its_pictures_are_alone(tiny_weights, picture, tmp_path):
    load_editor(tiny_weights).save(tmp_path / "editor")
    folder = tmp_path / "boats"
    folder.mkdir()
    Image.new("RGB", (64, 64), "blue").save(folder / "boat.png")
    Image.new("RGB", (64, 32), "red").save(folder / "wide.jpg")
    command = ["--instruction", "make it night", "--model", tmp_path / "editor"]
    alone = run_job("--image", picture, *command)
    assert alone.returncode == 0, alone.stderr
    done = run_job("--image", folder, *command, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"edit: {tmp_path / 'out'}: 2 of 2 pictures\n"
    assert decode_image((tmp_path / "out" / "wide.jpg.png").read_bytes()).size == (64, 32)
    one = decode_image((tmp_path / "out" / "boat.png").read_bytes())
    other = decode_image(picture.with_name("boat-edited.png").read_bytes())
    assert max(high for _, high in ImageChops.difference(one, other).getextrema()) <= 1
