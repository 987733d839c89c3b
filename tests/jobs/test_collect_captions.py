import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq

from ip2p_ray import storage
from ip2p_ray.schema import COLLECTED_CAPTIONS, REJECTS
from tests.jobs.running import Job

run_job = Job("collect_captions.py").run

FLAGS = {
    "--files",
    "--out",
    "--column",
    "--url-column",
    "--source-column",
    "--sample",
    "--seed",
    "--language",
    "--held-out",
}
"""Public: a flag that goes away, or changes its name, breaks somebody's command."""


def test_the_flags_are_those_that_were_promised():
    done = run_job("--help")
    assert done.returncode == 0
    assert set(re.findall(r"--[a-z][a-z-]+", done.stdout)) - {"--help"} == FLAGS


def test_bad_flags_end_in_status_2_and_a_sentence(tmp_path):
    fine = tmp_path / "a.txt"
    fine.write_text("a cat\n")
    for arguments, told in (
        ([], "--files"),
        (["--files"], "--files"),
        (["--files", tmp_path / "none.csv"], "none.csv: there is no such file or folder"),
        (["--files", "https://host/a.csv"], "only local files and s3:// can be read"),
        (["--files", fine, "--out", "https://host/a"], "a folder here or s3://bucket/folder"),
        (["--files", fine, "--sample", "0"], "--sample is at least 1"),
        (["--files", fine, "--language", "de"], "--language"),
        (["--files", fine, "--held-out", "1"], "--held-out lies in"),
    ):
        done = run_job(*arguments)
        assert done.returncode == 2, arguments
        assert told in done.stderr
        assert "Traceback" not in done.stderr


def test_captions_are_collected_once_and_a_wrong_column_is_told(tmp_path):
    given, out = tmp_path / "a.csv", tmp_path / "out"
    given.write_text("Alt,URL\na cat,u1\na dog,u2\n,u3\n")
    done = run_job("--files", given, "--out", out)
    assert done.returncode == 1
    assert done.stderr.startswith(f"collect_captions: {given} has none of the columns caption, ")
    assert "it has: Alt, URL" in done.stderr
    assert done.stderr.count("\n") == 1
    done = run_job("--files", given, "--column", "Alt", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "captions: kept 2 of 3 (67 %); rejected empty_caption 1" in done.stdout
    assert done.stdout.endswith(f"collect_captions: {out / 'captions'} has 2 rows\n")
    again = run_job("--files", given, "--column", "Alt", "--out", out)
    assert "captions: there already, 2 rows" in again.stdout


def test_captions_come_from_a_bucket_and_lie_in_one(bucket, tmp_path):
    local, given = tmp_path / "given", f"{bucket}/given"
    local.mkdir()
    rows = [{"alt": f"a red boat {number}", "url": f"u{number}"} for number in range(50)]
    pq.write_table(pa.Table.from_pylist(rows[:20]), local / "a.parquet")
    lines = "".join(json.dumps(row) + "\n" for row in rows[15:40])
    (local / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (local / "c.csv").write_text(
        "alt,url\n" + "".join(f"{r['alt']},{r['url']}\n" for r in rows[40:])
    )
    for path in local.iterdir():
        storage.write_bytes(f"{given}/{path.name}", path.read_bytes())
    storage.write_bytes(f"{given}/_SUCCESS", b"")
    out = f"{bucket}/out"
    flags = ["--column", "alt", "--sample", "30"]
    done = run_job("--files", f"{given}/", *flags, "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"collect_captions: {out}/captions has 30 rows\n")
    assert "there already" in run_job("--files", given, *flags, "--out", out).stdout
    here = run_job("--files", local, *flags, "--out", tmp_path / "out")
    assert here.returncode == 0, here.stderr
    made = storage.read_dataset(f"{out}/captions", COLLECTED_CAPTIONS)
    assert made.equals(storage.read_dataset(tmp_path / "out" / "captions", COLLECTED_CAPTIONS))
    rejects = storage.read_dataset(f"{out}/rejects/captions", REJECTS)
    assert rejects.equals(storage.read_dataset(tmp_path / "out/rejects/captions", REJECTS))
    one = run_job("--files", f"{given}/c.csv", *flags[:2], "--out", tmp_path / "one")
    assert "has 10 rows" in one.stdout


def test_what_a_bucket_refuses_is_one_sentence(bucket, tmp_path):
    for files, environment, told in (
        ("s3://test-none/a", {}, "s3://test-none/a: there is no bucket test-none at http://"),
        (f"{bucket}/none", {}, f"there is no {bucket}/none, and no .parquet, "),
        (bucket, {"AWS_SECRET_ACCESS_KEY": ""}, "missing: AWS_SECRET_ACCESS_KEY"),
        (bucket, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "9 cannot be reached, or hangs up"),
    ):
        environment = {"AWS_MAX_ATTEMPTS": "1", **environment}
        done = run_job("--files", files, "--out", tmp_path, **environment)
        assert done.returncode == 1, done.stderr
        assert told in done.stderr
        assert done.stderr.count("\n") == 1
    done = run_job("--files", bucket, "--out", "s3://test-none/a")
    assert done.returncode == 1
    assert "there is no bucket test-none" in done.stderr
