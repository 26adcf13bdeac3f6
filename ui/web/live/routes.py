"""Live streams over HTTP, for the page and for programs: a fragmented mp4 as a chunked answer, its state, and its controls.

    GET  /live.mp4?prompt=…            begins a stream, and is its video; the header X-Stream says what it is called
    GET  /live/NAME.mp4                the video of one that goes on, from now on
    GET  /live/NAME                    its state, JSON; ?at=SECONDS says how far a page has shown it
    POST /live/NAME/prompt             another prompt from the next chunk on: the body, as text
    POST /live/NAME/pause, resume, stop, save

`server.py` refuses requests of other web sites to all of them.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import math
from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tilewise.pipelines.generation.settings import MAX_PROMPT
from tilewise.plugins.errors import TilewiseError
from tilewise.ui.web.common.messages import error_message, log_unexpected
from tilewise.ui.web.common.safety import RefusedError
from tilewise.ui.web.jobs.job import ENDED
from tilewise.ui.web.live.hub import LiveHub
from tilewise.ui.web.live.live_stream import TICK, LiveStream
from tilewise.ui.web.live.pieces import Reader
from tilewise.ui.web.live.requests import asked_of, check_prompt

PREFIX = "/live"


class LiveRoutes:
    """The routes, as `routes`. auth: (user, password) that the page asks for, or None."""

    def __init__(self, hub: LiveHub, auth: tuple[str, str] | None) -> None:
        self.hub, self.auth = hub, auth
        self.routes = [
            _route(".mp4", "GET", self._for_users(self.begin)),
            _route("/{name}.mp4", "GET", self._for_users(self.video)),
            _route("/{name}", "GET", self._for_users(self.state)),
            _route("/{name}/{action}", "POST", self._for_users(self.act)),
        ]

    async def begin(self, request: Request) -> Response:
        """Begins a stream, and gives its video."""

        def start() -> LiveStream:
            return self.hub.start(asked_of(request.query_params, self.hub.models))

        live = await run_in_threadpool(start)
        return await self._answer(request, live, began=True)

    async def video(self, request: Request) -> Response:
        return await self._answer(request, self._found(request), began=False)

    async def state(self, request: Request) -> Response:
        live = self._found(request)
        at = _seconds(request.query_params.get("at"))
        if at is not None:
            live.seen(at)
        return JSONResponse(live.state(self.hub.job_queue.ahead(live.job)))

    async def act(self, request: Request) -> Response:
        name, action = request.path_params["name"], request.path_params["action"]
        if action == "save":
            return JSONResponse({"saved": await run_in_threadpool(self.hub.save, name)})
        live = self._found(request)
        if action == "prompt":
            prompt = await _text(request)
            check_prompt(prompt)
            live.set_prompt(prompt.strip())
        elif action in ("pause", "resume"):
            live.pause(action == "pause")
        elif action == "stop":
            live.stop()
            self.hub.job_queue.cancel(name)
        else:
            raise _NotFoundError(f"there is no action {action[:40]!r}: prompt, pause, resume, stop, save")
        return JSONResponse(live.state(self.hub.job_queue.ahead(live.job)))

    def _found(self, request: Request) -> LiveStream:
        name = request.path_params["name"]
        if (live := self.hub.find(name)) is None:
            raise _NotFoundError(f"there is no stream {name[:40]!r} under way")
        return live

    async def _answer(self, request: Request, live: LiveStream, *, began: bool) -> Response:
        """The video, when its first bytes are there; before that, what went wrong can still be said."""
        reader = live.pieces.reader()
        try:
            first = await self._first(request, live, reader)
        except BaseException:
            reader.close()
            raise
        if first is None:
            reader.close()
            if began and live.job.status not in ENDED:  # the program has gone while its stream waited
                self.hub.job_queue.cancel(live.job.id)
            return PlainTextResponse(live.job.error or "the stream has ended", 500 if live.job.error else 410)
        return _Video(reader, first, live.job.id)

    async def _first(self, request: Request, live: LiveStream, reader: Reader) -> bytes | None:
        """The first piece; None if the stream ends without one, or nobody waits for it any more."""
        coming = asyncio.ensure_future(reader.next())
        try:
            while not coming.done():
                await asyncio.wait({coming}, timeout=TICK)
                if live.job.status in ENDED:
                    live.pieces.end()  # one that was cancelled while it waited
                if not coming.done() and await request.is_disconnected():
                    return None
            return coming.result()
        finally:
            coming.cancel()

    def _for_users(self, answer: Callable[[Request], Any]) -> Callable[[Request], Any]:
        """An endpoint that asks for the page's password, and says what is wrong."""

        async def endpoint(request: Request) -> Response:
            if not self._is_user(request):
                return PlainTextResponse("a password is needed", 401, {"www-authenticate": 'Basic realm="tilewise"'})
            try:
                response: Response = await answer(request)
                return response
            except Exception as error:
                log_unexpected(error)
                status = 404 if isinstance(error, _NotFoundError) else 409 if isinstance(error, RefusedError) else 400
                return PlainTextResponse(
                    f"{error_message(error)}\n", status if isinstance(error, TilewiseError) else 500
                )

        return endpoint

    def _is_user(self, request: Request) -> bool:
        """Whether a request comes from somebody who is logged in to the page, or has its password (HTTP Basic)."""
        if self.auth is None:
            return True
        app = request.app
        for kind in ("access-token", "access-token-unsecure"):
            if request.cookies.get(f"{kind}-{app.cookie_id}") in app.tokens:
                return True
        scheme, _, told = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            given = base64.b64decode(told, validate=True)
        except (binascii.Error, ValueError):
            return False
        return hmac.compare_digest(given, ":".join(self.auth).encode())


def _route(path: str, method: str, endpoint: Callable[[Request], Any]) -> Route:
    route = Route(PREFIX + path, endpoint)
    route.methods = {method}  # and not HEAD, which would begin a stream too
    return route


class _NotFoundError(TilewiseError):
    pass


class _Video(Response):
    """A chunked answer that ends when the stream does, or lets the reader go as soon as the connection is closed."""

    media_type = "video/mp4"

    def __init__(self, reader: Reader, first: bytes, name: str) -> None:
        super().__init__()
        self.reader, self.first = reader, first
        del self.headers["content-length"]
        self.headers.update({"cache-control": "no-store", "x-stream": name, "x-accel-buffering": "no"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            piece: bytes | None = self.first
            while piece is not None and not gone.done():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                coming = asyncio.ensure_future(self.reader.next())
                try:
                    await asyncio.wait({coming, gone}, return_when=asyncio.FIRST_COMPLETED)
                    piece = coming.result() if coming.done() else None
                finally:
                    coming.cancel()
            if not gone.done():
                await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            self.reader.close()


async def _disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _text(request: Request) -> str:
    """The body; a prompt has four bytes a character at most. Raises RefusedError for a longer one."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > 4 * MAX_PROMPT:
            raise RefusedError(f"a prompt has at most {MAX_PROMPT:,} characters")
    return body.decode(errors="replace")


def _seconds(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
