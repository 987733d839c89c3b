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

_ROWS = 20_000


def export_pairs(folder: str, uri: str) -> storage.Manifest:
    """The dataset at `uri`: the pairs of `<folder>/pairs` in the published form, and a card.

    Its shards are data/train-00000.parquet and so on, and the same of the split held_out. A card
    that was deleted is written again; one that was changed stays.

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
        for table in read_tables(pairs, PAIRS, rows=PICTURE_ROWS):
            for split, own in shards.items():
                own.add(export.published_table(table.filter(pc.equal(table["split"], split))))
        for own in shards.values():
            own.close(empty=False)  # `datasets` takes no split without files
        _write_card(folder, made, uri)
        rows = sum(own.rows for own in shards.values())
        return [Report.count("export", [None] * rows, time.monotonic() - began)]

    origin = run.Origin(dataset="export", config={}, sources={"pairs": made.recipe})
    exported = run.make(uri, origin, build)
    if not storage.exists(storage.join(uri, CARD)):
        _write_card(folder, made, uri)
    return exported


def _write_card(folder: str, made: storage.Manifest, uri: str) -> None:
    counts, recipes = Counter[str](), set[str]()
    columns = ["split", "recipe"]
    pairs = storage.join(folder, "pairs")
    for table in read_tables(pairs, PAIRS, rows=_ROWS, columns=columns):
        counts.update(table["split"].to_pylist())
        recipes |= {recipe for recipe in table["recipe"].to_pylist() if recipe}
    rules = stored_rules(folder)
    card = export.card(
        {split: counts[split] for split in SPLITS if counts[split]},
        thresholds=asdict(rules.thresholds) if rules else None,
        keep=rules.keep if rules else None,
        recipes=sorted(recipes),
        models=made.models,
        reports=made.reports,
    )
    storage.write_bytes(storage.join(uri, CARD), card.encode())
