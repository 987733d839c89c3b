import yaml

from ip2p_ray.card import model_card


def test_the_card_tells_data_recipe_and_scores_as_tables():
    card = model_card(
        version="1.2",
        start={"model": "runs/generator", "fingerprint": "abc"},
        data={"dataset": "latents", "rows": 12},
        recipe={"steps": 8, "decay": "constant", "lora_rank": None},
        scores={"loss": 0.25},
    )
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "diffusers"
    assert "ip2p_ray 1.2" in body
    for line in (
        "| rows | 12 |",
        "| decay | constant |",
        "| lora_rank | null |",
        "| loss | 0.25 |",
    ):
        assert f"\n{line}\n" in body
    assert [line for line in body.splitlines() if line.startswith("## ")] == [
        *("## Start", "## Data", "## Recipe", "## Scores")
    ]


def test_what_is_told_cannot_break_the_table():
    card = model_card(version="1", start={"model": "a|b\nc"}, data={}, recipe={}, scores={})
    assert "| model | a\\|b c |" in card
