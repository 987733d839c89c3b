from collections import Counter

import numpy as np
import pytest
import torch

from ip2p_ray.errors import ConfigError
from ip2p_ray.latents import LatentDataset
from ip2p_ray.training.feed import Feed, Visit, draw, read_batch


@pytest.mark.parametrize("batch_size", [3, 4, 7, 25])
def test_every_group_once_an_epoch(batch_size: int) -> None:
    feed = Feed(10, batch_size, seed=1)
    visits = [visit for step in range(100) for visit in feed.batch(step)]
    assert Counter(visits[:40]) == Counter(Visit(e, g) for e in range(4) for g in range(10))


def test_epochs_differ_and_seeds_differ() -> None:
    orders = [
        [visit.group for visit in Feed(50, 50, seed).batch(step)]
        for seed, step in ((1, 0), (1, 1), (2, 0))
    ]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_a_step_can_be_asked_for_in_any_order() -> None:
    feed = Feed(10, 4, seed=3)
    late = feed.batch(9)
    feed.batch(0)
    assert feed.batch(9) == late == Feed(10, 4, seed=3).batch(9)


@pytest.mark.parametrize(("world_size", "parts"), [(1, 1), (2, 1), (1, 2), (3, 2), (2, 3)])
def test_ranks_together_have_the_global_batch(world_size: int, parts: int) -> None:
    feed = Feed(10, 12, seed=1)
    ranks = [
        feed.part(5, rank=rank, world_size=world_size, parts=parts) for rank in range(world_size)
    ]
    joined = [visit for part in range(parts) for rank in ranks for visit in rank[part]]
    assert joined == feed.batch(5)


def test_uneven_batches_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of world size x accumulation = 2 x 2, got 10"):
        Feed(10, 10, seed=1).part(0, rank=0, world_size=2, parts=2)


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(ConfigError, match="no pairs"):
        Feed(0, 1, seed=1)


def test_draws_depend_on_seed_epoch_and_key_only() -> None:
    first = draw(1, Visit(0, 5), "a", (4, 2, 2))
    again = draw(1, Visit(0, 7), "a", (4, 2, 2))
    assert np.array_equal(first.normals, again.normals)
    assert first.timestep == again.timestep
    for other in (
        draw(2, Visit(0, 5), "a", (4, 2, 2)),
        draw(1, Visit(1, 5), "a", (4, 2, 2)),
        draw(1, Visit(0, 5), "b", (4, 2, 2)),
    ):
        assert other.timestep != first.timestep
        assert not np.array_equal(other.normals, first.normals)


def test_uniforms_do_not_depend_on_the_size() -> None:
    small, large = (draw(1, Visit(0, 0), "a", (4, side, side)) for side in (2, 8))
    assert (small.pick, small.timestep, small.dropout, small.flip) == (
        large.pick,
        large.timestep,
        large.dropout,
        large.flip,
    )


def test_draws_are_uniform_normal_and_independent() -> None:
    draws = [draw(1, Visit(0, 0), f"key {i}", (1, 2, 2)) for i in range(4000)]
    uniforms = np.array([(d.pick, d.timestep, d.dropout, d.flip) for d in draws])
    normals = np.array([d.normals for d in draws]).reshape(4000, -1)
    columns = np.concatenate([uniforms, normals], axis=1)
    assert np.abs(uniforms.mean(0) - 0.5).max() < 0.02
    assert np.abs(uniforms.var(0) - 1 / 12).max() < 0.006
    assert np.abs(normals.mean(0)).max() < 0.07
    assert np.abs(normals.std(0) - 1).max() < 0.05
    correlation = np.corrcoef(columns, rowvar=False) - np.eye(columns.shape[1])
    assert np.abs(correlation).max() < 0.08


def test_a_row_does_not_depend_on_its_neighbours(dataset: LatentDataset) -> None:
    visits = [Visit(0, group) for group in range(6)]
    together, alone = read_batch(dataset, visits, 1), read_batch(dataset, visits[3:4], 1)
    assert together.instructions[3] == alone.instructions[0]
    for name in ("edited_mean", "edited_std", "source_mode", "posterior_noise", "noise"):
        assert torch.equal(getattr(together, name)[3], getattr(alone, name)[0])
    assert together.timesteps[3] == alone.timesteps[0]
    assert together.dropout[3] == alone.dropout[0]


def test_visits_change_pair_flip_and_noise(dataset: LatentDataset) -> None:
    group = 0  # of three pairs
    seen = {
        read_batch(dataset, [Visit(epoch, group)], 1).source_mode.numpy().tobytes()
        for epoch in range(60)
    }
    assert len(seen) == 2 * 3
    unflipped = {
        read_batch(dataset, [Visit(epoch, group)], 1, flips=False).source_mode.numpy().tobytes()
        for epoch in range(60)
    }
    assert len(unflipped) == 3


def test_batch_shapes(dataset: LatentDataset) -> None:
    batch = read_batch(dataset, [Visit(0, 1), Visit(0, 2)], 1)
    assert batch.noise.shape == batch.edited_mean.shape == (2, *dataset.shape)
    assert batch.noise.dtype == batch.edited_mean.dtype == torch.float32
    assert not torch.equal(batch.noise, batch.posterior_noise)


@pytest.mark.parametrize(("world_size", "most"), [(1, 5), (3, 2), (5, 1), (12, 4)])
def test_shares_of_any_world_size_are_the_global_batch(world_size: int, most: int) -> None:
    feed = Feed(10, 12, seed=1)
    ranks = [
        feed.share(5, rank=rank, world_size=world_size, most=most) for rank in range(world_size)
    ]
    assert [visit for rank in ranks for part in rank for visit in part] == feed.batch(5)
    sizes = [sum(map(len, rank)) for rank in ranks]
    assert max(sizes) - min(sizes) <= 1
    assert all(0 < len(part) <= most for rank in ranks for part in rank)


def test_more_ranks_than_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="every rank needs a sample"):
        Feed(10, 3, seed=1).share(0, rank=0, world_size=4, most=1)
