import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby, pairwise

import pytest

from ip2p_ray.benchmark.load import (
    ARRIVALS,
    Answer,
    Asked,
    Offer,
    bursty_arrivals,
    percentile,
    poisson_arrivals,
    request_body,
    send,
    summary,
)
from ip2p_ray.errors import ConfigError
from ip2p_ray.images import decode_image

ASKED = Asked(steps=3, text_guidance_scale=2.0, image_guidance_scale=1.5, resolution=64)


@pytest.mark.parametrize("arrivals", ARRIVALS.values())
def test_arrivals_are_in_order_as_frequent_as_asked_and_repeatable(arrivals):
    moments = arrivals(5.0, 20_000, 1)
    assert len(moments) == 20_000
    assert all(one <= other for one, other in pairwise(moments))
    assert moments[-1] == pytest.approx(4000)
    assert arrivals(5.0, 20_000, 1) == moments != arrivals(5.0, 20_000, 2)
    assert [len(arrivals(2.0, count, 0)) for count in (1, 7)] == [1, 7]
    assert arrivals(2.0, 7, 0)[-1] == pytest.approx(3.5)
    # another rate is the same load at another pace
    assert arrivals(10.0, 100, 1)[-1] == pytest.approx(arrivals(5.0, 100, 1)[-1] / 2)


def test_poisson_gaps_are_exponential():
    gaps = [after - before for before, after in pairwise(poisson_arrivals(2.0, 20_000, 0))]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(0.5, rel=0.03)
    assert variance**0.5 == pytest.approx(mean, rel=0.05)


def test_bursts_come_at_once():
    sizes = [len(list(same)) for _, same in groupby(bursty_arrivals(2.0, 20_000, 0, burst=4))]
    assert sum(sizes) / len(sizes) == pytest.approx(4, rel=0.05)
    assert sizes.count(1) / len(sizes) == pytest.approx(1 / 4, rel=0.1)
    assert {len(list(same)) for _, same in groupby(bursty_arrivals(2.0, 50, 0, burst=1))} == {1}
    with pytest.raises(ConfigError, match="burst is at least 1, got 0"):
        bursty_arrivals(1.0, 2, 0, burst=0)


def test_no_two_requests_share_a_picture_or_an_instruction():
    bodies = [request_body(number, 64) for number in range(400)]
    assert len({instruction for instruction, _ in bodies}) == 400
    assert len({decode_image(picture).tobytes() for _, picture in bodies}) == 400
    assert request_body(7, 64) == bodies[7]
    assert decode_image(request_body(7, 96)[1]).size == (96, 96)


def test_percentiles_by_hand():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, share) for share in (0.2, 0.5, 0.81, 1.0)] == [1.0, 3.0, 5.0, 5.0]
    assert percentile(range(1, 101), 0.95) == 95
    assert percentile([], 0.5) is None


def test_the_summary_counts_waiting_from_when_a_request_was_due():
    answers = [
        Answer(due=1.0, sent=1.0, ended=2.0, status=200),
        Answer(due=1.0, sent=1.5, ended=5.0, status=200),
        Answer(due=2.0, sent=2.0, ended=2.1, status=429),
        Answer(due=3.0, sent=3.0, ended=9.0, status=500),
        Answer(due=3.0, sent=3.0, ended=9.0, status=0),
    ]
    assert summary(answers) == {
        "requests": 5,
        "answered": 2,
        "rejected": 1,
        "failed": 2,
        "images_per_s": 0.5,
        "p50_s": 1.0,
        "p95_s": 4.0,
        "p99_s": 4.0,
        "late_s": 0.5,
    }
    assert summary(answers[2:])["images_per_s"] == 0.0
    assert summary(answers[2:])["p99_s"] is None


class Service:
    """Answers with `status` once `together` requests are there; notes what it was sent."""

    def __init__(self, together: int, status: int = 200) -> None:
        self.barrier = threading.Barrier(together, timeout=250)
        self.lock = threading.Lock()
        self.status, self.most, self.now = status, 0, 0
        self.bodies: list[bytes] = []


@contextmanager
def running(service: Service):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with service.lock:
                service.bodies.append(body)
                service.now += 1
                service.most = max(service.most, service.now)
            service.barrier.wait()
            with service.lock:
                service.now -= 1
            self.send_response(service.status if self.path == "/way/v1/images/edits" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/way"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_who_comes_by_the_clock_waits_for_nobody():
    service = Service(together=6)
    with running(service) as url:
        answers = send(Offer(url=url, asked=ASKED, first=10, count=6, arrivals=(0.0,) * 6))
    assert [answer.status for answer in answers] == [200] * 6
    assert service.most == 6
    assert all(answer.due == 0 <= answer.sent < answer.ended for answer in answers)
    sent = b"".join(service.bodies)
    for number in range(10, 16):
        instruction, picture = request_body(number, 64)
        assert sent.count(picture) == sent.count(instruction.encode()) == 1
    for name, value in (("steps", "3"), ("size", "64x64"), ("text_guidance_scale", "2.0")):
        assert sent.count(f'name="{name}"\r\n\r\n{value}\r\n'.encode()) == 6


def test_who_comes_in_turn_waits_for_those_before():
    service = Service(together=3)
    with running(service) as url:
        answers = send(Offer(url=url, asked=ASKED, first=0, count=9, concurrency=3))
    assert [answer.status for answer in answers] == [200] * 9
    assert service.most == 3
    assert all(answer.due == answer.sent for answer in answers)


def test_refusals_and_lost_connections_are_told_apart():
    with running(Service(together=1, status=429)) as url:
        [refused] = send(Offer(url=url, asked=ASKED, first=0, count=1, arrivals=(0.0,)))
    [lost] = send(Offer(url=url, asked=ASKED, first=0, count=1))
    assert (refused.status, lost.status) == (429, 0)
