"""Ray Data's own extension types, planted where stages read: none of their values is unpickled."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p_ray import parquet, storage
from ip2p_ray.errors import DatasetError
from ip2p_ray.schema import CAPTIONS
from ip2p_ray.stages import plan, run
from tests.jobs.running import Job
from tests.planting import RAYS, described, planted_column

pytestmark = pytest.mark.ray

SCHEMA = pa.schema([("key", pa.string()), ("value", pa.int64())])
REFUSED = f"has the extension type {RAYS}, which could run code"


@pytest.fixture
def rays():
    """The type, which a process knows once Ray Data has worked in it."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    return ArrowPythonObjectType()


@pytest.fixture
def marker(tmp_path):
    """Made by whoever unpickles; nobody may."""
    place = tmp_path / "marker"
    yield place
    assert not place.exists()


class Look:
    """Looks at every value, as actors do."""

    def __call__(self, batch):
        batch.to_pylist()
        yield batch


def stream(sources, uri):
    step = plan.Step(
        callable=Look, arguments={}, resources=run.Resources(actors=1, cpus=0.25, batch_size=2)
    )
    return plan.stream(
        sources, uri, key="key", schema=SCHEMA, steps=[step], unit="rows", rows_per_block=2
    )


def test_the_plant_works(rays, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"key": planted_column(rays, tmp_path / "made")}), path)
    pq.read_table(path).to_pylist()
    assert (tmp_path / "made").is_dir()


def test_a_type_whose_description_is_a_pickle_is_refused_and_no_advice_given(tmp_path, marker):
    import ray.data._internal.tensor_extensions.arrow  # noqa: F401 - registers the type

    kinds, path = pa.schema([described(marker)]), tmp_path / "a.parquet"
    pq.write_table(pa.table([pa.array([[1]], kinds[0].type)], schema=kinds), path)
    with pytest.raises(ValueError, match="RAY_DATA_AUTOLOAD_CLOUDPICKLE_TENSOR_METADATA"):
        pq.read_schema(path)
    with pytest.raises(DatasetError, match="extension type that cannot be read") as raised:
        parquet.read_table(path)
    assert "RAY_DATA" not in str(raised.value)


def test_a_plan_refuses_its_sources(local_ray, rays, tmp_path, marker):
    source = str(tmp_path / "a-0.parquet")
    keys = planted_column(rays, marker, 4)
    pq.write_table(pa.table({"key": keys, "value": [1, 2, 3, 4]}), source)
    with pytest.raises(DatasetError, match=REFUSED):
        stream([source], str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["a.parquet", "a.pending.parquet"])
def test_a_plan_refuses_notes_of_what_was_written(local_ray, rays, tmp_path, marker, name):
    source, uri = str(tmp_path / "source"), str(tmp_path / "out")
    storage.write_shard(source, "a", pa.table({"key": ["x"], "value": [1]}, schema=SCHEMA))
    notes = storage.local_path(run.resume_folder(uri))
    notes.mkdir(parents=True)
    pq.write_table(pa.table({"key": planted_column(rays, marker)}), notes / name)
    with pytest.raises(DatasetError, match=REFUSED):
        stream(storage.list_shards(source), uri)


def test_jobs_refuse_captions_and_pairs_of_others(rays, tmp_path, marker):
    """In whichever process they are read."""
    captions, pairs = tmp_path / "captions.parquet", tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"caption": planted_column(rays, marker, 3)}), captions)
    columns = {"source_img": planted_column(rays, marker, nested=True), "instruction": ["x"]}
    pq.write_table(pa.table({**columns, "target_img": columns["source_img"]}), pairs)
    for job, flag, path in (
        ("collect_captions.py", "--files", captions),
        ("filter_pairs.py", "--input", pairs),
    ):
        done = Job(job).run(flag, path, "--out", tmp_path / job)
        assert done.returncode == 1, done.stdout
        assert REFUSED in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_dataset_of_others_is_refused_by_the_job_that_reads_it(rays, tmp_path, marker):
    uri = tmp_path / "captions"
    names = [name for name in CAPTIONS.names if name != "caption"]
    rows = {name: pa.array([None], CAPTIONS.field(name).type) for name in names}
    storage.write_shard(uri, "a", pa.table({**rows, "caption": ["a cat"]}, schema=CAPTIONS))
    storage.write_manifest(uri, storage.Manifest(dataset="captions"))
    size = (uri / "a.parquet").stat().st_size
    spoilt = pa.table({**rows, "caption": planted_column(rays, marker)})
    pq.write_table(spoilt, uri / "a.parquet")
    manifest = (uri / storage.MANIFEST).read_text()
    new = (uri / "a.parquet").stat().st_size
    (uri / storage.MANIFEST).write_text(manifest.replace(str(size), str(new)))
    asked = ["--captions", uri, "--out", tmp_path / "out", "--writer", "local"]
    done = Job("write_triplets.py").run(*asked)
    assert done.returncode == 1, done.stdout
    assert REFUSED in done.stderr
