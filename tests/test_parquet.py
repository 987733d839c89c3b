import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ip2p_ray import files, parquet, storage
from ip2p_ray.errors import DatasetError
from ip2p_ray.latents import LatentDataset
from ip2p_ray.layouts import PairFiles
from ip2p_ray.schema import LATENTS, PAIRS
from ip2p_ray.stages import shards
from ip2p_ray.stages.queue import _rows as queue_rows
from tests.planting import RAYS, Careless, planted, planted_column

REFUSED = "column {} has the extension type {}, which could run code"


@pytest.fixture
def careless():
    """The type, registered in this process as Ray Data registers its own."""
    kind = Careless()
    pa.register_extension_type(kind)
    yield kind
    pa.unregister_extension_type(kind.extension_name)


@pytest.fixture
def marker(tmp_path):
    """Made by whoever unpickles; nobody may."""
    place = tmp_path / "marker"
    yield place
    assert not place.exists()


def values(schema, rows=2):
    """A table of the schema with something in every column."""
    made = {
        name: pa.array([None] * rows, kind)
        for name, kind in zip(schema.names, schema.types, strict=True)
    }
    for name, kind in zip(schema.names, schema.types, strict=True):
        if pa.types.is_string(kind):
            made[name] = pa.array([f"{name} {row}" for row in range(rows)])
    return pa.table(made, schema=schema)


def test_the_plant_works(careless, tmp_path):
    """What the other tests refuse does run something, where nobody looks at the types."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"caption": planted_column(careless, tmp_path / "made")}), path)
    table = pq.read_table(path)
    assert not (tmp_path / "made").exists()
    table.to_pylist()
    assert (tmp_path / "made").is_dir()


@pytest.mark.parametrize("nested", [False, True])
def test_an_extension_type_is_refused_before_a_value_is_read(careless, tmp_path, marker, nested):
    column = planted_column(careless, marker, nested=nested)
    path, arrow = tmp_path / "a.parquet", tmp_path / "a.arrow"
    table = pa.table({"caption": column})
    pq.write_table(table, path)
    with pa.ipc.new_file(str(arrow), table.schema) as writer:
        writer.write_table(table)
    told = REFUSED.format("caption", "tests.careless")
    for read in (parquet.opened, parquet.read_schema, parquet.read_table):
        with pytest.raises(DatasetError, match=f"a.parquet: {told}"):
            read(path)
    with pytest.raises(DatasetError, match=f"somewhere: {told}"):
        parquet.read_table(pa.memory_map(str(path)), "somewhere")
    with pa.memory_map(str(arrow)) as source, pytest.raises(DatasetError, match=told):
        parquet.opened_arrow(source, arrow)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda kind: pa.list_(kind),
        lambda kind: pa.map_(pa.string(), kind),
        lambda kind: pa.dictionary(pa.int32(), kind),
        lambda kind: pa.struct([("a", pa.list_(pa.struct([("b", kind)])))]),
    ],
)
def test_it_is_found_at_any_depth(careless, wrap):
    with pytest.raises(DatasetError, match=r"tests\.careless"):
        parquet.require_plain(pa.schema([("x", wrap(careless))]), "here")


def test_one_that_nobody_has_registered_is_refused_too(tmp_path):
    """So that what a file is does not depend on what the process has imported."""
    told = {b"ARROW:extension:name": RAYS.encode()}
    schema = pa.schema([pa.field("caption", pa.large_binary(), metadata=told)])
    pq.write_table(pa.table([pa.array([b"x"])], schema=schema), tmp_path / "a.parquet")
    # where ray.data is imported it is a type, elsewhere a note beside one
    with pytest.raises(DatasetError, match=REFUSED.format("caption", RAYS)):
        parquet.read_table(tmp_path / "a.parquet")


def test_plain_files_are_read(tmp_path):
    table = values(PAIRS)
    pq.write_table(table, tmp_path / "a.parquet")
    assert parquet.read_table(tmp_path / "a.parquet").equals(table)
    assert parquet.read_schema(tmp_path / "a.parquet").equals(PAIRS)


def test_captions_of_others_are_refused_and_columns_that_are_not_asked_for_do_not_matter(
    careless, tmp_path, marker
):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"TEXT": ["a cat"], "other": planted_column(careless, marker)}), path)
    assert files.columns(path) == ["TEXT", "other"]
    assert list(files.read_rows(path, ["TEXT"])) == [{"TEXT": "a cat"}]
    with pytest.raises(DatasetError, match=REFUSED.format("other", "tests.careless")):
        list(files.read_rows(path, ["TEXT", "other"]))


@pytest.mark.parametrize("name", ["source_img", "instruction"])
def test_pairs_of_others_are_refused(careless, tmp_path, marker, name):
    picture = pa.array([{"bytes": b"x", "path": "y"}])
    table = pa.table({"source_img": picture, "instruction": ["do"], "target_img": picture})
    column = planted_column(careless, marker, nested=name != "instruction")
    pq.write_table(planted(table, name, column), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match=REFUSED.format(name, "tests.careless")):
        list(PairFiles(paths=[tmp_path / "a.parquet"]))


def test_datasets_are_refused_where_they_are_read_and_not_made_whole(careless, tmp_path, marker):
    uri = str(tmp_path / "pairs")
    table = values(PAIRS)
    storage.write_shard(uri, "train-00000", table)
    manifest = storage.write_manifest(uri, storage.Manifest(dataset="pairs"))
    path = tmp_path / "pairs" / "train-00000.parquet"
    pq.write_table(planted(table, "caption", planted_column(careless, marker, 2)), path)
    told = REFUSED.format("caption", "tests.careless")
    with pytest.raises(DatasetError, match=told):
        storage.write_manifest(uri, storage.Manifest(dataset="pairs"))
    # whoever can write the shard can write the manifest as well
    text = (tmp_path / "pairs" / storage.MANIFEST).read_text()
    size = str(path.stat().st_size)
    (tmp_path / "pairs" / storage.MANIFEST).write_text(
        text.replace(str(manifest.shards[0].bytes), size)
    )
    for read in (
        lambda: storage.read_dataset(uri, PAIRS),
        lambda: storage.read_dataset(uri, PAIRS, columns=["pair_key"]),
        lambda: list(shards.read_tables(uri, PAIRS, rows=1)),
        lambda: storage.count_rows(path),
        lambda: list(queue_rows(uri)),
    ):
        with pytest.raises(DatasetError, match=told):
            read()


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_rows_by_index_are_refused(careless, tmp_path, marker, suffix):
    table = planted(values(LATENTS), "instruction", planted_column(careless, marker, 2))
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DatasetError, match=REFUSED.format("instruction", "tests.careless")):
        LatentDataset(path)
