import pytest

from ip2p_ray.benchmark.scale import CANDIDATES, PARTS, Figure, Options
from ip2p_ray.benchmark.scale import run as measure


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The figures of very few rows, as JSON has them, and what was told."""
    import json

    path = tmp_path_factory.mktemp("scale") / "scale.json"
    told = measure(Options(rows=2_000, triplets=50, exploded=3, shards=7, objects=30, json=path))
    return json.loads(path.read_text()), told


def test_every_part_is_measured(found):
    figures = {figure["name"]: figure for figure in found[0]["figures"]}
    assert len(figures) == 16
    assert figures["index, opened"]["count"] == figures["places, keys put"]["count"] == 2_000
    assert figures["explosion"]["count"] == 3 * CANDIDATES
    assert figures["listing by the server"]["count"] == 30
    assert figures["footers of objects"]["count"] == 30
    assert figures["manifest, written"]["stored_bytes"] > 7 * 50
    assert all(figure["cpu_s"] >= 0 and figure["wall_s"] >= 0 for figure in figures.values())
    assert all(line.startswith("scale: ") for line in found[1].splitlines())
    assert len(found[1].splitlines()) == 17


def test_figures_are_told_in_all_and_for_each():
    figure = Figure(
        name="keys",
        count=1_000,
        unit="rows",
        cpu_s=0.5,
        wall_s=2.0,
        peak_bytes=40_000,
        stored_bytes=12_500,
    )
    assert figure.line() == (
        "keys: 1,000 rows, 0.50 s of CPU (500.00 us each), 2.00 s; "
        "40 B of memory each; 12.5 B stored each"
    )


@pytest.mark.parametrize("flag", ["rows", "triplets", "exploded", "shards", "objects"])
def test_amounts_below_one_are_refused(flag):
    with pytest.raises(ValueError, match=f"--{flag} is at least 1"):
        Options(**{flag: 0})
    with pytest.raises(ValueError, match=f"some of {', '.join(PARTS)}"):
        Options(parts=())
