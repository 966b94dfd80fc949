"""What may be requested and what requests may bring, and where the page may go: an ASGI middleware."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from minference_jax.demo.visitors import Visitors

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    b"content-security-policy": _POLICY.encode(),  # the browser asks no other site for anything
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}


_GET = re.compile(
    r"/(config/?|favicon\.ico|theme\.css|robots\.txt|manifest\.json|(assets|static|svelte)/.*)?|"
    r"/gradio_api/(startup-events|queue/data|upload_progress|heartbeat/[^/]*)"
)
_POST = re.compile(r"/gradio_api/(queue/join|run/predict|upload|cancel|reset)/?")
_STREAM = "/gradio_api/queue/data"  # on which a page hears what happens to its events
_EVENT = "/gradio_api/queue/join"
_STRAY_SECONDS = 60


class Shield:
    """Lets through what the page asks for and nothing else that Gradio offers, bounds what it brings, adds headers.

    Refused: other addresses, bodies that are too large, files that were not uploaded here, uploads while too many lie
    about.

    Args:
        app: the application behind.
        max_body: bytes of a request.
        folder: where uploads lie until they are read.
        max_folder: bytes that may lie there.
        visitors: is told who listens.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        *,
        max_body: int,
        folder: Path,
        max_folder: int,
        visitors: Visitors,
    ):
        self._app, self._max_body, self._folder, self._max_folder = app, max_body, folder, max_folder
        self._visitors = visitors

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http":
            await self._request(scope, receive, send)
        elif scope["type"] == "lifespan":  # no websockets: the page has none
            await self._app(scope, receive, send)

    async def _request(self, scope: Message, receive: Receive, send: Send) -> None:
        allowed = {"GET": _GET, "HEAD": _GET, "POST": _POST}.get(scope["method"])
        if allowed is None or not allowed.fullmatch(scope["path"]):
            await _say(send, scope, 404, "There is no such page here.")
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body:
            await _say(send, scope, 413, "This is more text than the demo reads: shorten it.")
            return
        is_upload = "/upload" in scope["path"] and scope["method"] == "POST"
        if is_upload and await asyncio.to_thread(self._is_full):
            await _say(send, scope, 503, "Too many uploads at once: please try again in a minute.")
            return
        received = self._counted(receive)
        if scope["method"] == "POST" and not is_upload:
            body = await _whole(received)
            if body is None or not await asyncio.to_thread(self._brings_own_files_only, body):
                said = "The request is broken, too large, or names a file that was not uploaded here."
                await _say(send, scope, 400, said)
                return
            received = _again(body, receive)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS.items()]
            await send(message)

        with self._listening(scope):
            await self._app(scope, received, with_headers)

    def _listening(self, scope: Message) -> AbstractContextManager[None]:
        if scope["path"] != _STREAM:
            return nullcontext()
        visitor = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("session_hash", [""])[0]
        return self._visitors.listening(visitor)

    def _counted(self, receive: Receive) -> Receive:
        """The same messages, as if the client had gone where they are too much."""
        got = 0

        async def counted() -> Message:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            return {"type": "http.disconnect"} if got > self._max_body else message

        return counted

    def _brings_own_files_only(self, body: bytes) -> bool:
        """Whether it is JSON in which every file is one in the folder: Gradio would fetch others, from anywhere."""
        try:
            waiting = [json.loads(body)] if body else []
        except (ValueError, RecursionError):
            return False
        while waiting:
            value = waiting.pop()
            if isinstance(value, dict):
                if "path" in value and not is_inside(value["path"], self._folder):
                    return False
                waiting += value.values()
            elif isinstance(value, list):
                waiting += value
        return True

    def _is_full(self) -> bool:
        remove_strays(self._folder)
        return sum(map(_size, self._folder.rglob("*"))) > self._max_folder


def is_inside(path: Any, folder: Path) -> bool:
    """Whether this is the path of a file in a folder, which may be gone by now."""
    if not isinstance(path, str) or "\0" in path:
        return False
    found = Path(path).resolve()
    return folder.resolve() in found.parents and not found.is_dir()


def remove_strays(folder: Path) -> None:
    """Removes what has lain in the folder for a minute: uploads broken off or never read, and folders left empty."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what lies in a folder comes before it
        try:
            if time.time() - path.stat().st_mtime < _STRAY_SECONDS:  # it may be in use
                continue
            if not path.is_dir():
                path.unlink()
            elif not any(path.iterdir()):
                path.rmdir()
        except OSError:  # another request was faster
            continue


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size if path.is_file() else 0
    except FileNotFoundError:  # it was read, and is gone
        return 0


async def _whole(receive: Receive) -> bytes | None:
    """The body; None where the client went away before its end."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read, then what comes behind it."""
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return parts.pop() if parts else await receive()

    return replayed


async def _say(send: Send, scope: Message, status: int, text: str) -> None:
    """A sentence, in the form in which Gradio's page shows it: of an event an object, of an upload the text."""
    is_event = scope["path"].startswith(_EVENT)
    body, kind = (json.dumps({"detail": text}), b"application/json") if is_event else (text, b"text/plain")
    headers = [(b"content-type", kind), *HEADERS.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})
