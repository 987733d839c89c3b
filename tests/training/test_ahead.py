import threading
import time

import pytest

from ip2p_ray.training.ahead import made_ahead


def test_what_was_made_comes_in_order_whoever_made_it() -> None:
    def slow_at_first(number: int) -> int:
        time.sleep(0.05 if number == 0 else 0.0)
        return number * number

    with made_ahead(slow_at_first, range(20), threads=4, depth=5) as ahead:
        assert [ahead.next() for _ in range(20)] == [number * number for number in range(20)]
        assert ahead.waited > 0.0


def test_no_more_is_made_than_the_depth() -> None:
    made: list[int] = []
    with made_ahead(made.append, range(100), depth=3) as ahead:
        ahead.next()
        for _ in range(3):
            ahead.next()
    assert len(made) <= 4 + 3


def test_an_error_is_raised_where_its_item_is_asked_for() -> None:
    def fail(number: int) -> int:
        if number == 1:
            raise ZeroDivisionError("one")
        return number

    with made_ahead(fail, range(3)) as ahead:
        assert ahead.next() == 0
        with pytest.raises(ZeroDivisionError):
            ahead.next()


def test_no_thread_is_left() -> None:
    with made_ahead(str, range(5), threads=2) as ahead:
        ahead.next()
    assert not [one for one in threading.enumerate() if one.name.startswith("ahead")]
