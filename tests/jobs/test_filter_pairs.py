import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tyro
from PIL import Image

from ip2p_ray import storage
from ip2p_ray.miniature.weights import WEIGHTS
from ip2p_ray.schema import PAIRS, REJECTS, SCORES
from ip2p_ray.stages.checked import CHECKED
from ip2p_ray.testing import FaultyWay, WayFaults
from tests.jobs.running import Job, refused

run_job = Job("filter_pairs.py").run

FLAGS = {
    "--scores",
    "--input",
    "--out",
    "--export",
    "--text",
    "--image",
    "--direction",
    "--keep",
    "--judge",
    "--device",
    "--resolution",
    "--min-side",
    "--held-out",
    "--max-reject-share",
}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""


def encoded(seed, size=64):
    levels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture
def mine(tmp_path):
    """A published file of 12 pairs, one of which is broken."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    names = ("original_image", "edit_prompt", "edited_image")
    rows = []
    for number in range(12):
        pictures = (encoded(2 * number), encoded(2 * number + 1)[: 60 if number == 5 else None])
        source, edited = ({"bytes": data, "path": None} for data in pictures)
        rows.append(dict(zip(names, (source, f"make it {number}", edited), strict=True)))
    kinds = (image, pa.string(), image)
    schema = pa.schema(list(zip(names, kinds, strict=True)))
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "mine.parquet")
    return tmp_path / "mine.parquet"


def test_the_flags_are_those_that_were_promised():
    done = run_job("--help")
    assert done.returncode == 0
    assert set(re.findall(r"--[a-z][a-z-]+", done.stdout)) - {"--help"} == FLAGS


def ask(*arguments):
    """What the command line makes of the arguments, in this process."""
    from jobs.filter_pairs import FilterPairs

    return tyro.cli(FilterPairs, args=[str(argument) for argument in arguments])


def test_bad_flags_end_in_status_2_and_a_sentence(tmp_path, mine, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    there, out = tmp_path, ("--out", tmp_path / "out")
    folder, whole = tmp_path / "mine", tmp_path / "whole"
    folder.mkdir()
    (tmp_path / "a").mkdir()
    storage.write_manifest(whole, storage.Manifest(dataset="pairs"))
    for arguments, told in (
        ([], "give either --scores or --input"),
        (["--scores", there, "--input", mine, *out], "give either --scores or --input"),
        (["--scores", there], "give --out for pairs judged again, or --export, or both"),
        (["--input", mine], "--input needs --out"),
        (["--scores", tmp_path / "none", *out], "none: there is no such folder"),
        (["--input", tmp_path / "none.csv", *out], "none.csv: there is no such file or folder"),
        (["--input", "https://host/a.csv", *out], "a folder here or s3://bucket/folder"),
        (["--input", "s3://", *out], "--input s3:// names no bucket"),
        (["--input", "s3://b1/in", "--out", "s3://b1/in/out"], "lies in s3://b1/in, whose files"),
        (["--scores", "s3://b1/a", "--out", "s3://b1/a/"], "is what --scores names"),
        (["--scores", "s3://b1/a", "--out", "s3://b1/a/pairs/b"], "lies in s3://b1/a/pairs, whose"),
        (["--scores", there, *out, "--image", "75"], "--image is a cosine in [-1, 1]"),
        (["--scores", there, *out, "--keep", "0"], "--keep is at least 1"),
        (["--scores", there, *out, "--judge", "x"], "--judge is only for --input"),
        (["--scores", there, *out, "--held-out", "0"], "--held-out is only for --input"),
        (["--scores", there, "--export", tmp_path / "e", "--image", "0"], "by --out"),
        (["--input", mine, *out, "--resolution", "100"], "--resolution is a multiple of 8"),
        (["--input", mine, *out, "--min-side", "0"], "--min-side is at least 1"),
        (["--input", mine, *out, "--max-reject-share", "2"], "--max-reject-share lies in [0, 1]"),
        (["--scores", there, "--out", there], "is what --scores names; give another folder"),
        (["--input", mine, *out, "--export", tmp_path / "out"], "is what --out names"),
        (["--input", mine, "--out", mine], "is a file; give a folder"),
        (["--input", mine, *out, "--device", "tpu"], "--device"),
        (["--input", there, *out], f"lies in {there}, whose files would then be read as well"),
        (["--input", mine, there / "a" / "..", *out], f"--out {there / 'out'} lies in"),
        (["--input", folder, *out, "--export", folder / "e"], f"--export {folder / 'e'} lies in"),
        (["--scores", there, "--out", there / "pairs"], f"lies in {there / 'pairs'}"),
        (["--scores", there, *out, "--export", there / "out" / "scores" / "e"], "--export"),
        (["--scores", there, "--out", whole], f"lies in the dataset {whole}"),
        (["--scores", there, "--out", whole / "a" / "b"], f"lies in the dataset {whole}"),
        (["--scores", there, "--export", whole / "a"], f"lies in the dataset {whole}"),
    ):
        with pytest.raises(SystemExit) as raised:
            ask(*arguments)
        assert raised.value.code == 2, arguments
        assert told in capsys.readouterr().err
    done = run_job("--input", mine)
    assert done.returncode == 2
    assert "--input needs --out" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_folders_beside_what_is_read_are_taken(tmp_path, mine):
    asked = ask("--input", mine, "--out", tmp_path / "out", "--export", tmp_path / "out" / "e")
    assert asked.export == str(tmp_path / "out" / "e")
    again = ask("--scores", tmp_path, "--out", tmp_path / "looser")
    assert again.out == str(tmp_path / "looser")
    assert ask("--input", "s3://b1/in.csv", "--out", "s3://b1/in").out == "s3://b1/in"
    # An export is a dataset itself, and the same command finds it.
    storage.write_manifest(tmp_path / "published", storage.Manifest(dataset="export"))
    assert ask("--scores", tmp_path, "--export", tmp_path / "published").out is None


def test_own_pairs_are_judged_judged_again_and_exported(tmp_path, mine):
    out, again, published = (tmp_path / name for name in ("out", "again", "published"))
    judged = ("--judge", WEIGHTS / "judge", "--image", "-1", "--held-out", "0.3")
    done = run_job("--input", mine, "--out", out, *judged, "--export", published)
    assert done.returncode == 0, done.stderr
    assert "lowest similarities: text 0.2, image -1, direction 0.2\n" in done.stdout
    assert "pairs: kept 11 of 12 (92 %); rejected image_broken 1" in done.stdout
    assert f"filter_pairs: {out / 'pairs'} has 11 pairs\n" in done.stdout
    assert done.stdout.endswith(f"{published} has 11 pairs in the published form\n")
    scores = storage.read_dataset(out / "scores", SCORES)["image_similarity"].to_pylist()
    middle = sorted(scores)[6]
    done = run_job("--scores", out, "--out", again, "--image", middle)
    assert done.returncode == 0, done.stderr
    kept = sum(score >= middle for score in scores)
    assert f"{again / 'pairs'} has {kept} pairs\n" in done.stdout
    rows = storage.read_dataset(again / "pairs", PAIRS).to_pylist()
    assert len(rows) == kept
    other = run_job("--scores", again, "--export", tmp_path / "smaller")
    assert other.returncode == 0, other.stderr
    assert f"has {kept} pairs in the published form" in other.stdout


def test_what_is_wrong_with_the_data_is_one_sentence_and_status_1(tmp_path, mine):
    out = tmp_path / "out"
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("caption,url\na cat,u\n")
    for arguments, told in (
        (["--input", wrong, "--out", out], f"{wrong} holds no pairs: it has caption, url"),
        (["--input", mine, "--out", out, "--judge", "nowhere"], "CLIP folder nowhere does not"),
        (
            ["--input", mine, "--out", tmp_path / "few", "--max-reject-share", "0.05"],
            "1 of 12 rows are unusable, more than a share of 0.05: image_broken 1",
        ),
    ):
        done = run_job(*arguments)
        assert done.returncode == 1, arguments
        assert done.stderr.startswith("filter_pairs: ")
        assert told in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.timeout(1800)
def test_a_bucket_is_read_and_written_as_a_folder(bucket, tmp_path, mine, monkeypatch):
    own = tmp_path / "own"
    (own / "pictures").mkdir(parents=True)
    mine.rename(own / "a.parquet")
    for number in range(4):
        (own / "pictures" / f"{number}.png").write_bytes(encoded(100 + number))
    names = [("0", "1"), ("2", "3"), ("0", "none")]
    lines = [
        json.dumps(
            {
                "source_image": f"pictures/{source}.png",
                "instruction": "turn it",
                "edited_image": f"pictures/{edited}.png",
            }
        )
        for source, edited in names
    ]
    (own / "b.jsonl").write_text("\n".join(lines))
    for path in own.rglob("*.*"):
        name = path.relative_to(tmp_path).as_posix()
        storage.write_bytes(f"{bucket}/{name}", path.read_bytes())
    monkeypatch.setenv("IP2P_CACHE", str(tmp_path / "cache"))
    storage.upload(WEIGHTS / "judge", f"{bucket}/judge")
    rules = ("--text", -1, "--image", -1, "--direction", -1)
    for place, weights in ((tmp_path, WEIGHTS), (bucket, bucket)):
        done = run_job(
            *("--input", f"{place}/own", "--out", f"{place}/out", "--export", f"{place}/published"),
            *("--max-reject-share", 0.2, "--judge", f"{weights}/judge", *rules),
        )
        assert done.returncode == 0, done.stderr
        assert (
            "pairs: kept 13 of 15 (87 %); rejected image_broken 1, image_missing 1" in done.stdout
        )
        again = run_job(
            *("--scores", f"{place}/out", "--out", f"{place}/again", "--image", 0.5, "--keep", 1)
        )
        assert again.returncode == 0, again.stderr
    for name, schema in {
        "out/checked": CHECKED,
        "out/scores": SCORES,
        "out/pairs": PAIRS,
        "out/rejects/pairs": REJECTS,
        "again/scores": SCORES,
        "again/pairs": PAIRS,
    }.items():
        here, there = (storage.read_dataset(f"{at}/{name}", schema) for at in (tmp_path, bucket))
        if schema is REJECTS or schema is CHECKED:  # they name where a missing picture was
            here, there = (table.drop_columns("detail") for table in (here, there))
        assert there.equals(here), name
    published = storage.read_manifest(f"{bucket}/published").shards
    assert [shard.rows for shard in published] == [
        shard.rows for shard in storage.read_manifest(tmp_path / "published").shards
    ]
    assert storage.exists(f"{bucket}/published/README.md")
    twice = run_job("--scores", f"{bucket}/out", "--export", f"{bucket}/out/pairs/published")
    assert twice.returncode == 2
    inside = run_job("--scores", f"{bucket}/out", "--export", f"{bucket}/again/pairs/published")
    assert inside.returncode == 1
    assert f"lies in the dataset {bucket}/again/pairs, whose it is not" in inside.stderr
    storage.write_bytes(f"{bucket}/taken/file", b"")
    taken = run_job("--scores", f"{bucket}/out", "--export", f"{bucket}/taken")
    assert f"folder {bucket}/taken is not empty (file is in it); give a new one" in taken.stderr


@pytest.mark.timeout(900)
def test_what_a_bucket_refuses_is_one_sentence_before_a_model_is_looked_for(bucket, tmp_path, mine):
    for flags, refusal, told in refused(bucket, "--input", mine):
        with FaultyWay("http://127.0.0.1:9", WayFaults(refusal=refusal)) as way:
            environment = {"AWS_ENDPOINT_URL": way.url} if refusal else {}
            done = run_job(*flags, "--judge", tmp_path / "none", **environment)
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith("filter_pairs: s3://")
        assert told in done.stderr
        assert done.stderr.count("\n") == 1
