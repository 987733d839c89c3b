from pathlib import Path

import pytest

from ip2p_ray import objects
from ip2p_ray.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from ip2p_ray.errors import ConfigError, DatasetError, StorageError
from ip2p_ray.mirror import fetch_newest, upload_checkpoint, upload_file
from ip2p_ray.testing.buckets import FaultyWay, WayFaults
from ip2p_ray.training.state import TrainState
from tests.test_checkpoint import contents, new_state

NOTES, RECIPE = "metrics.jsonl", "abc"


def saved(folder: Path, step: int) -> Path:
    return save_checkpoint(folder, state_at(step), keep=None)


def state_at(step: int) -> TrainState:
    state = new_state(step)
    state.run["recipe"] = RECIPE
    return state


def names(uri: str) -> set[str]:
    return {found.name.split("/")[0] for found in objects.listing(uri)}


def newest(uri: str, folder: Path) -> str:
    found = fetch_newest(uri, folder, beside=NOTES, recipe=RECIPE)
    assert found is not None
    return found.name


def test_a_checkpoint_comes_back_where_there_is_none(bucket: str, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    uri = f"{bucket}/run"
    upload_checkpoint(saved(here, 3), uri, keep=2)
    (here / NOTES).write_text('{"step": 3}\n')
    upload_file(here / NOTES, uri)
    assert fetch_newest(uri, there, beside=NOTES, recipe=RECIPE) == there / "step-00000003"
    found = new_state()
    load_checkpoint(latest_checkpoint(there), found)
    assert contents(found) == contents(state_at(3))
    assert (there / NOTES).read_text() == '{"step": 3}\n'


def test_what_is_here_is_not_replaced_by_what_is_older(bucket: str, tmp_path: Path) -> None:
    upload_checkpoint(saved(tmp_path / "old", 3), bucket, keep=2)
    saved(tmp_path / "new", 4)
    assert fetch_newest(bucket, tmp_path / "new", beside=NOTES, recipe=RECIPE) is None
    assert fetch_newest(bucket, tmp_path / "old", beside=NOTES, recipe=RECIPE) is None
    assert fetch_newest(f"{bucket}/empty", tmp_path / "none", beside=NOTES, recipe=RECIPE) is None
    assert not (tmp_path / "none").exists()


def test_only_the_newest_are_kept(bucket: str, tmp_path: Path) -> None:
    for step in (1, 2, 3):
        upload_checkpoint(saved(tmp_path, step), bucket, keep=2)
    assert names(bucket) == {"step-00000002", "step-00000003"}
    upload_checkpoint(tmp_path / "step-00000001", bucket, keep=None)
    assert names(bucket) == {"step-00000001", "step-00000002", "step-00000003"}


def test_half_an_upload_is_no_checkpoint_and_costs_none(
    bucket: str, bucket_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_checkpoint(saved(tmp_path / "here", 1), bucket, keep=1)
    second = saved(tmp_path / "here", 2)
    objects.write_file(f"{bucket}/{second.name}/unet.safetensors", second / "unet.safetensors")
    refused = WayFaults(refusal=(403, "AccessDenied"), methods=("PUT", "POST"))
    with FaultyWay(bucket_endpoint, refused) as way, monkeypatch.context() as other:
        other.setenv("AWS_ENDPOINT_URL", way.url)
        with pytest.raises(StorageError):
            upload_checkpoint(second, bucket, keep=1)
    assert names(bucket) == {"step-00000001", "step-00000002"}
    assert newest(bucket, tmp_path / "there") == "step-00000001"
    upload_checkpoint(second, bucket, keep=1)
    assert newest(bucket, tmp_path / "there") == "step-00000002"
    assert names(bucket) == {"step-00000002"}


def test_a_fetch_that_breaks_off_leaves_no_checkpoint(bucket: str, tmp_path: Path) -> None:
    first = saved(tmp_path / "here", 1)
    upload_checkpoint(first, bucket, keep=1)
    objects.remove([f"{bucket}/{first.name}/optimizer.safetensors"])
    (tmp_path / "there").mkdir()
    with pytest.raises(DatasetError, match=r"optimizer\.safetensors"):
        fetch_newest(bucket, tmp_path / "there", beside=NOTES, recipe=RECIPE)
    assert latest_checkpoint(tmp_path / "there") is None
    objects.write_file(
        f"{bucket}/{first.name}/optimizer.safetensors", first / "optimizer.safetensors"
    )
    assert newest(bucket, tmp_path / "there") == first.name


def test_checkpoints_of_another_recipe_are_refused(bucket: str, tmp_path: Path) -> None:
    upload_checkpoint(saved(tmp_path / "here", 1), bucket, keep=1)
    for folder in (tmp_path / "there", tmp_path / "here"):
        with pytest.raises(ConfigError, match=r"made differently.*give another --mirror"):
            fetch_newest(bucket, folder, beside=NOTES, recipe="other")


def test_what_a_kill_left_of_older_ones_is_removed(bucket: str, tmp_path: Path) -> None:
    upload_checkpoint(saved(tmp_path, 1), bucket, keep=1)
    objects.remove([f"{bucket}/step-00000001/checksums.json"])
    upload_checkpoint(saved(tmp_path, 2), bucket, keep=1)
    assert names(bucket) == {"step-00000002"}
