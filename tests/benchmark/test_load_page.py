from xml.etree import ElementTree

from ip2p_ray.benchmark.load_page import NAMES, load_page, table


def way(factor: float) -> dict:
    """Made-up figures of one way."""
    loads = [
        {
            "arrivals": arrivals,
            "times_capacity": times,
            "offered_per_s": 4 * times,
            "requests": 10,
            "answered": 9,
            "rejected": 1,
            "failed": 0,
            "images_per_s": 3.0 * factor,
            "p50_s": 0.1 / factor,
            "p95_s": 0.2 / factor,
            "p99_s": 0.3 / factor,
            "late_s": 0.004,
            "batch_rows": 2 * factor,
        }
        for arrivals in ("poisson", "bursty")
        for times in (0.5, 1.5)
    ]
    return {
        "images_per_s": 4.0 * factor,
        "cpu_s_per_image": 0.2 / factor,
        "batch_rows": 2.5 * factor,
        "loads": loads,
        "threads": 1,
        "threads_searched": {"1": 4.0 * factor, "2": 3.5},
        "p50_s": 0.1 / factor,
        "p95_s": 0.2 / factor,
        "p99_s": 0.3 / factor,
    }


FOUND = {
    "device": "cpu",
    "device_name": "a processor",
    "cpus": 2,
    "load": [0.5, 0.4, 0.3],
    "date": "2026-01-01T00:00:00+00:00",
    "versions": {"torch": "2.9"},
    "model": None,
    "sd15": False,
    "dtype": "float32",
    "batch_size": 8,
    "requests": 10,
    "rounds": 1,
    "saturation": 4,
    "compare_at": 1.5,
    "resolution": 64,
    "steps": 12,
    "capacity_per_s": 4.0,
    "mean_difference": 0.01,
    "mean_difference_bound": 0.5,
    "max_difference": 1,
    "overhead": {
        "http_p50_s": 0.11,
        "engine_p50_s": 0.1,
        "added_p50_s": 0.01,
        "requests": 50,
    },
    "cold_start": {"process_to_first_picture_s": 31.4, "replica_s": 9.0, "first_picture_s": 0.2},
    "reference": way(1.0),
    "request_batching": {
        **way(2.0),
        "batch_wait_s": 0.25,
        "batch_waits_p95_s": {"0.010": 0.5, "0.250": 0.125},
    },
    "ours": way(2.5),
    "ratio": {"images_per_s": 2.5, "p50_s": 0.4, "p95_s": 0.4, "p99_s": 0.4},
    "ratio_to_request_batching": {"images_per_s": 1.25, "p50_s": 0.8, "p95_s": 0.8, "p99_s": None},
}


def test_the_table_tells_figures_ratios_and_loads():
    lines = table(FOUND).splitlines()
    [rate] = [line.split() for line in lines if line.startswith("pictures/s at saturation")]
    assert rate[-5:] == ["10.00", "4.00", "8.00", "2.50", "1.25"]
    [late] = [line.split() for line in lines if line.startswith("p99")]
    assert late[-5:] == ["120", "300", "150", "0.40", "-"]
    [load] = [line for line in lines if line.startswith("bursty 6.00/s (1.5 x)")]
    assert "100 / 200 / 300; 3.00; 2.0" in load
    assert any("wait 0.25 s to" in line and "0.01 s: 500, 0.25 s: 125" in line for line in lines)
    assert any("add 10.0 ms" in line for line in lines)
    assert any(line.startswith("12 requests were rejected and 0 failed") for line in lines)


def test_a_way_that_answered_nothing_is_told_as_unknown():
    silent = {"p50_s": None, "p95_s": None, "p99_s": None, "batch_rows": None, "images_per_s": 0.0}
    reference = way(1.0)
    reference["loads"] = [{**load, **silent} for load in reference["loads"]]
    found = {**FOUND, "reference": {**reference, "p95_s": None}}
    assert "- / - / -; 0.00; -" in table(found)
    assert "<svg" in load_page(found)


def test_the_page_has_both_plots_of_both_arrivals_and_loads_nothing():
    page = load_page(FOUND)
    drawings = page.split("<svg")[1:]
    assert len(drawings) == 4
    for drawing in drawings:
        svg = ElementTree.fromstring("<svg" + drawing.split("</svg>")[0] + "</svg>")
        assert len(svg.findall("polyline")) == len(NAMES)
    assert all(name in page for name in NAMES.values())
    assert "http://" not in page
    assert "<script" not in page
