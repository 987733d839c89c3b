import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray

from ip2p_ray.errors import ConfigError
from ip2p_ray.stages import preflight

ROOT = Path(__file__).resolve().parent.parent.parent

MOST_HERE = 32 << 20
"""What travels of this repository is less: its weights are some 22 MiB of it."""


def write(folder, name, size=1):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)


def test_what_travels_of_this_repository_is_small_and_all_that_jobs_need():
    found = preflight.travels(ROOT)
    assert sum(found.values()) < MOST_HERE
    for name in (
        *("jobs/quickstart.py", "jobs/preflight.py", "serve/app.py", "serve/config.yaml"),
        *("constraints.txt", "pyproject.toml", "ip2p_ray/schema.py", "ip2p_ray/stages/run.py"),
        "ip2p_ray/triplets/examples.jsonl",
        *(
            path.relative_to(ROOT).as_posix()
            for kind in ("miniature/weights/**/*", "templates/*", "testing/*.py")
            for path in (ROOT / "ip2p_ray").glob(kind)
            if path.is_file()
        ),
    ):
        assert name in found
    tops = {name.partition("/")[0] for name in found}
    assert not tops & {".git", ".venv", "venv", "build", "dist", "docs", "tests", "runs", "out"}
    assert not [name for name in found if "__pycache__" in name or "_cache/" in name]


def test_folders_that_stay_are_not_even_looked_into():
    """With a slash at its end Ray would ask a pattern about every file below, as in a .venv."""
    lines = (ROOT / ".rayignore").read_text().splitlines()
    assert not [line for line in lines if line.endswith("/")]


def test_it_is_what_ray_packs(tmp_path, monkeypatch):
    import zipfile

    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    folder = tmp_path / "here"
    for name in ("a.py", "data/b.bin", "data/skip.bin", "deep/c/d.txt", ".git/x", "out/y"):
        write(folder, name, 3)
    (folder / ".gitignore").write_text("/out/\n")
    (folder / "data" / ".rayignore").write_text("skip*\n")
    package = tmp_path / "package.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(folder), package, include_gitignore=True, excludes=excludes)
    packed = {each.filename: each.file_size for each in zipfile.ZipFile(package).infolist()}
    found = preflight.travels(folder)
    assert found == {name: size for name, size in packed.items() if not name.endswith("/")}
    assert set(found) == {".gitignore", "a.py", "data/.rayignore", "data/b.bin", "deep/c/d.txt"}
    monkeypatch.setenv("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    assert "out/y" in preflight.travels(folder)


def test_the_largest_files_of_a_large_folder_are_named(tmp_path):
    write(tmp_path, "small.py", 10)
    write(tmp_path, "weights/unet.safetensors", 4000)
    write(tmp_path, "old.ckpt", 9000)
    limits = {"many": 1000, "most": 20_000}
    [check] = preflight.check_package(tmp_path, **limits)
    assert check.state == "note"
    assert "in 3 files travel" in check.text
    assert check.text.index("old.ckpt") < check.text.index("weights/unet.safetensors")
    write(tmp_path, "older.ckpt", 9000)
    [check] = preflight.check_package(tmp_path, **limits)
    assert check.state == "wrong"
    assert "name in .rayignore: " in check.text
    (tmp_path / ".rayignore").write_text("*.ckpt\nweights\n")
    [check] = preflight.check_package(tmp_path, **limits)
    assert check.state == "fine"
    [check] = preflight.check_package(tmp_path / "none")
    assert check == ("wrong", f"{tmp_path / 'none'} is no folder")


@pytest.mark.parametrize(
    "name", [".env", ".env.local", "deep/id_rsa", "tls.pem", "my-secrets.json"]
)
def test_what_is_named_as_secrets_are_is_noted(tmp_path, name):
    for path in (name, "keys.py", "environment.md", "monkey.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("a")
    fine, note = preflight.check_package(tmp_path)
    assert (fine.state, note.state) == ("fine", "note")
    assert note.text.startswith(f"{name} travels too")


def test_rays_limit_is_the_one_that_is_known():
    assert preflight.MOST_BYTES == 512 << 20


def test_a_folder_that_can_be_written_to_is_left_as_it_was(tmp_path):
    for uri in (str(tmp_path), str(tmp_path / "a" / "b"), f"file://{tmp_path}/c"):
        assert preflight.check_storage(uri).state == "fine"
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_told(tmp_path):
    write(tmp_path, "file")
    check = preflight.check_storage(str(tmp_path / "file" / "below"))
    assert check.state == "wrong"
    assert "file/below cannot be written to" in check.text


def test_a_bucket_is_listed_and_written_to(bucket, monkeypatch):
    from ip2p_ray import objects

    assert preflight.check_storage(f"{bucket}/run").state == "fine"
    assert list(objects.listing(bucket)) == []
    check = preflight.check_storage("s3://no-such-bucket/run")
    assert check.state == "wrong"
    assert "there is no bucket no-such-bucket" in check.text


def test_other_versions_than_the_pins_are_noted(tmp_path):
    (tmp_path / "pins.txt").write_text("# ours\nray==2.60.0\nopen-clip-torch==3.3.0  # judge\n")
    pins = preflight.read_pins(tmp_path / "pins.txt")
    assert pins == {"ray": "2.60.0", "open_clip_torch": "3.3.0"}
    [check] = preflight.check_pins(pins, {"ray": "2.60.0", "open_clip_torch": "3.2.0"}, "here")
    assert check.state == "note"
    assert check.text.endswith("open_clip_torch 3.2.0 (pinned 3.3.0)")
    [check] = preflight.check_pins(pins, {"ray": "2.60.0"}, "here")
    assert "open_clip_torch missing" in check.text
    built = {"ray": "2.60.0", "open_clip_torch": "3.3.0+cu13"}
    assert preflight.check_pins(pins, built, "here")[0].state == "fine"
    with pytest.raises(ConfigError, match=r"none\.txt cannot be read"):
        preflight.read_pins(tmp_path / "none.txt")
    assert preflight.check_pins({}, {}, "here") == []


def test_every_package_that_is_compared_is_pinned_and_installed():
    pins, have = preflight.read_pins(ROOT / "constraints.txt"), preflight.installed()
    assert set(preflight.PACKAGES) <= set(pins)
    assert set(preflight.PACKAGES) == set(have)


@pytest.fixture
def dashboard():
    """Answers what it is told to: (status, body)."""

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = server.answer
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("status", "content", "told"),
    [
        (401, "", "wants a token (401): export RAY_AUTH_MODE=token"),
        (403, "", "wants a token (403)"),
        (200, {"ray_version": "1.0.0"}, f"runs Ray 1.0.0, here is {ray.__version__}"),
        (200, {"other": 1}, "answers 200, but is no dashboard of Ray's"),
        (404, "not here", "answers 404, but is no dashboard of Ray's"),
    ],
)
def test_who_answers_is_told(dashboard, status, content, told):
    dashboard.answer = (status, json.dumps(content).encode())
    [check] = preflight.check_cluster(f"http://127.0.0.1:{dashboard.server_port}", {})
    assert check.state == "wrong"
    assert told in check.text


def test_a_cluster_that_takes_no_job_is_told(dashboard):
    dashboard.answer = (200, json.dumps({"ray_version": ray.__version__}).encode())
    address = f"http://127.0.0.1:{dashboard.server_port}"
    fine, wrong = preflight.check_cluster(address, {})
    assert (fine.state, wrong.state) == ("fine", "wrong")
    assert wrong.text.startswith(f"{address}: a job cannot be submitted: ")
    assert "\n" not in wrong.text


def test_nobody_there_is_told():
    [check] = preflight.check_cluster("http://127.0.0.1:1", {})
    assert check.state == "wrong"
    assert "does not answer" in check.text
    assert os.environ.get("RAY_ADDRESS") is None
