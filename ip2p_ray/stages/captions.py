"""captions: cleaned, each once, as a dataset."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ip2p_ray import storage
from ip2p_ray.captions import collect
from ip2p_ray.report import Report
from ip2p_ray.schema import CAPTIONS
from ip2p_ray.stages import run


def collect_captions(
    captions: Sequence[str], uri: str, *, config: Mapping[str, Any]
) -> storage.Manifest:
    """The dataset of the captions; `config` says where they come from."""

    def build() -> list[Report]:
        began = time.monotonic()
        rows = list(collect([{"caption": caption} for caption in captions]))
        kept = [row for row, reason in rows if reason is None]
        storage.write_shard(uri, "captions-00000", pa.Table.from_pylist(kept, schema=CAPTIONS))
        reasons = [reason for _, reason in rows]
        return [Report.count("captions", reasons, time.monotonic() - began)]

    return run.make(uri, run.Origin(dataset="captions", config=config), build)
