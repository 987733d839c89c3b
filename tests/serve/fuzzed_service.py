"""A service in a process of its own, so that its memory is nobody else's.

python -m tests.serve.fuzzed_service [leaky]

Writes its port, and for every line that it reads how many bytes of memory it holds; ends with its
input. With `leaky` it keeps every picture that was sent, as no service should.
"""

import ctypes
import gc
import sys

import psutil

from ip2p_ray.editor import Editor, EditSettings
from ip2p_ray.engine import EngineConfig
from ip2p_ray.testing import tiny_stable_diffusion
from serve.api import ApiConfig, create_api
from serve.engine_editing import EngineEditing
from serve.form import Limits
from tests.serve.running import listening

LIMITS = Limits(body_bytes=300_000, steps=3, previews=3, deadline_s=120.0)


class Leaky(EngineEditing):
    """Keeps what it is sent."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._kept = []

    async def edit(self, order):
        self._kept.append(bytearray(order.image))
        return await super().edit(order)


def held():
    """Bytes that are held, after what is free was given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def tell(number):
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def main():
    settings = EditSettings(steps=1, resolution=16, max_pixels=32 * 32)
    editor = Editor(tiny_stable_diffusion(in_channels=8), settings=settings)
    # what is kept on purpose fills soon, or it would look like a leak
    engine = EngineConfig(cache_bytes=2**18)
    editing = (Leaky if "leaky" in sys.argv else EngineEditing)(editor, engine)
    with listening(create_api(ApiConfig(model="tiny", limits=LIMITS), editing)) as port:
        tell(port)
        for _ in sys.stdin:
            tell(held())
    editing.engine.close(drain=False)


if __name__ == "__main__":
    main()
