"""What requests may bring, and where the page may go: an ASGI middleware."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)
HEADERS = {
    b"content-security-policy": _POLICY.encode(),  # the browser asks no other site for anything
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}


class Shield:
    """Refuses bodies that are too large and uploads while too many lie about, and adds headers.

    Args:
        app: the application behind.
        max_body: bytes of a request.
        folder: where uploads lie until they are read.
        max_folder: bytes that may lie there.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], *, max_body: int, folder: Path, max_folder: int):
        self._app, self._max_body, self._folder, self._max_folder = app, max_body, folder, max_folder

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if int(dict(scope["headers"]).get(b"content-length", b"0") or 0) > self._max_body:
            await _say(send, 413, b"The request is too large.")
            return
        if scope["method"] == "POST" and scope["path"].endswith("/upload") and self._is_full():
            await _say(send, 503, b"Too many uploads at once: please try again in a minute.")
            return
        got = 0

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            return {"type": "http.disconnect"} if got > self._max_body else message

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS.items()]
            await send(message)

        await self._app(scope, counted, with_headers)

    def _is_full(self) -> bool:
        return sum(path.lstat().st_size for path in self._folder.rglob("*") if path.is_file()) > self._max_folder


async def _say(send: Send, status: int, text: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": text})
