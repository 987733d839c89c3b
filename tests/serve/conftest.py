import contextlib

import httpx
import pytest

from ip2p_ray.editor import Editor, EditSettings
from ip2p_ray.testing import tiny_stable_diffusion
from tests.serve.running import serving

# httpx gives an answer 5 s else, which are short where much else runs.
for part in ("connect", "read", "write", "pool"):
    setattr(httpx.get.__kwdefaults__["timeout"], part, 120.0)


@pytest.fixture(scope="session")
def tiny_editor():
    """Of random weights, for pictures of 32 x 32; a step takes some 15 ms."""
    settings = EditSettings(steps=2, resolution=32, max_pixels=64 * 64)
    return Editor(tiny_stable_diffusion(in_channels=8), settings=settings)


@pytest.fixture(scope="session")
def service(tiny_editor):
    """The one with nothing configured, for all tests that leave it as it is."""
    with serving(tiny_editor) as running:
        yield running


@pytest.fixture
def start(tiny_editor):
    """Starts a service with a configuration of its own, until the end of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(serving(tiny_editor, **options))
