"""The judge: cosines by hand, open_clip's own folder, and refusals that name the folder."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerFast

from ip2p_ray.captions import surely_fits
from ip2p_ray.clip import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Clip,
    needs_quick_gelu,
    openai_fits,
    preprocess,
    save_clip,
)
from ip2p_ray.errors import ConfigError, ModelError
from ip2p_ray.filtering import Thresholds, select
from ip2p_ray.schema import SIMILARITIES
from ip2p_ray.triplets.examples import load_examples

START, END = "<|startoftext|>", "<|endoftext|>"
CAPTIONS = ["a red cat on the mat", "a blue dog", "a red boat at sea"]
EDITED = ["a blue cat on the mat", "a blue cat", "a red boat at sea"]


def tokenizer(end_last=True, template=True):
    """Byte-level BPE trained on the captions."""
    rules = Tokenizer(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = [START, END] if end_last else [END, START]
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rules.train_from_iterator([*CAPTIONS, *EDITED], trainer)
    rules.add_special_tokens(specials)
    if template:
        rules.post_processor = processors.TemplateProcessing(
            single=f"{START} $A {END}",
            special_tokens=[(token, rules.token_to_id(token)) for token in specials],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=rules, bos_token=START, eos_token=END, pad_token=END
    )


def config(**text):
    return {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {
            "layers": 1,
            "width": 16,
            "head_width": 8,
            "patch_size": 8,
            "image_size": 16,
        },
        "text_cfg": {
            "context_length": 12,
            "vocab_size": 300,
            "width": 16,
            "heads": 2,
            "layers": 1,
            **text,
        },
    }


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return open_clip.CLIP(**config())


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "clip"
    save_clip(model, config(), tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def clip(folder):
    return Clip.load(folder)


def pictures(seed, size=16, count=3):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_images_are_encoded_as_open_clip_does_where_nothing_is_resized(clip, folder):
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    images = pictures(0)
    batch = torch.stack([transform(Image.fromarray(image)) for image in images])
    expected = normalize(model.eval().encode_image(batch), dim=-1)
    assert torch.allclose(clip.encode_images(images), expected, atol=1e-6)


def test_texts_are_encoded_as_open_clip_does(clip, folder, model):
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    expected = normalize(model.eval().encode_text(tokens), dim=-1)
    assert torch.allclose(clip.encode_texts(CAPTIONS), expected, atol=1e-6)


def test_the_weights_come_back_exactly(clip, model):
    stored = clip._model.state_dict()
    assert all(torch.equal(stored[name], value) for name, value in model.state_dict().items())


def test_preprocessing_is_the_whole_image_bicubic_without_antialiasing():
    images = torch.from_numpy(pictures(1, size=32))[:, :, :24]
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    found = preprocess(images, (16, 16), mean, std)
    plain = torch.nn.functional.interpolate(
        images.permute(0, 3, 1, 2) / 255, (16, 16), mode="bicubic", antialias=False
    )
    for channel in range(3):
        expected = (plain[:, channel] - mean[channel]) / std[channel]
        assert torch.allclose(found[:, channel], expected, atol=1e-6)
    flat = torch.full((1, 50, 30, 3), 51, dtype=torch.uint8)
    assert torch.allclose(preprocess(flat, (16, 16), (0, 0, 0), (1, 1, 1)), torch.tensor(0.2))


def test_the_four_cosines_are_those_of_their_definition(clip):
    source, edited = pictures(2), pictures(3)
    found = clip.similarities(source, edited, CAPTIONS, EDITED)
    for row in range(3):
        image, edited_image = (
            clip.encode_images(batch[row : row + 1])[0] for batch in (source, edited)
        )
        text, edited_text = (
            clip.encode_texts([CAPTIONS[row]])[0],
            clip.encode_texts([EDITED[row]])[0],
        )
        change, wish = edited_image - image, edited_text - text
        expected = {
            "caption_similarity": image @ text,
            "edited_caption_similarity": edited_image @ edited_text,
            "image_similarity": image @ edited_image,
            "direction_similarity": change @ wish / (change.norm() * wish.norm()).clamp(min=1e-8),
        }
        for name, value in expected.items():
            assert getattr(found, name)[row] == pytest.approx(float(value), abs=1e-5), name


def test_nothing_changed_is_no_direction(clip):
    same = clip.similarities(pictures(2), pictures(2), CAPTIONS, EDITED)
    assert same.direction_similarity.tolist() == [0, 0, 0]
    assert same.image_similarity.tolist() == pytest.approx([1, 1, 1])
    words = clip.similarities(pictures(2), pictures(3), CAPTIONS, CAPTIONS)
    assert words.direction_similarity.tolist() == [0, 0, 0]


def test_similarities_are_rows_for_the_filter(clip):
    found = clip.similarities(pictures(2), pictures(3), CAPTIONS, EDITED)
    rows = found.rows()
    assert [tuple(row) for row in rows] == [SIMILARITIES] * 3
    assert rows[1]["image_similarity"] == float(found.image_similarity[1])
    lowest = Thresholds(text=-1, image=-1, direction=-1)
    assert select(rows, lowest, keep=3) == [None] * 3


def test_arrays_and_tensors_are_alike_and_rows_have_unit_length(clip):
    images = pictures(4, size=40)
    features = clip.encode_images(images)
    assert torch.equal(features, clip.encode_images(torch.from_numpy(images)))
    assert torch.allclose(features.norm(dim=-1), torch.ones(3))
    assert features.shape == clip.encode_texts(CAPTIONS).shape == (3, 16)
    assert features.dtype == torch.float32


def test_equal_texts_are_equal_rows_in_their_places(clip):
    features = clip.encode_texts([*CAPTIONS, CAPTIONS[0]])
    assert torch.equal(features[3], features[0])
    assert not torch.equal(features[1], features[0])


def test_long_texts_are_cut_to_the_context(clip):
    long = " ".join(["a red cat"] * 20)
    assert torch.equal(clip.encode_texts([long]), clip.encode_texts([long + " and a dog"]))
    assert not clip.fits(long)
    assert clip.fits("a red cat")
    assert clip.count_tokens("a red cat") == 5


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(clip, model, tmp_path):
    save_clip(model, config(), tokenizer(), tmp_path / "elsewhere")
    assert Clip.load(tmp_path / "elsewhere").fingerprint() == clip.fingerprint()
    other = open_clip.CLIP(**config())
    save_clip(other, config(), tokenizer(), tmp_path / "elsewhere")
    assert Clip.load(f"local-dir:{tmp_path / 'elsewhere'}").fingerprint() != clip.fingerprint()
    assert len(clip.fingerprint()) == 32


def test_half_precision_folders_compute_in_single_precision(clip, model, tmp_path):
    save_clip(model, config(), tokenizer(), tmp_path / "half", dtype=torch.float16)
    half = Clip.load(tmp_path / "half")
    size = (tmp_path / "half" / WEIGHTS_FILE).stat().st_size
    assert size < 0.6 * sum(4 * value.numel() for value in model.state_dict().values())
    assert half.encode_images(pictures(5)).dtype == torch.float32
    assert torch.allclose(
        half.encode_texts(CAPTIONS), clip.encode_texts(CAPTIONS), atol=1e-2, rtol=0
    )


def test_a_residual_network_will_do(tmp_path):
    shape = config()
    shape["vision_cfg"] = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 32}
    save_clip(open_clip.CLIP(**shape), shape, tokenizer(), tmp_path / "resnet")
    assert Clip.load(tmp_path / "resnet").image_size == (32, 32)


def test_an_end_token_of_any_number_will_do_if_the_config_names_it(tmp_path):
    words = tokenizer(end_last=False)
    with pytest.raises(ConfigError, match='use pool_type "eos" with eos_id'):
        save_clip(open_clip.CLIP(**config()), config(), words, tmp_path / "clip")
    end = words.eos_token_id
    with pytest.raises(ConfigError, match="text_cfg eos_id is 2, the end token is"):
        save_clip(
            open_clip.CLIP(**config(pool_type="eos")),
            config(pool_type="eos"),
            words,
            tmp_path / "clip",
        )
    shape = config(pool_type="eos", eos_id=end)
    save_clip(open_clip.CLIP(**shape), shape, words, tmp_path / "clip")
    assert not torch.equal(*Clip.load(tmp_path / "clip").encode_texts(["a cat", "a dog"]))


def test_tokenizers_that_do_not_fit_are_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="add the end token"):
        save_clip(model, config(), tokenizer(template=False), tmp_path / "clip")
    with pytest.raises(ConfigError, match="vocab_size is 200"):
        save_clip(model, config(vocab_size=200), tokenizer(), tmp_path / "clip")
    blank = tokenizer()
    blank.pad_token = None
    with pytest.raises(ConfigError, match="needs a pad token"):
        save_clip(model, config(), blank, tmp_path / "clip")
    assert list(tmp_path.iterdir()) == []


def test_a_config_of_another_model_is_refused_and_the_old_folder_stays(clip, model, tmp_path):
    save_clip(model, config(), tokenizer(), tmp_path / "clip")
    with pytest.raises(ModelError, match="cannot be loaded"):
        save_clip(model, config(layers=2), tokenizer(), tmp_path / "clip")
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]
    assert Clip.load(tmp_path / "clip").fingerprint() == clip.fingerprint()


@pytest.mark.parametrize("source", ["nothing/here", "ViT-L-14", "ViT-L-99/openai"])
def test_what_is_neither_a_folder_nor_a_name_is_refused(source):
    with pytest.raises(ModelError, match=f"CLIP folder {source} does not exist, nor is it"):
        Clip.load(source)


def test_openai_models_read_75_tokens_between_start_and_end():
    assert openai_fits("cat " * 75)
    assert not openai_fits("cat " * 76)


def test_a_count_without_vocabulary_is_never_too_low_for_plain_english():
    texts = [text for t in load_examples() for text in (t.caption, t.edited_caption)]
    joined = [", ".join(texts[n : n + size]) for n in range(0, 500, 5) for size in (4, 6, 8)]
    sure = [text for text in joined if surely_fits(text)]
    assert len(sure) > 50
    assert all(map(openai_fits, sure))


def test_weights_that_open_clip_does_not_have_are_refused():
    with pytest.raises(ModelError, match="no weights ViT-L-14/nothing; it has: openai"):
        Clip.load("ViT-L-14/nothing")


@pytest.mark.parametrize(
    ("architecture", "weights", "needed"),
    [
        ("ViT-L-14", "openai", True),
        ("ViT-L-14-quickgelu", "openai", True),
        ("ViT-B-32", "openai", True),
        ("ViT-L-14", "laion2b_s32b_b82k", False),
    ],
)
def test_openai_weights_get_quick_gelu_under_either_name(architecture, weights, needed):
    assert needs_quick_gelu(architecture, weights) == needed


def test_quick_gelu_travels_with_the_folder(clip, folder):
    kinds = {type(module).__name__ for module in clip._model.modules()}
    assert "QuickGELU" in kinds
    assert json.loads((folder / CONFIG_FILE).read_text())["model_cfg"]["quick_gelu"] is True


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, "tokenizer.json"])
@pytest.mark.parametrize("broken", [True, False], ids=["broken", "missing"])
def test_a_folder_that_is_not_whole_is_named(model, tmp_path, name, broken):
    folder = tmp_path / "clip"
    save_clip(model, config(), tokenizer(), folder)
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if broken:
        path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=f"CLIP folder {folder}"):
        Clip.load(folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_judges_as_the_cpu_does(clip, folder):
    on_gpu = Clip.load(folder, "cuda")
    source, edited = pictures(2, size=40), pictures(3, size=40)
    expected = clip.similarities(source, edited, CAPTIONS, EDITED)
    found = on_gpu.similarities(source, edited, CAPTIONS, EDITED)
    for name in SIMILARITIES:
        assert torch.allclose(getattr(found, name).cpu(), getattr(expected, name), atol=1e-4)
    assert on_gpu.fingerprint() == clip.fingerprint()
