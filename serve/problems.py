"""Errors in the shape in which OpenAI's API tells them."""

from __future__ import annotations

import math
from typing import Any

from fastapi.responses import JSONResponse


class Problem(Exception):  # noqa: N818 not every answer that is not 200 is an error of ours
    """Ends a request with a status and a sentence."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.message = _printable(message)
        self.param = None if param is None else _printable(param[:100])
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """As JSON can express it."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        usual = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kind.get(self.status, usual),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def reason(self) -> str:
        """A word for it, for counters."""
        return self.code or f"status_{self.status}"

    def response(self) -> JSONResponse:
        """What is answered."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def _printable(text: str) -> str:
    """The text, with what no encoding can express escaped: some of it may be the sender's."""
    return text.encode("utf-8", "backslashreplace").decode()


def retry_after(seconds: float) -> dict[str, str]:
    """The header that says when to come again: whole seconds, at least one."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}
