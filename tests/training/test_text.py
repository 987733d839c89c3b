import pytest
import torch

from ip2p_ray.testing import tiny_stable_diffusion
from ip2p_ray.training.text import TextCache

MODEL = tiny_stable_diffusion()


class Counting:
    """An encoder that remembers which texts it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: list[str]) -> torch.Tensor:
        self.asked += texts
        return torch.tensor([[[float(len(text))]] for text in texts])


def test_same_as_the_encoder() -> None:
    texts = ["make it red", "", "make it blue", "make it red"]
    assert torch.allclose(TextCache(MODEL.encode_text)(texts), MODEL.encode_text(texts), atol=1e-6)


def test_each_text_is_encoded_once() -> None:
    encode = Counting()
    cache = TextCache(encode, chunk=2)
    cache(["a", "bb", "a", "ccc"])
    cache(["bb", "a"])
    assert [text for text in encode.asked if text] == ["a", "bb", "ccc"]
    assert len(encode.asked) % 2 == 0


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_a_row_does_not_depend_on_what_was_missing_beside_it(chunk: int) -> None:
    texts = [f"a red cat {number}" for number in range(20)]
    together = TextCache(MODEL.encode_text, chunk=chunk)(texts)
    one_by_one = TextCache(MODEL.encode_text, chunk=chunk)
    for number in reversed(range(20)):
        assert torch.equal(one_by_one([texts[number]])[0], together[number])


def test_memory_is_bounded() -> None:
    encode = Counting()
    cache = TextCache(encode, max_bytes=3 * 4, chunk=1)
    for text in ("a", "bb", "ccc", "a", "dddd"):
        assert cache([text]).item() == len(text)
    assert len(cache) == 3
    cache(["a"])
    assert encode.asked == ["a", "bb", "ccc", "dddd"]
    cache(["bb"])
    assert encode.asked[-1] == "bb"


def test_a_batch_larger_than_the_memory() -> None:
    cache = TextCache(Counting(), max_bytes=4, chunk=1)
    assert cache(["a", "bb", "ccc"]).flatten().tolist() == [1.0, 2.0, 3.0]
    assert len(cache) == 1


def test_rows_carry_no_gradient() -> None:
    assert not TextCache(MODEL.encode_text)(["a"]).requires_grad
