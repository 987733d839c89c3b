"""The server as a process: the first line it writes is its `base_url`."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from dataclasses import replace
from typing import Annotated

import tyro

from ip2p_ray.testing.server import Behaviour, Faults, FaultyServer


def main(
    behaviour: Annotated[Behaviour, tyro.conf.arg(name="")],
    fault_rate: float | None = None,
    port: int = 0,
) -> None:
    """Serves until it is ended.

    Args:
        behaviour: How it behaves.
        fault_rate: Share of requests that go wrong, every kind equally often.
        port: Where it listens; 0 is any that is free.
    """
    if fault_rate is not None:
        behaviour = replace(behaviour, faults=Faults.evenly(fault_rate))
    server = FaultyServer(behaviour, port=port)

    async def serve() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.url:
            await asyncio.sleep(0.01)
        sys.stdout.write(server.url + "\n")
        sys.stdout.flush()
        await serving

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())


if __name__ == "__main__":
    tyro.cli(main)
