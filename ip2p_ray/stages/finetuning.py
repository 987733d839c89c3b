"""examples -> a fine-tuned writer, at a server or in Ray Train's workers, scored before and after.

The score is of replies to held-out examples: how many have the form of an edit, and how many are
one. It says nothing of whether the edits are good ones.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer, get_device, prepare_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ip2p_ray import logs, storage
from ip2p_ray.copies import cache_folder, local_folder
from ip2p_ray.errors import BudgetError, ConfigError, ReplyError, StageError
from ip2p_ray.model_files import NO_CODE, SAFETENSORS, require_safetensors
from ip2p_ray.report import Report
from ip2p_ray.stages import plan, run
from ip2p_ray.stages.progress import Progress
from ip2p_ray.stages.watching import Telling
from ip2p_ray.triplets.endpoint import Endpoint
from ip2p_ray.triplets.finetune import Score, score, split_examples
from ip2p_ray.triplets.journal import Journal, JournalledWriter
from ip2p_ray.triplets.local_finetune import LocalTuningConfig, finetune_local
from ip2p_ray.triplets.local_writer import LocalWriter
from ip2p_ray.triplets.openai_finetune import TuningConfig, connect, finetune_openai
from ip2p_ray.triplets.reply import NO_REPLY, Reply, Triplet, read_reply
from ip2p_ray.triplets.writer import OpenAIWriter, WriterConfig

logger = logging.getLogger(__name__)

WRITER = "writer"
SCORES = "scores.json"
_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A fine-tuned writer."""

    model: str
    """Its folder, or the server's name of it."""
    before: Score | None
    """Of the model that was started from; None if it could not be asked."""
    after: Score | None

    @property
    def warning(self) -> str | None:
        """What to say of a new model that is worse than the one it came from; else None."""
        if self.before is None or self.after is None:
            return None
        if self.after.validity >= self.before.validity:
            return None
        return (
            f"the new model is worse than the one it was made from: of {self.after.replies:,} "
            f"held-out captions it has {self.after.valid:,} valid edits, that one has "
            f"{self.before.valid:,}. Both are kept. Write triplets with the old one, or tune again "
            "with more examples, fewer epochs or a lower learning rate into another --out"
        )


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What every worker is told."""

    writer: str
    folder: str
    config: LocalTuningConfig
    train: Sequence[Triplet]
    held_out: Sequence[Triplet]


def finetune_here(
    examples: Sequence[Triplet],
    folder: str,
    config: LocalTuningConfig,
    *,
    writer: str,
    fingerprint: str,
    held_out: float,
    resources: run.Resources,
) -> Tuned:
    """The transformers folder `<folder>/writer`, and scores.json in it.

    `folder` is one that all nodes reach, or s3://...; `writer` is the folder of any causal LM, in
    either. A killed run begins again; it is one epoch of some hundred examples.
    `resources.actors` workers train with DistributedDataParallel.
    """
    train, others = split_examples(examples, held_out)
    root = storage.join(storage.absolute(folder), WRITER)
    told = _Told(writer=writer, folder=root, config=config, train=train, held_out=others)
    digests = "\n".join(example.key for example in examples)
    origin = run.Origin(
        dataset=WRITER,
        config={**asdict(config), "held_out": held_out},
        models={"writer": fingerprint},
        sources={"examples": blake2b(digests.encode(), digest_size=8).hexdigest()},
    )
    run.make(root, origin, lambda: _fit(told, resources))
    found = json.loads(storage.read_bytes(storage.join(root, SCORES)))
    return Tuned(model=root, before=Score(**found["before"]), after=Score(**found["after"]))


def _fit(told: _Told, resources: run.Resources) -> list[Report]:
    scratch = Path(told.folder) / ".ray"
    if not storage.is_local(told.folder):  # only this node needs it, see `TrainingRun.ray`
        name = blake2b(told.folder.encode(), digest_size=8).hexdigest()
        scratch = cache_folder() / "runs" / f"{name}.ray"
    shutil.rmtree(scratch, ignore_errors=True)
    size = told.config.batch_size
    steps = -(-len(told.train) // size) * told.config.epochs
    try:
        with plan.counted(Progress("fine-tuning", total=steps, unit="steps")) as tally:
            TorchTrainer(
                train_on_worker,
                train_loop_config={"told": told, "tally": tally, "about": logs.names()},
                scaling_config=ray.train.ScalingConfig(
                    num_workers=resources.actors,
                    use_gpu=resources.gpus > 0,
                    resources_per_worker=resources.of_worker,
                ),
                run_config=ray.train.RunConfig(name="writer", storage_path=str(scratch)),
                torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
            ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not storage.exists(storage.join(told.folder, SCORES)):
        raise StageError(f"fine-tuning: the workers left no {SCORES} in {told.folder}")
    return []


def train_on_worker(arguments: Mapping[str, Any]) -> None:
    """What each worker of the trainer runs; rank 0 scores, saves, and scores again."""
    told: _Told = arguments["told"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    logs.follow(**arguments["about"], actor=f"worker {rank}")
    logging.getLogger("ip2p_ray").addHandler(Telling(arguments["tally"]))
    device = get_device()
    loader: Any = AutoModelForCausalLM
    writer = local_folder(told.writer)
    require_safetensors(writer, "writer folder")
    tokenizer = AutoTokenizer.from_pretrained(writer, local_files_only=True, **NO_CODE)
    model = loader.from_pretrained(
        writer, dtype=torch.float32, local_files_only=True, **SAFETENSORS, **NO_CODE
    )
    model.to(device)
    scores: dict[str, Any] = {}
    if rank == 0:
        scores["before"] = _scored(model, tokenizer, device, told.held_out)
    steps = finetune_local(
        model,
        tokenizer,
        told.train,
        told.config,
        rank=rank,
        world_size=world_size,
        wrap=partial(prepare_model, move_to_device=False) if world_size > 1 else None,
    )
    losses = []
    for metrics in steps:
        losses.append(metrics.loss)
        if rank == 0:
            arguments["tally"].add.remote(1)
    if rank == 0:
        _save(model, tokenizer, told.folder)
        scores["after"] = _scored(model, tokenizer, device, told.held_out)
        scores["losses"] = losses
        text = json.dumps(scores, indent=2) + "\n"
        storage.write_bytes(storage.join(told.folder, SCORES), text.encode())
    if world_size > 1:
        torch.distributed.barrier()


def _save(model: Any, tokenizer: Any, folder: str) -> None:
    """The transformers folder; a run that was killed writes it again."""
    if storage.is_local(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    with tempfile.TemporaryDirectory(dir=cache_folder()) as here:
        model.save_pretrained(here)
        tokenizer.save_pretrained(here)
        storage.upload(here, folder)


def _scored(model: Any, tokenizer: Any, device: Any, examples: Sequence[Triplet]) -> dict[str, Any]:
    writer = LocalWriter(model, tokenizer, device)

    def write(captions: Sequence[str]) -> list[str]:
        batches = (captions[at : at + _BATCH] for at in range(0, len(captions), _BATCH))
        return [reply for batch in batches for reply in writer.write(batch, seed=0)]

    return asdict(score(write, examples))


def finetune_at_server(
    examples: Sequence[Triplet],
    folder: str,
    config: TuningConfig,
    *,
    endpoint: Endpoint,
    held_out: float,
    scored: bool = True,
    poll_s: float = 15.0,
) -> Tuned:
    """A new model at the server. <folder>/finetuning.json says how far it is: rerun to go on.

    The replies that the score is made of are in <folder>/journal and paid for once.

    Raises:
        ConfigError: no key; or the server refuses it, the model or the examples.
        StageError: the server's job failed.
    """
    train, others = split_examples(examples, held_out)
    state = storage.local_path(folder).absolute() / "finetuning.json"
    told = None
    for tuning in finetune_openai(connect(endpoint), train, config, state, poll_s=poll_s):
        if (tuning.status, tuning.message) != told:
            told = tuning.status, tuning.message
            logger.info("fine-tuning: %s %s: %s", tuning.status, tuning.job_id, tuning.message)
        model = tuning.model
    assert model is not None
    # before the scores, which may fail or be stopped: this was paid for
    logger.info("fine-tuning: the new model is %s", model)
    if not scored:
        return Tuned(model=model, before=None, after=None)
    journal = str(state.parent / "journal")
    before = _score_of(config.model, config, others, endpoint, journal)
    after = _score_of(model, config, others, endpoint, journal)
    return Tuned(model=model, before=before, after=after)


def _score_of(
    model: str,
    config: TuningConfig,
    examples: Sequence[Triplet],
    endpoint: Endpoint,
    journal: str,
) -> Score | None:
    form: Any = "completions" if config.form == "completion" else "chat"
    asked = WriterConfig(model=model, form=form, shots=0)
    try:
        replies = asyncio.run(_replies(asked, examples, endpoint, journal))
    except (ConfigError, BudgetError) as error:
        logger.warning("fine-tuning: %s is not scored: %s", model, error)
        return None

    def read(caption: str, _: str) -> Triplet | str:
        reply = replies[caption]
        return NO_REPLY if reply is None else read_reply(caption, reply)

    return score(lambda captions: list(captions), examples, read=read)


async def _replies(
    config: WriterConfig, examples: Sequence[Triplet], endpoint: Endpoint, journal: str
) -> dict[str, Reply | None]:
    turn = asyncio.Semaphore(8)
    with Journal(journal) as kept:
        async with OpenAIWriter(config, endpoint) as writer:
            journalled = JournalledWriter(writer, kept)

            async def one(caption: str) -> Reply | None:
                async with turn:
                    try:
                        return await journalled.write(caption)
                    except ReplyError:
                        return None

            captions = [example.caption for example in examples]
            found = await asyncio.gather(*map(one, captions))
            return dict(zip(captions, found, strict=True))
