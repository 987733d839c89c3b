import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from ip2p_ray.evaluation import CurvePoint
from ip2p_ray.gallery import Series, ShownEdit, ShownPair, page, plot, triplets_page
from ip2p_ray.images import encode_png
from ip2p_ray.report import Report
from ip2p_ray.triplets.quality import Tally
from ip2p_ray.triplets.reply import Triplet

PNG = encode_png(Image.new("RGB", (4, 4), "red"))
SCORES = {"forced_choice_accuracy": 0.625, "preservation_error": 0.031}
METRICS = {
    "editor": SCORES,
    "chance": SCORES,
    "funnel": {"pairs": {"in": 8, "kept": 3, "rejected": {"image_similarity": 5}}},
    "seconds": {"pairs": 90.0},
    "seed": 7,
}


class Tags(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def shown():
    pair = ShownPair(
        caption='a "red" <boat>',
        instruction="make it night",
        edited_caption="a red boat at night",
        source_image=PNG,
        edited_image=PNG,
        similarities={"direction_similarity": 0.314},
    )
    edit = ShownEdit(
        caption="a red boat",
        instruction="make it day",
        pictures={"the input": PNG, "trained here": PNG},
    )
    curves = {"trained here": [CurvePoint(1.0, 0.3, 0.6, 4), CurvePoint(2.0, 0.2, 0.8, 4)]}
    text = page(
        title="A run",
        metrics=METRICS,
        pairs=[pair],
        edits=[edit],
        curves=curves,
        losses=[(1, 0.5), (2, 0.4)],
        command="python jobs/edit.py",
    )
    return Tags(text)


def test_the_page_loads_nothing(shown):
    for tag, attributes in shown.tags:
        assert tag not in ("script", "link", "iframe")
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or tag != "img"
        assert "href" not in attributes


def test_the_page_shows_everything_it_was_given(shown):
    words = " ".join(shown.words)
    for expected in (
        "make it night",
        "make it day",
        'a "red" <boat>',
        "0.31",
        "0.625",
        "0.031",
        "image similarity 5",
        "1.5 min",
        "Seed 7",
        "python jobs/edit.py",
        "the editor trained here",
    ):
        assert expected in words
    assert sum(tag == "img" for tag, _ in shown.tags) == 4
    assert sum(tag == "svg" for tag, _ in shown.tags) == 2


def test_a_plot_lies_within_its_frame():
    series = [Series("a", [(0.0, -1.0), (10.0, 3.0)]), Series("b", [(5.0, 0.0)], ["here"])]
    drawn = Tags(str(plot(series, x_label="x", y_label="y", width=400, height=200)))
    lines = [attributes for tag, attributes in drawn.tags if tag == "polyline"]
    assert len(lines) == 2
    for line in lines:
        for point in line["points"].split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 400
            assert 0 <= y <= 200
    assert {"x", "y", "a", "b", "here"} <= set(drawn.words)


@pytest.mark.parametrize(("value", "last"), [(1.0, "1"), (0.0, "1"), (0.02, "0.02")])
def test_a_share_is_plotted_from_zero_and_not_beyond_what_it_can_be(value, last):
    drawn = str(plot([Series("a", [(0.1, value)])], x_label="x", y_label="y", from_zero=True))
    ticks = re.findall(r'text-anchor="end">([^<]*)<', drawn)
    assert (ticks[0], ticks[-1]) == ("0", last)


def test_equal_factors_are_equally_far_apart_on_a_logarithmic_plot():
    points = [(0.0, 0.02), (1.0, 0.2), (2.0, 2.0), (3.0, 1.0)]
    svg = plot([Series("x", points)], x_label="x", y_label="y", logarithmic=True)
    drawn = svg.split('points="')[1].split('"')[0].split()
    first, second, third, fourth = (float(place.split(",")[1]) for place in drawn)
    assert first - second == pytest.approx(second - third, abs=0.2)
    assert third < fourth < second
    assert re.findall(r'"end">([\d.]+)<', svg) == ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"]
    assert "<svg" in plot([Series("x", points[:1])], x_label="x", y_label="y", logarithmic=True)


def test_one_point_and_no_point_can_be_plotted():
    assert "polyline" in plot([Series("a", [(1.0, 1.0)])], x_label="x", y_label="y")
    assert plot([], x_label="x", y_label="y") == ""


def test_the_page_of_triplets_is_one_file_with_counts_and_something_to_read():
    tally = Tally()
    for number in range(60):
        words = "very " * number
        tally.add(Triplet(f"a {words}<boat>", f"verb{number} it", f"a {words}<ship>"))
    report = Report.count("triplets", [None] * 60 + ["empty_reply"] * 4, 1.0)
    text = triplets_page(report, tally.quality(), writer="<fake>")
    found = Tags(text)
    assert "60 of 64 replies are triplets" in text
    assert "empty reply" in found.words
    assert "&lt;boat&gt;" in text
    assert "<boat>" not in text
    assert "&lt;fake&gt;" in text
    assert ".bar" in text  # the style is in it
    assert not {"script", "link", "iframe"} & {tag for tag, _ in found.tags}
    assert text.count("<b>") == 50
