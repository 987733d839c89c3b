"""The command that trains the miniature: every step once, in one folder, with its settings."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ip2p_ray.errors import ConfigError, StageError
from ip2p_ray.miniature import train, weights
from ip2p_ray.miniature.autoencoder import AutoencoderConfig
from ip2p_ray.miniature.editing import EditingConfig
from ip2p_ray.miniature.generator import GeneratorConfig
from ip2p_ray.miniature.judge import JudgeConfig
from ip2p_ray.miniature.train import TrainMiniature, command
from ip2p_ray.miniature.writer import WriterConfig
from ip2p_ray.triplets.prompt import completion

STEPS = (
    "autoencoder",
    "decoder",
    "judge",
    "writer",
    "generator",
    "calibration",
    "pairs",
    "editor",
    "scores",
)
JOB = TrainMiniature(
    out=Path("nowhere"),
    seed=12,
    calibration_pairs=10,
    tasks=4,
    autoencoder=AutoencoderConfig(
        steps=1, decoder_steps=1, batch_size=1, latent_channels=4, channels=(8, 8, 8, 8)
    ),
    judge=JudgeConfig(steps=1, batch_size=2),
    writer=WriterConfig(steps=1, batch_size=1),
    generator=GeneratorConfig(steps=1, batch_size=2, channels=(16, 16), scenes=4),
    editing=EditingConfig(
        triplets=2, candidates=1, sampling_steps=1, steps=1, batch_size=2, save_every=1
    ),
)
REPLY = completion("draw it with a pencil", "a pencil sketch of a boat on the sea")


def save_reciter(words: Any, folder: Path) -> None:
    """A writer that gives REPLY to every caption: it is one token, and the likeliest always."""
    words.add_tokens([AddedToken(REPLY, normalized=False)])
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), num_attention_heads=1, max_position_embeddings=128, **size
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(float("norm" in name or "embed" in name))
        model.lm_head.weight[words.convert_tokens_to_ids(REPLY)] = 10.0
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def note(out: Path, name: str, **content: Any) -> None:
    """As if the step had been done."""
    (out / "records").mkdir(parents=True, exist_ok=True)
    facts = {"wall_seconds": 1.0, "device": "an abacus", **content}
    (out / "records" / f"{name}.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def trained(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainMiniature:
    """A run to the end of tiny models, whose writer and thresholds were there before.

    A writer of one step writes nothing that is an edit, and no pair of such models passes.
    """
    job = replace(JOB, out=tmp_path_factory.mktemp("miniature") / "out")
    save_reciter(AutoTokenizer.from_pretrained(untrained / "writer"), job.out / "writer")
    note(job.out, "writer", steps=200, seconds=60)
    thresholds = {"text": -1.0, "image": -1.0, "direction": -1.0}
    note(job.out, "calibration", thresholds=thresholds, true_pass=1.0, mismatched_fail={})
    train.main(job)
    return job


def records(job: TrainMiniature) -> dict[str, dict[str, Any]]:
    paths = (job.out / "records").glob("*.json")
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def test_the_command_ends_in_weights_that_the_package_can_use(trained: TrainMiniature) -> None:
    folder = weights.require(trained.out / "weights")
    assert weights.pair_config(folder) == trained.editing.pairs(weights.thresholds(folder))
    editor = weights.load_editor(folder)
    assert editor.model.latent_channels == 4
    assert f"`{command(trained)}`" in (folder / "README.md").read_text(encoding="utf-8")


def test_every_step_leaves_its_record(trained: TrainMiniature) -> None:
    found = records(trained)
    assert set(found) == set(STEPS)
    for name, record in found.items():
        assert record["wall_seconds"] >= 0
        made_before = name in ("writer", "calibration")
        assert record["device"] == ("an abacus" if made_before else train._device("cpu"))
    assert found["pairs"]["funnel"] == {"captions": 2, "kept": 2}
    assert found["scores"]["tasks"] == 4
    assert found["editor"]["pairs"] == 2


def test_a_rerun_does_no_step_again(
    trained: TrainMiniature, caplog: pytest.LogCaptureFixture
) -> None:
    paths = sorted((trained.out / "records").iterdir())
    before = [path.stat().st_mtime_ns for path in paths]
    with caplog.at_level(logging.INFO):
        train.main(replace(trained, threads=1, device="cpu"))
    assert [path.stat().st_mtime_ns for path in paths] == before
    done = [line.removesuffix(": done before") for line in caplog.messages if "before" in line]
    assert tuple(done) == STEPS


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 13}, "seed"),
        ({"tasks": 5, "judge": JudgeConfig(steps=2)}, "tasks, judge"),
    ],
)
def test_a_folder_keeps_the_settings_it_was_begun_with(
    trained: TrainMiniature, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"was begun with another {named} "):
        train.main(replace(trained, **change))


def test_no_kept_candidate_is_told_before_the_editor_is_trained(
    trained: TrainMiniature, tmp_path: Path
) -> None:
    job = replace(trained, out=tmp_path / "out")
    shutil.copytree(trained.out, job.out)
    for name in ("pairs", "editor", "scores"):
        (job.out / "records" / f"{name}.json").unlink()
    shutil.rmtree(job.out / "pairs")
    note(job.out, "calibration", thresholds={"text": 1.0, "image": 1.0, "direction": 1.0})
    with pytest.raises(StageError, match=r"no candidate was kept.*caption_similarity"):
        train.main(job)
    assert "pairs" not in records(job)
    assert "editor" not in records(job)


def test_several_processes_do_not_share_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--processes 2 .* --device cuda"):
        train.main(TrainMiniature(out=tmp_path / "out", processes=2, device="cuda"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"processes": 0}, "--processes is at least 1, got 0"),
        ({"threads": 0}, "--threads is at least 1"),
        ({"processes": 3}, "batch-size .* does not split over 3 processes"),
        ({"out": Path("/dev/null")}, "--out"),
        ({"device": "bogus"}, "--device bogus: there is no such device"),
    ],
)
def test_flags_that_cannot_be_are_told_before_anything_is_made(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        train.main(replace(JOB, **{"out": tmp_path / "out", **changes}))
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / train.SETTINGS).write_text("[")
    with pytest.raises(ConfigError, match=r"settings\.json cannot be read"):
        train.main(replace(JOB, out=tmp_path))


def test_a_step_that_fails_leaves_no_record_and_is_done_again(tmp_path: Path) -> None:
    def fails() -> dict[str, Any]:
        raise ConfigError("not today")

    calls: list[str] = []

    def works() -> dict[str, Any]:
        assert not list(tmp_path.rglob("*.json"))
        calls.append("works")
        return {"answer": 42}

    with pytest.raises(ConfigError, match="not today"):
        train._once(tmp_path, "step", "cpu", fails)
    for _ in range(2):
        train._once(tmp_path, "step", "cpu", works)
    assert calls == ["works"]
    [path] = (tmp_path / "records").iterdir()
    assert json.loads(path.read_text())["answer"] == 42


@pytest.mark.parametrize(
    "job",
    [
        TrainMiniature(out=Path("FOLDER")),
        replace(JOB, out=Path("FOLDER")),
        TrainMiniature(
            out=Path("FOLDER"),
            device="cuda",
            threads=3,
            editing=EditingConfig(self_replace=(0.1, 0.5), learning_rate=1e-4),
        ),
    ],
)
def test_the_command_on_the_card_makes_the_same_job(job: TrainMiniature) -> None:
    python, flag, module, *arguments = shlex.split(command(job))
    assert (python, flag, module) == ("python", "-m", "ip2p_ray.miniature.train")
    assert tyro.cli(TrainMiniature, args=arguments) == job


def test_the_command_names_only_what_is_not_the_default() -> None:
    job = TrainMiniature(out=Path("FOLDER"), judge=JudgeConfig(steps=9))
    expected = "python -m ip2p_ray.miniature.train --out FOLDER --seed 0 --judge.steps 9"
    assert command(job) == expected
