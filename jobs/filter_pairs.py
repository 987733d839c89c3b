"""Pairs judged again by other thresholds, pairs of one's own, and pairs for others to read.

    python jobs/filter_pairs.py --scores runs/pairs --image 0.7 --keep 2 --out runs/looser
    python jobs/filter_pairs.py --input mine.parquet MagicBrush/ --resolution 512 --out runs/mine
    python jobs/filter_pairs.py --scores runs/pairs --export published
    ray job submit --working-dir . -- python jobs/filter_pairs.py \
        --scores /shared/pairs --direction 0.15 --out /shared/looser --export /shared/published
    ray job submit --working-dir . -- python jobs/filter_pairs.py \
        --input s3://bucket/mine/ --resolution 512 --out s3://bucket/run

Stored scores need no model and no GPU. Own pairs are tables (Parquet, JSON lines, CSV) with columns
source_image, instruction, edited_image (and caption, edited_caption) under the names of the
published datasets, or folders as the reference's generator leaves them (those only here, not in a
bucket); each row is checked and the unusable ones become rejects. An export is what
`datasets.load_dataset` reads. One process does it; Ray only brings it to a cluster. The same
command again finds what is made. s3:// is as in jobs/collect_captions.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.command import loading, require_uri

OF_INPUT = ("judge", "resolution", "min_side", "held_out", "max_reject_share")
DATASETS = ("checked", "scores", "pairs", "rejects")
MANIFEST = "_manifest.json"  # storage's, which takes long to load
OF_RULES = ("text", "image", "direction", "keep")


@dataclass(frozen=True, kw_only=True)
class FilterPairs:
    """Scores, or pairs of one's own, in; <out>/pairs, scores and rejects, or an export, out."""

    scores: str | None = None
    """Folder with the datasets scores and pairs, as generate_pairs and this job leave them; here or
    s3://."""
    input: tuple[str, ...] = ()
    """Own pairs: tables (.parquet, .jsonl, .csv, .tsv), or folders; here or s3://."""
    out: str | None = None
    """Folder for the new datasets; here or s3://."""
    export: str | None = None
    """Folder for the published form of the pairs of --out, or of --scores where there is none; here
    or s3://."""
    text: float | None = None
    """Lowest similarity of a picture with its caption; by default what it was, else the paper's."""
    image: float | None = None
    """The same of both pictures with each other."""
    direction: float | None = None
    """The same of the change of the picture with the change of the caption."""
    keep: int | None = None
    """At most so many pairs of a triplet; by default what it was, of own pairs all."""
    judge: str | None = None
    """Of --input: folder, s3://... or open_clip name of a CLIP that computes the similarities."""
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
        for name in self.input:
            require_uri("--input", name)
            if not _may_exist(name):
                raise ValueError(f"--input {name}: there is no such file or folder")
        places = [("--scores", self.scores), ("--out", self.out), ("--export", self.export)]
        given = [(flag, uri) for flag, uri in places if uri is not None]
        for number, (flag, uri) in enumerate(given):
            require_uri(flag, uri, written=flag != "--scores")
            for other, taken in given[:number]:
                if _place(uri) == _place(taken):
                    raise ValueError(f"{flag} {uri} is what {other} names; give another folder")
        if self.scores is not None and not _may_exist(self.scores):
            raise ValueError(f"--scores {self.scores}: there is no such folder")
        self._check_below()

    def _check_below(self) -> None:
        """What is written where something else is read would be read with it."""
        made = [below for below in (self.out, self.scores) if below is not None]
        inside = [(_place(name), name) for name in self.input]
        inside += [
            (_place(folder) / name, f"{folder.rstrip('/')}/{name}")
            for folder in made
            for name in DATASETS
        ]
        for flag, uri in (("--out", self.out), ("--export", self.export)):
            if uri is None:
                continue
            place = _place(uri)
            above = (place, *place.parents)
            for folder, told in inside:
                if folder in above and not (isinstance(folder, Path) and folder.is_file()):
                    raise ValueError(
                        f"{flag} {uri} lies in {told}, whose files would then be read as well; "
                        "give a folder outside it"
                    )
            for folder in above if flag == "--out" else above[1:]:
                if isinstance(folder, Path) and (folder / MANIFEST).is_file():
                    raise ValueError(_in_dataset(flag, uri, str(folder)))


def _place(uri: str) -> PurePath:
    """What can be compared: the path, or of a bucket what follows the scheme."""
    if uri.startswith("s3://"):
        return PurePosixPath("/", uri.removeprefix("s3://"))
    return Path(uri.removeprefix("file://")).resolve()


def _may_exist(uri: str) -> bool:
    """Whether it is there, or in a bucket, which is asked later."""
    return uri.startswith("s3://") or Path(uri.removeprefix("file://")).exists()


def _in_dataset(flag: str, uri: str, dataset: str) -> str:
    return f"{flag} {uri} lies in the dataset {dataset}, whose it is not; give a folder outside it"


def main(job: FilterPairs) -> int:
    """Filter, collect or export, or find that it is done; returns the exit status."""
    with loading("filter_pairs"):
        from ip2p_ray import storage
        from ip2p_ray.stages import run
        from ip2p_ray.stages.export import export_pairs

    def work() -> None:
        for flag, uri in (("--out", job.out), ("--export", job.export)):
            if uri is not None and not storage.is_local(uri):
                _require_no_dataset(flag, uri)
        if job.out is not None:
            with run.locked(job.out):
                made = _own(job) if job.input else _again(job)
            print(f"filter_pairs: {storage.join(job.out, 'pairs')} has {made.rows:,} pairs")
        if job.export is not None:
            made_in = storage.absolute(job.out or job.scores or "")
            with run.locked(job.export):
                exported = export_pairs(made_in, storage.absolute(job.export))
            print(f"filter_pairs: {job.export} has {exported.rows:,} pairs in the published form")

    return run.guarded("filter_pairs", work)


def _require_no_dataset(flag: str, uri: str) -> None:
    """What `FilterPairs` asks of folders here before a bucket could be asked."""
    from ip2p_ray import storage
    from ip2p_ray.errors import ConfigError

    storage.check(uri)
    place = _place(uri)
    for folder in (place, *place.parents)[0 if flag == "--out" else 1 : -1]:
        dataset = f"s3:/{folder}"
        if storage.exists(storage.join(dataset, MANIFEST)):
            raise ConfigError(_in_dataset(flag, uri, dataset))


def _again(job: FilterPairs) -> Any:
    from ip2p_ray import storage
    from ip2p_ray.filtering import Thresholds
    from ip2p_ray.rules import Rules
    from ip2p_ray.stages.filtering import rejudge_pairs, stored_rules

    scored = storage.absolute(job.scores or "")
    rules = (stored_rules(scored) or Rules(thresholds=Thresholds())).changed(**_rules(job))
    print(f"filter_pairs: lowest similarities: {rules.line()}")
    return rejudge_pairs(scored, storage.absolute(job.out or ""), rules)


def _own(job: FilterPairs) -> Any:
    from ip2p_ray import storage
    from ip2p_ray.clip import Clip
    from ip2p_ray.copies import local_folder
    from ip2p_ray.filtering import Thresholds
    from ip2p_ray.layouts import PairFiles
    from ip2p_ray.own_pairs import OwnPairsConfig
    from ip2p_ray.rules import Rules
    from ip2p_ray.stages.own_pairs import OwnPairs, collect_own_pairs

    rules = None
    if job.judge is not None or any(value is not None for value in _rules(job).values()):
        rules = Rules(thresholds=Thresholds(), keep=None).changed(**_rules(job))
        print(f"filter_pairs: lowest similarities: {rules.line()}")
    config = {"min_side": job.min_side, "resolution": job.resolution}
    shares = {"held_out": job.held_out, "max_reject_share": job.max_reject_share}
    own = OwnPairs(
        files=PairFiles(paths=tuple(file for name in job.input for file in storage.files_at(name))),
        config=OwnPairsConfig(**{k: v for k, v in config.items() if v is not None}),
        rules=rules,
        **{k: v for k, v in shares.items() if v is not None},
    )
    own.files.inputs()  # or a sentence that says what is wrong with one, before a model is loaded
    judge = None if job.judge is None else Clip.load(local_folder(job.judge), job.device)
    return collect_own_pairs(own, storage.absolute(job.out or ""), judge)


def _rules(job: FilterPairs) -> dict[str, Any]:
    return {name: getattr(job, name) for name in OF_RULES}


if __name__ == "__main__":
    with loading("filter_pairs"):
        import tyro

        asked = tyro.cli(FilterPairs)
    sys.exit(main(asked))
