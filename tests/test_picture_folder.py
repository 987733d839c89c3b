from concurrent.futures import Future

import pytest

from ip2p_ray.errors import ConfigError, ImageError, ServiceError
from ip2p_ray.picture_folder import FolderReport, edit_folder, edited_name, pictures_in
from ip2p_ray.testing import killed_at

RECIPE = {"instruction": "x", "seed": 0}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.JPG", "c.webp"):
        (folder / name).write_bytes(name.encode())
    for name in (".hidden.png", "notes.txt"):
        (folder / name).write_bytes(b"")
    (folder / "below.png").mkdir()
    return folder


def ended(outcome):
    future = Future()
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
    return future


def louder(picture):
    return ended(picture.upper())


def test_only_the_pictures_of_the_folder_are_taken(folder):
    assert [path.name for path in pictures_in(folder)] == ["a.png", "b.JPG", "c.webp"]
    assert [edited_name(path) for path in pictures_in(folder)] == [
        *("a.png", "b.JPG.png", "c.webp.png")
    ]


def test_what_is_made_is_not_made_again(folder, tmp_path):
    out, asked = tmp_path / "deep" / "out", []

    def submit(picture):
        asked.append(picture)
        return louder(picture)

    report = edit_folder(pictures_in(folder), out, RECIPE, submit, at_once=1)
    assert (report.total, report.found, report.made, report.failed) == (3, 0, 3, {})
    assert (out / "b.JPG.png").read_bytes() == b"B.JPG"
    (out / "a.png").unlink()
    report = edit_folder(pictures_in(folder), out, RECIPE, submit, at_once=4)
    assert (report.found, report.made, report.done) == (2, 1, 3)
    assert asked == [b"a.png", b"b.JPG", b"c.webp", b"a.png"]


def test_a_picture_that_fails_is_told_and_the_others_are_made(folder, tmp_path):
    told = []

    def submit(picture):
        return ended(ImageError("is torn")) if picture == b"a.png" else louder(picture)

    pictures = pictures_in(folder)
    (folder / "c.webp").unlink()  # after it was seen
    report = edit_folder(pictures, tmp_path / "out", RECIPE, submit, at_once=2, tell=told.append)
    assert (report.made, set(report.failed)) == (1, {"a.png", "c.webp"})
    assert any(sentence.endswith("a.png: is torn") for sentence in told)
    assert not (tmp_path / "out" / "a.png").exists()


def test_an_error_of_the_whole_run_ends_it_and_keeps_what_is_made(folder, tmp_path):
    outcomes = iter([ended(b"A"), ended(ServiceError("is away"))])
    report = FolderReport()
    with pytest.raises(ServiceError, match="is away"):
        edit_folder(
            pictures_in(folder),
            tmp_path / "out",
            RECIPE,
            lambda _: next(outcomes),
            at_once=1,
            report=report,
        )
    assert report.made == 1
    assert (tmp_path / "out" / "a.png").read_bytes() == b"A"


def test_whenever_it_is_killed_the_same_call_ends_with_the_same_pictures(folder, tmp_path):
    out = tmp_path / "out"

    def work():
        edit_folder(pictures_in(folder), out, RECIPE, louder, at_once=2)

    kills = 0
    while killed_at(kills % 20, work) and kills < 200:
        kills += 1
        for path in [] if not out.exists() else pictures_in(out):
            assert path.read_bytes() == path.read_bytes().upper() != b""
    assert 5 < kills < 200
    work()
    assert {path.name: path.read_bytes() for path in pictures_in(out)} == {
        "a.png": b"A.PNG",
        "b.JPG.png": b"B.JPG",
        "c.webp.png": b"C.WEBP",
    }
    assert {path.name for path in out.iterdir()} - {"edit.json"} == {
        path.name for path in pictures_in(out)
    }


def test_pictures_of_another_recipe_and_strange_folders_are_refused(folder, tmp_path):
    pictures = pictures_in(folder)
    edit_folder(pictures, tmp_path / "out", RECIPE, louder, at_once=1)
    with pytest.raises(ConfigError, match="edited with another instruction, steps; give another"):
        edit_folder(
            pictures,
            tmp_path / "out",
            {"instruction": "y", "seed": 0, "steps": 4},
            louder,
            at_once=1,
        )
    with pytest.raises(ConfigError, match="is not empty, and no folder of edited pictures"):
        edit_folder(pictures, folder, RECIPE, louder, at_once=1)
    (tmp_path / "out" / "edit.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        edit_folder(pictures, tmp_path / "out", RECIPE, louder, at_once=1)
    (folder / "c.webp.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"would both become c\.webp\.png"):
        edit_folder(pictures_in(folder), tmp_path / "other", RECIPE, louder, at_once=1)
