"""What this package's tests, and yours, run against instead of the real thing.

    models     small models with random weights, and kills
    generator  candidates with made-up scores
    server     an OpenAI-compatible server that goes wrong on purpose; `python -m ip2p_ray.testing`

Names are imported from here; what needs torch is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ip2p_ray.testing.generator import ScriptedGenerator
    from ip2p_ray.testing.models import (
        PIECES,
        WORDS,
        killed_at,
        stable_diffusion_1_5,
        tiny_scheduler_config,
        tiny_stable_diffusion,
        tiny_tokenizer,
    )
    from ip2p_ray.testing.server import (
        Behaviour,
        Counts,
        Faults,
        FaultyServer,
        edit,
        faulty_process,
    )

__all__ = [
    "PIECES",
    "WORDS",
    "Behaviour",
    "Counts",
    "Faults",
    "FaultyServer",
    "ScriptedGenerator",
    "edit",
    "faulty_process",
    "killed_at",
    "stable_diffusion_1_5",
    "tiny_scheduler_config",
    "tiny_stable_diffusion",
    "tiny_tokenizer",
]

_OF_THE_SERVER = {"Behaviour", "Counts", "Faults", "FaultyServer", "edit", "faulty_process"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "server" if name in _OF_THE_SERVER else "models"
    module = "generator" if name == "ScriptedGenerator" else module
    return getattr(import_module(f"{__name__}.{module}"), name)
