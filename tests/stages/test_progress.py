import io
import logging
import time

from ip2p_ray.stages import progress
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


def test_counts_only_rise_and_stay_within_the_total():
    stage = Progress("pairs", total=10, unit="triplets", done=3)
    stage.update(2)
    assert stage.done == 3
    stage.update(14)
    assert stage.done == 10
    assert "left" not in stage.line()


def test_off_a_terminal_there_is_a_line_now_and_then(monkeypatch, caplog):
    monkeypatch.setattr(progress, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(progress, "_POLL_S", 0.01)
    stage = Progress("pairs", total=10, unit="triplets")
    with caplog.at_level(logging.INFO), shown(stage, lambda: 7):
        deadline = time.monotonic() + 30
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
    assert caplog.messages[0].startswith("pairs: 7 of 10 triplets")


def test_on_a_terminal_one_line_is_rewritten_and_then_removed(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_POLL_S", 0.01)
    with shown(Progress("pairs", total=10, unit="triplets"), lambda: 7):
        deadline = time.monotonic() + 30
        while "7 of 10" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "\r\x1b[Kpairs: 7 of 10 triplets" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")
