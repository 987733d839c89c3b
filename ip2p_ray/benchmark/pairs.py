"""Our way to make pairs beside the reference's: same model, device, steps, candidates, one run."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from ip2p_ray import presets
from ip2p_ray.benchmark import measure
from ip2p_ray.benchmark.config import PairBenchmark
from ip2p_ray.benchmark.reference import materialised_attention, reference_candidates
from ip2p_ray.clip import Clip
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import Ip2pError
from ip2p_ray.filtering import select
from ip2p_ray.memory import free_bytes, held_bytes, is_out_of_memory
from ip2p_ray.miniature import grammar, scenes
from ip2p_ray.pairs import (
    CandidateRequest,
    PairConfig,
    Pictures,
    candidate_requests,
    generate_candidates,
)
from ip2p_ray.prompt_to_prompt.processor import PromptToPromptProcessor
from ip2p_ray.testing import stable_diffusion_1_5
from ip2p_ray.triplets.examples import load_examples

logger = logging.getLogger(__name__)

Both = tuple[Pictures, Pictures]
"""Source and edited pictures."""

KEYS = (
    "candidates_per_s",
    "device_s_per_accepted_pair",
    "peak_bytes",
    "working_bytes",
    "unet_rows_per_s",
    "utilisation",
    "cpu_s_per_candidate",
)
"""What is told of either way, and their ratio (ours by the reference's), in the table's order."""

MEAN_DIFFERENCE = {"float32": 0.05, "bfloat16": 8.0, "float16": 8.0}
"""How far the two ways' pictures may lie apart on average, in levels of 255. Half precision rounds
each step otherwise, and steps amplify it."""


@dataclass(frozen=True)
class Scene:
    """What both ways work on."""

    model: StableDiffusion
    """As the reference uses it."""
    ours: StableDiffusion
    """The same weights, compiled or channels last where that was asked for."""
    judge: Clip | None
    config: PairConfig
    requests: list[CandidateRequest]


def compare(job: PairBenchmark) -> dict[str, Any]:
    """Everything that was measured, as JSON can express it; `table` shows it to people.

    `ours` and `reference` have each of KEYS, `ratio` ours by the reference's; what cannot be told
    is None. `peak_bytes` is weights and `working_bytes`, what sampling and decoding hold beyond
    them, both at the batch of `peak_batch` candidates. `utilisation` is the UNet's arithmetic by
    the whole time (text, sampling, decoding), as a share of `matmul_flops`.

    Raises:
        Ip2pError: the two ways made different pictures, so that their times cannot be compared.
        ModelError: the preset's models are not there.
    """
    device = measure.device_named(job.device)
    scene = _prepare(job, device)
    facts = measure.facts(device)
    rates = _search(scene, device, job.decode_batch) if job.batch_size is None else {}
    size = job.batch_size or max(rates, key=lambda size: rates[size])
    ways: dict[str, Callable[[], Both]] = {
        "reference": lambda: reference_candidates(scene.model, scene.requests, scene.config),
        "ours": lambda: _ours(scene, scene.requests, size, job.decode_batch),
    }
    _warm_up(scene, size, job.decode_batch)
    ceiling = measure.matmul_flops(device, scene.model.dtype)
    logger.info("both ways in turns, %d candidates in batches of %d", job.candidates, size)
    seconds, made = measure.take_turns(device, ways, job.rounds)
    ceiling = max(ceiling, measure.matmul_flops(device, scene.model.dtype))
    difference = _difference(made, job.dtype)
    peak_batch, working = _peaks(scene, device, size, job.decode_batch)
    weights = held_bytes(scene.model.unet, scene.model.vae, scene.model.text_encoder)
    row_flops = unet_row_flops(scene.model, scene.config.resolution)
    judged = _judge(scene, made, device)
    results = {
        name: _result(scene, seconds[name], judged[name][0], working[name], weights)
        for name in ways
    }
    for result in results.values():
        result["utilisation"] = result["unet_rows_per_s"] * row_flops / ceiling
    ours, reference = results["ours"], results["reference"]
    ratio = {key: measure.ratio(ours[key], reference[key]) for key in KEYS}
    wall, cpu = (
        {name: [getattr(turn, clock) for turn in seconds[name]] for name in ways}
        for clock in ("wall", "cpu")
    )
    faster = measure.median_ratio(wall["reference"], wall["ours"])
    for key in ("candidates_per_s", "unet_rows_per_s", "utilisation"):
        ratio[key] = faster
    ratio["cpu_s_per_candidate"] = measure.median_ratio(cpu["ours"], cpu["reference"])
    if ratio["device_s_per_accepted_pair"] is not None:
        accepted = reference["accepted"] / ours["accepted"]
        ratio["device_s_per_accepted_pair"] = accepted / faster
    return {
        "benchmark": "pairs",
        **facts,
        **{field.name: getattr(job, field.name) for field in fields(PairBenchmark)},
        "device": facts["device"],
        "resolution": scene.config.resolution,
        "steps": scene.config.steps,
        "batch_size": size,
        "batch_sizes": {str(key): rate for key, rate in rates.items()},
        "peak_batch": peak_batch,
        "weight_bytes": weights,
        "unet_row_flops": row_flops,
        "matmul_flops": ceiling,
        **difference,
        "judge_candidates_per_s": judged["ours"][1],
        "ours": ours,
        "reference": reference,
        "ratio": ratio,
    }


def table(result: Mapping[str, Any]) -> str:
    """The result for people: conditions, a line for each of KEYS, and what to know of them."""
    names = {
        "candidates_per_s": ("candidates/s", 1.0, ".3f"),
        "device_s_per_accepted_pair": ("device s per accepted pair", 1.0, ".2f"),
        "peak_bytes": (f"peak memory at batch {result['peak_batch']}, MiB", 2.0**-20, ",.1f"),
        "working_bytes": ("- of it beyond the weights, MiB", 2.0**-20, ",.1f"),
        "unet_rows_per_s": ("UNet rows/s", 1.0, ",.1f"),
        "utilisation": ("utilisation of the matmul ceiling, %", 100.0, ".1f"),
        "cpu_s_per_candidate": ("CPU s per candidate", 1.0, ".3f"),
    }
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    model = "SD-1.5 shapes, random weights" if result["sd15"] else f"preset {result['preset']}"
    lines = [
        f"{model}, {result['resolution']} px, {result['steps']} steps, {result['dtype']}, "
        f"{result['candidates']} candidates, {result['rounds']} rounds",
        f"{result['device_name']} ({result['device']}, {result['threads']} threads of "
        f"{result['cpus']} cpus, load {result['load'][0]}), {result['date']}",
        versions,
        "",
        f"{'':40}{'ours':>12}{'reference':>12}{'ratio':>9}",
    ]
    for key in KEYS:
        label, factor, form = names[key]
        cells = (
            f"{measure.cell(result['ours'][key], factor, form):>12}"
            f"{measure.cell(result['reference'][key], factor, form):>12}"
            f"{measure.cell(result['ratio'][key], 1.0, '.2f'):>9}"
        )
        lines.append(f"{label:40}{cells}")
    searched = ", ".join(f"{size}: {rate:.2f}" for size, rate in result["batch_sizes"].items())
    lines += [
        "",
        f"ours: {result['batch_size']} candidates a batch"
        + (f" (candidates/s of the search: {searched})" if searched else ""),
        f"pictures of the two ways differ by {result['mean_difference']:.4f} of 255 on average "
        f"(bound {result['mean_difference_bound']:g}), {result['max_difference']} at most",
        f"matmul ceiling {result['matmul_flops'] / 1e9:,.1f} GFLOP/s; a UNet row takes "
        f"{result['unet_row_flops'] / 1e9:,.3f} GFLOP",
    ]
    if result["judge_candidates_per_s"] is not None:
        lines.append(
            f"accepted {result['ours']['accepted']} and {result['reference']['accepted']}; "
            f"the judge does {result['judge_candidates_per_s']:,.1f} candidates/s"
        )
    return "\n".join(lines)


def unet_row_flops(model: StableDiffusion, resolution: int) -> int:
    """The arithmetic of one UNet row, with attention as the matrix products it stands for.

    Counted on shapes alone; what our way saves (keys and values of the text) is not subtracted, so
    that both ways are measured by the same work.
    """
    height, width = model.latent_size(resolution, resolution)
    with torch.device("meta"):
        unet: Any = type(model.unet).from_config(model.unet.config)
        x = torch.empty(1, int(unet.config["in_channels"]), height, width)
        text = torch.empty(1, model.text_length, int(unet.config["cross_attention_dim"]))
        level = torch.empty(1)
    with torch.inference_mode(), materialised_attention(unet):
        return measure.count_flops(lambda: unet(x, level, encoder_hidden_states=text))


def _prepare(job: PairBenchmark, device: torch.device) -> Scene:
    preset = presets.by_name(job.preset)
    dtype = getattr(torch, job.dtype)
    judge = None
    if job.sd15:
        model = stable_diffusion_1_5()
        for network in (model.unet, model.vae, model.text_encoder):
            torch.nn.Module.to(network, device=device, dtype=dtype)
    else:
        model = StableDiffusion.load(preset.generator, device=device, dtype=dtype)
        judge = Clip.load(preset.judge, device=device)
    config = replace(
        preset.pairs,
        sampler="euler_ancestral",
        spacing="linspace",
        cross_replace=None,
        resolution=job.resolution or preset.pairs.resolution,
        steps=job.steps or preset.pairs.steps,
        candidates=min(job.candidates, preset.pairs.candidates),
    )
    model.latent_size(config.resolution, config.resolution)
    return Scene(model, _ours_of(model, job), judge, config, _requests(job, config))


def _ours_of(model: StableDiffusion, job: PairBenchmark) -> StableDiffusion:
    ours = model
    if job.channels_last:
        unet, vae = copy.deepcopy(model.unet), copy.deepcopy(model.vae)
        for network in (unet, vae):
            torch.nn.Module.to(network, memory_format=torch.channels_last)
        ours = replace(model, unet=unet, vae=vae)
    if job.compile:
        ours.unet.set_attn_processor(PromptToPromptProcessor())
        ours = replace(ours, unet=torch.compile(ours.unet))
    return ours


def _requests(job: PairBenchmark, config: PairConfig) -> list[CandidateRequest]:
    """Candidates of different triplets, as many of each as the preset makes."""
    count = -(-job.candidates // config.candidates)
    texts: list[tuple[str, str]] = []
    if job.preset == "miniature":
        rng = random.Random(0)
        while len(texts) < count:
            scene = scenes.random_scene(rng)
            caption, _, edited = grammar.triplet(scene, scenes.random_edit(scene, rng), rng)
            texts.append((caption, edited))
    else:
        examples = load_examples()
        chosen = (examples[k % len(examples)] for k in range(count))
        texts = [(each.caption, each.edited_caption) for each in chosen]
    requests = [
        request
        for k, (caption, edited) in enumerate(texts)
        for request in candidate_requests(str(k), caption, edited, config, "benchmark")
    ]
    return requests[: job.candidates]


def _ours(
    scene: Scene, requests: Sequence[CandidateRequest], size: int, decode_batch: int | None
) -> Both:
    parts = [
        generate_candidates(
            scene.ours, requests[start : start + size], scene.config, decode_batch=decode_batch
        )
        for start in range(0, len(requests), size)
    ]
    source, edited = (np.concatenate(pictures) for pictures in zip(*parts, strict=True))
    return source, edited


def _search(scene: Scene, device: torch.device, decode_batch: int | None) -> dict[int, float]:
    """Candidates a second by batch size, until two doublings in a row gained less than 2 %.

    At fewer steps than in the run, so decoding weighs more here.
    """
    short = replace(scene, config=replace(scene.config, steps=min(scene.config.steps, 4)))
    rates: dict[int, float] = {}
    best, since = 0.0, 0
    size = 1
    while size <= len(scene.requests) and since < 2:
        batch = scene.requests[:size]
        try:
            _ours(short, batch, size, decode_batch)
            work = partial(_ours, short, batch, size, decode_batch)
            seconds = [measure.timed(device, work)[0].wall for _ in range(2)]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            logger.info("a batch of %d candidates does not fit", size)
            break
        rates[size] = size / min(seconds)
        logger.info(
            "batch of %d: %.2f candidates/s at %d steps", size, rates[size], short.config.steps
        )
        since = 0 if rates[size] > 1.02 * best else since + 1
        best = max(best, rates[size])
        size *= 2
    if not rates:
        raise Ip2pError("not even one candidate fits into the device's memory")
    return rates


def _warm_up(scene: Scene, size: int, decode_batch: int | None) -> None:
    """Each way once in its own shapes: the first step copies attention, the last does not."""
    short = replace(scene, config=replace(scene.config, steps=2))
    reference_candidates(short.model, short.requests[:1], short.config)
    _ours(short, short.requests[:size], size, decode_batch)


def _peaks(
    scene: Scene, device: torch.device, size: int, decode_batch: int | None
) -> tuple[int, dict[str, int | None]]:
    """The batch, and what each way holds beyond the weights at it.

    Where the reference's matrices of a batch as ours do not fit, it is halved for both.
    """
    # The first step copies attention, and every other one holds as much.
    short = replace(scene, config=replace(scene.config, steps=1))
    batch = size
    while batch > 1 and _matrix_bytes(scene, batch) > free_bytes(device) // 2:
        batch //= 2
    requests = short.requests[:batch]
    ways: dict[str, Callable[[], object]] = {
        "reference": lambda: reference_candidates(
            short.model, requests, short.config, batch_size=batch
        ),
        "ours": lambda: _ours(short, requests, batch, decode_batch),
    }
    for work in ways.values():
        work()
    return batch, {name: measure.peak_bytes(device, work) for name, work in ways.items()}


def _matrix_bytes(scene: Scene, batch: int) -> int:
    """Of the largest logits and their softmax."""
    height, width = scene.model.latent_size(scene.config.resolution, scene.config.resolution)
    heads = scene.model.unet.config["attention_head_dim"]  # diffusers' name for it in SD 1.5
    rows = 4 * batch * max(heads if isinstance(heads, (list, tuple)) else [heads])
    return 2 * rows * (height * width) ** 2 * scene.model.dtype.itemsize


def _judge(
    scene: Scene, made: Mapping[str, Both], device: torch.device
) -> dict[str, tuple[int | None, float | None]]:
    """How many of each way's candidates become pairs, and the judge's candidates a second."""
    judge = scene.judge
    if judge is None:
        return dict.fromkeys(made, (None, None))
    judged: dict[str, tuple[int | None, float | None]] = {}
    for name, (source, edited) in made.items():
        scores: list[dict[str, float]] = []
        seconds = 0.0
        for start in range(0, len(scene.requests), 32):
            part = slice(start, start + 32)
            captions = [request.caption for request in scene.requests[part]]
            edited_captions = [request.edited_caption for request in scene.requests[part]]
            arguments = (source[part], edited[part], captions, edited_captions)
            took, found = measure.timed(device, partial(judge.similarities, *arguments))
            seconds += took.wall
            scores += found.rows()
        judged[name] = _accepted(scene, scores), len(scene.requests) / seconds
    return judged


def _accepted(scene: Scene, scores: Sequence[Mapping[str, float]]) -> int:
    each = scene.config.candidates
    of_triplets = (scores[start : start + each] for start in range(0, len(scores), each))
    reasons = (
        reason
        for rows in of_triplets
        for reason in select(rows, scene.config.thresholds, scene.config.keep)
    )
    return sum(reason is None for reason in reasons)


def _difference(made: Mapping[str, Both], dtype: str) -> dict[str, float]:
    """How far the pictures of the two ways lie apart, in levels of 255."""
    pairs = zip(made["ours"], made["reference"], strict=True)
    apart = np.stack([np.abs(a.astype(int) - b.astype(int)) for a, b in pairs])
    bound, mean = MEAN_DIFFERENCE[dtype], float(apart.mean())
    if mean > bound:
        raise Ip2pError(
            f"the two ways made different pictures ({mean:.3f} of 255 levels apart on average, "
            f"{bound:g} are allowed for {dtype}): their times cannot be compared"
        )
    return {
        "max_difference": int(apart.max()),
        "mean_difference": mean,
        "mean_difference_bound": bound,
    }


def _result(
    scene: Scene,
    seconds: list[measure.Seconds],
    accepted: int | None,
    working: int | None,
    weights: int,
) -> dict[str, Any]:
    took, count = median(turn.wall for turn in seconds), len(scene.requests)
    return {
        "candidates_per_s": count / took,
        "device_s_per_accepted_pair": took / accepted if accepted else None,
        "peak_bytes": None if working is None else weights + working,
        "working_bytes": working,
        "unet_rows_per_s": 4 * scene.config.steps * count / took,
        "cpu_s_per_candidate": median(turn.cpu for turn in seconds) / count,
        "accepted": accepted,
        "seconds": [turn.wall for turn in seconds],
    }
