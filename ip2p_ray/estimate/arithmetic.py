"""The reckoning: units of work, device hours, bytes, objects, what crosses the network, money.

Everything follows from a Basis by the formulas below; nothing is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ip2p_ray.estimate.config import STAGES, Basis, Cluster, Prices, Sizes, Speeds, Workload

SHARD_ROWS = 20_000
SHARD_BYTES = 128 << 20
PART_TRIPLETS = 16_384
BLOCK_BYTES = 16 << 20
REPLY_BLOCK = 500
WRITER_BATCH = 16
LATENT_BLOCKS = 2_000
LATENT_BATCH = 32
"""What the stages cut datasets by; a test holds them to what the stages have."""

SHOWN_TRIPLETS = 48
"""Of which rejects keep their pictures."""

CANDIDATE_BYTES = 37.0
"""Of a candidate within its triplet's row: number, seed, two draws, four similarities, a reason."""

FOOTER_BYTES = 2_000.0
"""Of an object, beside its rows."""

CHECKPOINTS = 2
"""That are kept."""

SAVES = 12
"""Of a run of training."""

HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Rows of each dataset."""

    captions: float
    triplets: float
    candidates: float
    pairs: float
    latents: float
    samples: float
    """Of training, over all steps."""
    answers: float


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one stage of the flow takes."""

    name: str
    units: float
    unit: str
    device_hours: float
    """Of its pool while it works."""
    devices: int
    """Of its pool; 0 where it holds none."""
    fixed_seconds: float
    wall_hours: float
    """From its beginning to its end."""

    @property
    def held_hours(self) -> float:
        """Device hours that are paid for where the pool is held for the whole stage."""
        return self.devices * self.wall_hours


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A dataset, or what else lies in the folder of a run."""

    name: str
    rows: float
    bytes: float
    objects: float
    kept: bool = True
    """Whether it stays when the stage is done."""
    local: bool = False
    """Whether it lies on the nodes and not in the bucket."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """In the currency of the prices."""

    devices: float
    """Held for whole stages."""
    tokens: float
    storage: float
    requests: float
    transfer: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.devices + self.tokens + self.storage + self.requests + self.transfer


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What will be made, and what that takes."""

    counts: Counts
    stages: tuple[Stage, ...]
    start_hours: float
    """Beside the stages."""
    stored: tuple[Stored, ...]
    read_bytes: Mapping[str, float]
    """By stage, that nodes read from the bucket."""
    written_bytes: Mapping[str, float]
    """By stage, that they write to it."""
    exchanged_bytes: float
    """Between trainers, gradients of all steps: what each of them sends."""
    puts: float
    gets: float
    prompt_tokens: float
    reply_tokens: float
    cost: Cost | None
    """None without prices."""

    @property
    def device_hours(self) -> float:
        """Of all pools while they work."""
        return sum(stage.device_hours for stage in self.stages)

    @property
    def wall_hours(self) -> float:
        """One stage after the other."""
        return self.start_hours + sum(stage.wall_hours for stage in self.stages)

    @property
    def kept_bytes(self) -> float:
        """Of what stays in the bucket."""
        return sum(each.bytes for each in self.stored if each.kept and not each.local)

    @property
    def objects(self) -> float:
        """Of what stays in the bucket."""
        return sum(each.objects for each in self.stored if each.kept and not each.local)

    @property
    def moved_bytes(self) -> float:
        """Between the bucket and the nodes."""
        return sum(self.read_bytes.values()) + sum(self.written_bytes.values())


def estimate(basis: Basis, prices: Prices | None = None) -> Estimate:
    """What the workload takes on the cluster; the cost is None without prices."""
    work, cluster = basis.workload, basis.cluster
    counts = count(work)
    stages = _stages(work, counts, basis.speeds, cluster)
    stored = _stored(work, counts, basis.sizes, cluster)
    by_name = {each.name: each for each in stored}
    read, written = _moved(by_name, cluster)
    asked = work.prompt_tokens is not None
    prompt = counts.captions * (work.prompt_tokens or 0.0) if asked else 0.0
    reply = counts.captions * (work.reply_tokens or 0.0) if asked else 0.0
    whole = [each for each in stored if not each.local]
    puts = sum(each.objects for each in whole) + len(whole)  # a manifest each
    gets = 3 * puts  # a footer, a size and the bytes of each shard that is read once
    made = Estimate(
        counts=counts,
        stages=stages,
        start_hours=basis.speeds.start / HOUR,
        stored=stored,
        read_bytes=read,
        written_bytes=written,
        exchanged_bytes=_exchanged(work, basis.sizes, cluster),
        puts=puts,
        gets=gets,
        prompt_tokens=prompt,
        reply_tokens=reply,
        cost=None,
    )
    return made if prices is None else _priced(made, prices)


def count(work: Workload) -> Counts:
    """The rows that each stage makes, on average."""
    triplets = work.captions * work.reply_share
    hopeful = 1 - work.hopeless
    share = min(1.0, work.acceptance / hopeful)
    pairs = triplets * hopeful * kept_of_triplet(work.candidates, share, work.keep)
    return Counts(
        captions=work.captions,
        triplets=triplets,
        candidates=triplets * work.candidates,
        pairs=pairs,
        latents=pairs * (1 - work.held_out),
        samples=float(work.train_steps * work.batch_size),
        answers=work.answers,
    )


def kept_of_triplet(candidates: int, acceptance: float, keep: int) -> float:
    """The mean of min(keep, accepted) where each candidate is accepted independently.

    Candidates of a triplet are alike, so with few kept of many it is an upper bound.
    `Workload.hopeless` takes the worst of that away.
    """
    least = min(keep, candidates)
    if not 0 < acceptance < 1:
        return least * acceptance
    below = 0.0  # of the probability, up to each number of accepted ones
    mean = 0.0
    for accepted in range(least):
        below += math.exp(
            math.lgamma(candidates + 1)
            - math.lgamma(accepted + 1)
            - math.lgamma(candidates - accepted + 1)
            + accepted * math.log(acceptance)
            + (candidates - accepted) * math.log1p(-acceptance)
        )
        mean += 1 - below  # E[min(keep, X)] is the sum of P(X > k) for k below keep
    return max(0.0, mean)


def _stages(work: Workload, counts: Counts, speeds: Speeds, cluster: Cluster) -> tuple[Stage, ...]:
    def stage(
        name: str, units: float, unit: str, seconds: float, devices: int, wall: float
    ) -> Stage:
        fixed = speeds.fixed.get(name, 0.0)
        return Stage(
            name=name,
            units=units,
            unit=unit,
            device_hours=seconds / HOUR,
            devices=devices,
            fixed_seconds=fixed,
            wall_hours=(fixed + wall) / HOUR,
        )

    writing, writers, written = 0.0, 0, 0.0
    if speeds.caption is not None:
        writing, writers = counts.captions * speeds.caption.seconds, cluster.writers
        written = writing / writers
    elif cluster.requests_per_minute is not None:
        written = 60.0 * counts.captions / cluster.requests_per_minute
    each = speeds.candidate.seconds + work.steps * speeds.candidate_step.seconds
    making = counts.candidates * each
    judging = counts.candidates * speeds.judgement.seconds
    # A judge of its own works beside the generators; else the generator does both.
    beside = cluster.judges is not None
    made = (making if beside else making + judging) / cluster.generators
    if cluster.judges is not None:
        made = max(made, judging / cluster.judges)
    exploding = counts.candidates * speeds.score.seconds / cluster.tasks
    pools = cluster.generators + (cluster.judges or 0) * (speeds.judgement.seconds > 0)
    encoding = counts.latents * speeds.latent.seconds
    training = counts.samples * speeds.sample.seconds / cluster.training_efficiency
    answering = counts.answers * work.answer_steps * speeds.answer_step.seconds
    return (
        stage("captions", counts.captions, "captions", 0.0, 0, 0.0),
        stage("triplets", counts.captions, "captions", writing, writers, written),
        stage("pairs", counts.candidates, "candidates", making + judging, pools, made + exploding),
        stage(
            "latents",
            counts.latents,
            "pairs",
            encoding,
            cluster.encoders,
            encoding / cluster.encoders,
        ),
        stage(
            "training",
            counts.samples,
            "samples",
            training,
            cluster.trainers,
            training / cluster.trainers,
        ),
        stage(
            "evaluation",
            counts.answers,
            "answers",
            answering,
            cluster.editors,
            answering / cluster.editors,
        ),
    )


def _stored(work: Workload, counts: Counts, sizes: Sizes, cluster: Cluster) -> tuple[Stored, ...]:
    parts = max(1, math.ceil(counts.triplets / PART_TRIPLETS))
    rejected = counts.candidates - counts.pairs
    shown = rejected * min(1.0, SHOWN_TRIPLETS / max(1.0, counts.triplets))
    pictures = 2 * sizes.picture * (counts.pairs + shown)
    nested = counts.candidates * CANDIDATE_BYTES
    candidates = counts.triplets * sizes.triplet + nested + pictures
    pairs = counts.pairs * (sizes.score + 2 * sizes.picture)
    latents = counts.latents * sizes.latent
    blocks = max(1, min(LATENT_BLOCKS, math.ceil(counts.latents / LATENT_BATCH)))

    def shards(rows: float, size: float, folders: int = 1) -> float:
        each = max(rows / folders / SHARD_ROWS, size / folders / SHARD_BYTES)
        return float(folders * max(1, math.ceil(each)))

    def dataset(name: str, rows: float, size: float, folders: int = 1) -> Stored:
        objects = shards(rows, size, folders)
        return Stored(name=name, rows=rows, bytes=size + objects * FOOTER_BYTES, objects=objects)

    rejects = counts.captions - counts.triplets
    at_once = WRITER_BATCH if work.prompt_tokens is None else REPLY_BLOCK
    asked = float(math.ceil(counts.captions / at_once))  # a shard each, which nothing puts together
    return (
        dataset("captions", counts.captions, counts.captions * sizes.caption),
        Stored(
            name="replies",
            rows=counts.captions,
            bytes=counts.captions * sizes.reply + asked * FOOTER_BYTES,
            objects=asked,
        ),
        dataset("triplets", counts.triplets, counts.triplets * sizes.triplet),
        dataset("rejects/triplets", rejects, rejects * sizes.reply),
        Stored(
            name="queue",
            rows=counts.triplets,
            bytes=counts.triplets * sizes.triplet,
            objects=parts,
        ),
        Stored(
            name="candidates' blocks",
            rows=min(counts.triplets, PART_TRIPLETS),
            bytes=candidates / parts,
            objects=2 * min(counts.triplets, PART_TRIPLETS),  # a block and its note, at most
            kept=False,
        ),
        dataset("candidates", counts.triplets, candidates, parts),
        dataset("scores", counts.candidates, counts.candidates * sizes.score, parts),
        dataset("rejects/pairs", rejected, rejected * sizes.reject, parts),
        # of a part, each split has shards of its own
        dataset("pairs", counts.pairs, pairs, 2 * parts),
        Stored(
            name="latents",
            rows=counts.latents,
            bytes=latents,
            objects=max(blocks, math.ceil(latents / BLOCK_BYTES)),
        ),
        Stored(
            name="latents, mapped",
            rows=counts.latents,
            bytes=latents * cluster.nodes,
            objects=cluster.nodes,
            local=True,
        ),
        Stored(
            name="checkpoints",
            rows=CHECKPOINTS,
            bytes=CHECKPOINTS * sizes.checkpoint,
            objects=8 * CHECKPOINTS,
        ),
        Stored(name="editor", rows=1, bytes=sizes.editor, objects=12),
        dataset("answers", counts.answers, counts.answers * sizes.answer),
    )


def _moved(
    stored: Mapping[str, Stored], cluster: Cluster
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes read from the bucket, and written to it, by stage."""

    def size(*names: str) -> float:
        return sum(stored[name].bytes for name in names)

    candidates = stored["candidates"]
    read = {
        "captions": 0.0,
        "triplets": size("captions") + 2 * size("replies"),
        # The queue is made of two readings of the triplets; a part is compacted once, and then
        # read with pictures for the pairs and without them for scores and rejects.
        "pairs": 2 * size("triplets") + size("queue") + 2 * candidates.bytes + size("scores"),
        "latents": size("pairs"),
        "training": size("latents") * cluster.nodes,
        "evaluation": size("editor") * cluster.editors,
    }
    written = {
        "captions": size("captions"),
        "triplets": size("replies", "triplets", "rejects/triplets"),
        "pairs": size("queue", "scores", "rejects/pairs", "pairs") + 2 * candidates.bytes,
        "latents": size("latents"),
        "training": SAVES * size("checkpoints") / CHECKPOINTS + size("editor"),
        "evaluation": size("answers"),
    }
    assert set(read) == set(written) == set(STAGES)
    return read, written


def _exchanged(work: Workload, sizes: Sizes, cluster: Cluster) -> float:
    """A ring sends 2 (n - 1) / n of the gradients, which are a quarter of a checkpoint.

    That holds weights, their average and AdamW's two moments.
    """
    share = 2 * (cluster.trainers - 1) / cluster.trainers
    return work.train_steps * share * sizes.checkpoint / 4


def _priced(made: Estimate, prices: Prices) -> Estimate:
    cost = Cost(
        devices=prices.device_hour * sum(stage.held_hours for stage in made.stages),
        tokens=(
            prices.prompt_million * made.prompt_tokens + prices.reply_million * made.reply_tokens
        )
        / 1e6,
        storage=prices.storage_gb_month * prices.months * made.kept_bytes / 1e9,
        requests=(prices.put_1000 * made.puts + prices.get_1000 * made.gets) / 1000,
        transfer=prices.transfer_gb * made.moved_bytes / 1e9,
    )
    return Estimate(**{**vars(made), "cost": cost})
