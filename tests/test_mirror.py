import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from ip2p_ray import objects
from ip2p_ray.checkpoint import (
    is_sound,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from ip2p_ray.errors import ConfigError, DatasetError, StorageError
from ip2p_ray.mirror import (
    fetch_alone,
    fetch_newest,
    upload_checkpoint,
    upload_file,
    upload_folder,
)
from ip2p_ray.mirror import newest as newest_name
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


def uploaded(folder: Path, uri: str, *steps: int) -> None:
    for step in steps:
        upload_checkpoint(saved(folder, step), uri, keep=None)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("lost", ["a bit", "a part", "facts", "checksums"])
def test_a_broken_checkpoint_costs_the_steps_since_the_one_before(
    bucket: str, tmp_path: Path, lost: str, alone: bool
) -> None:
    uri = f"{bucket}/run"
    uploaded(tmp_path / "here", uri, 1, 2)
    third = saved(tmp_path / "here", 3)
    whole = (third / "unet.safetensors").read_bytes()
    upload_checkpoint(third, uri, keep=None)
    place = f"{uri}/{third.name}"
    if lost == "a bit":
        objects.write(f"{place}/unet.safetensors", whole[:-1] + bytes([whole[-1] ^ 1]))
    elif lost == "a part":
        objects.remove([f"{place}/unet.safetensors"])
    else:
        objects.write(f"{place}/{'state' if lost == 'facts' else lost}.json", b"{}")
    there = tmp_path / "there"
    there.mkdir()
    if alone:
        found = fetch_alone(uri, there, beside=NOTES, recipe=RECIPE)
    else:
        found = fetch_newest(uri, there, beside=NOTES, recipe=RECIPE)
    assert found == there / "step-00000002"
    assert is_sound(found)
    assert newest_name(uri) == "step-00000002"
    upload_checkpoint(third, uri, keep=None)  # when it is reached again
    assert newest(uri, tmp_path / "again") == third.name


def test_where_all_are_broken_it_is_told_and_nothing_is_forgotten(
    bucket: str, tmp_path: Path
) -> None:
    uploaded(tmp_path / "here", bucket, 1, 2)
    for step in (1, 2):
        objects.remove([f"{bucket}/step-{step:08d}/ema.safetensors"])
    told = r"every checkpoint in .* is broken \(.*step-00000002/ema.*no such object\); delete them"
    for _ in range(2):
        with pytest.raises(DatasetError, match=told):
            fetch_newest(bucket, tmp_path / "there", beside=NOTES, recipe=RECIPE)
        with pytest.raises(DatasetError, match=told):
            fetch_alone(bucket, tmp_path / "alone", beside=None, recipe=RECIPE)
    saved(tmp_path / "old", 0)  # one that is here is gone on with
    assert fetch_newest(bucket, tmp_path / "old", beside=NOTES, recipe=RECIPE) is None
    assert newest_name(bucket) is None


def test_planted_names_write_nothing_outside_the_folder(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    uploaded(tmp_path / "here", bucket, 1)
    planted = tmp_path / "work" / "planted"
    place = f"{bucket}/step-00000001"
    sums = json.loads(objects.read(f"{place}/checksums.json"))
    for name in ("../../planted", str(planted)):
        with contextlib.suppress(StorageError):
            objects.write(f"{place}/{name}", b"planted")
        objects.write(f"{place}/checksums.json", json.dumps({**sums, name: {"bytes": 7}}).encode())
        with pytest.raises(DatasetError, match="step-00000001 differs from its checksums"):
            fetch_alone(bucket, tmp_path / "work" / "cache", beside=None, recipe=RECIPE)
        assert not list(tmp_path.rglob("*planted*"))
        assert list((tmp_path / "work" / "cache").iterdir()) == []


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


def alone(uri: str, folder: Path) -> str | None:
    found = fetch_alone(uri, folder, beside=NOTES, recipe=RECIPE)
    return None if found is None else found.name


def test_only_what_the_bucket_has_counts_in_a_folder_of_a_machine(
    bucket: str, tmp_path: Path
) -> None:
    here, uri = tmp_path / "here", f"{bucket}/run"
    assert alone(uri, here) is None
    upload_checkpoint(saved(here, 2), uri, keep=2)
    saved(here, 3)  # killed before it was there
    (here / NOTES).write_text("of another run\n")
    objects.write(f"{uri}/{NOTES}", b"of this run\n")
    assert alone(uri, here) == "step-00000002"
    assert [path.name for path in sorted(here.glob("step-*"))] == ["step-00000002"]
    assert (here / NOTES).read_text() == "of this run\n"
    before = (here / "step-00000002").stat().st_ino
    assert alone(uri, here) == "step-00000002"
    assert (here / "step-00000002").stat().st_ino == before  # it is not fetched again
    assert alone(uri, tmp_path / "empty") == "step-00000002"
    found = new_state()
    load_checkpoint(tmp_path / "empty" / "step-00000002", found)
    assert contents(found) == contents(state_at(2))


def test_a_checkpoint_that_differs_from_the_buckets_is_fetched_again(
    bucket: str, tmp_path: Path
) -> None:
    upload_checkpoint(saved(tmp_path / "there", 2), bucket, keep=2)
    same = saved(tmp_path / "here", 2)
    weights = same / "unet.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # a disk that lost a bit
    assert alone(bucket, tmp_path / "here") == "step-00000002"
    assert weights.read_bytes() == whole
    objects.remove_below(bucket)
    assert alone(bucket, tmp_path / "here") is None
    assert list((tmp_path / "here").glob("step-*")) == []
    upload_checkpoint(saved(tmp_path / "there", 1), bucket, keep=None)
    with pytest.raises(ConfigError, match="give another --mirror, or --out"):
        fetch_alone(bucket, tmp_path / "here", beside=None, recipe="other")


def test_several_workers_of_a_machine_fetch_once(
    bucket: str, bucket_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_checkpoint(saved(tmp_path / "there", 2), bucket, keep=2)
    saved(tmp_path / "here", 1)
    with FaultyWay(bucket_endpoint) as way, monkeypatch.context() as other:
        other.setenv("AWS_ENDPOINT_URL", way.url)
        alone(bucket, tmp_path / "one")
        once = way.counts["GET"]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda _: alone(bucket, tmp_path / "here"), range(3)))
        # two list, read the facts and the notes, and compare the checksums with what is there
        assert way.counts["GET"] == 2 * once + 2 * 4
    assert found == 3 * ["step-00000002"]


def test_a_folder_in_a_bucket_has_its_index_while_it_is_whole(
    bucket: str, bucket_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "editor"
    (folder / "unet").mkdir(parents=True)
    for name in ("a_index.json", "unet/weights", "z.md"):
        (folder / name).write_text(name)
    upload_folder(folder, f"{bucket}/editor", last="a_index.json")
    assert {
        name: objects.read(f"{bucket}/editor/{name}").decode() for name in names_of(bucket)
    } == {name: name for name in ("a_index.json", "unet/weights", "z.md")}
    (folder / "z.md").unlink()
    refused = WayFaults(refusal=(403, "AccessDenied"), methods=("PUT",))
    with FaultyWay(bucket_endpoint, refused) as way, monkeypatch.context() as other:
        other.setenv("AWS_ENDPOINT_URL", way.url)
        with pytest.raises(StorageError):
            upload_folder(folder, f"{bucket}/editor", last="a_index.json")
    assert "a_index.json" not in names_of(bucket)
    upload_folder(folder, f"{bucket}/editor", last="a_index.json")
    assert names_of(bucket) == ["a_index.json", "unet/weights"]


def test_what_a_kill_left_of_uploads_goes(bucket: str, tmp_path: Path) -> None:
    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    for key in ("run/step-00000001/unet", "editor/unet", "other/unet"):
        client.create_multipart_upload(Bucket=name, Key=key)
    uploaded(tmp_path / "here", f"{bucket}/run", 2)
    (tmp_path / "editor").mkdir()
    (tmp_path / "editor" / "index").touch()
    upload_folder(tmp_path / "editor", f"{bucket}/editor", last="index")
    left = client.list_multipart_uploads(Bucket=name)["Uploads"]
    assert [begun["Key"] for begun in left] == ["other/unet"]


def names_of(bucket: str) -> list[str]:
    return [found.name for found in objects.listing(f"{bucket}/editor")]
