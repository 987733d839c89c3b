"""Pairs in the form of the published dataset, which Hugging Face `datasets` reads.

Five columns: original_prompt, original_image, edit_prompt, edited_prompt, edited_image. What makes
`datasets` decode the pictures is a note in the schema of each Parquet file.

Source: the columns of timbrooks/instructpix2pix-clip-filtered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ip2p_ray import __version__
from ip2p_ray.schema import IMAGE

COLUMNS = {
    "original_prompt": "caption",
    "original_image": "source_image",
    "edit_prompt": "instruction",
    "edited_prompt": "edited_caption",
    "edited_image": "edited_image",
}
"""The published columns in their order, each with ours."""

PUBLISHED = pa.schema(
    [(name, IMAGE if name.endswith("_image") else pa.string()) for name in COLUMNS],
    metadata={
        "huggingface": json.dumps(
            {
                "info": {
                    "features": {
                        name: {"_type": "Image"}
                        if name.endswith("_image")
                        else {"dtype": "string", "_type": "Value"}
                        for name in COLUMNS
                    }
                }
            }
        )
    },
)
"""The schema of an exported shard, with the note on its features."""

_MEANINGS = {
    "original_prompt": "describes the original image; may be null in data of one's own",
    "original_image": "the picture before the edit",
    "edit_prompt": 'the instruction, such as "make it night"',
    "edited_prompt": "describes the edited image; may be null in data of one's own",
    "edited_image": "the picture after the edit",
}

CARD = """\
---
# license: choose one, and name it here, before you publish this
task_categories:
- image-to-image
configs:
- config_name: default
  data_files:
{files}
---

# Pairs of pictures with editing instructions

{rows:,} pairs for training an editor as InstructPix2Pix is trained: {splits}. Written by ip2p_ray
{version}. **No licence is stated: that depends on the models and data that the pairs were made
from, and is yours to choose.**

```python
from datasets import load_dataset

pairs = load_dataset("parquet", data_files={loaded})
```

| column | holds |
|---|---|
{columns}

## How they were made

{made}
"""


def published_table(pairs: pa.Table) -> pa.Table:
    """The published columns of a table of `schema.PAIRS`."""
    table = pairs.select(list(COLUMNS.values())).rename_columns(list(COLUMNS))
    return table.cast(PUBLISHED)


def card(
    splits: Mapping[str, int],
    *,
    thresholds: Mapping[str, float] | None,
    keep: int | None,
    recipes: Sequence[str],
    models: Mapping[str, str],
    reports: Sequence[Mapping[str, Any]],
) -> str:
    """The text of README.md beside the shards: what they hold and how it was made.

    `splits` has the number of pairs of each split with at least one; `reports` are those of the
    pairs' manifest (`Report.as_dict`).
    """
    files = {split: f"data/{split}-*.parquet" for split in splits}
    facts = [f"- recipe {', '.join(recipes)}"] if recipes else ["- data of one's own, no recipe"]
    facts += [f"- {role} {fingerprint}" for role, fingerprint in sorted(models.items())]
    if thresholds:
        limits = ", ".join(f"{name} {value:g}" for name, value in thresholds.items())
        facts.append(f"- lowest CLIP similarities: {limits}")
        facts.append(f"- at most {keep} pairs of a triplet" if keep else "- all that pass are kept")
    for report in reports:
        facts.append(f"- {report['stage']}: {report['rows_out']:,} of {report['rows_in']:,} kept")
        facts += [f"  - {reason} {count:,}" for reason, count in report["rejected"].items()]
    return CARD.format(
        files="\n".join(f"  - split: {name}\n    path: {path}" for name, path in files.items()),
        rows=sum(splits.values()),
        splits=", ".join(f"{count:,} in the split {name}" for name, count in splits.items()),
        version=__version__,
        loaded=json.dumps(files),
        columns="\n".join(f"| {name} | {meaning} |" for name, meaning in _MEANINGS.items()),
        made="\n".join(facts),
    )
