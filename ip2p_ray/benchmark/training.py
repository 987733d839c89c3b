"""Our training loop beside the plain way: same model, batch and device, in turns, in one run."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ip2p_ray import presets
from ip2p_ray.benchmark import measure
from ip2p_ray.benchmark.config import TrainingBenchmark
from ip2p_ray.benchmark.pairs import unet_row_flops
from ip2p_ray.benchmark.plain_training import Drawn, Example, PlainTrainer
from ip2p_ray.benchmark.training_ranks import Ranks, ranks_per_s
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.errors import Ip2pError
from ip2p_ray.images import encode_png, to_pil
from ip2p_ray.latents import LatentDataset, encode_instructions, encode_pairs
from ip2p_ray.memory import held_bytes
from ip2p_ray.schema import LATENT_TEXTS, LATENTS
from ip2p_ray.testing import stable_diffusion_1_5
from ip2p_ray.training.feed import Feed, read_batch
from ip2p_ray.training.loop import Metrics, TrainConfig, start, train
from ip2p_ray.training.state import TrainState
from ip2p_ray.training.unet import widen

logger = logging.getLogger(__name__)

KEYS = ("images_per_s", "utilisation", "peak_bytes", "working_bytes", "cpu_s_per_image")
"""What is told of either way, and their ratio (ours by the reference's), in the table's order."""

LOSS_DIFFERENCE = {"float32": 0.01, "bfloat16": 0.05}
"""How far, of itself, the loss of the same step may lie apart. Stored latents are float16."""

LONG = 1_000_000
_ENCODED = 8


@dataclass(frozen=True)
class Scene:
    """What both ways work on."""

    plain: StableDiffusion
    ours: StableDiffusion
    """A copy, which the loop trains."""
    config: TrainConfig
    resolution: int
    examples: list[Example]
    dataset: LatentDataset


def compare(job: TrainingBenchmark) -> dict[str, Any]:
    """Everything that was measured, as JSON can express it; `table` shows it to people.

    `ours` and `reference` have each of KEYS, `ratio` ours by the reference's. `peak_bytes` is what
    both hold (weights, optimizer, average) and `working_bytes`, what a step holds beyond that.
    `utilisation` is the UNet's arithmetic, forward and backward, as a share of `matmul_flops`.
    Encoding the latents once is not in ours, encoding texts is unless embeddings are stored;
    `wait_share` is the share of
    its time that the loop waits for data, which the page cache holds.

    Raises:
        Ip2pError: the two ways have different losses for the same step.
    """
    device = measure.device_named(job.device)
    with tempfile.TemporaryDirectory() as folder:
        scene = _prepare(job, device, Path(folder))
        found = _compare(job, device, scene)
        if job.ranks > 1:
            found["ranks"] = _ranks(job, scene, Path(folder))
    return found


def _compare(job: TrainingBenchmark, device: torch.device, scene: Scene) -> dict[str, Any]:
    plain = PlainTrainer(
        scene.plain,
        scene.examples,
        batch_size=scene.config.batch_size,
        learning_rate=scene.config.learning_rate,
    )
    state = start(scene.ours, scene.config)
    loop = train(
        scene.ours,
        scene.dataset,
        scene.config,
        micro_batch=job.micro_batch,
        wrap=_compiled if job.compile else None,
        state=state,
    )
    difference = _same_first_step(job, scene, plain, next(loop))
    met: list[Metrics] = []

    def ours() -> float:
        taken = [next(loop) for _ in range(job.steps)]
        met.extend(taken)
        return taken[-1].loss

    def reference() -> float:
        return [plain.step() for _ in range(job.steps)][-1]

    ours(), reference()  # memory and kernels
    met.clear()
    dtype = torch.bfloat16 if job.bf16 else torch.float32
    ceilings = {kind: measure.matmul_flops(device, kind) for kind in {dtype, torch.float32}}
    logger.info("both ways in turns, %d steps of %d samples", job.steps, scene.config.batch_size)
    ways = {"reference": reference, "ours": ours}
    seconds, _ = measure.take_turns(device, ways, job.rounds)
    waited = sum(one.waited for one in met) / sum(one.seconds for one in met)
    working = {
        "reference": measure.peak_bytes(device, plain.step),
        "ours": measure.peak_bytes(device, lambda: next(loop)),
    }
    loop.close()  # type: ignore[attr-defined]
    held = {
        "reference": plain.state_bytes + _weights(scene.plain),
        "ours": _state_bytes(state) + _weights(scene.ours),
    }
    flops = 3 * unet_row_flops(scene.ours, scene.resolution)
    count = job.steps * scene.config.batch_size
    results: dict[str, dict[str, Any]] = {}
    for name, kind in (("reference", torch.float32), ("ours", dtype)):
        rate = count / median(turn.wall for turn in seconds[name])
        beyond = working[name]
        results[name] = {
            "images_per_s": rate,
            "utilisation": rate * flops / ceilings[kind],
            "working_bytes": beyond,
            "peak_bytes": None if beyond is None else held[name] + beyond,
            "cpu_s_per_image": median(turn.cpu for turn in seconds[name]) / count,
            "seconds": [turn.wall for turn in seconds[name]],
        }
    results["ours"]["wait_share"] = waited
    faster, cpu = (
        measure.median_ratio(
            *([getattr(turn, clock) for turn in seconds[name]] for name in ("reference", "ours"))
        )
        for clock in ("wall", "cpu")
    )
    ratio = {key: measure.ratio(results["ours"][key], results["reference"][key]) for key in KEYS}
    ratio |= {"images_per_s": faster, "cpu_s_per_image": 1 / cpu}
    facts = measure.facts(device)
    return {
        "benchmark": "training",
        **facts,
        **{name: value for name, value in asdict(job).items() if name != "ranks"},
        "device": facts["device"],
        "resolution": scene.resolution,
        "batch_size": scene.config.batch_size,
        "image_flops": flops,
        "matmul_flops": ceilings[dtype],
        "loss_difference": difference,
        "loss_difference_bound": LOSS_DIFFERENCE["bfloat16" if job.bf16 else "float32"],
        **results,
        "ratio": ratio,
    }


def _compiled(unet: torch.nn.Module) -> torch.nn.Module:
    compiled: Any = torch.compile(unet)
    module: torch.nn.Module = compiled
    return module


def table(result: Mapping[str, Any]) -> str:
    """The result for people: conditions, a line for each of KEYS, and what to know of them."""
    names = {
        "images_per_s": ("images/s", 1.0, ",.2f"),
        "utilisation": ("utilisation of the matmul ceiling, %", 100.0, ".1f"),
        "peak_bytes": ("peak memory, MiB", 2.0**-20, ",.1f"),
        "working_bytes": ("- of it a step's, MiB", 2.0**-20, ",.1f"),
        "cpu_s_per_image": ("CPU s per image", 1.0, ".4f"),
    }
    model = "SD-1.5 shapes, random weights" if result["sd15"] else f"preset {result['preset']}"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"{model}, {result['resolution']} px, steps of {result['batch_size']} samples, "
        f"{result['steps']} a turn, {result['rounds']} rounds, ours in "
        f"{'bfloat16' if result['bf16'] else 'float32'}, texts as {result['text']}"
        f"{', compiled' if result['compile'] else ''}",
        f"{result['device_name']} ({result['device']}, {result['threads']} threads of "
        f"{result['cpus']} cpus, load {result['load'][0]}), {result['date']}",
        versions,
        "",
        f"{'':40}{'ours':>12}{'reference':>12}{'ratio':>9}",
    ]
    for key in KEYS:
        label, factor, form = names[key]
        ours, reference = (
            measure.cell(result[way][key], factor, form) for way in ("ours", "reference")
        )
        cells = f"{ours:>12}{reference:>12}{measure.cell(result['ratio'][key], 1.0, '.2f'):>9}"
        lines.append(f"{label:40}{cells}")
    lines += [
        "",
        f"ours waits for data {100 * result['ours']['wait_share']:.2f} % of its time",
        f"the loss of the same step differs by {100 * result['loss_difference']:.3f} % (bound "
        f"{100 * result['loss_difference_bound']:g} %)",
        f"matmul ceiling {result['matmul_flops'] / 1e9:,.1f} GFLOP/s; the UNet takes "
        f"{result['image_flops'] / 1e9:,.3f} GFLOP an image, forward and backward",
    ]
    if "ranks" in result:
        ranks = result["ranks"]
        lines.append(
            f"{ranks['count']} processes of {ranks['threads'] // ranks['count']} threads: "
            f"{ranks['several_per_s']:,.2f} images/s; one of {ranks['threads']}: "
            f"{ranks['one_per_s']:,.2f}; ratio {ranks['ratio']:.2f}"
        )
    return "\n".join(lines)


def _prepare(job: TrainingBenchmark, device: torch.device, folder: Path) -> Scene:
    preset = presets.by_name(job.preset)
    if job.sd15:
        model = stable_diffusion_1_5(in_channels=8)
        for network in (model.unet, model.vae, model.text_encoder):
            torch.nn.Module.to(network, device=device)
    else:
        model = StableDiffusion.load(preset.generator, device=device)
        widen(model.unet)
    model.unet.requires_grad_(True)
    usual = 256 if job.sd15 else preset.pairs.resolution
    resolution = job.resolution or usual
    config = replace(
        preset.training,
        steps=LONG,
        decay="constant",
        batch_size=job.batch_size or preset.training.batch_size,
        flips=False,
        bf16=job.bf16,
        channels_last=not job.channels_first,
        gradient_checkpointing=job.gradient_checkpointing,
    )
    steps = 2 + job.steps * (job.rounds + 1)  # with the first, the warm-up and that of the memory
    count = job.pairs or steps * config.batch_size
    pictures = np.random.default_rng(0).integers(
        0, 256, (2, count, resolution, resolution, 3), dtype=np.uint8
    )
    instructions = [f"make it number {number}" for number in range(count)]
    examples = [
        Example(encode_png(to_pil(source)), encode_png(to_pil(edited)), text)
        for source, edited, text in zip(*pictures, instructions, strict=True)
    ]
    rows = [
        {
            "pair_key": f"{number:06d}",
            "triplet_key": f"{number:06d}",
            "instruction": instructions[number],
            "split": "train",
            **row,
        }
        for at in range(0, count, _ENCODED)
        for number, row in enumerate(
            encode_pairs(model, pictures[0, at : at + _ENCODED], pictures[1, at : at + _ENCODED]),
            start=at,
        )
    ]
    for at in range(0, count, _ENCODED):
        texts = encode_instructions(model, instructions[at : at + _ENCODED], job.text)
        for row, text in zip(rows[at : at + _ENCODED], texts, strict=True):
            row.update(text)
    stored = [field for field in LATENT_TEXTS if field.name in rows[0]]
    table = pa.Table.from_pylist(rows, schema=pa.schema([*LATENTS, *stored]))
    pq.write_table(table, folder / "latents.parquet")
    unet: Any = copy.deepcopy(model.unet)
    return Scene(
        plain=model,
        ours=replace(model, unet=unet),
        config=config,
        resolution=resolution,
        examples=examples,
        dataset=LatentDataset(folder / "latents.parquet"),
    )


def _same_first_step(
    job: TrainingBenchmark, scene: Scene, plain: PlainTrainer, first: Metrics
) -> float:
    """How far the plain way's loss of our first step is from ours, of itself."""
    config, dataset = scene.config, scene.dataset
    visits = Feed(len(dataset), config.batch_size, config.seed).batch(0)
    batch = read_batch(dataset, visits, config.seed, flips=False)
    own = PlainTrainer(
        replace(scene.plain, unet=copy.deepcopy(scene.plain.unet)),
        [scene.examples[visit.group] for visit in visits],
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
    )
    loss = own.step(
        Drawn(
            batch.posterior_noise,
            batch.noise,
            batch.timesteps,
            batch.dropout,
        )
    )
    plain.step()
    apart = abs(loss - first.loss) / first.loss
    bound = LOSS_DIFFERENCE["bfloat16" if job.bf16 else "float32"]
    if apart > bound:
        raise Ip2pError(
            f"the two ways have different losses for the same step ({loss:.5f} and "
            f"{first.loss:.5f}): their times cannot be compared"
        )
    return apart


def _ranks(job: TrainingBenchmark, scene: Scene, folder: Path) -> dict[str, Any]:
    """Images a second of one process with all threads, and of several that share them."""
    model = folder / "model"
    scene.plain.save(model)
    threads = job.ranks * max(1, torch.get_num_threads() // job.ranks)
    rates: dict[int, list[float]] = {1: [], job.ranks: []}
    for turn in range(job.rounds):
        for count in rates:
            ranks = Ranks(
                model=str(model),
                latents=str(folder / "latents.parquet"),
                config=scene.config,
                count=count,
                threads=threads // count,
                steps=job.steps,
                micro_batch=job.micro_batch,
                meeting=str(folder / f"meet-{turn}-{count}"),
            )
            rates[count].append(ranks_per_s(ranks))
    return {
        "count": job.ranks,
        "threads": threads,
        "one_per_s": median(rates[1]),
        "several_per_s": median(rates[job.ranks]),
        "ratio": measure.median_ratio(rates[job.ranks], rates[1]),
        "one": rates[1],
        "several": rates[job.ranks],
        "spread": [min(rates[1]) / fmean(rates[1]), max(rates[1]) / fmean(rates[1])],
    }


def _weights(model: StableDiffusion) -> int:
    return held_bytes(model.unet, model.vae, model.text_encoder)


def _state_bytes(state: TrainState) -> int:
    tensors = state.tensors()
    return sum(
        tensor.numel() * tensor.element_size()
        for part in ("ema", "optimizer")
        for tensor in tensors[part].values()
    )
