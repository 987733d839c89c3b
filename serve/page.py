"""The page of the editor: a client of the service's own API, for people.

    serve run serve/config.yaml                                    the page at /page/, with the rest
    python -m serve.page --server http://127.0.0.1:8000            the page alone, without Ray

It runs in one replica: Gradio keeps what visitors do in memory.
"""

import argparse
import os
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from ray.serve import Application

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

ROUTE = "/page"
MAX_ONGOING = 1000

POLICY = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    b"style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    b"connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    b"frame-ancestors 'self'"
)
"""Gradio writes scripts into its page and makes functions of strings; none comes from outside."""


HEADERS = [
    (b"content-security-policy", POLICY),
    (b"referrer-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
]
ICON = (
    '<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns=\'http://www.w3.org/2000/svg\' '
    "viewBox='0 0 16 16'%3E%3Crect width='16' height='16' rx='4' fill='%230d9488'/%3E"
    "%3Cpath d='M8 0h4a4 4 0 0 1 4 4v8a4 4 0 0 1-4 4H8z' fill='%23f59e0b'/%3E%3C/svg%3E\">"
)


class PageConfig(BaseModel):
    """Where the service is, and what the page tells of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    server: str = "http://127.0.0.1:8000"
    """Address of the service's API."""
    text_guidance_scale: float = Field(default=2.0, ge=1, le=15)
    """Where the setting stands at first, unless the service says otherwise; the miniature's."""
    image_guidance_scale: float = Field(default=1.5, ge=1, le=3)
    """As text_guidance_scale."""
    steps: int = Field(default=12, ge=1)
    """As text_guidance_scale."""
    max_steps: int = Field(default=100, ge=1)
    """The most that can be chosen."""
    max_upload: str = "20mb"
    """Size of the largest file."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds without a byte from the service after which an edit is given up."""


class OwnOriginOnly:
    """Keeps the browser from fetching anything from elsewhere.

    Every answer forbids it by its headers, and the page itself loses Gradio's own advertisements.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers as the app does, otherwise."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _is_foreign(scope):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"from another page"})
            return
        plain = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        began: Message = {}
        page = bytearray()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = message.get("headers", ())
                # Gradio lets any page from elsewhere in; this one is for its own origin
                kept = [pair for pair in given if not pair[0].lower().startswith(b"access-control")]
                message["headers"] = [*kept, *HEADERS]
                if _is_page(message["headers"]):
                    began.update(message)
                    return
            elif began:
                page.extend(message.get("body", b""))
                if message.get("more_body"):
                    return
                message["body"] = _own(bytes(page))
                length = (b"content-length", str(len(message["body"])).encode())
                kept = [pair for pair in began["headers"] if pair[0] != b"content-length"]
                await send({**began, "headers": [*kept, length]})
            await send(message)

        # a page that comes packed could not be read here; it is small, and asked for once
        await self._app(
            {**scope, "headers": plain} if _wants_page(scope) else scope, receive, sending
        )


def _is_foreign(scope: Scope) -> bool:
    """Whether a browser asks for what a page from elsewhere wants."""
    headers = dict(scope["headers"])
    origin = headers.get(b"origin")
    return origin is not None and origin.partition(b"://")[2] != headers.get(b"host")


def _wants_page(scope: Scope) -> bool:
    return any(name == b"accept" and b"text/html" in value for name, value in scope["headers"])


def _is_page(headers: list[tuple[bytes, bytes]]) -> bool:
    found = dict(headers)
    return b"text/html" in found.get(b"content-type", b"") and b"content-encoding" not in found


def _own(page: bytes) -> bytes:
    """The page with an icon of its own and without pictures and addresses of other hosts."""
    page = re.sub(rb"<meta\s+(?:property|name)=\"(?:og|twitter):[^>]*>\s*", b"", page)
    return page.replace(b"<head>", b"<head>" + ICON.encode(), 1)


def create_app(config: PageConfig, *, path: str = ROUTE) -> FastAPI:
    """The page as an ASGI application; `path` is "/" where what runs it takes ROUTE away."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import gradio as gr

    from ip2p_ray.remote_editor import RemoteEditor
    from serve import page_actions, page_layout

    editor = RemoteEditor(config.server, timeout_s=config.timeout_s)
    defaults = page_layout.Defaults(
        text_guidance_scale=config.text_guidance_scale,
        image_guidance_scale=config.image_guidance_scale,
        steps=config.steps,
        max_steps=config.max_steps,
    )
    page = page_actions.Page(editor, defaults)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(OwnOriginOnly)
    return gr.mount_gradio_app(
        app,
        page.blocks,
        path=path,
        root_path=ROUTE,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=config.max_upload,
        show_error=False,
        theme=page_layout.THEME,
        css=page_layout.CSS,
        head=page_layout.HEAD,
    )


def build(args: PageConfig) -> "Application":
    """The page as an application of Ray Serve, in one replica."""
    from ray import serve

    deployment = serve.deployment(
        name="Page",
        num_replicas=1,
        max_ongoing_requests=MAX_ONGOING,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},
    )
    return deployment(serve.ingress(lambda: create_app(args, path="/"))()).bind()


def main() -> None:
    """The page on uvicorn, for this machine alone, without Ray."""
    import uvicorn

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--server", default="http://127.0.0.1:8000", help="address of the API")
    parser.add_argument("--port", type=int, default=8001)
    asked = parser.parse_args()
    print(f"page: http://127.0.0.1:{asked.port}{ROUTE}/")
    app = create_app(PageConfig(server=asked.server))
    uvicorn.run(app, host="127.0.0.1", port=asked.port, log_level="warning")


if __name__ == "__main__":
    main()
