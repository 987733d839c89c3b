"""Edit one picture, or a folder of them, as a sentence tells it; no Ray.

    python jobs/edit.py --image boat.png --instruction "make it night"
    python jobs/edit.py --image boat.png --instruction "make it night" \
        --model runs/quickstart/editor
    python jobs/edit.py --image boats/ --instruction "make it night" --server http://127.0.0.1:8000
    ray job submit --working-dir . -- python jobs/edit.py --image /shared/boats \
        --instruction "make it night" --out /shared/night

Of a folder every picture is edited; the same command goes on where a stopped one ended.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.command import is_web_address, loading, require_place

if TYPE_CHECKING:
    from ip2p_ray.picture_folder import Submit


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Pictures and one instruction in, edited pictures out."""

    image: str
    """The picture to edit, PNG, JPEG, WebP and others, here or s3://...; or a folder here."""
    instruction: str
    """What to change, for example "make it night"."""
    model: str | None = None
    """A diffusers folder, s3://... or hub id of an editor; by default the miniature's, for drawn
    pictures."""
    server: str | None = None
    """Address of a running service, which edits instead, as http://127.0.0.1:8000."""
    api_key_env: str = "IP2P_API_KEY"
    """Name of the environment variable that holds the key to the service, if it wants one."""
    at_once: int = 4
    """Requests to the service at a time."""
    patience_s: float = 600.0
    """Seconds in all for which a picture is sent again while the service is full or away."""
    out: Path | None = None
    """Where the edited picture goes; by default beside the picture (of a bucket: here), as
    <name>-edited.png. Of a folder the folder, by default <folder>-edited."""
    mask: Path | None = None
    """A PNG of the picture's size, transparent where to edit; the rest stays untouched."""
    seed: int = 0
    """Another seed gives another edit."""
    text_guidance_scale: float | None = None
    """How strongly the instruction is followed; by default the model's own."""
    image_guidance_scale: float | None = None
    """How strongly the picture is kept; by default the model's own."""
    steps: int | None = None
    """Denoising steps; by default the model's own."""

    def __post_init__(self) -> None:
        if not self.in_bucket and not self.place.exists():
            raise ValueError(f"--image {self.image} is no file and no folder")
        if not self.instruction.strip():
            raise ValueError("--instruction is empty")
        if not 0 <= self.seed < 2**63:
            raise ValueError("--seed lies in [0, 2**63)")
        if self.steps is not None and self.steps < 1:
            raise ValueError("--steps is at least 1")
        for name in ("text_guidance_scale", "image_guidance_scale"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise ValueError(f"--{name.replace('_', '-')} is a finite number")
        self._check_server()
        if self.mask is not None and not self.mask.is_file():
            raise ValueError(f"--mask {self.mask} is no file")
        if self.is_folder:
            self._check_folder()
        else:
            self._check_file()

    def _check_server(self) -> None:
        if self.server is not None and not is_web_address(self.server):
            raise ValueError(f"--server is like http://127.0.0.1:8000, got {self.server}")
        if self.server is not None and self.model is not None:
            raise ValueError("--model is for editing here; the service at --server has its own")
        if self.at_once < 1:
            raise ValueError("--at-once is at least 1")
        if not self.patience_s >= 0:
            raise ValueError("--patience-s is at least 0")

    def _check_file(self) -> None:
        if self.target.suffix.lower() != ".png":
            raise ValueError(f"--out {self.target} does not end in .png, which is what is written")
        if self.target.exists() and not self.in_bucket and self.target.samefile(self.place):
            raise ValueError(f"--out {self.target} is the picture itself")
        require_place("--out", self.target, folder=False)

    def _check_folder(self) -> None:
        if self.mask is not None:
            raise ValueError("--mask is for one picture, and --image is a folder")
        require_place("--out", self.target, folder=True)
        if self.target.exists() and self.target.samefile(self.place):
            raise ValueError(f"--out {self.target} is the folder of the pictures itself")

    @property
    def in_bucket(self) -> bool:
        """Whether the picture is fetched from a bucket."""
        return self.image.startswith("s3://")

    @property
    def place(self) -> Path:
        """The path of --image; of one of a bucket its name."""
        return Path(self.image.rpartition("/")[2] if self.in_bucket else self.image)

    @property
    def is_folder(self) -> bool:
        """Whether --image is a folder of pictures."""
        return not self.in_bucket and self.place.is_dir()

    @property
    def target(self) -> Path:
        """Where what is edited goes."""
        if self.out is not None:
            return self.out
        if self.is_folder:
            folder = self.place.resolve()
            return folder.with_name(f"{folder.name}-edited")
        return self.place.with_name(f"{self.place.stem}-edited.png")

    @property
    def settings(self) -> dict[str, Any]:
        """What both ways of editing take, by the API's names."""
        return {
            "seed": self.seed,
            "text_guidance_scale": self.text_guidance_scale,
            "image_guidance_scale": self.image_guidance_scale,
            "steps": self.steps,
        }


def main(job: Edit) -> int:
    """Edit what was given; returns the exit status."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    if job.model is None or "://" in job.model or Path(job.model).exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with loading("edit"):
        from ip2p_ray.errors import Ip2pError
        from ip2p_ray.images import decode_image
        from ip2p_ray.storage import read_bytes, write_bytes
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ip2p_ray").setLevel(logging.INFO)
    try:
        with _submitting(job) as (submit, at_once, model):
            if job.is_folder:
                return _edit_folder(job, submit, at_once, model)
            edited = submit(read_bytes(job.image)).result()
            write_bytes(str(job.target), edited)
    except KeyboardInterrupt:
        print("edit: stopped", file=sys.stderr, flush=True)
        os._exit(130)  # requests may be waiting; what is written is whole or not there
    except (Ip2pError, OSError) as error:
        print(f"edit: {error}", file=sys.stderr)
        return 1
    size = decode_image(edited).size
    print(f"edit: {job.target} ({size[0]} x {size[1]})")
    return 0


def _edit_folder(job: Edit, submit: Submit, at_once: int, model: str) -> int:
    from ip2p_ray.picture_folder import FolderReport, edit_folder, pictures_in
    from ip2p_ray.stages.progress import Progress, shown

    pictures, report = pictures_in(job.place), FolderReport()
    if not pictures:
        print(f"edit: no pictures in {job.image}", file=sys.stderr)
        return 1
    recipe = {"instruction": job.instruction, "model": model, **job.settings}
    with shown(Progress("edit", total=len(pictures), unit="pictures"), lambda: report.done):
        edit_folder(
            pictures,
            job.target,
            recipe,
            submit,
            at_once=at_once,
            report=report,
            tell=lambda sentence: print(f"edit: {sentence}", file=sys.stderr),
        )
    counts = f"{report.found + report.made:,} of {report.total:,} pictures"
    before = f", {report.found:,} of them before" if report.found else ""
    failed = f"; {len(report.failed):,} failed" if report.failed else ""
    print(f"edit: {job.target}: {counts}{before}{failed}")
    return 1 if report.failed else 0


@contextmanager
def _submitting(job: Edit) -> Iterator[tuple[Submit, int, str]]:
    """What edits a picture, how many at a time, and the name of its model."""
    with ExitStack() as opened:
        yield _remote(job, opened) if job.server is not None else _local(job, opened)


def _local(job: Edit, opened: ExitStack) -> tuple[Submit, int, str]:
    from concurrent.futures import CancelledError, Future

    from ip2p_ray.copies import local_folder
    from ip2p_ray.editor import Editor
    from ip2p_ray.engine import Engine, EngineConfig, EngineRequest
    from ip2p_ray.images import encode_png
    from ip2p_ray.miniature import weights

    editor = weights.load_editor() if job.model is None else Editor.load(local_folder(job.model))
    stated = {name: value for name, value in job.settings.items() if value is not None}
    names = ("text_guidance_scale", "image_guidance_scale", "steps")
    settings = {**{name: getattr(editor.settings, name) for name in names}, **stated}
    mask = None if job.mask is None else job.mask.read_bytes()
    at_once = 2 * editor.batch_size
    config = EngineConfig(batch_size=editor.batch_size, max_waiting=at_once)
    engine = opened.enter_context(Engine(editor, config))

    def submit(picture: bytes) -> Future[bytes]:
        request = EngineRequest(image=picture, instruction=job.instruction, mask=mask, **settings)
        encoded: Future[bytes] = Future()
        encoded.set_running_or_notify_cancel()

        def end(made: Future[Any]) -> None:
            try:
                encoded.set_result(encode_png(made.result()))
            except (Exception, CancelledError) as error:  # noqa: BLE001 - whoever waits raises it
                encoded.set_exception(error)

        engine.submit(request).future.add_done_callback(end)
        return encoded

    return submit, at_once, job.model or "miniature"


def _remote(job: Edit, opened: ExitStack) -> tuple[Submit, int, str]:
    from concurrent.futures import ThreadPoolExecutor

    from ip2p_ray.remote_editor import RemoteEditor

    key = os.environ.get(job.api_key_env)
    assert job.server is not None
    editor = opened.enter_context(RemoteEditor(job.server, key, patience_s=job.patience_s))
    pool = ThreadPoolExecutor(job.at_once)
    opened.callback(pool.shutdown, cancel_futures=True)
    mask = None if job.mask is None else job.mask.read_bytes()
    [model, *_] = editor.models()

    def edit(picture: bytes) -> bytes:
        return editor.edit(picture, job.instruction, mask=mask, **job.settings).data

    return lambda picture: pool.submit(edit, picture), job.at_once, model


if __name__ == "__main__":
    with loading("edit"):
        import tyro

        asked = tyro.cli(Edit)
    sys.exit(main(asked))
