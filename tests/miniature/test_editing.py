"""Pairs are made chunk by chunk, each once, and the editor's training goes on where it stopped."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from ip2p_ray.clip import Similarities
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.editor import Editor
from ip2p_ray.filtering import Thresholds
from ip2p_ray.latents import LatentDataset
from ip2p_ray.miniature import editing, grammar
from ip2p_ray.miniature.editing import CHUNK, EditingConfig, Models
from ip2p_ray.miniature.scores import random_captions
from ip2p_ray.miniature.tiny import true_edit
from ip2p_ray.schema import LATENTS
from ip2p_ray.triplets.prompt import completion

CONFIG = EditingConfig(
    triplets=CHUNK + 4, candidates=2, sampling_steps=1, steps=3, batch_size=4, save_every=1
)
THRESHOLDS = Thresholds(text=0.2, image=0.5, direction=0.2)
SEED = 3


class Writer:
    """Knows a true edit of every caption; of every fourth it has only half a reply."""

    def write(self, captions: Sequence[str], *, seed: int) -> list[str]:
        assert seed == SEED
        replies = [completion(*true_edit(caption)) for caption in captions]
        return [r[:9] if k % 4 == 3 else r for k, r in enumerate(replies)]


class Judge:
    """Judges candidates by what is asked: additions fail by image, other subjects by direction.

    Of the rest every second candidate fails by its caption.
    """

    def similarities(
        self, source: Any, edited: Any, captions: list[str], edited_captions: list[str]
    ) -> Similarities:
        assert len(source) == len(edited) == len(captions) == len(edited_captions)
        rows = []
        for number, texts in enumerate(zip(captions, edited_captions, strict=True)):
            before, after = map(grammar.parse_caption, texts)
            assert before is not None
            assert after is not None
            added = len(after.things) > len(before.things)
            swapped = {s for s, _ in after.things} != {s for s, _ in before.things}
            text = 0.1 if number % 2 and not swapped else 0.3
            rows.append((text, 0.3, 0.4 if added else 0.9, 0.1 if swapped else 0.6))
        return Similarities(*torch.tensor(rows).unbind(dim=1))


@pytest.fixture(scope="module")
def models(untrained: Path) -> Models:
    helpers: Any = (Writer(), StableDiffusion.load(untrained / "generator"), Judge())
    return Models(*helpers)


def make(models: Models, folder: Path) -> None:
    editing.make_pairs(models, CONFIG, THRESHOLDS, folder, seed=SEED)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "pairs").iterdir()}


@pytest.fixture(scope="module")
def made(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pairs, from one undisturbed run."""
    folder: Path = tmp_path_factory.mktemp("made")
    make(models, folder)
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "pairs").iterdir())
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def test_every_kept_candidate_is_a_row_of_latents(made: Path) -> None:
    assert sorted(contents(made)) == ["00000.parquet", "00001.parquet"]
    found = rows(made)
    assert found
    assert len({row["pair_key"] for row in found}) == len(found)
    wishes = {true_edit(caption)[0] for caption in random_captions(CONFIG.triplets, SEED)}
    assert {row["instruction"] for row in found} <= wishes
    assert {tuple(row["shape"]) for row in found} == {(16, 8, 8)}
    assert {row["split"] for row in found} == {"train"}
    for path in (made / "pairs").iterdir():
        assert pq.read_schema(path).remove_metadata().equals(LATENTS)
    assert LatentDataset(made / "pairs", cache=made / "cache").pairs == len(found)


def test_what_is_there_is_not_made_again(models: Models, made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (made / "pairs").iterdir()}
    make(models, made)
    assert {path: path.stat().st_mtime_ns for path in (made / "pairs").iterdir()} == before


def test_a_lost_chunk_is_made_again_to_the_same_bytes(
    models: Models, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "pairs", tmp_path / "pairs")
    (tmp_path / "pairs" / "00000.parquet").unlink()
    make(models, tmp_path)
    assert rows(tmp_path) == rows(made)
    assert contents(tmp_path) == contents(made)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_of_two_processes_makes_its_own_chunks(
    models: Models, made: Path, tmp_path: Path, rank: int
) -> None:
    # A group whose other process never has to answer: making pairs asks it nothing.
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    try:
        make(models, tmp_path)
    finally:
        dist.destroy_process_group()
    own = f"{rank:05d}.parquet"
    assert contents(tmp_path) == {own: contents(made)[own]}


def test_the_funnel_accounts_for_every_caption_and_candidate(made: Path) -> None:
    found = editing.pair_funnel(made)
    captions = random_captions(CONFIG.triplets, SEED)
    # Each chunk is a batch of the writer, of which every fourth reply is half a one.
    written = [c for k, c in enumerate(captions) if k % CHUNK % 4 != 3]
    expected: Counter[str] = Counter(captions=20, unfinished=5)
    for caption in written:
        before, after = map(grammar.parse_caption, (caption, true_edit(caption)[1]))
        assert before is not None
        assert after is not None
        if len(after.things) > len(before.things):
            expected["image_similarity"] += 2
        elif {s for s, _ in after.things} != {s for s, _ in before.things}:
            expected["direction_similarity"] += 2
        else:
            expected["kept"] += 1
            expected["caption_similarity"] += 1
    assert found == expected
    assert found["kept"] == len(rows(made))
    judged = sum(expected.values()) - 20 - 5
    assert judged == 2 * len(written)
    assert editing.kept_share(found) == pytest.approx(found["kept"] / judged)


def test_the_share_kept_is_of_judged_candidates_only() -> None:
    funnel = {
        "captions": 9,
        "unfinished": 3,
        "kept": 2,
        "image_similarity": 3,
        "caption_similarity": 1,
        "not_best": 2,
    }
    assert editing.kept_share(funnel) == 0.25
    assert editing.kept_share({"captions": 4, "unfinished": 4}) == 0.0


def test_held_out_captions_are_counted_alike_and_leave_no_pairs(models: Models) -> None:
    found = editing.held_out_funnel(models, CONFIG.pairs(THRESHOLDS), seed=SEED, count=5)
    assert (found.pop("captions"), found.pop("unfinished")) == (5, 1)
    assert sum(found.values()) == 2 * 4


def train(folder: Path) -> dict[str, Any]:
    defaults = {"steps": 2, "resolution": 64, "max_pixels": 64 * 64}
    return editing.train_editor(CONFIG, folder, defaults, seed=SEED, device="cpu")


@pytest.fixture(scope="module")
def edited(untrained: Path, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After an undisturbed training of the editor."""
    folder: Path = tmp_path_factory.mktemp("edited")
    shutil.copytree(untrained / "generator", folder / "generator")
    shutil.copytree(made / "pairs", folder / "pairs")
    figures = train(folder)
    assert (figures["steps"], figures["pairs"]) == (3, len(rows(made)))
    return folder


def editor_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "editor" / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_editor_learned_from_the_generator(untrained: Path, edited: Path) -> None:
    found = editor_weights(edited)["conv_in.weight"]
    begun = StableDiffusion.load(untrained / "generator").unet.conv_in.weight.detach()
    own, new = found.chunk(2, dim=1)
    assert not torch.equal(own, begun)
    torch.testing.assert_close(own, begun, atol=1e-2, rtol=0)
    assert bool(new.any())
    assert Editor.load(edited / "editor").settings.steps == 2


def test_a_resumed_editor_ends_as_an_undisturbed_one(edited: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    shutil.copytree(edited, folder, copy_function=shutil.copy2)
    checkpoints = folder / "state" / "editor"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000003"]
    shutil.rmtree(checkpoints / "step-00000003")
    shutil.rmtree(folder / "editor")
    # A run that began anew would begin with other weights, and end with others.
    other = StableDiffusion.load(folder / "generator")
    with torch.no_grad():
        for parameter in other.unet.parameters():
            parameter.add_(0.1)
    other.save(folder / "generator")
    train(folder)
    expected, resumed = editor_weights(edited), editor_weights(folder)
    assert expected.keys() == resumed.keys()
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name
