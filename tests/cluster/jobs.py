"""The flags of jobs, parsed as the jobs do it, without running them."""

import functools
import importlib.util
import sys
from typing import Any

import tyro

from tests.cluster.manifests import ROOT


@functools.cache
def _flags_of(script: str) -> Any:
    """The dataclass that the script's main takes."""
    path = ROOT / script
    spec = importlib.util.spec_from_file_location(f"job_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where tyro looks annotations up
    spec.loader.exec_module(module)
    return getattr(module, module.main.__annotations__["job"])


def parsed(script: str, flags: list[str]) -> Any:
    """The flags as the job would hold them, after its own checks of them."""
    return tyro.cli(_flags_of(script), args=flags, config=(tyro.conf.FlagCreatePairsOff,))
