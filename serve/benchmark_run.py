"""The editor's service under load, its engine beside two other ways to edit behind the same front.

Once the threads of each way are chosen, all three are deployed at once and take turns: whatever
else the machine does meets all of them, and those that wait for their turn compute nothing.
"""

from __future__ import annotations

import io
import itertools
import logging
import multiprocessing
import os
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import ray
from PIL import Image
from ray import serve

import ip2p_ray
from ip2p_ray import presets
from ip2p_ray.benchmark import load, measure
from ip2p_ray.benchmark.config import EditorBenchmark
from ip2p_ray.checkpoint import EDITOR_DEFAULTS
from ip2p_ray.editor import EditSettings
from ip2p_ray.errors import ConfigError, Ip2pError
from ip2p_ray.miniature import weights
from ip2p_ray.settings import read_settings
from serve.app import EDITOR, ServiceConfig, application
from serve.benchmark_replicas import SD15, Done, Engine, OneByOne, RequestBatching
from serve.orders import Order

logger = logging.getLogger("ip2p_ray.benchmark")

WAYS: dict[str, type[Any]] = {
    "reference": OneByOne,
    "request_batching": RequestBatching,
    "ours": Engine,
}
"""The replica of each way, by the name under which its figures stand."""

MEAN_DIFFERENCE = {"float32": 0.5, "bfloat16": 8.0, "float16": 8.0}
"""How far pictures of two ways may lie apart on average, in levels of 255."""
COMPARED = 4
"""Pictures that are looked at for that."""
LATENCIES = ("p50_s", "p95_s", "p99_s")
RATIOS = ("images_per_s", "cpu_s_per_image", *LATENCIES)
"""Of what ratios are told: the medians of the ratios of turns that followed each other."""


@dataclass
class _Bench:
    """What all measurements use."""

    job: EditorBenchmark
    asked: load.Asked
    url: str
    generator: ProcessPoolExecutor
    """The load comes from a process of its own."""
    next: dict[str, int] = field(default_factory=dict)
    """The number of each way's next request: none is sent twice."""
    deployed: dict[str, int] = field(default_factory=dict)
    """With how many threads each way runs that is deployed."""

    def send(self, way: str, count: int, **offer: Any) -> tuple[list[load.Answer], Done]:
        """The answers, and what the replica did meanwhile."""
        first = self.next.get(way, 0)
        self.next[way] = first + count
        before = _handle(way).done.remote().result()
        asked = load.Offer(
            url=f"{self.url}/{way}", asked=self.asked, first=first, count=count, **offer
        )
        answers = self.generator.submit(load.send, asked).result()
        after = _handle(way).done.remote().result()
        return answers, Done(
            after.batches - before.batches, after.rows - before.rows, after.cpu_s - before.cpu_s
        )

    @property
    def under_way(self) -> int:
        """Requests at a time that saturate any of the ways."""
        return 2 * self.job.batch_size


def compare(job: EditorBenchmark) -> dict[str, Any]:
    """Everything that was measured, as JSON can express it; `load_page.table` shows it to people.

    `reference`, `request_batching` and `ours` each have `images_per_s` at saturation, the
    latencies at the rate `compare_at`, and all loads under `loads`; `ratio` is ours by the
    reference's, `ratio_to_request_batching` ours by those of batches of whole requests.

    Raises:
        Ip2pError: the ways made different pictures, or requests failed.
        ModelError: the model is not there.
    """
    device = measure.device_named(job.device)
    asked = _asked(job)
    facts = measure.facts(device, (*measure.LIBRARIES, "ray", "fastapi"))
    choices = job.threads or _choices(job)
    spawn = multiprocessing.get_context("spawn")
    with _service() as url, ProcessPoolExecutor(1, mp_context=spawn) as generator:
        bench = _Bench(job, asked, url, generator)
        cold, searched = _search(bench, choices)
        threads = {way: _quickest(searched[way], choices) for way in WAYS}
        for way in WAYS:
            _deploy(bench, way, threads[way])
        difference = _difference(bench)
        wait, waits = _search_wait(bench)
        results = _saturate(bench)
        overhead = _overhead(bench)
        capacity = results["reference"]["images_per_s"]
        _offer(bench, capacity, results)
    results["request_batching"] |= {
        "batch_wait_s": wait,
        "batch_waits_p95_s": {f"{each:.3f}": p95 for each, p95 in waits.items()},
    }
    for way, result in results.items():
        result["threads"] = threads[way]
        result["threads_searched"] = {str(k): rate for k, rate in searched[way].items()}
        [at] = [
            each
            for each in result["loads"]
            if (each["arrivals"], each["times_capacity"]) == _compared(job)
        ]
        result |= {key: at[key] for key in LATENCIES}
        result["rounds"] |= at["rounds"]
    return {
        "benchmark": "editor",
        **facts,
        **{each.name: getattr(job, each.name) for each in fields(EditorBenchmark)},
        "device": facts["device"],
        "load_after": [round(each, 2) for each in os.getloadavg()],
        "resolution": asked.resolution,
        "steps": asked.steps,
        "capacity_per_s": capacity,
        **difference,
        "overhead": overhead,
        "cold_start": cold,
        **results,
        "ratio": _ratios(results, "reference"),
        "ratio_to_request_batching": _ratios(results, "request_batching"),
    }


def _asked(job: EditorBenchmark) -> load.Asked:
    if job.sd15:
        settings = presets.fast().editing
    elif job.model is None:
        folder = weights.require() / "editor"
        settings = read_settings(EditSettings, folder / EDITOR_DEFAULTS)
    else:
        place = Path(job.model) / EDITOR_DEFAULTS
        settings = read_settings(EditSettings, place) if place.is_file() else EditSettings()
    if settings.image_guidance_scale < 1:
        raise ConfigError(
            "the model's image_guidance_scale is below 1, where diffusers' pipeline leaves all "
            f"guidance out: {settings.image_guidance_scale:g}"
        )
    return load.Asked(
        steps=job.steps or settings.steps,
        text_guidance_scale=settings.text_guidance_scale,
        image_guidance_scale=settings.image_guidance_scale,
        resolution=job.resolution or settings.resolution,
    )


def _choices(job: EditorBenchmark) -> tuple[int, ...]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (1, cores) if job.device == "cpu" and cores and cores > 1 else (1,)


@contextmanager
def _service() -> Iterator[str]:
    """A Ray of its own with Serve for the block; yields the URL, that of this machine."""
    root = str(Path(ip2p_ray.__file__).resolve().parent.parent)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{root}{os.pathsep}{before}" if before else root
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    ray.init(
        address="local",
        # logical ones, for the replicas of three ways; threads are what they are
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=256 << 20,
    )
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        ray.shutdown()  # and Serve with it


def _deploy(bench: _Bench, way: str, threads: int) -> None:
    """The way at its own prefix; nothing, where it runs there with so many threads already."""
    job = bench.job
    if bench.deployed.get(way) == threads:
        return
    if way in bench.deployed:
        serve.delete(way)
    bench.deployed[way] = threads
    config = ServiceConfig.model_validate(
        {
            "model": SD15 if job.sd15 else job.model,
            "name": "benchmark",
            "device": job.device,
            "dtype": job.dtype,
            "num_gpus": 0.3 if job.device != "cpu" else 0.0,
            "threads": threads,
            "batch_size": job.batch_size,
            # whatever is offered waits: how long is what is measured
            "max_queued": 100_000,
            "max_steps": max(100, bench.asked.steps),
            "deadline_s": load.Offer.timeout_s,
        }
    )
    try:
        serve.run(application(config, WAYS[way]), name=way, route_prefix=f"/{way}")
    except RuntimeError as error:
        raise Ip2pError(f"the service does not start: {_reason(way) or error}") from error


def _reason(way: str) -> str:
    """The last line of what Serve tells of a replica that does not start."""
    found = serve.status().applications.get(way)
    messages = [] if found is None else [each.message for each in found.deployments.values()]
    lines = "\n".join(messages).strip().splitlines()
    return lines[-1] if lines else ""


def _handle(way: str) -> Any:
    return serve.get_deployment_handle(EDITOR, way)


def _search(
    bench: _Bench, choices: tuple[int, ...]
) -> tuple[dict[str, float], dict[str, dict[int, float]]]:
    """The cold start, and each way's pictures a second at saturation by number of threads.

    The engine comes first, so that its first picture is the first of this process.
    """
    cold: dict[str, float] = {}
    found: dict[str, dict[int, float]] = {way: {} for way in ("ours", *WAYS)}
    for way, rates in found.items():
        for threads in choices:
            began = time.monotonic()
            _deploy(bench, way, threads)
            running = time.monotonic()
            _checked(bench.send(way, 1)[0])
            if not cold:
                cold = {
                    "process_to_first_picture_s": time.time() - psutil.Process().create_time(),
                    "replica_s": running - began,
                    "first_picture_s": time.monotonic() - running,
                }
                logger.info("first picture %.1f s from start", cold["process_to_first_picture_s"])
            if len(choices) > 1:
                _warm_up(bench, way)
                rates[threads] = _throughput(bench, way)["images_per_s"]
                logger.info("%s, %d threads: %.2f pictures/s", way, threads, rates[threads])
    return cold, found


def _quickest(rates: Mapping[int, float], choices: tuple[int, ...]) -> int:
    return max(choices, key=lambda threads: rates.get(threads, 0.0))


def _search_wait(bench: _Bench) -> tuple[float, dict[float, float | None]]:
    """How long a batch of whole requests best waits to become full, and p95 by such times.

    `serve.batch` closes a batch after that time even while the one before is computed, so that a
    short wait leaves batches nearly empty.
    """
    job, way = bench.job, "request_batching"
    for each in ("reference", way):
        _warm_up(bench, each)
    capacity = _throughput(bench, "reference")["images_per_s"]
    waits = job.batch_waits_s or (0.01, *(times / capacity for times in (0.5, 1.0, 2.0, 4.0)))
    moments = load.poisson_arrivals(job.compare_at * capacity, job.saturation, job.seed + 1)
    found: dict[float, float | None] = {}
    for wait in waits if len(waits) > 1 else ():
        _handle(way).wait_for_batches.remote(wait).result()
        answers, done = bench.send(way, job.saturation, arrivals=moments)
        _checked(answers)
        found[wait] = load.summary(answers)["p95_s"]
        told = wait, found[wait], done.rows / done.batches
        logger.info("batches that wait %.2f s: p95 %.2f s, %.1f requests in one", *told)
    best = min(waits, key=lambda wait: found.get(wait) or 0.0)
    _handle(way).wait_for_batches.remote(best).result()
    return best, found


def _warm_up(bench: _Bench, way: str) -> None:
    """Batches of any size are met, and full ones last."""
    for concurrency in (1, bench.under_way):
        answers, _ = bench.send(way, max(2, concurrency), concurrency=concurrency)
        _checked(answers)


def _throughput(bench: _Bench, way: str) -> dict[str, float]:
    """What a way does with more requests under way than a batch has."""
    answers, done = bench.send(way, bench.job.saturation, concurrency=bench.under_way)
    _checked(answers)
    return {
        "images_per_s": load.summary(answers)["images_per_s"],
        "cpu_s_per_image": done.cpu_s / len(answers),
        "batch_rows": done.rows / done.batches,
    }


def _saturate(bench: _Bench) -> dict[str, dict[str, Any]]:
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for way in WAYS:
        _warm_up(bench, way)
    for _ in range(bench.job.rounds):
        for way, rounds in found.items():
            rounds.append(_throughput(bench, way))
    results: dict[str, dict[str, Any]] = {}
    for way, rounds in found.items():
        results[way] = {key: median(each[key] for each in rounds) for key in rounds[0]}
        results[way]["rounds"] = {key: [each[key] for each in rounds] for key in rounds[0]}
        results[way]["loads"] = []
        logger.info("%s: %.2f pictures/s", way, results[way]["images_per_s"])
    return results


def _overhead(bench: _Bench) -> dict[str, Any]:
    """What HTTP and Serve add to the engine: the same kind of requests through both, in turns.

    `added_p50_s` is the median of the differences of the medians of neighbouring turns.
    """
    through: list[list[float]] = []
    bare: list[list[float]] = []
    each = min(5, bench.job.sequential)
    for _ in range(-(-bench.job.sequential // each)):
        answers, _ = bench.send("ours", each)
        _checked(answers)
        through.append([answer.waited for answer in answers])
        first = bench.next["ours"]
        bench.next["ours"] += each
        orders = [_order(bench.asked, number) for number in range(first, first + each)]
        bare.append(_handle("ours").bare_seconds.remote(orders).result())
    added = median(median(a) - median(b) for a, b in zip(through, bare, strict=True))
    logger.info("HTTP and Serve add %.1f ms", added * 1000)
    return {
        "http_p50_s": median(itertools.chain.from_iterable(through)),
        "engine_p50_s": median(itertools.chain.from_iterable(bare)),
        "added_p50_s": added,
        "requests": each * len(through),
    }


def _order(asked: load.Asked, number: int) -> Order:
    instruction, image = load.request_body(number, asked.resolution)
    return Order(
        image=image,
        instruction=instruction,
        seeds=(number,),
        size=(asked.resolution, asked.resolution),
        steps=asked.steps,
        text_guidance_scale=asked.text_guidance_scale,
        image_guidance_scale=asked.image_guidance_scale,
    )


def _offer(bench: _Bench, capacity: float, results: Mapping[str, dict[str, Any]]) -> None:
    """Every rate and kind of arrivals to every way in turn; the figures go into `results`."""
    for kind in load.ARRIVALS:
        for times in bench.job.rates:
            rounds = bench.job.rounds if (kind, times) == _compared(bench.job) else 1
            for way, found in _load(bench, kind, times, capacity, rounds).items():
                results[way]["loads"].append(found)
                logger.info(
                    "%s at %.2f/s, %s: p50 %.2f s, p95 %.2f s",
                    *(way, times * capacity, kind),
                    *(found["p50_s"] or float("nan"), found["p95_s"] or float("nan")),
                )


def _compared(job: EditorBenchmark) -> tuple[str, float]:
    """The load whose latencies are compared in the first lines; it is offered in rounds."""
    return "poisson", job.compare_at


def _load(
    bench: _Bench, kind: str, times: float, capacity: float, rounds: int
) -> dict[str, dict[str, Any]]:
    """What each way made of a load; of rounds the medians, each way in each round in turn."""
    job, rate = bench.job, times * capacity
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        moments = load.ARRIVALS[kind](rate, job.requests, job.seed + number)
        for way, turns in found.items():
            answers, done = bench.send(way, job.requests, arrivals=moments)
            rows = done.rows / done.batches if done.batches else None
            turns.append({**load.summary(answers), "batch_rows": rows})
    return {
        way: {
            "arrivals": kind,
            "times_capacity": times,
            "offered_per_s": rate,
            **_middle(turns),
            "rounds": {key: [turn[key] for turn in turns] for key in LATENCIES},
            "load_average": round(os.getloadavg()[0], 2),
        }
        for way, turns in found.items()
    }


def _middle(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Of rounds the sum of what is counted, the worst lateness, and medians of what is measured."""
    counted = ("requests", "answered", "rejected", "failed")
    middle: dict[str, Any] = {key: sum(turn[key] for turn in turns) for key in counted}
    middle["late_s"] = max(turn["late_s"] for turn in turns)
    for key in ("images_per_s", *LATENCIES, "batch_rows"):
        known = [turn[key] for turn in turns if turn[key] is not None]
        middle[key] = median(known) if known else None
    return middle


def _difference(bench: _Bench) -> dict[str, float]:
    """How far the ways' pictures of the same requests lie apart, in levels of 255.

    Raises:
        Ip2pError: further than rounding explains.
    """
    # numbers of their own, which no measurement sends
    orders = [_order(bench.asked, 10**6 + number) for number in range(COMPARED)]
    made = {
        way: np.stack(
            [
                np.asarray(Image.open(io.BytesIO(_handle(way).edit.remote(order).result()[0].data)))
                for order in orders
            ]
        ).astype(int)
        for way in WAYS
    }
    apart = [np.abs(made[way] - made["reference"]) for way in WAYS]
    mean = max(float(each.mean()) for each in apart)
    bound = MEAN_DIFFERENCE[bench.job.dtype]
    if mean > bound:
        raise Ip2pError(
            f"the ways made different pictures ({mean:.3f} of 255 levels apart on average, "
            f"{bound:g} are allowed for {bench.job.dtype}): their times cannot be compared"
        )
    return {
        "max_difference": max(int(each.max()) for each in apart),
        "mean_difference": mean,
        "mean_difference_bound": bound,
    }


def _checked(answers: list[load.Answer]) -> None:
    """Raises: Ip2pError where a request was not answered with a picture."""
    bad = [answer.status for answer in answers if answer.status != 200]
    if bad:
        raise Ip2pError(
            f"{len(bad)} of {len(answers)} requests were not answered with a picture, the first "
            f"with status {bad[0]}"
        )


def _ratios(results: Mapping[str, Mapping[str, Any]], base: str) -> dict[str, float | None]:
    ours, theirs = results["ours"], results[base]
    rounds = ((key, ours["rounds"][key], theirs["rounds"][key]) for key in RATIOS)
    return {
        key: None if None in (*above, *below) else measure.median_ratio(above, below)
        for key, above, below in rounds
    }
