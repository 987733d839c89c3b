"""What README says: `serve run serve/config.yaml`, as a user types it."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import yaml

from ip2p_ray.miniature import weights
from tests.ports import free_port
from tests.serve.asking import picture_bytes, pixels_of

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def serve_run(folder, host="127.0.0.1"):
    """The command with the shipped config, at a free port; its log, and the port."""
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text("utf-8"))
    port = free_port()
    config["http_options"] = {"host": host, "port": port}
    named = {each["name"]: each for each in config["applications"]}
    named["page"]["args"]["server"] = f"http://127.0.0.1:{port}"
    path, log = folder / "config.yaml", folder / "log.txt"
    path.write_text(yaml.safe_dump(config))
    command = [Path(sys.executable).with_name("serve"), "run", "--address", "local", str(path)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")}
    with log.open("wb") as out:
        running = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield log, port
    finally:
        running.send_signal(signal.SIGINT)
        try:
            running.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)


def wait_for(true, log, timeout=600):
    ends = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < ends, log.read_text("utf-8", "replace")[-3000:]
        time.sleep(0.5)


def answers(url):
    try:
        return httpx.get(url).status_code == 200
    except httpx.HTTPError:
        return False


def test_the_config_serves_the_shipped_editor_and_its_page(tmp_path):
    with serve_run(tmp_path) as (log, port):
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(f"{url}/readyz"), log)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
        made = client.images.edit(
            image=picture_bytes(1), prompt="make it night", extra_body={"seed": 4}
        )
        truth = weights.load_editor().edit(picture_bytes(1), "make it night", seed=4)
        assert np.abs(pixels_of(made.data[0].b64_json) - np.asarray(truth).astype(int)).max() <= 1
        assert answers(f"{url}/healthz")
        assert answers(f"{url}/docs")
        wait_for(lambda: answers(f"{url}/page/"), log)
        door = httpx.get(f"{url}/", follow_redirects=True)
        assert door.status_code == 200
        assert "gradio" in door.text.lower()


def test_without_keys_it_listens_on_no_other_address(tmp_path):
    with serve_run(tmp_path, host="0.0.0.0") as (log, port):
        wait_for(lambda: "without API keys" in log.read_text("utf-8", "replace"), log)
        assert not answers(f"http://127.0.0.1:{port}/readyz")
