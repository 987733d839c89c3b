"""A Ray head of its own, as an operator starts it, and jobs submitted to it."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.ports import free_ports

ROOT = Path(__file__).resolve().parent.parent.parent
RAY = Path(sys.executable).parent / "ray"


@contextlib.contextmanager
def ray_head(*, cpus: int = 4, token: str | None = None) -> Iterator[str]:
    """The dashboard's address of a head that runs while the block does.

    With a `token` it wants that from whoever asks.
    """
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: sockets lie below it
    port, dashboard, agent, client = free_ports(4)
    command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={folder}"]
    command += [f"--num-cpus={cpus}", f"--object-store-memory={256 << 20}"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (Path(folder) / "head.log").open("w") as log:
        head = subprocess.Popen(
            [*map(str, command), "--disable-usage-stats"],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd="/",  # what a driver finds, it does not find because the head lay there
            env={**environment, **_authentication(token)},
            start_new_session=True,
        )
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        _wait_for(dashboard, head, Path(folder) / "head.log", headers)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        _end(head)
        shutil.rmtree(folder, ignore_errors=True)


def _authentication(token: str | None) -> dict[str, str]:
    if token is None:
        return {"RAY_AUTH_MODE": "disabled"}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def _wait_for(
    port: int,
    head: "subprocess.Popen[bytes]",
    log: Path,
    headers: dict[str, str],
    limit_s: float = 300,
) -> None:
    import httpx

    deadline = time.monotonic() + limit_s
    while True:
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        with contextlib.suppress(httpx.HTTPError):
            # the job API is the last to answer
            url = f"http://127.0.0.1:{port}/api/jobs/"
            if httpx.get(url, headers=headers, timeout=5).status_code == 200:
                return
        time.sleep(0.3)


def _end(head: "subprocess.Popen[bytes]") -> None:
    """Ends the head and whatever it started, by their ids."""
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(head.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGTERM)
        _, left = psutil.wait_procs(below, timeout=15)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    if head.poll() is None:
        os.killpg(head.pid, signal.SIGKILL)
    head.wait(timeout=30)
