from __future__ import annotations

import pytest
import torch

from ip2p_ray.errors import ConfigError
from ip2p_ray.prompt_to_prompt.alignment import TokenizedCaption, tokenize_caption
from ip2p_ray.prompt_to_prompt.control import (
    CrossControl,
    PairControl,
    attention_control,
    cross_control,
    word_maps,
)
from ip2p_ray.testing import tiny_tokenizer

TOKENIZER = tiny_tokenizer(10)


def caption(text: str) -> TokenizedCaption:
    return tokenize_caption(TOKENIZER, text, 10)


def copied_steps(self_replace: float, steps: int) -> int:
    control = PairControl(self_replace=self_replace)
    return sum(control.copies_self(step, steps) for step in range(steps))


@pytest.mark.parametrize(("self_replace", "count"), [(0, 0), (0.1, 10), (0.5, 50), (0.9, 90)])
def test_steps_with_copied_self_attention_are_the_references(
    self_replace: float, count: int
) -> None:
    assert copied_steps(self_replace, 100) == count


def test_the_last_step_is_never_copied_but_the_only_one_is() -> None:
    assert copied_steps(1.0, 100) == 99
    assert copied_steps(0.4, 1) == 1


def test_rows_of_the_source_are_gathered_in_both_halves() -> None:
    pairs = [PairControl(self_replace=p) for p in (0.9, 0.1, 0.9)]
    control = attention_control(pairs, step=5, steps=11)
    assert control is not None
    assert control.self_source is not None
    assert control.self_source.tolist() == [0, 1, 2, 0, 4, 2, 6, 7, 8, 6, 10, 8]
    half = attention_control(pairs, step=5, steps=11, both_halves=False)
    assert half is not None
    assert half.self_source is not None
    assert half.self_source.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 6, 10, 8]
    assert control.cross is None


def test_targets_that_share_a_source_gather_its_row() -> None:
    """Two sources, targets 2 to 4 of a half; the first two follow source 0."""
    pairs = [PairControl(self_replace=p) for p in (0.9, 0.1, 0.9)]
    control = attention_control(pairs, step=5, steps=11, source=[0, 0, 1])
    assert control is not None
    assert control.self_source is not None
    assert control.self_source.tolist() == [0, 1, 0, 3, 1, 5, 6, 5, 8, 6]
    replaced = cross_control(TOKENIZER, caption("a cat"), caption("a dog"), kind="replace")
    crossed = [PairControl(), PairControl(cross=replaced), PairControl(cross=replaced)]
    control = attention_control(crossed, step=0, steps=10, source=[0, 1, 1])
    assert control is not None
    assert control.cross is not None
    assert control.cross.own.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert control.cross.copied.tolist() == [8, 9]
    assert control.cross.source.tolist() == [6, 6]


def weights(step: int, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    control = cross_control(
        TOKENIZER,
        caption("a cat on a mat"),
        caption("a red cat on a mat") if options["kind"] == "refine" else caption("a dog on a mat"),
        **options,  # type: ignore[arg-type]
    )
    return control.weights(step, 10)


def test_replacement_while_active_takes_everything_from_the_source() -> None:
    matrix, own = weights(3, kind="replace", spans=0.5)
    assert torch.equal(matrix, torch.eye(10))
    assert torch.equal(own, torch.zeros(10))
    matrix, own = weights(5, kind="replace", spans=0.5)
    assert torch.equal(matrix, torch.zeros(10, 10))
    assert torch.equal(own, torch.ones(10))


def test_a_word_whose_source_was_cut_off_keeps_its_own_attention() -> None:
    source, target = caption("zebrafish " * 6), caption("a " * 6)
    matrix, own = cross_control(TOKENIZER, source, target, kind="replace").weights(0, 10)
    assert torch.equal(own, 1.0 - matrix.any(dim=0).float())
    assert own.any()


def test_refinement_keeps_new_words_and_scales_them_too() -> None:
    matrix, own = weights(0, kind="refine", scales={"red": 3.0, "cat": 2.0})
    assert own.tolist() == [0, 0, 3, 0, 0, 0, 0, 0, 0, 0]
    assert matrix[:, 2].tolist() == [0] * 10
    assert matrix[2, 3] == 2.0
    assert matrix[3, 4] == 1.0


def test_words_have_schedules_of_their_own() -> None:
    spans = {"default_": 0.5, "dog": (0.8, 1.0)}
    for step, dog, others in ((0, 1, 0), (4, 1, 0), (5, 1, 1), (8, 0, 1), (9, 0, 1)):
        _, own = weights(step, kind="replace", spans=spans)
        assert own[2] == dog
        assert torch.equal(own[[0, 1, 3, 4, 5, 6]], torch.full((6,), float(others)))


def test_words_override_the_default_whatever_the_order() -> None:
    first = weights(0, kind="replace", spans={"dog": (0.5, 1.0), "default_": 1.0})
    last = weights(0, kind="replace", spans={"default_": 1.0, "dog": (0.5, 1.0)})
    assert torch.equal(first[1], last[1])
    assert first[1][2] == 1


def test_rows_without_control_are_computed_once_and_replaced_rows_too() -> None:
    replaced = cross_control(
        TOKENIZER, caption("a cat"), caption("a dog"), kind="replace", spans=0.5
    )
    pairs = [PairControl(cross=replaced), PairControl()]
    control = attention_control(pairs, step=0, steps=10)
    assert control is not None
    assert control.self_source is None
    rows = control.cross
    assert rows is not None
    assert rows.own.tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert rows.copied.tolist() == [6]
    assert rows.source.tolist() == [4]
    assert attention_control(pairs, step=9, steps=10) is None


def test_a_reweight_in_a_span_outside_is_plain() -> None:
    control = cross_control(
        TOKENIZER,
        caption("a cat"),
        caption("a cat"),
        kind="reweight",
        spans=(0.5, 1.0),
        scales={"cat": 5.0},
    )
    assert attention_control([PairControl(cross=control)], step=0, steps=10) is None
    assert attention_control([PairControl(cross=control)], step=7, steps=10) is not None


def test_controls_without_a_blend_have_no_word_maps() -> None:
    assert word_maps([PairControl(self_replace=0.5)], (8, 8)) is None


def test_wrong_settings_are_refused() -> None:
    source, target = caption("a cat"), caption("a dog")

    def control(**options: object) -> CrossControl:
        return cross_control(TOKENIZER, source, target, **options)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match="swap"):
        control(kind="swap")
    with pytest.raises(ConfigError, match="span"):
        control(spans=1.5)
    with pytest.raises(ConfigError, match="span"):
        control(spans={"dog": (0.6, 0.4)})
    with pytest.raises(ConfigError, match="'cat' is not in the caption"):
        control(scales={"cat": 2.0})
    with pytest.raises(ConfigError, match="'boat'"):
        control(spans={"boat": 0.4})
