import json

from ip2p_ray.estimate.arithmetic import estimate
from ip2p_ray.estimate.comparison import compare
from ip2p_ray.estimate.measured import read
from ip2p_ray.estimate.sensitivity import sensitivity
from ip2p_ray.estimate.text import TOTALS, as_json, comparison_lines, lines
from tests.estimate.made_run import made_run
from tests.estimate.test_arithmetic import BASIS, PRICES
from tests.estimate.test_measured import MADE_ON


def test_every_stage_dataset_and_change_has_a_line():
    made, changed = estimate(BASIS, PRICES), sensitivity(BASIS, PRICES)
    told = lines(BASIS, PRICES, made, changed)
    for name in (
        *(stage.name for stage in made.stages),
        *(each.name for each in made.stored),
        *(each.name for each in changed),
    ):
        assert any(line.startswith(f"{name}  ") for line in told), name
    assert any("cost, USD" in line for line in told)
    assert f"{made.cost.total:,.2f}" in "\n".join(told)


def test_without_prices_there_is_no_word_of_cost():
    told = "\n".join(lines(BASIS, None, estimate(BASIS), sensitivity(BASIS)))
    assert "cost" not in told
    assert "price" not in told


def test_columns_stand_below_each_other():
    told = lines(BASIS, None, estimate(BASIS), sensitivity(BASIS))
    first = told[: told.index("")]
    ends = {len(line) for line in first}
    assert len(ends) <= len(first)
    place = first[0].index("devices") + len("devices")
    assert [line[place : place + 2].strip() for line in first] == [""] * len(first)


def test_json_has_all_of_it(tmp_path):
    made, changed = estimate(BASIS, PRICES), sensitivity(BASIS, PRICES)
    found = json.loads(json.dumps(as_json(BASIS, PRICES, made, changed)))
    assert found["estimate"]["device_hours"] == made.device_hours
    assert found["estimate"]["cost"]["all"] == made.cost.total
    assert found["workload"]["captions"] == 1_000
    elastic = found["sensitivity"]["captions"]["device_hours"]["elasticity"]
    assert elastic == changed[0].elasticity(TOTALS["device_hours"])
    assert as_json(BASIS, None, estimate(BASIS), sensitivity(BASIS))["estimate"]["cost"] is None


def test_a_comparison_tells_each_error(tmp_path):
    known = read([made_run(tmp_path / "small")], MADE_ON)
    other = read([made_run(tmp_path / "large", captions=80)], MADE_ON)
    told = comparison_lines(compare(known, other, MADE_ON))
    assert any(line.startswith("triplets") and line.endswith("+77 %") for line in told)
