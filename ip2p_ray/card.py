"""The model card of a trained editor: what it was made from, how, and how well it did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_HEAD = """---
library_name: diffusers
pipeline_tag: image-to-image
tags: [instruct-pix2pix, image-editing]
---

# An InstructPix2Pix editor

Changes a picture as a sentence tells it. Trained by ip2p_ray {version}.

```python
from diffusers import StableDiffusionInstructPix2PixPipeline

pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained("this folder")
```

ip2p_ray's own `Editor.load` reads it too; `editor_defaults.json` has the settings that it is
meant to be used with.
"""


def model_card(
    *,
    version: str,
    start: Mapping[str, Any],
    data: Mapping[str, Any],
    recipe: Mapping[str, Any],
    scores: Mapping[str, Any],
) -> str:
    """The README.md of the editor's folder: where it started, data, recipe and scores as tables.

    Values are told as they are; what is not known is left out by the caller.
    """
    parts = [_HEAD.format(version=version)]
    for title, facts in (
        ("Start", start),
        ("Data", data),
        ("Recipe", recipe),
        ("Scores", scores),
    ):
        rows = "".join(f"| {name} | {_cell(value)} |\n" for name, value in facts.items())
        parts.append(f"## {title}\n\n| | |\n|---|---|\n{rows}")
    return "\n".join(parts)


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.replace("|", "\\|").split())
