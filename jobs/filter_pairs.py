"""Pairs judged again by other thresholds, pairs of one's own, and pairs for others to read.

    python jobs/filter_pairs.py --scores runs/pairs --image 0.7 --keep 2 --out runs/looser
    python jobs/filter_pairs.py --input mine.parquet MagicBrush/ --resolution 512 --out runs/mine
    python jobs/filter_pairs.py --scores runs/pairs --export published
    ray job submit --working-dir . -- python jobs/filter_pairs.py \
        --scores /shared/pairs --direction 0.15 --out /shared/looser --export /shared/published

Stored scores need no model and no GPU. Own pairs are tables (Parquet, JSON lines, CSV) with columns
source_image, instruction, edited_image (and caption, edited_caption) under the names of the
published datasets, or folders as the reference's generator leaves them; each row is checked and the
unusable ones become rejects. An export is what `datasets.load_dataset` reads. One process does it;
Ray only brings it to a cluster. The same command again finds what is made.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.command import loading, require_place

OF_INPUT = ("judge", "resolution", "min_side", "held_out", "max_reject_share")
DATASETS = ("checked", "scores", "pairs", "rejects")
MANIFEST = "_manifest.json"  # storage's, which takes long to load
OF_RULES = ("text", "image", "direction", "keep")


@dataclass(frozen=True, kw_only=True)
class FilterPairs:
    """Scores, or pairs of one's own, in; <out>/pairs, scores and rejects, or an export, out."""

    scores: Path | None = None
    """Folder with the datasets scores and pairs, as generate_pairs and this job leave them."""
    input: tuple[str, ...] = ()
    """Own pairs: tables (.parquet, .jsonl, .csv, .tsv), or folders."""
    out: Path | None = None
    """Folder for the new datasets."""
    export: Path | None = None
    """Folder for the published form of the pairs of --out, or of --scores where there is none."""
    text: float | None = None
    """Lowest similarity of a picture with its caption; by default what it was, else the paper's."""
    image: float | None = None
    """The same of both pictures with each other."""
    direction: float | None = None
    """The same of the change of the picture with the change of the caption."""
    keep: int | None = None
    """At most so many pairs of a triplet; by default what it was, of own pairs all."""
    judge: str | None = None
    """Of --input: folder or open_clip name of a CLIP that computes the similarities."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where --judge runs."""
    resolution: int | None = None
    """Of --input: height and width of all pictures; by default they stay as they are."""
    min_side: int | None = None
    """Of --input: pixels of the shorter side, at least; by default 64."""
    held_out: float | None = None
    """Of --input: share of pairs that no editor is trained on; by default 0.05."""
    max_reject_share: float | None = None
    """Of --input: share of unusable rows above which the job fails; by default 0.1."""

    def __post_init__(self) -> None:
        if (self.scores is None) == (not self.input):
            raise ValueError("give either --scores or --input")
        if self.input and self.out is None:
            raise ValueError("--input needs --out, the folder for the datasets")
        if self.out is None and self.export is None:
            raise ValueError("give --out for pairs judged again, or --export, or both")
        for name in OF_INPUT:
            if not self.input and getattr(self, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is only for --input")
        for name in OF_RULES:
            if self.out is None and getattr(self, name) is not None:
                raise ValueError(f"--{name} judges pairs again: name the folder for them by --out")
        self._check_values()
        self._check_places()

    def _check_values(self) -> None:
        for name in ("text", "image", "direction"):
            value = getattr(self, name)
            if value is not None and not -1 <= value <= 1:
                raise ValueError(f"--{name} is a cosine in [-1, 1]")
        for name in ("keep", "min_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is at least 1")
        for name in ("held_out", "max_reject_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"--{name.replace('_', '-')} lies in [0, 1]")
        if self.resolution is not None and (self.resolution < 8 or self.resolution % 8):
            raise ValueError("--resolution is a multiple of 8")

    def _check_places(self) -> None:
        if self.scores is not None and not self.scores.is_dir():
            raise ValueError(f"--scores {self.scores}: there is no such folder")
        for name in self.input:
            if "://" in name and not name.startswith("file://"):
                raise ValueError(f"--input {name}: only local files can be read")
            if not Path(name.removeprefix("file://")).exists():
                raise ValueError(f"--input {name}: there is no such file or folder")
        places = [("--scores", self.scores), ("--out", self.out), ("--export", self.export)]
        given = [(flag, path.absolute()) for flag, path in places if path is not None]
        for number, (flag, path) in enumerate(given):
            for other, taken in given[:number]:
                if path == taken:
                    raise ValueError(f"{flag} {path} is what {other} names; give another folder")
            if flag != "--scores":
                require_place(flag, path, folder=True)
        self._check_below()

    def _check_below(self) -> None:
        """What is written where something else is read would be read with it."""
        out, export = (path and path.resolve() for path in (self.out, self.export))
        made = [below for below in (self.out, self.scores) if below is not None]
        inside = [(Path(name.removeprefix("file://")).resolve(), name) for name in self.input]
        inside += [
            (folder.resolve() / name, f"{folder / name}") for folder in made for name in DATASETS
        ]
        for flag, place in (("--out", out), ("--export", export)):
            if place is None:
                continue
            above = (place, *place.parents)
            for folder, told in inside:
                if folder in above and not folder.is_file():
                    raise ValueError(
                        f"{flag} {place} lies in {told}, whose files would then be read as well; "
                        "give a folder outside it"
                    )
            for folder in above if flag == "--out" else above[1:]:
                if (folder / MANIFEST).is_file():
                    raise ValueError(
                        f"{flag} {place} lies in the dataset {folder}, whose it is not; give a "
                        "folder outside it"
                    )


def main(job: FilterPairs) -> int:
    """Filter, collect or export, or find that it is done; returns the exit status."""
    with loading("filter_pairs"):
        from ip2p_ray.stages import run
        from ip2p_ray.stages.export import export_pairs

    def work() -> None:
        if job.out is not None:
            with run.locked(job.out):
                made = _own(job) if job.input else _again(job)
            print(f"filter_pairs: {job.out / 'pairs'} has {made.rows:,} pairs")
        if job.export is not None:
            with run.locked(job.export):
                exported = export_pairs(str(job.out or job.scores), str(job.export))
            print(f"filter_pairs: {job.export} has {exported.rows:,} pairs in the published form")

    return run.guarded("filter_pairs", work)


def _again(job: FilterPairs) -> Any:
    from ip2p_ray.filtering import Thresholds
    from ip2p_ray.rules import Rules
    from ip2p_ray.stages.filtering import rejudge_pairs, stored_rules

    scored = str(job.scores)
    rules = (stored_rules(scored) or Rules(thresholds=Thresholds())).changed(**_rules(job))
    print(f"filter_pairs: lowest similarities: {rules.line()}")
    return rejudge_pairs(scored, str(job.out), rules)


def _own(job: FilterPairs) -> Any:
    from ip2p_ray.clip import Clip
    from ip2p_ray.filtering import Thresholds
    from ip2p_ray.layouts import PairFiles
    from ip2p_ray.own_pairs import OwnPairsConfig
    from ip2p_ray.rules import Rules
    from ip2p_ray.stages.own_pairs import OwnPairs, collect_own_pairs
    from ip2p_ray.storage import local_path

    rules = None
    if job.judge is not None or any(value is not None for value in _rules(job).values()):
        rules = Rules(thresholds=Thresholds(), keep=None).changed(**_rules(job))
        print(f"filter_pairs: lowest similarities: {rules.line()}")
    config = {"min_side": job.min_side, "resolution": job.resolution}
    shares = {"held_out": job.held_out, "max_reject_share": job.max_reject_share}
    own = OwnPairs(
        files=PairFiles(paths=tuple(local_path(name) for name in job.input)),
        config=OwnPairsConfig(**{k: v for k, v in config.items() if v is not None}),
        rules=rules,
        **{k: v for k, v in shares.items() if v is not None},
    )
    own.files.inputs()  # or a sentence that says what is wrong with one, before a model is loaded
    judge = None if job.judge is None else Clip.load(job.judge, job.device)
    return collect_own_pairs(own, str(job.out), judge)


def _rules(job: FilterPairs) -> dict[str, Any]:
    return {name: getattr(job, name) for name in OF_RULES}


if __name__ == "__main__":
    with loading("filter_pairs"):
        import tyro

        asked = tyro.cli(FilterPairs)
    sys.exit(main(asked))
