import dataclasses

import numpy as np
import pytest

from ip2p_ray import presets
from ip2p_ray.answerers import EditorAnswerer, GeneratorAnswerer
from ip2p_ray.candidates import CandidateRequest
from ip2p_ray.errors import ModelError
from ip2p_ray.generator import GeneratorWeights
from ip2p_ray.images import decode_image, encode_png, to_pil
from ip2p_ray.miniature import scores
from ip2p_ray.miniature.scenes import draw
from ip2p_ray.pairs import generate_candidates
from ip2p_ray.trials import GENERATED_PAIR, PROMPT_TO_PROMPT, SDEDIT, TrialConfig, noise_seed

TRIALS = TrialConfig(
    curve_tasks=1,
    image_guidance_scales=(1.0,),
    strengths=(0.4, 0.8),
    self_replaces=(0.0, 0.6),
)


@pytest.fixture(scope="module")
def tasks():
    """Two of the miniature's, the second with two instructions; and one without captions."""
    rows = [
        {
            "task_key": f"{number:032x}",
            "number": number,
            "caption": task.caption,
            "instructions": [task.instruction],
            "edited_caption": task.edited_caption,
            "source_image": {"bytes": encode_png(to_pil(draw(task.scene))), "path": None},
        }
        for number, task in enumerate(scores.edit_tasks(3, 0))
    ]
    rows[1]["instructions"] *= 2
    rows[2] |= {"caption": None, "edited_caption": None}
    return rows


def picture(answer, name="picture"):
    return np.asarray(decode_image(answer[name]["bytes"])).astype(int)


@pytest.fixture(scope="module")
def editor(tiny_weights):
    return EditorAnswerer(source=str(tiny_weights), trials=TRIALS, steps=3)


@pytest.fixture(scope="module")
def edited(editor, tasks):
    return editor.load(batch_size=3).answer(tasks)


def test_an_editor_answers_each_task_once_at_each_setting(edited):
    asked = [[answer["image_guidance_scale"] for answer in own] for own in edited]
    assert asked == [[1.5, 1.0], [1.5], [1.5]]
    assert [answer["usual"] for answer in edited[0]] == [True, False]
    assert {answer["kind"] for own in edited for answer in own} == {"editor"}


def test_instructions_are_done_one_after_the_other(editor, edited, tasks):
    own, task = editor.editor(), tasks[1]
    image = task["source_image"]["bytes"]
    for turn, instruction in enumerate(task["instructions"]):
        image = own.edit(image, instruction, seed=noise_seed(TRIALS, task["task_key"], turn))
    near = np.abs(np.asarray(image).astype(int) - picture(edited[1][0]))
    assert near.max() <= 2
    once = own.edit(
        task["source_image"]["bytes"],
        task["instructions"][0],
        seed=noise_seed(TRIALS, task["task_key"]),
    )
    assert np.abs(np.asarray(once).astype(int) - picture(edited[1][0])).max() > 2


def test_a_diffusers_folder_is_an_editor_too(editor, edited, tasks, tmp_path):
    editor.editor().save(tmp_path / "editor")
    saved = EditorAnswerer(source=str(tmp_path / "editor"), trials=TRIALS)
    (found,) = saved.load(batch_size=8).answer(tasks[:1])
    assert np.abs(picture(found[0]) - picture(edited[0][0])).max() <= 2


@pytest.fixture(scope="module")
def generator(tiny_weights):
    preset = presets.miniature(tiny_weights)
    pairs = dataclasses.replace(preset.pairs, steps=3)
    return GeneratorAnswerer(
        weights=GeneratorWeights(source=preset.generator), pairs=pairs, trials=TRIALS
    )


@pytest.fixture(scope="module")
def drawn(generator, tasks):
    return generator.load(batch_size=2).answer(tasks)


def test_baselines_answer_what_they_can(drawn):
    asked = [
        [(a["kind"], a["strength"] or a["self_replace"], a["usual"]) for a in own] for own in drawn
    ]
    assert asked[0] == [
        (SDEDIT, 0.8, True),
        (SDEDIT, 0.4, False),
        (PROMPT_TO_PROMPT, 0.6, True),
        (PROMPT_TO_PROMPT, 0.0, False),
        (GENERATED_PAIR, 0.6, True),
        (GENERATED_PAIR, 0.0, False),
    ]
    assert [kind for kind, _, _ in asked[1]] == [SDEDIT, PROMPT_TO_PROMPT, GENERATED_PAIR]
    assert [kind for kind, _, _ in asked[2]] == [SDEDIT]
    for own in drawn:
        for answer in own:
            assert picture(answer).shape == (64, 64, 3)


def test_a_generated_pair_is_made_as_training_pairs_are(generator, drawn, tasks):
    task = tasks[1]
    request = CandidateRequest(
        triplet_key=task["task_key"],
        index=0,
        caption=task["caption"],
        edited_caption=task["edited_caption"],
        seed=noise_seed(TRIALS, task["task_key"]),
        self_replace=0.6,
        guidance_scale=sum(generator.pairs.guidance_scale) / 2,
    )
    source, edited = generate_candidates(generator.weights.load(), [request], generator.pairs)
    answer = drawn[1][-1]
    assert np.abs(picture(answer, "own_source") - source[0]).max() <= 2
    assert np.abs(picture(answer) - edited[0]).max() <= 2
    assert all(own["own_source"] is None for own in drawn[1][:-1])


def test_edits_of_a_picture_have_a_guidance_of_their_own(generator, drawn, tasks):
    assert generator.edit_scale == generator.pair_scale
    stated = dataclasses.replace(generator, guidance_scale=generator.pair_scale + 5)
    assert (stated.edit_scale, stated.pair_scale) == (
        generator.edit_scale + 5,
        generator.edit_scale,
    )
    (found,) = stated.load(batch_size=2).answer(tasks[1:2])
    gaps = {
        one["kind"]: np.abs(picture(one) - picture(other)).max()
        for one, other in zip(found, drawn[1], strict=True)
    }
    assert gaps[SDEDIT] > 2
    assert gaps[PROMPT_TO_PROMPT] > 2
    assert gaps[GENERATED_PAIR] <= 2


def test_an_editor_is_no_generator(generator, editor, tmp_path):
    editor.editor().save(tmp_path / "editor")
    wrong = GeneratorWeights(source=str(tmp_path / "editor"))
    with pytest.raises(ModelError, match=r"generator .*editor is an editor: its UNet takes "):
        dataclasses.replace(generator, weights=wrong).load()


def test_sdedit_takes_the_instructions_where_there_is_no_caption(generator, tasks):
    bare = {**tasks[0], "edited_caption": None}
    told = {**tasks[0], "edited_caption": tasks[0]["instructions"][0]}
    answering = generator.load(batch_size=2)
    first, second = answering.answer([bare])[0], answering.answer([told])[0]
    for one, other in zip(first[:2], second[:2], strict=True):
        assert np.abs(picture(one) - picture(other)).max() <= 2
