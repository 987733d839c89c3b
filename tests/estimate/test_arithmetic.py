import itertools
from dataclasses import replace

import pytest

from ip2p_ray.errors import ConfigError
from ip2p_ray.estimate import arithmetic
from ip2p_ray.estimate.arithmetic import count, estimate, kept_of_triplet
from ip2p_ray.estimate.config import Basis, Cluster, Prices, Sizes, Speed, Speeds, Workload
from ip2p_ray.stages import compaction, latents, pairs_page, plan, queue, replies, shards

NOTHING = Speed(seconds=0.0, source="given")


def second(value: float) -> Speed:
    return Speed(seconds=value, source="given")


WORK = Workload(
    captions=1_000,
    reply_share=0.5,
    candidates=10,
    steps=20,
    acceptance=1.0,
    keep=4,
    held_out=0.25,
    train_steps=100,
    batch_size=8,
    answers=60,
    answer_steps=2,
)
SPEEDS = Speeds(
    caption=second(0.5),
    candidate_step=second(0.1),
    candidate=second(1.0),
    judgement=second(0.3),
    latent=second(2.0),
    sample=second(0.25),
    answer_step=second(3.0),
    score=second(0.01),
    fixed={"triplets": 10.0, "pairs": 20.0, "latents": 30.0, "training": 40.0, "evaluation": 50.0},
    start=7.0,
)
SIZES = Sizes(
    caption=100,
    reply=200,
    triplet=300,
    score=50,
    reject=40,
    picture=1_000,
    latent=4_000,
    checkpoint=800,
    editor=90,
    answer=2_500,
    source="given",
)
CLUSTER = Cluster(writers=2, generators=4, judges=2, encoders=3, trainers=4, editors=6, tasks=5)
BASIS = Basis(workload=WORK, speeds=SPEEDS, sizes=SIZES, cluster=CLUSTER)
PRICES = Prices(
    device_hour=3.0,
    storage_gb_month=0.5,
    put_1000=2.0,
    get_1000=1.0,
    transfer_gb=4.0,
    months=2.0,
)


def test_the_stages_cut_datasets_as_is_reckoned() -> None:
    assert queue.PART_TRIPLETS == arithmetic.PART_TRIPLETS
    assert shards.SHARD_ROWS == arithmetic.SHARD_ROWS
    assert shards.SHARD_BYTES == compaction.SHARD_BYTES == arithmetic.SHARD_BYTES
    assert plan.BLOCK_BYTES == arithmetic.BLOCK_BYTES
    assert replies._MOST_ROWS == arithmetic.REPLY_BLOCK
    assert latents._MOST_BLOCKS == arithmetic.LATENT_BLOCKS
    assert pairs_page.SHOWN_TRIPLETS == arithmetic.SHOWN_TRIPLETS


def test_rows_by_hand() -> None:
    counts = count(WORK)
    assert (counts.triplets, counts.candidates, counts.pairs) == (500, 5_000, 2_000)
    assert (counts.latents, counts.samples, counts.answers) == (1_500, 800, 60)


@pytest.mark.parametrize(("candidates", "keep"), [(3, 4), (5, 2), (6, 1)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_kept_of_a_triplet_is_the_mean_over_all_outcomes(
    candidates: int, keep: int, share: float
) -> None:
    mean = 0.0
    for outcome in itertools.product((0, 1), repeat=candidates):
        accepted = sum(outcome)
        mean += share**accepted * (1 - share) ** (candidates - accepted) * min(keep, accepted)
    assert kept_of_triplet(candidates, share, keep) == pytest.approx(mean)


def test_hopeless_triplets_leave_the_accepted_to_the_others() -> None:
    alike = replace(WORK, acceptance=0.2, candidates=3)
    half = replace(alike, hopeless=0.5)
    # fewer than keep are made, so nothing is lost: as many are accepted in all
    assert count(half).pairs == pytest.approx(count(alike).pairs)
    many = replace(half, candidates=1_000)
    assert count(many).pairs == pytest.approx(250 * 4)


def test_device_hours_and_walls_by_hand() -> None:
    stages = {stage.name: stage for stage in estimate(BASIS).stages}
    assert stages["triplets"].device_hours == pytest.approx(1_000 * 0.5 / 3600)
    assert stages["triplets"].wall_hours == pytest.approx((10 + 250) / 3600)
    # 5,000 candidates of 20 x 0.1 + 1 s, and 0.3 s to judge them
    assert stages["pairs"].device_hours == pytest.approx(5_000 * 3.3 / 3600)
    assert stages["pairs"].wall_hours == pytest.approx((20 + 15_000 / 4 + 50 / 5) / 3600)
    assert stages["pairs"].devices == 6
    assert stages["latents"].wall_hours == pytest.approx((30 + 1_500 * 2 / 3) / 3600)
    assert stages["training"].wall_hours == pytest.approx((40 + 800 * 0.25 / 4) / 3600)
    assert stages["evaluation"].wall_hours == pytest.approx((50 + 60 * 6 / 6) / 3600)
    assert estimate(BASIS).wall_hours == pytest.approx(
        7 / 3600 + sum(stage.wall_hours for stage in stages.values())
    )


def test_the_slower_of_generators_and_judges_binds() -> None:
    slow = replace(BASIS, speeds=replace(SPEEDS, judgement=second(3.0)))
    assert wall(slow) == pytest.approx((20 + 5_000 * 3 / 2 + 10) / 3600)
    together = replace(slow, cluster=replace(CLUSTER, judges=None))
    assert wall(together) == pytest.approx((20 + 5_000 * 6 / 4 + 10) / 3600)


def wall(basis: Basis) -> float:
    return next(stage.wall_hours for stage in estimate(basis).stages if stage.name == "pairs")


def test_training_that_scales_badly_holds_devices_longer() -> None:
    half = replace(BASIS, cluster=replace(CLUSTER, training_efficiency=0.5))
    hours = [
        stage.device_hours
        for basis in (BASIS, half)
        for stage in estimate(basis).stages
        if stage.name == "training"
    ]
    assert hours[1] == pytest.approx(2 * hours[0])


def test_an_endpoint_is_as_fast_as_its_limit_and_costs_tokens() -> None:
    basis = replace(
        BASIS,
        workload=replace(WORK, prompt_tokens=500, reply_tokens=20),
        speeds=replace(SPEEDS, caption=None),
        cluster=replace(CLUSTER, requests_per_minute=120),
    )
    made = estimate(basis, replace(PRICES, prompt_million=2.0, reply_million=10.0))
    triplets = made.stages[1]
    assert (triplets.device_hours, triplets.devices) == (0, 0)
    assert triplets.wall_hours == pytest.approx((10 + 1_000 / 2) / 3600)
    assert (made.prompt_tokens, made.reply_tokens) == (500_000, 20_000)
    assert made.cost is not None
    assert made.cost.tokens == pytest.approx(1.0 + 0.2)


def test_bytes_and_objects_by_hand() -> None:
    stored = {each.name: each for each in estimate(BASIS).stored}
    footer = arithmetic.FOOTER_BYTES
    assert stored["captions"].bytes == 1_000 * 100 + footer
    assert stored["replies"].objects == 63  # batches of 16
    assert stored["replies"].bytes == 1_000 * 200 + 63 * footer
    assert stored["scores"].bytes == 5_000 * 50 + footer
    assert stored["pairs"].bytes == 2_000 * (50 + 2 * 1_000) + 2 * footer
    assert stored["latents"].bytes == 1_500 * 4_000
    assert stored["latents"].objects == 47  # blocks of 32 pairs
    shown = 3_000 * 48 / 500
    expected = 500 * 300 + 5_000 * 37 + 2_000 * (2_000 + shown) + footer
    assert stored["candidates"].bytes == pytest.approx(expected)


def test_a_part_has_its_own_shards() -> None:
    large = replace(WORK, captions=1_000_000)
    stored = {each.name: each for each in estimate(replace(BASIS, workload=large)).stored}
    parts = 31  # of 16,384 of 500,000 triplets
    assert stored["queue"].objects == parts
    # of 5,000,000 scores 161,290 are in a part, in shards of 20,000
    assert stored["scores"].objects == parts * 9
    # a split of a part has half of 4 GB of pairs, 66 MB, and of 2,000,000 rows 32,258
    assert stored["pairs"].objects == 2 * parts * 2


def test_what_crosses_the_network() -> None:
    made = estimate(BASIS)
    stored = {each.name: each for each in made.stored}
    assert made.read_bytes["latents"] == stored["pairs"].bytes
    two = estimate(replace(BASIS, cluster=replace(CLUSTER, nodes=2)))
    assert two.read_bytes["training"] == 2 * made.read_bytes["training"]
    # 4 trainers send 2 x 3/4 of 200 bytes of gradients in each of 100 steps
    assert made.exchanged_bytes == pytest.approx(100 * 1.5 * 200)
    assert made.moved_bytes == sum(made.read_bytes.values()) + sum(made.written_bytes.values())


def test_the_cost_by_hand() -> None:
    made = estimate(BASIS, PRICES)
    held = sum(stage.devices * stage.wall_hours for stage in made.stages)
    assert made.cost is not None
    assert made.cost.devices == pytest.approx(3 * held)
    assert made.cost.storage == pytest.approx(0.5 * 2 * made.kept_bytes / 1e9)
    assert made.cost.requests == pytest.approx((2 * made.puts + made.gets) / 1_000)
    assert made.cost.transfer == pytest.approx(4 * made.moved_bytes / 1e9)
    assert made.cost.tokens == 0
    parts = (made.cost.devices, made.cost.storage, made.cost.requests, made.cost.transfer)
    assert made.cost.total == pytest.approx(sum(parts))
    assert estimate(BASIS).cost is None


def test_what_is_on_the_way_or_on_the_nodes_is_not_kept() -> None:
    made = estimate(BASIS)
    gone = {"candidates' blocks", "latents, mapped"}
    kept = sum(each.bytes for each in made.stored if each.name not in gone)
    assert made.kept_bytes == kept
    assert made.objects == sum(each.objects for each in made.stored if each.name not in gone)


@pytest.mark.parametrize(
    "change",
    [
        {"captions": 0},
        {"reply_share": 0.0},
        {"acceptance": 1.5},
        {"hopeless": 1.0},
        {"held_out": 1.0},
        {"answers": -1},
        {"prompt_tokens": 5.0},
    ],
)
def test_impossible_amounts_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(WORK, **change)


def test_somebody_has_to_write_the_triplets() -> None:
    with pytest.raises(ConfigError, match="nobody writes the triplets"):
        replace(BASIS, speeds=replace(SPEEDS, caption=None))
