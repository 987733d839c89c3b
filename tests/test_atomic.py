"""Whatever is killed when: the old or the new is there, whole, and nothing else stays."""

import fcntl
import os
import shutil
import threading

import pytest

from ip2p_ray.atomic import atomic_file, atomic_folder, remove_folder, remove_leftovers
from ip2p_ray.testing import killed_at

FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class StoppedError(Exception):
    pass


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_file(path, text):
    with atomic_file(path) as new:
        new.write_text(text)


def write_folder(path, text):
    with atomic_folder(path) as new:
        (new / "deep").mkdir()
        for name in ("first", "deep/second"):
            (new / name).write_text(text)


def read(path):
    """What write_file or write_folder wrote there; a half is an error."""
    if path.is_file():
        return path.read_text()
    assert names(path) == ["deep", "first"]
    first, second = ((path / name).read_text() for name in ("first", "deep/second"))
    assert first == second
    return first


WRITERS = pytest.mark.parametrize("write", [write_file, write_folder])


@WRITERS
def test_what_is_written_replaces_what_was_there(tmp_path, write):
    target = tmp_path / "made" / "target"
    for text in ("old", "new"):
        write(target, text)
        assert read(target) == text
        assert names(tmp_path / "made") == ["target"]


@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, atomic):
    target = tmp_path / "target"
    write_folder(target, "old")
    with pytest.raises(StoppedError), atomic(target):
        raise StoppedError
    assert read(target) == "old"
    assert names(tmp_path) == ["target"]


def test_a_block_may_decide_to_write_nothing(tmp_path):
    with atomic_file(tmp_path / "target"):
        pass
    assert names(tmp_path) == []


@FORKS
@WRITERS
def test_killed_at_any_file_operation_nothing_is_lost(tmp_path, write):
    folder = tmp_path / "folder"
    target, seen, killed, event = folder / "target", [], True, 0
    while killed:
        write(target, "old")
        killed = killed_at(event, lambda: write(target, "new"))
        remove_leftovers(folder)
        assert names(folder) == ["target"]
        seen.append(read(target))
        shutil.rmtree(folder)
        event += 1
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {"old", "new"}


@FORKS
def test_the_next_write_clears_away_what_a_kill_left(tmp_path):
    killed, event = True, 0
    while killed:
        write_folder(tmp_path / "target", "old")
        killed = killed_at(event, lambda: write_folder(tmp_path / "target", "new"))
        write_folder(tmp_path / "target", "third")
        assert names(tmp_path) == ["target"]
        assert read(tmp_path / "target") == "third"
        event += 1


@FORKS
def test_a_folder_is_removed_or_not_but_never_half(tmp_path):
    target, seen, killed, event = tmp_path / "target", [], True, 0
    while killed:
        write_folder(target, "old")
        killed = killed_at(event, lambda: remove_folder(target))
        seen.append(target.exists() and read(target) == "old")
        remove_leftovers(tmp_path)
        assert names(tmp_path) == (["target"] if seen[-1] else [])
        event += 1
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {True, False}


def test_leftovers_are_found_in_the_depth_and_the_living_are_left_alone(tmp_path):
    dead, living = (tmp_path / "deep" / f".{name}.partial" for name in ("dead", "living"))
    for place in (dead, living):
        (place / "new" / ".nested.partial").mkdir(parents=True)
    lock = os.open(living / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    remove_leftovers(tmp_path)
    assert names(tmp_path / "deep") == [".living.partial"]
    os.close(lock)
    remove_leftovers(tmp_path)
    assert names(tmp_path / "deep") == []


def test_what_a_kill_left_of_a_download_is_cleared_away(tmp_path):
    place = tmp_path / ".a.bin.partial"
    place.mkdir()
    for name in (".lock", "new.1A8AbC0b"):
        (place / name).touch()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_writers_of_one_file_take_turns(tmp_path):
    target, inside, together = tmp_path / "target", [], []

    def write(number):
        for _ in range(20):
            with atomic_file(target) as new:
                inside.append(number)
                together.append(len(inside))
                new.write_text(str(number))
                inside.remove(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [1] * 80
    assert names(tmp_path) == ["target"]


def test_what_other_programs_name_alike_is_left_alone(tmp_path):
    theirs = tmp_path / "proj" / ".download.partial"
    theirs.mkdir(parents=True)
    (theirs / "precious").write_text("theirs")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".lock").touch()
    (elsewhere / "new").write_text("theirs")
    (tmp_path / "proj" / ".z.partial").symlink_to(elsewhere)
    mixed = tmp_path / "proj" / ".mixed.partial"
    mixed.mkdir()
    for name in (".lock", "new", "precious"):
        (mixed / name).touch()
    remove_leftovers(tmp_path / "proj")
    assert names(theirs) == ["precious"]
    assert names(elsewhere) == [".lock", "new"]
    assert names(mixed) == [".lock", "new", "precious"]
