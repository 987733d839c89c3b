import logging
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from ip2p_ray import storage
from ip2p_ray.errors import ModelError, StageError
from ip2p_ray.notes import read_noted
from ip2p_ray.stages import plan, run

pytestmark = pytest.mark.ray

SCHEMA = pa.schema([("key", pa.string()), ("value", pa.int64())])
ROWS = 24


class Note:
    """Adds 1 to each value, and a line to a file for each row it was given."""

    def __init__(self, seen: str, fail_after: int | None = None, out: str = "") -> None:
        self.seen, self.fail_after, self.out = Path(seen), fail_after, out

    def __call__(self, batch):
        for row in batch.to_pylist():
            given = self.seen.read_text().splitlines() if self.seen.exists() else []
            if self.fail_after is not None and len(given) >= self.fail_after:
                self.wait_until_written(len(given))
                raise ModelError("the weights are gone")
            with self.seen.open("a") as file:
                file.write(row["key"] + "\n")
            yield pa.Table.from_pylist([{**row, "value": row["value"] + 1}], schema=SCHEMA)

    def wait_until_written(self, rows):
        ends = time.monotonic() + 300
        while plan._noted(run.resume_folder(self.out)) < rows and time.monotonic() < ends:
            time.sleep(0.1)
        time.sleep(3)  # the driver looks once a second


@pytest.fixture
def source(tmp_path):
    uri = str(tmp_path / "source")
    keys = [f"{number:03d}" for number in range(ROWS)]
    rows = pa.table({"key": keys, "value": list(range(ROWS))}, schema=SCHEMA)
    run.make(
        uri,
        run.Origin(dataset="source", config={}),
        lambda: storage.write_shard(uri, "a-0", rows) or [],
    )
    return uri


def note(tmp_path, **arguments):
    resources = run.Resources(actors=1, cpus=0.25, batch_size=2)
    arguments["seen"] = str(tmp_path / "seen")
    return plan.Step(callable=Note, arguments=arguments, resources=resources)


def stream(source, uri, steps, **options):
    return plan.stream(
        plan.shards(source),
        uri,
        key="key",
        schema=SCHEMA,
        steps=steps,
        unit="rows",
        rows_per_block=2,
        **options,
    )


def rows_of(uri):
    return sorted(
        (row["key"], row["value"])
        for shard in storage.list_shards(uri)
        for row in pq.read_table(shard).to_pylist()
    )


def test_every_row_passes_every_step_once_in_small_blocks(local_ray, source, tmp_path):
    uri = str(tmp_path / "out")
    stream(source, uri, [note(tmp_path), note(tmp_path)])
    assert rows_of(uri) == [(f"{number:03d}", number + 2) for number in range(ROWS)]
    assert len(storage.list_shards(uri)) == ROWS // 2


def test_a_plan_that_failed_goes_on_where_it_stopped(local_ray, source, tmp_path):
    uri = str(tmp_path / "out")
    with pytest.raises(Exception, match="the weights are gone") as caught:
        stream(source, uri, [note(tmp_path, fail_after=10, out=uri)])
    assert str(run.own_error(caught.value)).startswith("the weights are gone")
    written = {key for key, _ in rows_of(uri)}
    assert written
    before = (tmp_path / "seen").read_text().splitlines()
    stream(source, uri, [note(tmp_path)])
    assert rows_of(uri) == [(f"{number:03d}", number + 1) for number in range(ROWS)]
    again = (tmp_path / "seen").read_text().splitlines()[len(before) :]
    assert not written & set(again), "a written row was made again"
    assert sorted(written | set(again)) == [f"{number:03d}" for number in range(ROWS)]


def test_a_plan_that_is_done_makes_nothing_again(local_ray, source, tmp_path):
    uri = str(tmp_path / "out")
    stream(source, uri, [note(tmp_path)])
    stream(source, uri, [note(tmp_path)])
    assert len((tmp_path / "seen").read_text().splitlines()) == ROWS
    assert len(rows_of(uri)) == ROWS


def test_rows_that_were_written_twice_are_removed(local_ray, source, tmp_path):
    uri = str(tmp_path / "out")
    stream(source, uri, [note(tmp_path)])
    first = Path(storage.list_shards(uri)[0])
    (first.parent / "zz-copy.parquet").write_bytes(first.read_bytes())
    stream(source, uri, [note(tmp_path)])
    assert len(rows_of(uri)) == ROWS


def test_rows_that_are_missing_fail_the_stage(local_ray, source, tmp_path):
    uri = str(tmp_path / "out")
    stream(source, uri, [note(tmp_path)])
    Path(storage.list_shards(uri)[0]).unlink()
    with pytest.raises(StageError, match="22 of 24 rows"):
        stream(source, uri, [note(tmp_path)])


def test_no_rows_need_no_plan(local_ray, tmp_path):
    empty, uri = str(tmp_path / "empty"), str(tmp_path / "out")
    run.make(
        empty,
        run.Origin(dataset="source", config={}),
        lambda: storage.write_shard(empty, "a-0", SCHEMA.empty_table()) or [],
    )
    stream(empty, uri, [note(tmp_path)])
    assert storage.list_shards(uri) == []


def test_shards_that_the_manifest_does_not_list_are_no_data(local_ray, source):
    storage.write_shard(source, "zz-0", SCHEMA.empty_table())
    assert [Path(shard).name for shard in plan.shards(source)] == ["a-0.parquet"]
    assert len(storage.list_shards(source)) == 2


class Warn(Note):
    """Says the same to its log with each batch."""

    def __call__(self, batch):
        logging.getLogger("ip2p_ray.memory").warning("8 at a time do not fit")
        yield from super().__call__(batch)


def test_what_actors_warn_of_is_told_once_and_their_memory_at_the_end(
    local_ray, source, tmp_path, caplog, monkeypatch
):
    step = replace(note(tmp_path), callable=Warn)
    step = replace(step, resources=replace(step.resources, actors=2))
    monkeypatch.setattr(plan, "_LAST_WORDS_S", 120.0)
    with caplog.at_level(logging.WARNING, logger="ip2p_ray"):
        peaks = stream(source, str(tmp_path / "out"), [step])
    assert caplog.messages == ["out: 8 at a time do not fit"]
    assert list(peaks) == ["driver", "object store", "Warn"]
    assert min(peaks["driver"], peaks["Warn"]) > 50e6


def test_a_cluster_whose_actors_hold_every_cpu_is_told_of(local_ray, tmp_path):
    have = ray.cluster_resources()["CPU"]

    def lacking(cpus, resumes=False):
        held = run.Resources(actors=2, cpus=cpus / 2)
        return plan.cpus_lacking([replace(note(tmp_path), resources=held)], resumes=resumes)

    assert lacking(have - plan.TASK_CPUS) is None
    assert f"hold {have:g} CPUs and reading and writing want 0.25" in lacking(have)
    assert lacking(have - 1) is None
    assert f"the cluster has {have:g}; it waits" in lacking(have - 1, resumes=True)


def parity(table):
    """Even values are kept."""
    return Counter("odd" if value % 2 else None for value in table["value"].to_pylist())


PARITY = plan.Judged(columns=["value"], verdicts=parity)


def test_it_is_noted_how_far_a_plan_came_and_what_it_judged(local_ray, source, tmp_path):
    uri, origin = str(tmp_path / "out"), run.Origin(dataset="numbers", config={})

    def built(**arguments):
        step = replace(note(tmp_path, **arguments), judges=True)
        stream(source, uri, [step], judged=PARITY)
        return []

    with pytest.raises(Exception, match="the weights are gone"):
        run.make(uri, origin, lambda: built(fail_after=10, out=uri))
    first = read_noted(uri).note
    assert first.ended == "failed"
    assert first.failures[0]["sentence"].startswith("the weights are gone")
    assert 0 < first.done < ROWS
    assert first.kept + first.rejected["odd"] > 0
    run.make(uri, origin, built)
    last = read_noted(uri).note
    assert (last.ended, last.done, last.total, last.unit) == ("made", ROWS, ROWS, "rows")
    # a block that was being written when it failed may be judged twice
    assert last.kept >= ROWS // 2
    assert last.rejected["odd"] >= ROWS // 2
    assert last.busy["Note"] > first.busy.get("Note", 0.0)


def test_a_shard_that_a_kill_cut_was_not_judged(source, tmp_path):
    whole = Path(storage.list_shards(source)[0]).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    shards = [str(tmp_path / "cut.parquet"), *storage.list_shards(source)]
    assert PARITY.of(shards) == {None: ROWS // 2, "odd": ROWS // 2}
