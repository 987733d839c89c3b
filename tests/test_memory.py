import logging

import numpy as np
import pytest
import torch

from ip2p_ray import memory
from ip2p_ray.errors import ModelError


@pytest.mark.parametrize(
    "work", [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: np.empty(2**60, np.uint8)]
)
def test_what_allocators_raise_is_a_lack_of_memory(work):
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        work()
    assert memory.is_out_of_memory(caught.value)


def test_other_errors_are_none():
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert not memory.is_out_of_memory(caught.value)
    assert not memory.is_out_of_memory(ValueError("CUDA error: out of memory"))


def test_half_is_tried_until_there_is_nothing_to_halve(caplog):
    with caplog.at_level(logging.WARNING, logger="ip2p_ray.memory"):
        assert memory.halved("judge", 9, "no", "cpu") == 4
        assert memory.halved("judge", 4, "no", "cpu", least=3) == 3
    assert "judge: 9 candidates at a time do not fit on cpu, goes on with 4" in caplog.messages
    with pytest.raises(ModelError, match=r"not even 1 at a time fit: the weights hold 2\.0 GiB"):
        memory.halved("judge", 1, "", "cpu", held=2 << 30)
