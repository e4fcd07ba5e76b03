"""What Ray Serve's HTTP proxies do beside routing: a request whose replica has died gets an answer.

Serve looks for `middlewares` where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH says, when it starts on a node.
"""

from __future__ import annotations

import msgspec
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvx.runtime.serving import schema

RETRY_SECONDS = 1
LOST = schema.Problem(
    title="Service Unavailable",
    status=503,
    detail="What was translating this has ended. Expected a replica that goes on. Send the request again.",
)


def middlewares() -> list[Middleware]:
    """For Serve."""
    return [Middleware(Answered)]


class Answered:
    """Answers 503, with the time to come back, where Serve gives up on a request without an answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        await self._app(scope, receive, noting)
        if scope["type"] == "http" and not begun:
            await _unanswered(send)


async def _unanswered(send: Send) -> None:
    form = msgspec.to_builtins(LOST) | {"error": LOST.detail}  # also for clients of LibreTranslate
    body = msgspec.json.encode(form)
    headers = {
        "content-type": "application/problem+json",
        "content-length": str(len(body)),
        "retry-after": str(RETRY_SECONDS),
        "cache-control": "no-store",
    }
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": LOST.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
