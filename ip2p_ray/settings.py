"""Settings that a folder of weights brings along: dataclasses, read from JSON files."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ip2p_ray.errors import ModelError

Settings = TypeVar("Settings")


def read_settings(
    kind: type[Settings], path: Path, *, complete: bool = False, **given: Any
) -> Settings:
    """The object of the dataclass `kind` that the file describes; a list becomes a tuple.

    `given` are fields that stand elsewhere; they come before those of the file. Where the file has
    to be `complete`, no field falls back to its default.

    Raises:
        ModelError: no readable JSON object, an unknown field, or a value that is not allowed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object")
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in content:
        if name not in known:
            raise ModelError(f"{path}: no such setting {name!r}; there are {', '.join(known)}")
    lacking = [name for name in known if name not in (*content, *given)]
    if complete and lacking:
        raise ModelError(f"{path} lacks {', '.join(lacking)}")
    found = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
    try:
        return kind(**{**found, **given})
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path} does not hold allowed settings: {error}") from error
