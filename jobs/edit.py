"""Edit one picture as a sentence tells it; no Ray, no network.

python jobs/edit.py --image boat.png --instruction "make it night"
python jobs/edit.py --image boat.png --instruction "make it night" --model runs/quickstart/editor
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.command import loading, require_place


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One picture and one instruction in, one edited picture out."""

    image: Path
    """The picture to edit; PNG, JPEG, WebP and others."""
    instruction: str
    """What to change, for example "make it night"."""
    model: str | None = None
    """A diffusers folder or hub id of an editor; by default the miniature's, for drawn pictures."""
    out: Path | None = None
    """Where the edited picture goes; by default beside the picture, as <name>-edited.png."""
    seed: int = 0
    """Another seed gives another edit."""
    text_guidance_scale: float | None = None
    """How strongly the instruction is followed; by default the model's own."""
    image_guidance_scale: float | None = None
    """How strongly the picture is kept; by default the model's own."""
    steps: int | None = None
    """Denoising steps; by default the model's own."""

    def __post_init__(self) -> None:
        if not self.image.is_file():
            raise ValueError(f"--image {self.image} is no file")
        if not self.instruction.strip():
            raise ValueError("--instruction is empty")
        if not 0 <= self.seed < 2**63:
            raise ValueError("--seed lies in [0, 2**63)")
        if self.steps is not None and self.steps < 1:
            raise ValueError("--steps is at least 1")
        for name in ("text_guidance_scale", "image_guidance_scale"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise ValueError(f"--{name.replace('_', '-')} is a finite number")
        if self.target.suffix.lower() != ".png":
            raise ValueError(f"--out {self.target} does not end in .png, which is what is written")
        if self.target.exists() and self.target.samefile(self.image):
            raise ValueError(f"--out {self.target} is the picture itself")
        require_place("--out", self.target, folder=False)

    @property
    def target(self) -> Path:
        """Where the edited picture goes."""
        return self.out or self.image.with_name(f"{self.image.stem}-edited.png")


def main(job: Edit) -> int:
    """Edit the picture; returns the exit status."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    if job.model is None or Path(job.model).exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with loading("edit"):
        from ip2p_ray.editor import Editor
        from ip2p_ray.errors import Ip2pError
        from ip2p_ray.images import encode_png
        from ip2p_ray.miniature import weights
        from ip2p_ray.storage import write_bytes
    try:
        editor = weights.load_editor() if job.model is None else Editor.load(job.model)
        edited = editor.edit(
            job.image.read_bytes(),
            job.instruction,
            seed=job.seed,
            text_guidance_scale=job.text_guidance_scale,
            image_guidance_scale=job.image_guidance_scale,
            steps=job.steps,
        )
        write_bytes(str(job.target), encode_png(edited))
    except KeyboardInterrupt:
        print("edit: stopped", file=sys.stderr)
        return 130
    except (Ip2pError, OSError) as error:
        print(f"edit: {error}", file=sys.stderr)
        return 1
    print(f"edit: {job.target} ({edited.width} x {edited.height})")
    return 0


if __name__ == "__main__":
    with loading("edit"):
        import tyro

        asked = tyro.cli(Edit)
    sys.exit(main(asked))
