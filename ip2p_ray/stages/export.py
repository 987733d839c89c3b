"""pairs -> a folder in the published form, ready for `datasets` and for the Hugging Face hub."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict

import pyarrow.compute as pc

from ip2p_ray import export, storage
from ip2p_ray.errors import StageError
from ip2p_ray.report import Report
from ip2p_ray.schema import PAIRS, SPLITS
from ip2p_ray.stages import run
from ip2p_ray.stages.filtering import stored_rules
from ip2p_ray.stages.shards import PICTURE_ROWS, TableShards, clear, read_tables, require_free

CARD = "README.md"


def export_pairs(folder: str, uri: str) -> storage.Manifest:
    """The dataset at `uri`: the pairs of `<folder>/pairs` in the published form, and a card.

    Its shards are data/train-00000.parquet and so on, and the same of the split held_out.

    Raises:
        DatasetError: the pairs are missing or not whole.
        ConfigError: something else lies at `uri`.
        StageError: there is no pair.
    """
    pairs = storage.join(folder, "pairs")
    made = storage.read_manifest(pairs)
    require_free(uri)

    def build() -> list[Report]:
        began = time.monotonic()
        if not made.rows:
            raise StageError(f"export: {pairs} holds no pair")
        clear(uri)
        shards = {
            split: TableShards(storage.join(uri, "data"), split, export.PUBLISHED)
            for split in SPLITS
        }
        recipes = Counter[str]()
        for table in read_tables(pairs, PAIRS, rows=PICTURE_ROWS):
            recipes.update(recipe for recipe in table["recipe"].to_pylist() if recipe)
            for split, own in shards.items():
                own.add(export.published_table(table.filter(pc.equal(table["split"], split))))
        for own in shards.values():
            own.close(empty=False)  # `datasets` takes no split without files
        counts = {split: own.rows for split, own in shards.items() if own.rows}
        rules = stored_rules(folder)
        card = export.card(
            counts,
            thresholds=asdict(rules.thresholds) if rules else None,
            keep=rules.keep if rules else None,
            recipes=sorted(recipes),
            models=made.models,
            reports=made.reports,
        )
        storage.write_bytes(storage.join(uri, CARD), card.encode())
        return [Report.count("export", [None] * sum(counts.values()), time.monotonic() - began)]

    origin = run.Origin(dataset="export", config={}, sources={"pairs": made.recipe})
    return run.make(uri, origin, build)
