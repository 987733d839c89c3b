import numpy as np

from ip2p_ray.stages.memory import DRIVER, OBJECT_STORE, memory_line, own_peak_bytes, peak_memory


def test_the_peak_is_that_of_the_block_and_not_of_its_end():
    with peak_memory(every_s=0.02) as before:
        pass
    with peak_memory(every_s=0.02) as peaks:
        held = np.ones(1 << 28, np.uint8)
        while peaks[DRIVER] < before[DRIVER] + (1 << 27):  # the watcher looks now and then
            assert held[-1] == 1
        del held
    assert before[DRIVER] + (1 << 27) < peaks[DRIVER] <= 1.01 * own_peak_bytes()
    assert list(peaks) == [DRIVER, OBJECT_STORE]


def test_the_line_is_for_people():
    assert memory_line({DRIVER: 301_000_000, "Judge": 1_200_000_000}) == (
        "driver 301.0 MB, Judge 1.2 GB"
    )
