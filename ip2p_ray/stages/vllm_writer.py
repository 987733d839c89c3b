"""captions -> replies by vLLM inside the plan, through Ray Data's own processor (`ray.data.llm`).

It is asked for what `triplets.local_writer` writes: the paper's text form, sampled by a stream of
the caption's own. vLLM's draws are others than ours, so the replies are others too, and a dataset
tells which engine wrote it. Needs the extra "vllm" and a GPU an engine.

Tested as far as it goes without vLLM: what is asked, what is made of an answer, the processor that
Ray builds of it, and a plan with such a processor in it. A real engine has not run it yet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

from ip2p_ray.errors import ConfigError
from ip2p_ray.model_files import NO_CODE, require_safetensors
from ip2p_ray.schema import CAPTIONS, stream_seed
from ip2p_ray.stages import plan, run
from ip2p_ray.stages.reply_rows import fits_openai, row_of_reply
from ip2p_ray.triplets.prompt import MAX_TOKENS, STOP, TEMPERATURE, completion_prompt

Engine = Literal["auto", "transformers", "vllm"]


def chosen(engine: Engine, *, model: str | None, gpus: float) -> Literal["transformers", "vllm"]:
    """The engine that writes; "auto" is vLLM where it is installed and a model and GPUs are named.

    Raises:
        ConfigError: vLLM is asked for, and it is not installed or cannot do it.
    """
    whole = gpus >= 1 and gpus == int(gpus)
    if engine == "auto":
        return "vllm" if model and whole and find_spec("vllm") else "transformers"
    if engine == "transformers":
        return engine
    if not model:
        raise ConfigError("vLLM needs a model: a transformers folder")
    if not whole:
        raise ConfigError(f"vLLM needs whole GPUs for each engine, at least 1, got {gpus:g}")
    if not find_spec("vllm"):
        raise ConfigError(
            'vLLM is not installed; pip install "ip2p_ray[vllm]" on every node, or take the engine '
            "transformers"
        )
    return engine


def question(row: dict[str, Any], seed: int) -> dict[str, Any]:
    """What the processor is asked of a row of CAPTIONS; its other columns are carried along."""
    return {
        "prompt": completion_prompt(row["caption"]),
        "sampling_params": {
            "temperature": TEMPERATURE,
            "max_tokens": MAX_TOKENS,
            "stop": [STOP],
            "include_stop_str_in_output": True,  # a reply without it was cut off
            "seed": stream_seed(seed, "reply", row["caption"]),
        },
    }


def answer(row: dict[str, Any], fits: Callable[[str], bool] = fits_openai) -> dict[str, Any]:
    """The row of REPLIES of a row that the processor has answered."""
    caption = {name: row[name] for name in CAPTIONS.names}
    return {**caption, **row_of_reply(row["caption"], row["generated_text"], fits)}


def config(writer: str, resources: run.Resources) -> Any:
    """Ray Data's settings for engines that hold the model of a folder."""
    from ray.data.llm import vLLMEngineProcessorConfig

    require_safetensors(writer, "writer folder")
    return vLLMEngineProcessorConfig(
        model_source=writer,
        batch_size=resources.batch_size,
        concurrency=(resources.actors, resources.actors),
        engine_kwargs={
            "tensor_parallel_size": int(resources.gpus),
            "load_format": "safetensors",
            **NO_CODE,
        },
        # the engine reads and writes text; there is no chat here
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )


def step(writer: str, seed: int, resources: run.Resources) -> Callable[[Any], Any]:
    """What makes rows of REPLIES of a plan's rows of CAPTIONS; needs a running Ray."""
    from ray.data.llm import build_processor

    small = {"num_cpus": plan.TASK_CPUS}
    processor: Callable[[Any], Any] = build_processor(
        config(writer, resources),
        preprocess=partial(question, seed=seed),
        postprocess=answer,
        preprocess_map_kwargs=small,
        postprocess_map_kwargs=small,
    )
    return processor
