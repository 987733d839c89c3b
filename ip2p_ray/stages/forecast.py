"""What making pairs will take: a batch is made and judged, and the rest is reckoned from it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import ray

from ip2p_ray import storage
from ip2p_ray.clip import Clip
from ip2p_ray.copies import local_folder
from ip2p_ray.generator import Generator, GeneratorWeights, Holding
from ip2p_ray.images import encode_image, to_pil
from ip2p_ray.pairs import CandidateRequest, PairConfig, Pictures, candidate_requests
from ip2p_ray.report import duration, size
from ip2p_ray.search.options import SearchConfig
from ip2p_ray.stages import plan, run
from ip2p_ray.stages.models import local_weights
from ip2p_ray.stages.pairs import Making
from ip2p_ray.stages.plan import BLOCK_BYTES

SHORT_S = 20.0
"""A batch that takes longer is measured over a few of its steps."""

_FEW_STEPS, _MORE_STEPS = 2, 6


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is to be made, and what of it was measured."""

    triplets: int
    candidates: int
    pairs: int
    """At most so many."""
    asked_batch: int
    """Candidates at a time that were asked for."""
    batch_size: int
    """That fitted."""
    generator_seconds: float
    """Of one generator for a candidate."""
    judge_seconds: float
    """Of one judge for a candidate."""
    generators: int
    """That the cluster has room for, of those asked for."""
    cpu_generators: int
    """Beside them, without a GPU; how fast those are is not measured."""
    judges: int
    """As many as there may be."""
    triplet_bytes: float
    """Of all pictures of a triplet on their way to the judge; 0 where they are judged at once."""
    pair_bytes: float
    """Of both pictures of a pair as they are stored."""
    extrapolated: bool
    """Whether only a few steps of a batch were made."""
    spared: bool
    """Whether an option is on, which may make fewer or cheaper candidates."""

    @property
    def device_hours(self) -> float:
        """Of all generators."""
        return self.candidates * self.generator_seconds / 3600

    def _carried(self) -> str:
        return (
            f"plan: a triplet's pictures, about {size(self.triplet_bytes)}, go to the judge in one "
            "piece; with --judge-actors 0 they stay where they are made"
        )

    def _beside(self) -> str:
        return (
            f"plan: what {self.cpu_generators} generators without a GPU make comes off that; how "
            "fast they are is not measured"
        )

    @property
    def judging(self) -> bool:
        """Whether the generators would wait for the judges."""
        made = self.generator_seconds / self.generators
        return self.judge_seconds / self.judges > made

    @property
    def hours(self) -> float:
        """Until the last candidate is judged, generators and judges working side by side."""
        judging = self.candidates * self.judge_seconds / self.judges / 3600
        return max(self.device_hours / self.generators, judging)

    def lines(self) -> list[str]:
        """The plan, for people."""
        smaller = self.batch_size < self.asked_batch
        of = f"{_FEW_STEPS} to {_MORE_STEPS} steps" if self.extrapolated else "a batch"
        stored = size(2 * self.pairs * self.pair_bytes)
        return [
            f"plan: {self.triplets:,} triplets, {self.candidates:,} candidates, "
            f"at most {self.pairs:,} pairs",
            f"plan: a generator takes {self.generator_seconds:.3g} s for a candidate, "
            f"{self.batch_size} at a time (measured over {of}); a judge {self.judge_seconds:.3g} s",
            f"plan: {duration(3600 * self.device_hours)} of a device in all; with "
            f"{self.generators} of them and {self.judges} to judge "
            f"{duration(3600 * self.hours)}, beside loading the models",
            f"plan: at most {stored} of pictures, {size(self.pair_bytes)} a pair in candidates and "
            "again in pairs"
            + ("; pictures of so few steps are larger than finished ones" * self.extrapolated),
            *([self._carried()] * (self.triplet_bytes > BLOCK_BYTES)),
            *([self._beside()] * bool(self.cpu_generators)),
            *([f"plan: {self.asked_batch} at a time do not fit"] * smaller),
            *(["plan: judging is what binds: more --judge-actors, or --judge-gpus"] * self.judging),
            *(["plan: what the options spare comes off that"] * self.spared),
        ]


class Measured(NamedTuple):
    """What one generator did."""

    seconds: float
    """For a candidate."""
    batch_size: int
    extrapolated: bool
    source: Pictures
    edited: Pictures


def forecast_of(triplets: str, folder: str, config: PairConfig, making: Making) -> Forecast:
    """The forecast of `generate_pairs` with the same arguments, measured on the first triplets.

    Runs where actors of the stage would, and fills the queue.

    Raises:
        ModelError: a model cannot be loaded or does not fit.
        DatasetError: the triplets are not whole.
        StageError: too many of them are unusable.
    """
    count = making.fill_queue(triplets, folder).rows
    generators = making.generators
    # where each generator judges, judging comes on top
    judges = making.judges or replace(generators, batch_size=making.holding.batch_size)
    requests = _requests(storage.join(folder, "queue"), config, making.holding.batch_size)
    made: Measured = run.in_task(
        generators, _measure_generator, making.generator, making.holding, requests, config
    )
    device = "cuda" if judges.gpus else "cpu"
    judged: float = run.in_task(
        judges, _measure_judge, making.judge, device, made.source, made.edited, requests
    )
    stored = [
        len(encode_image(to_pil(picture), config.image_format))
        for pictures in (made.source, made.edited)
        for picture in pictures
    ]
    pair_bytes = 2 * float(np.mean(stored))
    return Forecast(
        triplets=count,
        candidates=count * config.candidates,
        pairs=count * min(config.keep, config.candidates),
        asked_batch=making.holding.batch_size,
        batch_size=made.batch_size,
        generator_seconds=made.seconds + (judged if making.judges is None else 0.0),
        judge_seconds=judged,
        generators=_room(generators, making.judges),
        cpu_generators=generators.cpu_actors,
        judges=_room(judges),
        triplet_bytes=0.0 if making.judges is None else config.candidates * pair_bytes,
        pair_bytes=pair_bytes,
        extrapolated=made.extrapolated,
        spared=making.options != SearchConfig(),
    )


def fingerprints(making: Making) -> dict[str, str]:
    """What identifies generator and judge, by role; each is loaded once for it, on a node.

    Raises:
        ModelError: a model cannot be loaded; says which.
    """
    anywhere = run.Resources(cpus=plan.TASK_CPUS)
    return {
        "generator": run.in_task(anywhere, _generator_fingerprint, making.generator),
        "judge": run.in_task(anywhere, _judge_fingerprint, making.judge),
    }


def _generator_fingerprint(weights: GeneratorWeights) -> str:
    return local_weights(weights).load().fingerprint()


def _judge_fingerprint(judge: str) -> str:
    return Clip.load(local_folder(judge)).fingerprint()


def _requests(queue: str, config: PairConfig, count: int) -> list[CandidateRequest]:
    """So many requests, of the first triplets; the last are repeated where there are too few."""
    names = ["triplet_key", "caption", "edited_caption"]
    with storage.open_parquet(plan.shards(queue)[0]) as file:
        rows = next(file.iter_batches(count, columns=names)).to_pylist()
    requests = [
        request
        for row in rows
        for request in candidate_requests(
            row["triplet_key"], row["caption"], row["edited_caption"], config, "forecast"
        )
    ]
    return (requests * count)[:count]


def _measure_generator(
    weights: GeneratorWeights,
    holding: Holding,
    requests: Sequence[CandidateRequest],
    config: PairConfig,
) -> Measured:
    generator = Generator(local_weights(weights).load(holding.device), holding)

    def timed(steps: int) -> tuple[float, Pictures, Pictures]:
        began = time.monotonic()
        batches = list(generator.make(requests, replace(config, steps=steps)))
        seconds = (time.monotonic() - began) / len(requests)
        source = np.concatenate([batch.source for batch in batches])
        edited = np.concatenate([batch.edited for batch in batches])
        return seconds, source, edited

    few = min(_FEW_STEPS, config.steps)
    timed(few)  # memory, kernels and compilation
    short, source, edited = timed(few)
    if short * len(requests) * config.steps / few <= SHORT_S:
        seconds, source, edited = timed(config.steps)
        return Measured(seconds, generator.batch_size, False, source, edited)
    longer, source, edited = timed(min(_MORE_STEPS, config.steps))
    step = max(longer - short, 0.0) / max(min(_MORE_STEPS, config.steps) - few, 1)
    return Measured(short + step * (config.steps - few), generator.batch_size, True, source, edited)


def _measure_judge(
    judge: str,
    device: str,
    source: Pictures,
    edited: Pictures,
    requests: Sequence[CandidateRequest],
) -> float:
    clip = Clip.load(local_folder(judge), device)
    captions = [request.caption for request in requests]
    edited_captions = [request.edited_caption for request in requests]
    for _ in range(2):  # the first time is memory and kernels
        began = time.monotonic()
        clip.similarities(source, edited, captions, edited_captions).rows()
        seconds = time.monotonic() - began
    return seconds / len(requests)


def _room(asked: run.Resources, beside: run.Resources | None = None) -> int:
    """Actors that the cluster has room for now, at least one; `beside` hold their share first."""
    have: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    most = float(asked.most_actors or asked.actors)
    taken = {} if beside is None else {**beside.in_all, "CPU": beside.all_cpus}
    for name, held in asked.of_worker.items():
        if held:
            most = min(most, (have.get(name, 0.0) - taken.get(name, 0.0)) // held)
    return max(1, int(most))
