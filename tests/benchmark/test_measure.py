import sys
import time

import pytest
import torch
import torch.nn.functional as F

from ip2p_ray import memory
from ip2p_ray.benchmark import measure

CPU = torch.device("cpu")


def test_ways_take_turns_and_the_last_results_are_kept():
    order = []

    def way(name):
        order.append(name)
        return len(order)

    ways = {"a": lambda: way("a"), "b": lambda: way("b")}
    seconds, results = measure.take_turns(CPU, ways, 3)
    assert "".join(order) == "ababab"
    assert results == {"a": 5, "b": 6}
    assert {name: len(turns) for name, turns in seconds.items()} == {"a": 3, "b": 3}


def test_wall_time_passes_without_work_and_cpu_time_does_not():
    took, result = measure.timed(CPU, lambda: time.sleep(0.2))
    assert result is None
    assert took.wall >= 0.2
    assert took.cpu < took.wall


def test_a_ratio_is_that_of_turns_that_followed_each_other():
    # The machine was ten times slower in the second round, for both.
    assert measure.median_ratio([2.0, 20.0, 2.1], [1.0, 10.0, 1.0]) == 2.0


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is read from /proc")
def test_peak_memory_is_what_the_work_held_at_once():
    block = 64 * 2**20

    def hold(blocks):
        return [torch.ones(block // 4) for _ in range(blocks)]

    one = measure.peak_bytes(CPU, lambda: hold(1))
    three = measure.peak_bytes(CPU, lambda: hold(3))
    again = measure.peak_bytes(CPU, lambda: [hold(1) is None for _ in range(3)])
    assert one is not None
    assert three is not None
    assert again is not None
    assert 0.9 * block < one < 1.5 * block
    assert 2.9 * block < three < 3.5 * block
    assert 0.9 * block < again < 1.5 * block


def test_operations_are_counted():
    assert measure.count_flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5
    image, kernel = torch.ones(1, 2, 8, 8), torch.ones(3, 2, 3, 3)
    assert measure.count_flops(lambda: F.conv2d(image, kernel, padding=1)) == 2 * 64 * 3 * 18


def test_weights_are_counted_in_bytes():
    network = torch.nn.Linear(3, 5)
    assert memory.held_bytes(network, network.half()) == 2 * 2 * (15 + 5)


def test_the_ceiling_is_above_what_one_product_reaches():
    ceiling = measure.matmul_flops(CPU, torch.float32, seconds=0.02)
    assert 1e8 < ceiling < 1e14


def test_facts_name_device_versions_and_date():
    facts = measure.facts(CPU)
    assert facts["device"] == "cpu"
    assert facts["device_name"]
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert facts["date"].endswith("+00:00")
    assert len(facts["load"]) == 3
    assert memory.free_bytes(CPU) > 0
