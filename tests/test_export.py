"""The published columns, and that the package which reads them sees pictures."""

import json

import pyarrow as pa

from ip2p_ray import export
from ip2p_ray.schema import PAIRS


def test_the_published_columns_hold_ours():
    row = dict.fromkeys(PAIRS.names)
    row |= {"caption": "a cat", "instruction": "make it a dog", "edited_caption": "a dog"}
    row |= {"source_image": {"bytes": b"1", "path": None}}
    row |= {"edited_image": {"bytes": b"2", "path": None}}
    table = export.published_table(pa.Table.from_pylist([row], schema=PAIRS))
    assert table.to_pylist() == [
        {
            "original_prompt": "a cat",
            "original_image": {"bytes": b"1", "path": None},
            "edit_prompt": "make it a dog",
            "edited_prompt": "a dog",
            "edited_image": {"bytes": b"2", "path": None},
        }
    ]
    assert b"huggingface" in table.schema.metadata


def test_the_note_on_the_features_is_the_one_of_datasets():
    from datasets import Features, Image, Value

    features = Features(
        {name: Image() if "image" in name else Value("string") for name in export.COLUMNS}
    )
    noted = json.loads(export.PUBLISHED.metadata[b"huggingface"])["info"]["features"]
    assert Features.from_arrow_schema(export.PUBLISHED) == features
    assert Features.from_dict(noted) == features
    assert features.arrow_schema.equals(export.PUBLISHED.remove_metadata())


def test_the_card_says_what_is_known_and_leaves_the_licence_open():
    text = export.card(
        {"train": 1900, "held_out": 100},
        thresholds={"text": 0.2, "image": 0.75, "direction": 0.2},
        keep=4,
        recipes=["21b1b8cab09176fc"],
        models={"generator": "abc"},
        reports=[
            {
                "stage": "pairs",
                "rows_in": 3000,
                "rows_out": 2000,
                "rejected": {"direction_similarity": 1000},
            }
        ],
    )
    for said in (
        "2,000 pairs",
        "1,900 in the split train, 100 in the split held_out",
        '{"train": "data/train-*.parquet", "held_out": "data/held_out-*.parquet"}',
        "lowest CLIP similarities: text 0.2, image 0.75, direction 0.2",
        "at most 4 pairs of a triplet",
        "recipe 21b1b8cab09176fc",
        "generator abc",
        "pairs: 2,000 of 3,000 kept",
        "direction_similarity 1,000",
        "# license: choose one",
    ):
        assert said in text


def test_the_card_of_own_pairs_states_no_threshold():
    text = export.card({"train": 3}, thresholds=None, keep=None, recipes=[], models={}, reports=[])
    assert "data of one's own" in text
    assert "similarities" not in text
    assert "held_out" not in text
