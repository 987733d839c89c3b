"""All of vLLM's part that is ours; vLLM itself is not needed here."""

from importlib.util import find_spec

import pyarrow as pa
import pytest

from ip2p_ray import storage
from ip2p_ray.errors import ConfigError
from ip2p_ray.schema import CAPTIONS, caption_key
from ip2p_ray.stages import plan, run, vllm_writer
from ip2p_ray.stages.captions import collect_captions
from ip2p_ray.stages.reply_rows import REPLIES
from ip2p_ray.stages.triplets import TripletConfig, write_triplets
from ip2p_ray.triplets.prompt import STOP, completion, completion_prompt

RESOURCES = run.Resources(actors=2, gpus=4.0, batch_size=16)


def row(caption):
    return {"caption_key": caption_key(caption), "caption": caption, "url": None}


def test_a_question_is_the_papers_text_with_the_captions_own_seed():
    asked = vllm_writer.question(row("a cat"), 3)
    assert asked["prompt"] == completion_prompt("a cat")
    sampling = asked["sampling_params"]
    assert sampling["stop"] == [STOP]
    assert sampling["include_stop_str_in_output"] is True
    assert sampling["temperature"] == 0.7
    again, other, later = (
        vllm_writer.question(row(caption), seed)["sampling_params"]["seed"]
        for caption, seed in (("a cat", 3), ("a dog", 3), ("a cat", 4))
    )
    assert sampling["seed"] == again
    assert len({again, other, later}) == 3
    assert 0 <= again < 2**63


def test_an_answer_is_a_row_of_replies():
    text = completion("make it a dog", "a dog")
    carried = {**row("a cat"), **vllm_writer.question(row("a cat"), 0), "num_input_tokens": 3}
    found = vllm_writer.answer({**carried, "generated_text": text}, fits=lambda text: True)
    assert list(found) == REPLIES.names
    assert pa.Table.from_pylist([found], schema=REPLIES).to_pylist() == [found]
    assert (found["status"], found["instruction"]) == ("ok", "make it a dog")
    cut = vllm_writer.answer({**carried, "generated_text": text.removesuffix(STOP)})
    assert (cut["status"], cut["edited_caption"]) == ("unfinished", None)


def test_which_engine_writes():
    there = find_spec("vllm") is not None
    for told, gpus, model, expected in (
        ("transformers", 1.0, "m", "transformers"),
        ("auto", 0.0, "m", "transformers"),
        ("auto", 0.5, "m", "transformers"),
        ("auto", 1.0, None, "transformers"),
        ("auto", 1.0, "m", "vllm" if there else "transformers"),
    ):
        assert vllm_writer.chosen(told, model=model, gpus=gpus) == expected
    with pytest.raises(ConfigError, match="vLLM needs a model"):
        vllm_writer.chosen("vllm", model=None, gpus=1.0)
    with pytest.raises(ConfigError, match=r"whole GPUs for each engine, at least 1, got 0\.5"):
        vllm_writer.chosen("vllm", model="m", gpus=0.5)
    if not there:
        with pytest.raises(ConfigError, match=r'not installed; pip install "ip2p_ray\[vllm\]"'):
            vllm_writer.chosen("vllm", model="m", gpus=1.0)


@pytest.mark.ray
def test_ray_takes_the_settings_and_builds_a_processor_of_one_stage(local_ray, tiny_weights):
    settings = vllm_writer.config(str(tiny_weights / "writer"), RESOURCES)
    assert settings.get_concurrency() == {"min_size": 2, "max_size": 2}
    assert settings.engine_kwargs["tensor_parallel_size"] == 4
    processor = vllm_writer.step(str(tiny_weights / "writer"), 3, RESOURCES)
    assert processor.list_stage_names() == ["vLLMEngineStage"]
    asked = processor.preprocess(row("a cat"))
    (data,) = asked.values()
    assert data["prompt"] == completion_prompt("a cat")
    text = completion("make it a dog", "a dog")
    (column,) = asked
    found = processor.postprocess({column: {**data, "generated_text": text}})
    assert found["edited_caption"] == "a dog"


class StandIn:
    """Makes one Dataset of another as a processor does; its engine always says the same."""

    def __call__(self, dataset):
        asked = dataset.map(lambda row: {**row, **vllm_writer.question(row, 0)}, num_cpus=0.25)
        answered = asked.map(_says, num_cpus=0.25)
        return answered.map(vllm_writer.answer, num_cpus=0.25)


def _says(row):
    caption = row["prompt"].removesuffix(completion_prompt(""))
    return {**row, "generated_text": completion("make it night", f"{caption} at night")}


@pytest.mark.ray
def test_a_plan_may_hold_a_processor(local_ray, tmp_path):
    captions, replies = str(tmp_path / "captions"), str(tmp_path / "replies")
    collect_captions([f"boat {n}" for n in range(12)], captions, config={})

    def stream():
        plan.stream(
            plan.shards(captions),
            replies,
            key="caption_key",
            schema=REPLIES,
            steps=[StandIn()],
            unit="captions",
            rows_per_block=4,
        )
        return []

    run.make(replies, run.Origin(dataset="replies", config={}), stream)
    rows = storage.read_dataset(replies, REPLIES).to_pylist()
    assert {row["edited_caption"] for row in rows} == {f"boat {n} at night" for n in range(12)}
    assert {row["status"] for row in rows} == {"ok"}


def test_vllm_is_not_judged_by_another_clip(tmp_path):
    captions = str(tmp_path / "captions")
    collect_captions(["a cat"], captions, config={})
    assert storage.read_dataset(captions, CAPTIONS).num_rows == 1
    with pytest.raises(ConfigError, match="not judged by some/folder"):
        write_triplets(
            captions,
            str(tmp_path),
            TripletConfig(),
            writer="w",
            judge="some/folder",
            models={"writer": "w", "judge": "j"},
            resources=RESOURCES,
            engine="vllm",
        )
