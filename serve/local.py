"""The same HTTP API on one process, without Ray: for tests, and to develop against.

python -m serve.local --port 8000
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI

from ip2p_ray.editor import Editor
from ip2p_ray.engine import EngineConfig
from serve.api import ApiConfig, create_api
from serve.engine_editing import EngineEditing
from serve.keys import Keys


@dataclass(frozen=True, kw_only=True)
class Local:
    """The API with an engine in the same process."""

    model: str | None = None
    """Folder or hub id of an editor; by default the miniature's."""
    host: str = "127.0.0.1"
    """Where to listen."""
    port: int = 8000
    batch_size: int = 8
    max_waiting: int = 64


def local_api(editor: Editor, config: ApiConfig, engine: EngineConfig | None = None) -> FastAPI:
    """The ASGI application; its engine ends with it."""
    editing = EngineEditing(editor, engine or EngineConfig())
    app = create_api(config, editing)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await editing.close()

    app.router.lifespan_context = lifespan
    return app


def main(job: Local) -> None:
    """Serves until it is stopped."""
    import uvicorn

    from ip2p_ray.miniature import weights

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    editor = weights.load_editor() if job.model is None else Editor.load(job.model)
    engine = EngineConfig(batch_size=job.batch_size, max_waiting=job.max_waiting)
    name = "miniature" if job.model is None else job.model
    config = ApiConfig(model=name, keys=Keys.from_environment())
    uvicorn.run(
        local_api(editor, config, engine), host=job.host, port=job.port, log_level="warning"
    )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Local))
