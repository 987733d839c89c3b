"""What this package's tests, and yours, run against instead of the real thing.

    models     small models with random weights, and kills
    generator  candidates with made-up scores
    buckets    a server that speaks S3, and a way to it on which requests go wrong
    server     an OpenAI-compatible server that goes wrong on purpose; `python -m ip2p_ray.testing`
    service    an editing service without a model, which goes wrong when it is told to

Names are imported from here; what needs torch is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ip2p_ray.testing.buckets import FaultyWay, WayFaults, bucket_process
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
    from ip2p_ray.testing.service import FakeService, ServiceBehaviour

__all__ = [
    "PIECES",
    "WORDS",
    "Behaviour",
    "Counts",
    "FakeService",
    "Faults",
    "FaultyServer",
    "FaultyWay",
    "ScriptedGenerator",
    "ServiceBehaviour",
    "WayFaults",
    "bucket_process",
    "edit",
    "faulty_process",
    "killed_at",
    "stable_diffusion_1_5",
    "tiny_scheduler_config",
    "tiny_stable_diffusion",
    "tiny_tokenizer",
]

_MODULES = {
    **dict.fromkeys(("FaultyWay", "WayFaults", "bucket_process"), "buckets"),
    "ScriptedGenerator": "generator",
    **dict.fromkeys(("Behaviour", "Counts", "Faults", "FaultyServer"), "server"),
    **dict.fromkeys(("edit", "faulty_process"), "server"),
    **dict.fromkeys(("FakeService", "ServiceBehaviour"), "service"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'models')}"), name)
