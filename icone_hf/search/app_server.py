"""The server of the page: Gradio behind a gate, and two routes of our own.

GET  /image/ID         an image of the index, small, written anew as JPEG; /image/ID/large for a larger one
POST /upload           an image to search by; the answer is a token

The gate lets through what the page needs. Gradio's other routes, which serve files, fetch addresses and take uploads,
are closed, so that no path and no address in a request has an effect.
"""

import asyncio
import contextlib
import json
import re
import socket
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from .app import Page, build_app
from .app_terms import ROW
from .app_uploads import MOST_BYTES, decode_upload
from .gallery import Gallery, thumbnail

SMALL, LARGE = 384, 1280  # pixels of an image's longer side
KEPT_BYTES = 64_000_000  # of JPEG images that were made
DECODED_AT_A_TIME = 2  # images of the index
SENT_AT_A_TIME = 4  # a visitor's images, whose bytes are in memory
SECONDS_TO_SEND, SECONDS_TO_DROP = 60.0, 10.0
MOST_BYTES_OF_AN_EVENT = 200_000
MOST_CONNECTIONS = 800
_WORD = r"[\w.@-]+"
OPEN = {
    "GET": re.compile(
        rf"/|/image/\w+(/large)?|/(assets|static|svelte)/{_WORD}(/{_WORD})*|/theme\.css|/config/?|/favicon\.ico|"
        rf"/manifest\.json|/gradio_api/(queue/data|startup-events|theme\.css|heartbeat/\w+)"
    ),
    "POST": re.compile(r"/upload|/gradio_api/(queue/join/?|cancel|reset/?)"),
}
OPEN["HEAD"] = OPEN["GET"]
_PLAIN = (str, int, float, bool, type(None))
LOCAL = ("localhost", "127.0.0.1", "::1")
# Nothing is loaded from elsewhere. Gradio runs templates as functions ('unsafe-eval').
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; font-src 'self' data:; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; base-uri 'self'; form-action 'self'; object-src 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """Let through what the page needs.

    Args:
        app: behind it.
        is_local: whether only this machine's own names are right, so that no other site's page can ask in its place.
    """

    def __init__(self, app: Any, is_local: bool = False):
        self.app = app
        self.is_local = is_local

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer or refuse a request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self._refusal(scope, headers):
            await _answer(receive, send, *refusal)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *more]
            await send(message)

        if scope["path"].startswith("/gradio_api/queue/join"):
            event = await _event(receive)
            if event is None:
                await _answer(None, send, 400, "The event can't be read: load the page again.")
                return
            scope["headers"] = [pair for pair in scope["headers"] if pair[0].lower() != b"content-length"]
            scope["headers"].append((b"content-length", str(len(event)).encode()))
            receive = _once(event, receive)
        await self.app(scope, receive, send_with_headers)

    def _refusal(self, scope: Message, headers: dict[bytes, str]) -> tuple[int, str] | None:
        path, allowed = scope["path"], OPEN.get(scope["method"])
        if self.is_local and _name_of(headers.get(b"host", "")) not in LOCAL:
            return 421, "This page is for this machine alone: icone app --host opens it to others."
        if allowed is None or not allowed.fullmatch(path) or ".." in path:
            return 404, "There is nothing here."
        if scope["method"] == "POST":
            most = MOST_BYTES if path == "/upload" else MOST_BYTES_OF_AN_EVENT
            length = headers.get(b"content-length", "")
            if not length.isdecimal():
                return 411, "The request doesn't say how long it is."
            if int(length) > most:
                return 413, f"This has {int(length) / 1e6:,.1f} MB, and the limit is {most / 1e6:g}."
        return None


def _name_of(host: str) -> str:
    """Take the port off a host."""
    return re.sub(r":\d*$", "", host).strip("[]").lower()


async def _event(receive: Receive) -> bytes | None:
    """Read an event of the page.

    All that it says is texts and numbers. To Gradio a mapping may stand for a file or an address, and a server that
    another application mounts would copy what is there.

    Returns:
        It, written anew; `None` for what the page doesn't send.
    """
    body, more = b"", True
    while more:
        part = await receive()
        if part["type"] == "http.disconnect":
            return None
        body, more = body + part.get("body", b""), part.get("more_body", False)
    try:
        event = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("data"), list):
        return None
    said = event.get("event_data")
    values = [*event["data"], *(said.values() if isinstance(said, dict) else [said])]
    values += [value for name, value in event.items() if name not in ("data", "event_data")]
    return json.dumps(event).encode() if all(isinstance(value, _PLAIN) for value in values) else None


def _once(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read already."""
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_part() -> Message:
        return parts.pop() if parts else await receive()

    return next_part


async def _answer(receive: Receive | None, send: Send, status: int, message: str) -> None:
    """Refuse a request.

    A browser that is still sending would never read why, so what it sends is read first, and dropped.
    """
    from fastapi.responses import JSONResponse

    async def drop() -> None:
        dropped, more = 0, receive is not None
        while more and dropped < 2 * MOST_BYTES:
            part = await receive()  # type: ignore[misc]
            dropped, more = dropped + len(part.get("body", b"")), part.get("more_body", False)

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(drop(), SECONDS_TO_DROP)
    body = JSONResponse({"error": message}).body
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})


class Thumbnails:
    """Make images of an index small.

    The last ones are kept.

    Args:
        gallery: whose images they are.
    """

    def __init__(self, gallery: Gallery):
        self.gallery = gallery
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, one: str, side: int) -> bytes:
        """Return an image as JPEG.

        Raises:
            InputError: if there is none, or its file is gone or can't be decoded.
        """
        with self._lock:
            if (one, side) in self._kept:
                self._kept.move_to_end((one, side))
                return self._kept[one, side]
        made = thumbnail(self.gallery.open_image(self.gallery.row(one), side), side)
        with self._lock:
            if (one, side) not in self._kept:
                self._kept[one, side] = made
                self._bytes += len(made)
            while self._bytes > KEPT_BYTES:
                self._bytes -= len(self._kept.popitem(last=False)[1])
        return made


def make_server(gallery: Gallery, is_local: bool = False) -> Any:
    """Make the server, as an ASGI application.

    Args:
        gallery: to search.
        is_local: whether it answers to this machine's own names alone.

    Raises:
        MissingPackageError: if Gradio isn't installed.
    """
    page = Page(gallery)
    blocks = build_app(gallery, page)
    import gradio as gr
    from anyio import CapacityLimiter
    from anyio.to_thread import run_sync
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response

    server = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    thumbnails, decoding = Thumbnails(gallery), CapacityLimiter(DECODED_AT_A_TIME)
    embedding, sending = CapacityLimiter(1), asyncio.Semaphore(SENT_AT_A_TIME)

    async def image(one: str, side: int) -> Response:
        if not ROW.fullmatch(one):
            return JSONResponse({"error": "There is no such image."}, 404)
        try:
            made = await run_sync(thumbnails.get, one, side, limiter=decoding)
        except InputError:  # whose message says where it lies
            return JSONResponse({"error": "There is no such image, or its file can't be read any more."}, 404)
        # An id stands for the content, which never changes.
        return Response(made, media_type="image/jpeg", headers={"cache-control": "private, max-age=86400, immutable"})

    @server.get("/image/{one}")
    async def small(one: str) -> Response:
        return await image(one, SMALL)

    @server.get("/image/{one}/large")
    async def large(one: str) -> Response:
        return await image(one, LARGE)

    @server.post("/upload")
    async def upload(request: Request) -> Response:
        async with sending:
            try:
                content = await asyncio.wait_for(request.body(), SECONDS_TO_SEND)
                told = await run_sync(lambda: page.add_upload(decode_upload(content)), limiter=embedding)
            except (asyncio.TimeoutError, TimeoutError):
                return JSONResponse({"error": "The image took too long to arrive: try a smaller one."}, 408)
            except Exception as error:
                return JSONResponse({"error": page.told(error)}, 422 if isinstance(error, InputError) else 500)
        return JSONResponse(told)

    mounted = gr.mount_gradio_app(
        server,
        blocks,
        "/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=1,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(
            primary_hue="blue", font=gr.themes.Font("sans-serif"), font_mono=gr.themes.Font("monospace")
        ),
        # As `css`, Gradio would write selectors anew, and forget those within media queries.
        head=f"<style>{(Path(__file__).parent / 'app.css').read_text(encoding='utf-8')}</style>",
    )
    return Gate(mounted, is_local)


def serve(gallery: Gallery, host: str = "127.0.0.1", port: int = 7860, said: Callable[[str], None] = print) -> None:
    """Serve the page until an interruption.

    Args:
        gallery: to search. Its model is loaded first.
        host: an address of this machine. 0.0.0.0: all of them, so that others may come.
        port: 0 for any that is free.
        said: is told the page's address.

    Raises:
        InputError: for an address that can't be had, and a model that can't be loaded.
    """
    application = make_server(gallery, host in LOCAL)
    import uvicorn

    gallery.model  # noqa: B018
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port} can't be had: {error}. Choose another.") from error
    with listening:
        config = uvicorn.Config(
            application,
            log_level="warning",
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=3,
            server_header=False,
        )
        shown = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
        said(f"http://{shown}:{listening.getsockname()[1]}")
        uvicorn.Server(config).run(sockets=[listening])
