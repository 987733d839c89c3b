"""A command of jobs/, run as a user would."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


class Job:
    """A job by the name of its file, perhaps with the first of its arguments."""

    def __init__(self, name, *first):
        self.path = ROOT / "jobs" / name
        self._first = first

    def command(self, *arguments):
        """What is typed."""
        return [sys.executable, *map(str, (self.path, *self._first, *arguments))]

    def run(self, *arguments, timeout=1700, **environment):
        """The ended process, with what it printed."""
        return subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=ROOT,
            # no sentence is broken by the frame around it
            env={**os.environ, "COLUMNS": "400", **environment},
        )


def shards_below(folder):
    """Names of the Parquet files in a folder where others come and go, which ends a glob."""
    names = (name for _, _, files in os.walk(folder) for name in files)
    return [name for name in names if name.endswith(".parquet")]


def refused(bucket, flag, here):
    """Flags, what a server refuses them with (None: nothing), and what is told of it."""
    there = [flag, f"{bucket}/in", "--out", f"{bucket}/out"]
    yield [flag, here, "--out", "s3://test-none/out"], None, "there is no bucket test-none at http"
    yield there, (403, "AccessDenied"), "access is denied: the credentials in use have no right"
    yield there, (400, "ExpiredToken"), "the credentials have expired; renew them and run"
