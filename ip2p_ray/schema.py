"""The datasets in the order of the flow, the keys of their rows, and every derived seed.

captions -> triplets -> candidates -> pairs (and scores) -> latents; whatever is dropped on the way
is a row of rejects. Identity comes from content alone: a key or a seed is a hash of the texts, the
index and the recipe, so it does not depend on the number of workers, on batches or on order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal

import pyarrow as pa

from ip2p_ray.errors import ConfigError

SCHEMA_VERSION = 2
"""Raised whenever a column or the derivation of a key or seed changes."""

SPLITS = ("train", "held_out")
"""What `split_of` may answer: on the second no editor is trained."""

# Encoded bytes, in the form that Hugging Face `datasets` reads as an Image feature.
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

_SIMILARITY_FIELDS: list[tuple[str, pa.DataType]] = [
    ("caption_similarity", pa.float32()),  # cosine: source image with caption
    ("edited_caption_similarity", pa.float32()),  # cosine: edited image with edited caption
    ("image_similarity", pa.float32()),  # cosine: source image with edited image
    ("direction_similarity", pa.float32()),  # cosine: change of image with change of caption
]
SIMILARITIES: tuple[str, ...] = tuple(name for name, _ in _SIMILARITY_FIELDS)

_TEXT_FIELDS: list[tuple[str, pa.DataType]] = [
    ("triplet_key", pa.string()),  # triplet_key() of the three texts
    ("caption", pa.string()),  # describes the source image
    ("instruction", pa.string()),  # the imperative edit
    ("edited_caption", pa.string()),  # describes the edited image
]

_DRAW_FIELDS: list[tuple[str, pa.DataType]] = [
    ("index", pa.int32()),  # number of the candidate within its triplet, from 0
    ("seed", pa.int64()),  # candidate_seed(), in [0, 2**63)
    ("self_replace", pa.float32()),  # fraction of steps that copy self-attention, in [0, 1]
    ("guidance_scale", pa.float32()),  # the one scale used while making the pair
]

CAPTIONS = pa.schema(
    [
        ("caption_key", pa.string()),  # caption_key() of the caption
        ("caption", pa.string()),
        ("url", pa.string()),  # where the caption was found; null when unknown
    ]
)

COLLECTED_CAPTIONS = pa.schema(
    [
        *CAPTIONS,  # all that readers of captions ask for
        ("source", pa.string()),  # which collection or file it is from; may be null
    ]
)

TRIPLETS = pa.schema(
    [
        *_TEXT_FIELDS,
        ("caption_key", pa.string()),  # the row of captions it was written for
        ("split", pa.string()),  # split_of() the triplet key: "train" or "held_out"
        ("writer", pa.string()),  # which model, with which prompt, wrote it
    ]
)

CANDIDATES = pa.schema(
    [
        *TRIPLETS,
        ("recipe", pa.string()),  # recipe() of the pair config and the models
        ("status", pa.string()),  # "ok", or why it has fewer candidates: "enough", "futile"
        ("seconds", pa.float32()),  # that the generator's process was busy with the triplet
        (
            "candidates",
            pa.list_(
                pa.struct(
                    [
                        *_DRAW_FIELDS,
                        *_SIMILARITY_FIELDS,
                        ("reason", pa.string()),  # why it was rejected; null when kept
                        ("source_image", IMAGE),  # null unless kept, or among the rejects to show
                        ("edited_image", IMAGE),  # as the source's
                    ]
                )
            ),
        ),
    ]
)

# Of pairs that were not generated but came from a user, in PAIRS and SCORES: caption,
# edited_caption and caption_key are null where there was no caption, and triplet_key is then
# own_triplet_key(); index and recipe are null; seed, self_replace, guidance_scale and the
# similarities are null unless the data brought them or a judge computed them; pair_key is
# own_pair_key(); writer is "own".
PAIRS = pa.schema(
    [
        ("pair_key", pa.string()),  # pair_key() of triplet, index and recipe
        *TRIPLETS,
        ("recipe", pa.string()),
        *_DRAW_FIELDS,
        *_SIMILARITY_FIELDS,
        ("source_image", IMAGE),
        ("edited_image", IMAGE),
    ]
)

SCORES = pa.schema(
    [
        ("pair_key", pa.string()),
        *_TEXT_FIELDS,
        ("split", pa.string()),
        ("recipe", pa.string()),
        *_DRAW_FIELDS,
        *_SIMILARITY_FIELDS,
        ("reason", pa.string()),  # null when kept
    ]
)

LATENTS = pa.schema(
    [
        ("pair_key", pa.string()),
        ("triplet_key", pa.string()),  # the group that one pair a visit is drawn from
        ("instruction", pa.string()),
        ("split", pa.string()),
        ("shape", pa.list_(pa.int32())),  # [channel, row, column] of every array below
        ("edited_mean", pa.binary()),  # float16, C order, unscaled posterior of the edited image
        ("edited_std", pa.binary()),
        ("source_mode", pa.binary()),  # float16, unscaled posterior mode of the source image
        ("edited_mean_flipped", pa.binary()),  # the same of the mirrored images
        ("edited_std_flipped", pa.binary()),
        ("source_mode_flipped", pa.binary()),
    ]
)

# What a dataset of latents may have beside LATENTS, see `latents.TextForm`.
LATENT_TEXTS: tuple[pa.Field, ...] = (
    pa.field("tokens", pa.list_(pa.int32())),  # of the instruction, padded to the encoder's length
    pa.field("embedding", pa.binary()),  # float16, C order: the text encoder's last hidden state
    pa.field("embedding_shape", pa.list_(pa.int32())),  # [token, channel]
)

REJECTS = pa.schema(
    [
        ("stage", pa.string()),  # the dataset that the row would have belonged to
        ("key", pa.string()),  # key of the row that was dropped; its place where it has none
        ("reason", pa.string()),  # snake_case, counted in the report
        ("detail", pa.string()),  # the text, reply or message that shows why; may be null
    ]
)

DATASETS: dict[str, pa.Schema] = {
    "captions": CAPTIONS,
    "triplets": TRIPLETS,
    "candidates": CANDIDATES,
    "pairs": PAIRS,
    "scores": SCORES,
    "latents": LATENTS,
    "rejects": REJECTS,
}
"""Every dataset by name, in the order of the flow."""


def caption_key(caption: str) -> str:
    """32 hex digits that identify a caption by its text."""
    return _hash("caption", caption, size=16).hex()


def reply_key(caption: str, model: str, recipe: str) -> str:
    """32 hex digits that identify what a language model is asked about a caption."""
    return _hash("reply", caption, model, recipe, size=16).hex()


def triplet_key(caption: str, instruction: str, edited_caption: str) -> str:
    """32 hex digits that identify a triplet by its three texts."""
    return _hash("triplet", caption, instruction, edited_caption, size=16).hex()


def pair_key(triplet_key: str, index: int, recipe: str) -> str:
    """32 hex digits that identify candidate number `index` of a triplet under a recipe."""
    return _hash("pair", triplet_key, index, recipe, size=16).hex()


def own_pair_key(source: str, instruction: str, edited: str) -> str:
    """32 hex digits that identify a user's own pair by the digests of its pictures."""
    return _hash("own_pair", source, instruction, edited, size=16).hex()


def own_triplet_key(source: str, instruction: str) -> str:
    """What stands for the triplet key where there are no captions: the source and what is asked."""
    return _hash("own_triplet", source, instruction, size=16).hex()


def recipe(config: Any, *fingerprints: str) -> str:
    """16 hex digits that identify an algorithm config (a dataclass) with the models it runs.

    Equal settings give equal recipes: field order does not matter, nor 1 against 1.0.

    Raises:
        ConfigError: `config` is no dataclass instance, or holds a value JSON cannot express.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ConfigError(f"a recipe is made from a dataclass instance, got {config!r}")
    content = {type(config).__name__: _canonical(dataclasses.asdict(config))}
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{config!r} cannot be written as JSON: {error}") from error
    return _hash("recipe", text, *fingerprints, size=8).hex()


def candidate_seed(triplet_key: str, index: int, recipe: str) -> int:
    """The seed of one candidate's noise, uniform in [0, 2**63).

    Counter-based: unlike the reference generator, whose seeds fall into cycles after some 10^5
    draws, no seed depends on another. torch's CPU generator uses its low 32 bits.
    """
    return _integer(_hash("candidate_seed", triplet_key, index, recipe, size=8))


def candidate_uniforms(triplet_key: str, index: int, recipe: str) -> tuple[float, float]:
    """Two uniforms in [0, 1) for a candidate's self_replace and guidance_scale.

    A second stream beside `candidate_seed`: knowing the one tells nothing of the other.
    """
    digest = _hash("candidate_uniforms", triplet_key, index, recipe, size=16)
    return _uniform(digest[:8]), _uniform(digest[8:])


def split_of(triplet_key: str, held_out: float = 0.05) -> Literal["train", "held_out"]:
    """The split of a triplet, with all its pairs; a larger `held_out` share only adds triplets."""
    if not 0.0 <= held_out <= 1.0:
        raise ConfigError(f"held_out is a share in [0, 1], got {held_out}")
    below = _uniform(_hash("split", triplet_key, size=8)) < held_out
    return "held_out" if below else "train"


def stream_seed(*parts: int | str) -> int:
    """The seed, in [0, 2**63), of the random stream that `parts` name.

    For example `stream_seed(run_seed, epoch, pair_key, "noise")`. The integer 1 and the text "1"
    name different streams, and so do ("ab", "c") and ("a", "bc").
    """
    return _integer(_hash("stream", *parts, size=8))


def _hash(*parts: int | str, size: int) -> bytes:
    """blake2b over the parts, each with its type and length in front, so joins are unambiguous."""
    digest = hashlib.blake2b(digest_size=size)
    for part in parts:
        data = str(part).encode("utf-8", "surrogatepass")
        tag = b"s" if isinstance(part, str) else b"i"
        digest.update(tag + len(data).to_bytes(8, "big") + data)
    return digest.digest()


def _integer(digest: bytes) -> int:
    return int.from_bytes(digest, "big") >> 1


def _uniform(digest: bytes) -> float:
    return float((int.from_bytes(digest, "big") >> 11) / (1 << 53))


def _canonical(value: Any) -> Any:
    """The value with whole floats as integers, through lists and dictionaries."""
    if isinstance(value, dict):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
