import dataclasses

import pytest

from ip2p_ray.errors import ConfigError
from ip2p_ray.intervals import BootstrapConfig
from ip2p_ray.trials import (
    BASELINES,
    COPY,
    EDITOR,
    MEASURES,
    SCORED,
    SDEDIT,
    Setting,
    TrialConfig,
    as_json,
    badness,
    by_type,
    curves,
    differences,
    flat,
    noise_seed,
    table,
    task_key,
    told_apart,
)

CONFIG = BootstrapConfig(resamples=200)
TRIALS = TrialConfig(image_guidance_scales=(1.0, 2.0), curve_tasks=2)


def row(answerer, number, setting=Setting(), **measures):  # noqa: B008 - it is frozen
    known = dict.fromkeys(SCORED.names) | dict.fromkeys(MEASURES)
    return {
        **known,
        "answerer": answerer,
        "task_key": f"task-{number}",
        "number": number,
        "group": f"group-{number // 2}",
        **dataclasses.asdict(setting),
        **measures,
    }


def editor_rows():
    """Three tasks at the table's scales, the first two on a curve of two points."""
    usual, others = TRIALS.editor_settings(7.5, 1.5)
    return [
        row(
            "mine",
            number,
            setting,
            direction_similarity=number + (setting.image_guidance_scale or 0),
            image_similarity=0.5,
            correct=float(number == 2),
            edit_type="swap" if number else "add",
        )
        for number in range(3)
        for setting in (*usual, *(others if TRIALS.on_curve(number) else ()))
    ]


def test_an_editor_is_asked_at_its_own_scales_and_on_the_curve():
    usual, others = TRIALS.editor_settings(2.0, 1.5)
    assert usual == [Setting(text_guidance_scale=2.0, image_guidance_scale=1.5)]
    assert [s.image_guidance_scale for s in others] == [1.0, 2.0]
    assert {s.text_guidance_scale for s in others} == {2.0}
    assert not any(s.usual for s in others)


def test_stated_scales_come_before_its_own():
    told = TrialConfig(
        text_guidance_scale=7.5,
        image_guidance_scale=1.2,
        text_guidance_scales=(5.0, 7.5),
        image_guidance_scales=(1.2, 1.4),
    )
    usual, others = told.editor_settings(2.0, 1.5)
    assert usual == [Setting(text_guidance_scale=7.5, image_guidance_scale=1.2)]
    asked = [(s.text_guidance_scale, s.image_guidance_scale) for s in others]
    assert asked == [(5.0, 1.2), (5.0, 1.4), (7.5, 1.4)]


def test_the_default_curve_is_the_papers():
    _, others = TrialConfig().editor_settings(7.5, 1.5)
    assert [s.image_guidance_scale for s in others] == [1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2]
    assert {s.text_guidance_scale for s in others} == {7.5}


def test_a_baseline_has_the_middle_in_the_table():
    (usual,), others = TrialConfig(strengths=(0.9, 0.3, 0.6)).of_one_number("strength")
    assert usual == Setting(strength=0.6)
    assert [s.strength for s in others] == [0.3, 0.9]


@pytest.mark.parametrize(
    "changes",
    [{"curve_tasks": -1}, {"strengths": ()}, {"strengths": (0.0,)}, {"self_replaces": (2.0,)}],
)
def test_what_cannot_be_asked_is_refused(changes):
    with pytest.raises(ConfigError):
        TrialConfig(**changes)


def test_keys_and_noise_come_from_content():
    key = task_key("a/1", "a", ["do it"], "00", "11")
    assert len(key) == 32
    assert key != task_key("a/1", "a", ["do it"], "00", "12")
    assert key != task_key("a/1", "a", ["do", "it"], "00", "11")
    assert noise_seed(TRIALS, key) == noise_seed(TrialConfig(strengths=(0.5,)), key)
    assert len({noise_seed(TRIALS, key, turn) for turn in range(3)}) == 3


def test_measured_rows_become_a_row_an_answer():
    setting = dataclasses.asdict(Setting())
    measured = [
        {
            "answerer": who,
            "answer_key": f"t/{who}",
            "task_key": "t",
            "number": 0,
            "place": "p",
            "group": "g",
            "edit_type": None,
            "answers": [
                {"kind": kind, **setting, **dict.fromkeys(MEASURES, 0.0)} for kind in kinds
            ],
        }
        for who, kinds in (("d1", [SDEDIT, COPY]), ("d2", [EDITOR]))
    ]
    rows = flat(measured, {"d2": "mine"})
    assert [found["answerer"] for found in rows] == ["mine", COPY, SDEDIT]
    assert set(SCORED.names) <= set(rows[0])


def test_the_table_holds_the_usual_setting_only():
    found = table(editor_rows(), CONFIG)["mine"]
    assert found["correct"].mean == pytest.approx(1 / 3)
    assert found["correct"].count == 3
    assert found["correct"].groups == 2
    assert found["direction_similarity"].mean == pytest.approx(1 + 1.5)
    assert "truth_l1" not in found


def test_types_stand_apart():
    found = by_type(editor_rows(), CONFIG)["mine"]
    assert {kind: means["correct"].count for kind, means in found.items()} == {"add": 1, "swap": 2}
    assert found["swap"]["correct"].mean == 0.5
    assert by_type([row("mine", 0, correct=1.0)], CONFIG) == {}


def test_a_curve_is_over_the_same_tasks_at_every_point():
    rows = [*editor_rows(), row(COPY, 0, direction_similarity=0.0, image_similarity=1.0)]
    found = curves(rows, TRIALS, CONFIG)
    ((low, high),) = found["mine"]
    assert (low.setting.image_guidance_scale, high.setting.image_guidance_scale) == (1.0, 2.0)
    assert low.direction_similarity.count == high.direction_similarity.count == 2
    assert low.direction_similarity.mean == pytest.approx(0.5 + 1.0)
    ((copied,),) = found[COPY]
    assert copied.image_similarity.mean == 1.0


def test_the_tables_setting_is_a_point_where_it_lies_on_the_curve():
    trials = TrialConfig(image_guidance_scales=(1.0, 1.5))
    usual, others = trials.editor_settings(7.5, 1.5)
    rows = [
        row("mine", 0, setting, direction_similarity=0.1, image_similarity=0.2)
        for setting in (*usual, *others)
    ]
    ((low, high),) = curves(rows, trials, CONFIG)["mine"]
    assert (low.setting.image_guidance_scale, high.setting.image_guidance_scale) == (1.0, 1.5)


def test_there_is_a_curve_for_each_text_scale():
    trials = TrialConfig(text_guidance_scales=(2.0, 5.0), image_guidance_scales=(1.0, 1.5))
    usual, others = trials.editor_settings(7.5, 1.5)
    rows = [
        row("mine", 0, setting, direction_similarity=0.1, image_similarity=0.2)
        for setting in (*usual, *others)
    ]
    found = curves(rows, trials, CONFIG)["mine"]
    assert [line[0].setting.text_guidance_scale for line in found] == [2.0, 5.0]
    assert [len(line) for line in found] == [2, 2]


def test_without_captions_there_is_no_curve():
    assert curves([row("mine", 0, image_similarity=0.5)], TRIALS, CONFIG) == {}


def test_differences_are_to_the_first():
    rows = [row("a", n, correct=0.0) for n in range(4)]
    rows += [row("b", n, correct=float(n > 0)) for n in range(4)]
    found = differences(rows, "a", CONFIG)
    assert set(found) == {"b"}
    assert found["b"]["correct"].mean == 0.75
    assert "truth_l1" not in found["b"]


def test_the_worst_is_wrong_by_the_surest_measure():
    by_oracle = [
        row("a", 0, correct=1.0, truth_l1=0.9, truth_clip=0.1),
        row("a", 1, correct=0.0, truth_l1=0.1, truth_clip=0.9),
        row("a", 2, correct=0.0, truth_l1=0.2, truth_clip=0.9),
    ]
    assert [r["number"] for r in sorted(by_oracle, key=badness)] == [0, 1, 2]
    by_truth = [row("a", n, truth_clip=0.5 - n / 10, direction_similarity=n) for n in range(3)]
    assert [r["number"] for r in sorted(by_truth, key=badness)] == [0, 1, 2]
    by_direction = [row("a", n, direction_similarity=-n, image_similarity=n) for n in range(3)]
    assert [r["number"] for r in sorted(by_direction, key=badness)] == [0, 1, 2]
    bare = [row("a", n, image_similarity=-n) for n in range(3)]
    assert [r["number"] for r in sorted(bare, key=badness)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["/runs/a/editor"], ["editor"]),
        (["/runs/a/editor", "/runs/b/editor/"], ["a/editor", "b/editor"]),
        (["timbrooks/instruct-pix2pix", "/x/mine"], ["instruct-pix2pix", "mine"]),
        ([f"/x/{SDEDIT}"], [f"x/{SDEDIT}"]),
    ],
)
def test_editors_are_called_by_what_tells_them_apart(sources, names):
    assert told_apart(sources) == names


@pytest.mark.parametrize("sources", [["/a", "/a"], ["sdedit"]])
def test_editors_that_cannot_be_told_apart_are_refused(sources):
    with pytest.raises(ConfigError):
        told_apart(sources)


def test_everything_can_be_written_as_json():
    import json

    found = as_json({"curves": curves(editor_rows(), TRIALS, CONFIG), "who": BASELINES})
    told = json.loads(json.dumps(found, allow_nan=False))
    assert told["curves"]["mine"][0][0]["setting"]["image_guidance_scale"] == 1.0
    assert told["curves"]["mine"][0][0]["direction_similarity"]["count"] == 2
