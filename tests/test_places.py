import hashlib
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from ip2p_ray.places import Places


def digest(number):
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2**63 - 1))))
def test_it_holds_what_a_dictionary_holds(written):
    places, expected = Places(), {}
    for number, place in written:
        places.put(digest(number), place)
        expected[digest(number)] = place
    assert len(places) == len(expected)
    for number in range(31):
        assert places.get(digest(number)) == expected.get(digest(number))


def test_keys_that_begin_alike_are_told_apart():
    """All in one slot of the table, and once around its end."""
    for begin in (bytes(8), b"\xff" * 8):
        keys = [begin + number.to_bytes(8, "big") for number in range(2_000)]
        places = Places()
        for place, key in enumerate(keys):
            places.put(key, place)
        assert [places.get(key) for key in keys] == list(range(2_000))
        assert places.get(begin + b"\xff" * 8) is None


def test_a_key_takes_at_most_72_bytes():
    count = 100_000
    tracemalloc.start()
    places = Places()
    for number in range(count):
        places.put(digest(number), number)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 73 * count
    assert len(places) == count
    assert places.get(digest(count - 1)) == count - 1
