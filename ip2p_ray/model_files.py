"""Folders of models from anyone: weights are safetensors, and no code that comes along is run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

from ip2p_ray.errors import ModelError

SAFETENSORS: Final[dict[str, Any]] = {"use_safetensors": True}
"""For every `from_pretrained`: by default diffusers and transformers fall back to pickles."""

NO_CODE: Final[dict[str, Any]] = {"trust_remote_code": False}
"""For every Auto class of transformers: by default it asks whoever sits at the terminal."""

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
_INDEX = ".safetensors.index.json"
_ADAPTER = "adapter_config.json"


def require_safetensors(folder: str | Path, what: str, names: Sequence[str] = ()) -> None:
    """Returns if a library finds only safetensors in the folder; of a hub id nothing is asked.

    `names` are those of weights that it takes before any others. What lies beside safetensors and
    is not read does not matter. `what` names the model for people.

    Raises:
        ModelError: the weights are pickles, an index of shards names other files, or it is an
            adapter, which would load another model.
    """
    place = Path(folder)
    if not place.is_dir():
        return
    inside = {path.name for path in place.iterdir()}
    if _ADAPTER in inside:
        raise ModelError(f"{what} {folder} is an adapter ({_ADAPTER}): merge it into its model")
    taken = names or [name for name in inside if name.endswith((".safetensors", _INDEX))]
    pickled = sorted(name for name in inside if name.endswith(_PICKLED))
    if pickled and not inside.intersection(taken):
        raise ModelError(
            f"{what} {folder} has its weights as {pickled[0]}, which can run code when it is read: "
            "give them as safetensors"
        )
    for name in sorted(inside):
        if name.endswith(_INDEX):
            _require_shards(place / name, what)


def _require_shards(index: Path, what: str) -> None:
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{what} {index.parent} has no readable {index.name}: {error}") from error
    for shard in shards:
        if not isinstance(shard, str) or PurePosixPath(shard).name != shard:
            raise ModelError(f"{what} {index.parent}: {index.name} names {shard!r}, no file in it")
        if not shard.endswith(".safetensors"):
            raise ModelError(
                f"{what} {index.parent}: {index.name} names {shard}, which can run code when it is "
                "read: give the weights as safetensors"
            )


def require_no_code(path: Path, what: str) -> None:
    """Returns if a JSON file of settings, if there is one, names no classes of its own.

    Raises:
        ModelError: it does ("auto_map"); for loaders that would ask whether to run them.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # whoever reads it next says so
    if isinstance(told, dict) and told.get("auto_map"):
        raise ModelError(
            f"{what} {path.parent}: {path.name} names code of its own (auto_map), which is not run"
        )
