"""Captions from files as people have them: cleaned, each once, a sample of them.

    python jobs/collect_captions.py --files laion.parquet --column TEXT --out runs/laion
    python jobs/collect_captions.py --files a.csv b.jsonl.gz lists/ --sample 100000 --language en
    ray job submit --working-dir . -- python jobs/collect_captions.py \
        --files /shared/laion --column TEXT --sample 100000 --out /shared/run
    python jobs/collect_captions.py --files s3://bucket/laion/ --column TEXT --out s3://bucket/run

s3:// takes endpoint, region and credentials from where boto3 finds them: AWS_ENDPOINT_URL (of MinIO
and the like), AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, the pod's role.

Files of triplets (input, edit, output; original_prompt, edit_prompt, edited_prompt; and the like)
become the dataset of triplets at once. One process does it; Ray only brings it to a cluster. The
same command again finds what is made.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout, not installed

from ip2p_ray.command import require_uri


@dataclass(frozen=True, kw_only=True)
class CollectCaptions:
    """Files in, <out>/captions (or <out>/triplets) and <out>/rejects out."""

    files: tuple[str, ...]
    """Files (.parquet, .jsonl, .csv, .tsv, .txt; but for Parquet also gzipped), or folders; here
    or s3://."""
    out: str = "runs/captions"
    """Folder for the datasets; here or s3://."""
    column: str | None = None
    """Column of the caption; by default one of the usual names is looked for."""
    url_column: str | None = None
    """Column of the picture's URL; of captions with one URL one is kept."""
    source_column: str | None = None
    """Column that says where a row is from; by default "source", or the file's name."""
    sample: int | None = None
    """Captions to keep, drawn by --seed from all that pass; by default all."""
    seed: int = 0
    """Of the sample, which does not depend on the order of rows or files."""
    language: Literal["en"] | None = None
    """Keep only English, as far as script and little words tell; by default any language."""
    held_out: float = 0.05
    """Share of triplets that no editor is trained on; only for files of triplets."""

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("--files names at least one file or folder")
        for name in self.files:
            if name.startswith("s3://"):
                continue
            if "://" in name and not name.startswith("file://"):
                raise ValueError(f"--files {name}: only local files and s3:// can be read")
            if not Path(name.removeprefix("file://")).exists():
                raise ValueError(f"--files {name}: there is no such file or folder")
        require_uri("--out", self.out, written=True)
        if self.sample is not None and self.sample < 1:
            raise ValueError("--sample is at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError("--seed lies in [0, 2**63)")
        if not 0 <= self.held_out < 1:
            raise ValueError("--held-out lies in [0, 1)")


def main(job: CollectCaptions) -> int:
    """Collect the captions, or find that they are there; returns the exit status."""
    from ip2p_ray import storage
    from ip2p_ray.captions import CaptionConfig, CaptionFiles
    from ip2p_ray.stages import run
    from ip2p_ray.stages.captions import collect_files

    config = CaptionConfig(sample=job.sample, seed=job.seed, language=job.language)

    def work() -> None:
        with run.locked(job.out):
            rows = CaptionFiles(
                paths=tuple(file for name in job.files for file in storage.files_at(name)),
                column=job.column,
                url_column=job.url_column,
                source_column=job.source_column,
            )
            made = collect_files(rows, job.out, config, held_out=job.held_out)
        print(f"collect_captions: {storage.join(job.out, made.dataset)} has {made.rows:,} rows")

    return run.guarded("collect_captions", work)


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(CollectCaptions)))
