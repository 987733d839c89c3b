"""What can be known before a job is submitted: what travels, who answers, what can be written."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple
from uuid import uuid4

import httpx
import ray
from ray._private import ray_constants
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
from ray._private.runtime_env import packaging
from ray.job_submission import JobStatus, JobSubmissionClient

from ip2p_ray import storage
from ip2p_ray.errors import ConfigError, Ip2pError

MOST_BYTES = int(packaging.GCS_STORAGE_MAX_SIZE)
"""Ray refuses a working directory of so many bytes."""

MANY_BYTES = 100 << 20
"""From here on the largest files are named: each job sends them anew when one file has changed."""

PACKAGES = (
    *("ray", "torch", "diffusers", "transformers", "open_clip_torch", "accelerate"),
    *("pyarrow", "numpy", "safetensors", "tokenizers", "pillow", "boto3"),
)
"""Whose other versions make other pictures, or do not understand each other."""

_SILENT = logging.Logger(__name__, logging.CRITICAL)  # Ray tells of every ignore file it reads
_NAMED = 8
_SECRET = re.compile(
    r"^\.env(\.|$)|^\.netrc$|^id_[a-z0-9]+$|^credentials|secret|\.(pem|key|p12|pfx|kdbx)$",
    re.IGNORECASE,
)
_PROBE_S = 120.0

_PROBE = (
    "import importlib.metadata as m, json, platform, sys; "
    "have = {str(d.metadata['Name']).lower().replace('-', '_'): d.version "
    "for d in m.distributions()}; "
    "print('preflight ' + json.dumps([platform.python_version(), "
    "{n: have.get(n, '') for n in sys.argv[1:]}]))"
)


class Check(NamedTuple):
    """One thing that was looked at."""

    state: Literal["fine", "note", "wrong"]
    """A note does not stop a job from working."""
    text: str
    """A sentence."""


def travels(folder: Path) -> dict[str, int]:
    """Bytes of each file that Ray would send as the working directory, by its path in it.

    Ray's own walk: .gitignore and .rayignore of every folder, and what Ray leaves out by itself.
    """
    folder = folder.absolute()
    excludes = packaging._get_excludes(folder, ray_constants.get_runtime_env_default_excludes())
    found: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path.stat().st_size

    ignored = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") == "1"
    packaging._dir_travel(folder, [excludes], note, include_gitignore=not ignored, logger=_SILENT)
    return found


def check_package(folder: Path, *, most: int = MOST_BYTES, many: int = MANY_BYTES) -> list[Check]:
    """Whether Ray takes the folder as a working directory; the largest files where it is large.

    Files whose names are those that secrets have are noted.
    """
    if not folder.is_dir():
        return [Check("wrong", f"{folder} is no folder")]
    sizes = travels(folder)
    total = sum(sizes.values())
    told = f"{_mib(total)} in {len(sizes):,} files travel from {folder}"
    secret = sorted(name for name in sizes if _SECRET.search(name.rpartition("/")[2]))
    notes = [
        Check("note", f"{name} travels too; if it is secret, name it in .rayignore")
        for name in secret[:_NAMED]
    ]
    if total < many:
        return [Check("fine", told), *notes]
    largest = sorted(sizes, key=lambda name: -sizes[name])[:_NAMED]
    names = ", ".join(f"{name} {_mib(sizes[name])}" for name in largest)
    if total < most:
        check = Check("note", f"{told}; the largest are {names}: .rayignore leaves files out")
    else:
        text = f"{told}, Ray takes less than {_mib(most)}; name in .rayignore: {names}"
        check = Check("wrong", text)
    return [check, *notes]


def check_storage(uri: str) -> Check:
    """Whether the place can be listed and written to from here: a small file comes and goes."""
    place = storage.join(uri, f".preflight-{uuid4().hex[:12]}")
    try:
        storage.check(uri)
        made = _make_folders(uri)
        try:
            storage.write_bytes(place, b"preflight")
            storage.read_bytes(place)
            storage.remove(place)
        finally:
            for folder in made:
                folder.rmdir()
    except (Ip2pError, OSError) as error:
        return Check("wrong", f"{uri} cannot be written to: {error}")
    return Check("fine", f"{uri} can be listed and written to")


def check_pins(pins: Mapping[str, str], have: Mapping[str, str], where: str) -> list[Check]:
    """Packages of PACKAGES that are of another version `where` than the pins, if there are any."""
    if not pins:
        return []
    other = [
        f"{name} {have.get(name) or 'missing'} (pinned {pins[name]})"
        for name in PACKAGES
        if name in pins and have.get(name, "").partition("+")[0] != pins[name]
    ]
    if other:
        return [
            Check("note", f"{where} has other versions than constraints.txt: {', '.join(other)}")
        ]
    return [Check("fine", f"{where} has the versions of constraints.txt")]


def read_pins(path: Path) -> dict[str, str]:
    """Version by package of a file of `name==version` lines.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    pairs = (line.split("#")[0].strip().partition("==") for line in lines)
    return {_normal(name): version.strip() for name, _, version in pairs if version}


def installed() -> dict[str, str]:
    """Version by package, of PACKAGES, in this environment."""
    found = {_normal(str(each.metadata["Name"])): each.version for each in metadata.distributions()}
    return {name: found[name] for name in PACKAGES if name in found}


def check_cluster(
    address: str, pins: Mapping[str, str], *, patience_s: float = _PROBE_S
) -> list[Check]:
    """Whether a cluster answers at the dashboard's address and can run what is here.

    A job is submitted that prints the versions it finds.
    """
    try:
        answer = httpx.get(
            f"{address.rstrip('/')}/api/version",
            headers=get_auth_headers_if_auth_enabled({}),
            timeout=30,
        )
    except httpx.HTTPError as error:
        return [Check("wrong", f"{address} does not answer: {error or type(error).__name__}")]
    if answer.status_code in (401, 403):
        text = (
            f"{address} wants a token ({answer.status_code}): export RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        )
        return [Check("wrong", text)]
    try:
        theirs = str(answer.raise_for_status().json()["ray_version"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        text = f"{address} answers {answer.status_code}, but is no dashboard of Ray's"
        return [Check("wrong", text)]
    if theirs != ray.__version__:
        return [Check("wrong", f"{address} runs Ray {theirs}, here is {ray.__version__}")]
    return [Check("fine", f"{address} runs Ray {theirs}"), *_probed(address, pins, patience_s)]


def _probed(address: str, pins: Mapping[str, str], patience_s: float) -> Iterator[Check]:
    try:
        status, logs = _asked(JobSubmissionClient(address), patience_s)
    except (RuntimeError, OSError) as error:  # what Ray's client raises, requests' errors included
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        yield Check("wrong", f"{address}: a job cannot be submitted: {reason}")
        return
    if not status.is_terminal():
        yield Check("wrong", f"{address}: a job did not end in {patience_s:g} s; is it full?")
        return
    told = [line.removeprefix("preflight ") for line in logs if line.startswith("preflight [")]
    if status != JobStatus.SUCCEEDED or not told:
        yield Check("wrong", f"{address}: a job failed: {' '.join(logs[-3:])}")
        return
    python, have = json.loads(told[-1])
    ours = platform.python_version()
    if python.split(".")[:2] != ours.split(".")[:2]:
        yield Check("wrong", f"{address} runs Python {python}, here is {ours}")
    else:
        yield Check("fine", f"{address} ran a job, in Python {python}")
    yield from check_pins(pins, have, f"the cluster at {address}")


def _asked(client: JobSubmissionClient, patience_s: float) -> tuple[JobStatus, list[str]]:
    """How the job that prints versions ended, and its lines; one that takes longer is stopped."""
    command = ["python", "-c", _PROBE, *PACKAGES]
    job = client.submit_job(entrypoint=shlex.join(command))
    deadline = time.monotonic() + patience_s
    while not (status := client.get_job_status(job)).is_terminal():
        if time.monotonic() > deadline:
            client.stop_job(job)
            return status, []
        time.sleep(0.5)
    return status, client.get_job_logs(job).splitlines()


def _make_folders(uri: str) -> Sequence[Path]:
    """The folders that had to be made, the deepest first."""
    if not storage.is_local(uri):
        return ()
    folder = storage.local_path(uri).absolute()
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB"


def _normal(name: str) -> str:
    return name.strip().lower().replace("-", "_")
