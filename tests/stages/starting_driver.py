"""A driver whose Ray loses its first agent before that has told its ports."""

import contextlib
import logging
import sys
import threading
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import ray

from ip2p_ray.stages.run import local_ray

stopped = []


def stop_one():
    while not stopped:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any(part.endswith("dashboard/agent.py") for part in process.cmdline()):
                    process.suspend()
                    stopped.append(process)
                    return
        time.sleep(0.02)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    threading.Thread(target=stop_one, daemon=True).start()
    try:
        with local_ray(workers=1):
            logging.info("%d", ray.get(ray.remote(num_cpus=0.5)(lambda: 17).remote()))
    finally:
        for process in stopped:  # its parent has died, and nobody can tell whose it was
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
