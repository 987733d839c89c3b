import pytest

from ip2p_ray.estimate.comparison import compare
from ip2p_ray.estimate.measured import read
from tests.estimate.made_run import made_run
from tests.estimate.test_measured import MADE_ON


def by_name(lines):
    return {line.name: line for line in lines}


UNEVEN = ("pairs", "rejects/pairs", "latents", "all")
"""In the made-up run candidates of a triplet are not accepted independently."""


def test_a_run_is_predicted_from_itself(tmp_path):
    run = read([made_run(tmp_path)], MADE_ON)
    found = compare(run, run, MADE_ON)
    for line in found.walls:
        if line.name not in ("latents", "all"):
            assert line.predicted == pytest.approx(line.took), line
            assert line.error == pytest.approx(0.0, abs=1e-9)
    for line in (*found.rows, *found.device):
        if line.name not in UNEVEN or line in found.device[:2]:
            assert line.predicted == pytest.approx(line.took), line


def test_a_larger_run_is_predicted_by_its_units(tmp_path):
    known = read([made_run(tmp_path / "small")], MADE_ON)
    other = read([made_run(tmp_path / "large", captions=80)], MADE_ON)
    found = compare(known, other, MADE_ON)
    walls = by_name(found.walls)
    # 6 s fixed and 80 captions of 0.5 s; it took, by its manifests, 26 s
    assert walls["triplets"].predicted == pytest.approx(46.0)
    assert walls["triplets"].took == 26
    assert walls["triplets"].error == pytest.approx(46 / 26 - 1)
    assert walls["pairs"].predicted == pytest.approx(11 + 200 * 0.6 / 2, abs=0.01)
    assert walls["training"].predicted == pytest.approx(30)
    total = sum(line.predicted for name, line in walls.items() if name != "all")
    assert walls["all"].predicted == pytest.approx(total)
    assert by_name(found.rows)["scores"].predicted == 200
    device = by_name(found.device)
    assert device["pairs"].predicted == pytest.approx(120)
    assert device["pairs"].took == pytest.approx(60)


def test_survival_is_that_of_the_known_run(tmp_path):
    known = read([made_run(tmp_path / "small")], MADE_ON)
    other = read([made_run(tmp_path / "large", captions=80)], MADE_ON)
    # of 80 pairs 76 were encoded there, of 40 here 36
    found = by_name(compare(known, other, MADE_ON).rows)["latents"]
    assert found.took == 76
    accepted = 0.5 * 5 - 1 / 32  # of five at one half, four are kept at most
    assert found.predicted == pytest.approx(40 * accepted * 0.9)
