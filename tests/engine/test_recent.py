import torch

from ip2p_ray.engine.recent import Recent


def numbers(count):
    return torch.zeros(count, dtype=torch.uint8)


def test_what_was_not_used_for_longest_makes_room():
    kept = Recent(10)
    for name in "abc":
        assert not kept.get(name, lambda: numbers(3))[1]
    assert kept.get("a", lambda: numbers(3))[1]
    kept.get("d", lambda: numbers(3))  # b is the one that goes
    assert kept.held_bytes == 9
    assert [kept.get(name, lambda: numbers(0))[1] for name in "acd"] == [True, True, True]
    assert not kept.get("b", lambda: numbers(3))[1]


def test_what_is_larger_than_all_room_is_not_kept():
    kept = Recent(2)
    kept.get("small", lambda: numbers(2))
    found, _ = kept.get("large", lambda: numbers(3))
    assert found.nbytes == 3
    assert len(kept) == 1
    assert kept.get("small", lambda: numbers(0))[1]
