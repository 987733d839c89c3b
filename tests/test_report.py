"""A stage's counts as one sentence."""

import json
import pickle

import pytest

from ip2p_ray.errors import ConfigError
from ip2p_ray.report import Report, duration, size


def test_the_sentence_has_a_denominator_and_reasons_by_frequency():
    reasons = [None] * 812 + ["direction_similarity"] * 277 + ["image_similarity"] * 2911
    report = Report.count("pairs", reasons, 31.4 * 60)
    assert report.line() == (
        "pairs: kept 812 of 4,000 (20 %); rejected image_similarity 2,911, "
        "direction_similarity 277; 31.4 min"
    )


def test_nothing_rejected_and_nothing_at_all():
    assert Report.count("captions", [None], 0.04).line() == "captions: kept 1 of 1 (100 %); 0.0 s"
    assert Report.count("captions", [], 1).line() == "captions: kept 0 of 0; 1.0 s"


def test_it_survives_json_and_pickle():
    report = Report.count("pairs", [None, "not_best"], 2)
    assert Report(**json.loads(json.dumps(report.as_dict()))) == report
    assert pickle.loads(pickle.dumps(report)) == report


def test_rows_do_not_vanish():
    with pytest.raises(ConfigError, match="pairs: 3 rows came in, but 1 were kept and 1 rejected"):
        Report(stage="pairs", rows_in=3, rows_out=1, rejected={"not_best": 1}, seconds=0)


def test_durations():
    assert [duration(value) for value in (0, 59.96, 60, 9000)] == [
        "0.0 s",
        "60.0 s",
        "1.0 min",
        "2.5 h",
    ]


def test_sizes():
    assert [size(value) for value in (0, 999, 11_300, 8.07e6, 436e9, 1.8e12)] == [
        "0 B",
        "999 B",
        "11.3 kB",
        "8.1 MB",
        "436.0 GB",
        "1.8 TB",
    ]
