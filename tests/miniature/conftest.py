"""What the tests of the miniature's trainings share: tokenizers, and models that learned nothing.

`ip2p_ray.miniature.tiny` makes the same, but teaches its writer for seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from transformers import CLIPTokenizer

from ip2p_ray.checkpoint import export_editor
from ip2p_ray.clip import save_clip
from ip2p_ray.diffusion.model import StableDiffusion
from ip2p_ray.miniature import judge, tiny, writer
from ip2p_ray.miniature.vocabulary import END, clip_tokenizer
from ip2p_ray.training.unet import widen


@pytest.fixture(scope="session")
def tokenizer() -> CLIPTokenizer:
    """The judge's and the generator's."""
    return clip_tokenizer()


@pytest.fixture(scope="session")
def writer_words() -> Any:
    """The writer's tokenizer."""
    return writer.tokenizer()


@pytest.fixture(scope="session")
def untrained(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer, writer_words: Any
) -> Path:
    """A folder as the trainings leave it, of tiny models with random weights. Not to be changed."""
    folder: Path = tmp_path_factory.mktemp("untrained")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = judge.clip_config(len(tokenizer))
        clip: Any = open_clip.CLIP(**shape)
        text_encoder = judge.text_encoder(clip, tokenizer)
        model = tiny._generator(text_encoder, tokenizer)
        words: Any = writer.build(len(writer_words), writer_words.convert_tokens_to_ids(END))
    save_clip(clip, shape, tokenizer, folder / "judge")
    text_encoder.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    model.vae.save_pretrained(folder / "vae")
    model.save(folder / "generator")
    words.save_pretrained(folder / "writer")
    writer_words.save_pretrained(folder / "writer")
    editor = StableDiffusion.load(folder / "generator")
    widen(editor.unet)
    export_editor(editor, None, folder / "editor", {"steps": 2})
    return folder
