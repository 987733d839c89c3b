import io
import logging
import time

from ip2p_ray.stages.progress import Progress, shown


def test_nothing_is_promised_before_anything_is_done():
    line = Progress("pairs", total=1200, unit="triplets").line()
    assert line.startswith("pairs: 0 of 1,200 triplets, ")
    assert "left" not in line


def test_a_line_tells_how_much_time_is_left():
    stage = Progress("pairs", total=10, unit="triplets")
    stage.update(2)
    stage.update(4)
    assert stage.line().startswith("pairs: 4 of 10 triplets, ")
    assert stage.line().endswith(" left")


def test_the_time_left_is_by_the_rate_of_late():
    """A run that goes on finds 5,000 replies in a second and then gets 2 a second."""
    now = [0.0]
    stage = Progress("replies", total=10_000, unit="captions", clock=lambda: now[0])
    stage.update(1)
    now[0] = 1.0
    stage.update(5_000)
    for second in range(2, 400):
        now[0] = float(second)
        stage.update(5_000 + 2 * (second - 1))
    assert stage.line().endswith("about 35.0 min left")  # (5,000 - 796) / 2 s


def test_slow_counts_have_a_rate_too():
    now = [0.0]
    stage = Progress("pairs", total=20, unit="triplets", clock=lambda: now[0])
    for count in range(1, 11):
        now[0] += 3600.0
        stage.update(count)
    assert stage.line().endswith("about 10.0 h left")


def test_counts_only_rise_and_stay_within_the_total():
    stage = Progress("pairs", total=10, unit="triplets", done=3)
    stage.update(2)
    assert stage.done == 3
    stage.update(14)
    assert stage.done == 10
    assert "left" not in stage.line()


def wait_until(holds):
    deadline = time.monotonic() + 30
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_off_a_terminal_there_is_a_line_now_and_then(caplog):
    stage = Progress("pairs", total=10, unit="triplets")
    with (
        caplog.at_level(logging.INFO),
        shown(stage, lambda: 7, every_s=0.02, poll_s=0.01, screen=io.StringIO()),
    ):
        wait_until(lambda: caplog.records)
    assert caplog.messages[0].startswith("pairs: 7 of 10 triplets")


def test_on_a_terminal_one_line_is_rewritten_and_then_removed():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    stage = Progress("pairs", total=10, unit="triplets")
    with shown(stage, lambda: 7, poll_s=0.01, screen=terminal):
        wait_until(lambda: "7 of 10" in terminal.getvalue())
    assert "\r\x1b[Kpairs: 7 of 10 triplets" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_what_is_done_is_told_once():
    told = []
    stage = Progress("pairs", total=20, unit="triplets", done=5, more=told.append)
    for done in (5, 8, 7, 20, 30):
        stage.update(done)
    assert told == [3, 12]


def test_verdicts_of_this_run_come_on_top_of_those_before():
    stage = Progress("pairs", total=20, unit="triplets", verdicts={None: 2, "dull": 1})
    for judged in ({None: 1}, {None: 3, "dull": 4}):  # each time all so far
        stage.heard({"Judge": 1.0}, judged)
    assert stage.verdicts == {None: 5, "dull": 5}
    assert stage.busy == {"Judge": 1.0}
