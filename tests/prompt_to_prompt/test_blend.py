from __future__ import annotations

from typing import Any

import pytest
import torch

from ip2p_ray.errors import ConfigError
from ip2p_ray.prompt_to_prompt.alignment import tokenize_caption
from ip2p_ray.prompt_to_prompt.blend import LocalBlend, WordMaps, local_blend
from ip2p_ray.testing import tiny_tokenizer

TOKENIZER = tiny_tokenizer(8)
SOURCE = tokenize_caption(TOKENIZER, "a cat on a mat", 8)
TARGET = tokenize_caption(TOKENIZER, "a red chinchilla", 8)
LATENTS = torch.stack([torch.zeros(1, 8, 8), torch.zeros(1, 8, 8) - 1, *[torch.ones(1, 8, 8)] * 2])


def blend(**options: Any) -> LocalBlend:
    return local_blend(TOKENIZER, SOURCE, TARGET, words=(["cat"], ["red chinchilla"]), **options)


def test_indicators_are_the_tokens_of_the_words() -> None:
    assert blend().words[0].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    assert blend().words[1].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    with pytest.raises(ConfigError, match="'dog' is not in the caption"):
        local_blend(TOKENIZER, SOURCE, TARGET, words=(["dog"], ["red"]))


def test_a_region_is_grown_by_one_place_and_takes_the_target() -> None:
    """One pair, maps of 4 x 4 for latents of 8 x 8."""
    maps = WordMaps([blend(start=0.0)], (8, 8), downscale=2)
    maps.sums[0, 0, 0] = 5.0  # the source's word attends to the upper left corner
    blended = maps.blend(LATENTS[[0, 2]], 0, 10)
    assert torch.equal(blended[0], LATENTS[0])
    expected = torch.zeros(8, 8)
    expected[:4, :4] = 1  # the corner and its neighbours, twice as large
    assert torch.equal(blended[1, 0], expected)


def test_regions_of_both_branches_count_above_their_own_threshold() -> None:
    maps = WordMaps([blend(start=0.0, threshold=0.5)], (4, 4), downscale=1)
    maps.sums[0, 0, 0], maps.sums[0, 15, 0] = 1.0, 0.4
    maps.sums[1, 3, 0], maps.sums[1, 12, 0] = 100.0, 60.0
    (mask,) = maps.blend(torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)]), 0, 1)[1]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]


def test_less_takes_a_region_away_without_growing() -> None:
    less = local_blend(
        TOKENIZER, SOURCE, TARGET, words=(["cat"], ["red"]), less=(["mat"], ["a"]), start=0.0
    )
    assert less.less is not None
    maps = WordMaps([less], (4, 4), downscale=1)
    maps.sums[0, 5, 0] = maps.sums[0, 5, 1] = 1.0
    (mask,) = maps.blend(torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)]), 0, 1)[1]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]


def test_each_pair_blends_from_its_own_step_on() -> None:
    maps = WordMaps([blend(start=0.2), blend(start=0.6)], (8, 8), downscale=2)
    assert torch.equal(maps.blend(LATENTS, 1, 10), LATENTS)
    early = maps.blend(LATENTS, 2, 10)
    # words that nothing attends to have no region: the target is the source
    assert torch.equal(early[2], LATENTS[0])
    assert torch.equal(early[3], LATENTS[3])
    late = maps.blend(LATENTS, [2, 9], [10, 15])
    assert torch.equal(late[3], LATENTS[1])


def test_pairs_without_blend_stay() -> None:
    maps = WordMaps([None, blend(start=0.0)], (8, 8), downscale=2)
    blended = maps.blend(LATENTS, 0, 10)
    assert torch.equal(blended[2], LATENTS[2])
    assert torch.equal(blended[3], LATENTS[1])


def test_targets_of_one_source_blend_with_it_each_by_its_own_words() -> None:
    maps = WordMaps(
        [blend(start=0.0, threshold=0.5), None, blend(start=0.0, threshold=0.5)],
        (4, 4),
        downscale=1,
        source=[0, 1, 0],
    )
    assert maps.indicators.shape[0] == maps.sums.shape[0] == 2 + 3
    assert maps.indicators[:, :, 0].sum(1).tolist() == [1, 0, 4, 0, 4]
    maps.sums[0, 0, 0] = 1.0  # the source: upper left
    maps.sums[4, 15, 0] = 1.0  # the third target: lower right
    sources = torch.stack([torch.zeros(1, 4, 4), torch.full((1, 4, 4), 2.0)])
    blended = maps.blend(torch.cat([sources, torch.ones(3, 1, 4, 4)]), 0, 1)
    assert torch.equal(blended[:2], sources)
    corner = torch.zeros(4, 4)
    corner[:2, :2] = 1
    assert torch.equal(blended[2, 0], corner)
    assert torch.equal(blended[3, 0], torch.ones(4, 4))
    assert torch.equal(blended[4, 0], corner + corner.flip(0, 1))


def test_other_words_of_a_shared_caption_are_refused() -> None:
    other = local_blend(TOKENIZER, SOURCE, TARGET, words=(["mat"], ["red"]))
    with pytest.raises(ConfigError, match="different words"):
        WordMaps([blend(), other], (4, 4), source=[0, 0])
