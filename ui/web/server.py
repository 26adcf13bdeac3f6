"""Serve the page, with the headers and checks that restrict what is reachable."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tilewise.pipelines.errors import SetupError
from tilewise.ui.common.collections_paused import no_collections
from tilewise.ui.web.common.messages import LOG, error_message, log_unexpected
from tilewise.ui.web.common.safety import Address, Limits, check_outputs
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.jobs.models import Models
from tilewise.ui.web.live.routes import PREFIX, LiveRoutes

if TYPE_CHECKING:
    from tilewise.ui.web.jobs.shared_clips import SharedClips

# Nothing is fetched from elsewhere, nothing is sent elsewhere, and no other site may show the page in a frame.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; frame-ancestors 'none'; form-action 'self'"
)
SHOWN = (b"video/", b"image/png", b"image/webp", b"image/jpeg", b"image/gif")  # files that the page itself shows
UPLOAD = "64mb"  # of a clip whose settings are read, or of a list of prompts; uploads are swept


class Headers:
    """ASGI middleware: the policy on every answer, and no answer for other web sites that a visitor has open.

    On a local address, requests for another host's name are refused: a web site whose name was pointed at this machine would
    otherwise be the same origin as the page. On any address, requests that another site's page makes are refused, because
    uploads and calls would take effect although that page cannot read the answer.
    """

    def __init__(self, app: Any, local: bool) -> None:
        self.app, self.local = app, local

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self.local and not names_this_machine(headers.get("host", "")):
            await _refuse(send, 421, b"this page is for its own machine only")
            return
        # A live stream begins with a GET, which the pages of other sites can make too.
        method = "POST" if scope.get("path", "").startswith(PREFIX) else scope["method"]
        if from_another_site(method, headers):
            await _refuse(send, 403, b"this page answers no other web site")
            return

        async def told(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
                own = list(message["headers"])
                if must_be_saved(scope.get("path", ""), dict(own).get(b"content-type", b"")):
                    own = [header for header in own if header[0] != b"content-disposition"]
                    more.append((b"content-disposition", b"attachment"))
                message = {**message, "headers": [*own, *more]}
            await send(message)

        await self.app(scope, receive, told)


def must_be_saved(path: str, content_type: bytes) -> bool:
    """Whether an answer is a file that a browser must not show as a page of this site: it could act as whoever opened it."""
    is_file = re.search(r"/file[=/]", path) is not None
    return is_file and not content_type.startswith(SHOWN)


def names_this_machine(host: str) -> bool:
    """Whether a Host header is a name of this machine alone: localhost or a loopback address, with a port or without."""
    if set(host) & set("@/\\?#"):
        return False
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    return name is not None and Address(name, force=True).is_local


def from_another_site(method: str, headers: Mapping[str, str]) -> bool:
    """Whether the page of another site makes a request. Links from elsewhere are not meant: they carry no Origin.

    headers: names in lower case. Sec-Fetch-Site is the browser's own word, which no page can set; it also holds where a proxy
    gives the server another Host than the browser asked for, and where a form's Origin is "null" for our referrer policy.
    """
    site = headers.get("sec-fetch-site")
    if site in ("same-origin", "none"):
        return False
    if site in ("cross-site", "same-site") and method not in ("GET", "HEAD"):
        return True
    origin = headers.get("origin")
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
    except ValueError:
        return True


async def _refuse(send: Any, status: int, words: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": words})


@contextlib.contextmanager
def serving(
    model_names: Sequence[str],
    outputs: Path,
    address: Address,
    limits: Limits,
    *,
    device: str = "auto",
    dtype: str = "auto",
    libraries: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    shared: SharedClips | None = None,
) -> Iterator[str]:
    """Serves the page while the block runs; gives its URL. A job under way is interrupted at the end, and the list of jobs kept.

    libraries: a context for what is done with diffusers, entered before its models are imported. That may be after the page
    answers (see `Models`): it begins at once then, and plans and jobs wait for it.
    shared: where several processes make the clips; the others follow until this one closes the page.
    Raises ConfigError and SetupError before anything listens, for what cannot be: models, outputs, device.
    """
    folder = check_outputs(outputs)
    with contextlib.ExitStack() as stack:
        if shared is not None:
            stack.callback(shared.close)
        private = stack.enter_context(tempfile.TemporaryDirectory(prefix="tilewise-ui-"))
        stack.enter_context(_environment(private))
        with_libraries = stack.enter_context(contextlib.ExitStack())
        models = Models(model_names, device, dtype, lambda: with_libraries.enter_context(libraries()), shared)
        from tilewise.ui.web.page import Page, look, theme

        job_queue = JobQueue(
            limits.waiting, folder, refuses=lambda kind: None if shared is None else shared.refuses(kind)
        )
        stack.callback(models.unload)
        stack.callback(job_queue.close)
        built = Page(models, limits, job_queue, folder)
        page = built.blocks
        page.queue(max_size=None, default_concurrency_limit=None, api_open=False)
        from starlette.middleware import Middleware

        stack.callback(page.close, verbose=False)
        stack.callback(built.live.close)
        stack.callback(job_queue.close)  # before the page, whose streams say what became of the jobs
        _, url, _ = _launched(
            page,
            server_name=address.host,
            server_port=address.port or None,
            auth=address.auth,
            share=False,
            allowed_paths=[str(folder)],
            max_file_size=UPLOAD,
            show_error=False,
            footer_links=[],
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            quiet=True,
            inbrowser=False,
            prevent_thread_lock=True,
            theme=theme(),
            css=look("style.css"),
            head=built.head,
            app_kwargs={
                "middleware": [Middleware(Headers, local=address.is_local)],
                "routes": LiveRoutes(built.live, address.auth).routes,
            },
        )
        job_queue.start()  # not before it is sure that there will be a page
        importing = threading.Thread(target=make_skeletons, args=(models,), name="import", daemon=True)
        importing.start()
        stack.callback(importing.join)
        yield url


def make_skeletons(models: Models) -> None:
    """What plans and jobs need of all models. One that cannot be read is told in the log, and by the page where it is used."""
    with no_collections():
        for name in models.names:
            try:
                models.skeleton(name)
            except Exception as error:
                log_unexpected(error)
                LOG.warning("%s", error_message(error))


def _launched(page: Any, **options: Any) -> tuple[Any, str, str]:
    try:
        return page.launch(**options)
    except OSError as error:
        where = f"{options['server_name']}, port {options['server_port'] or 'any'}"
        raise SetupError(
            f"the page cannot listen on {where}: {error}; try another --port (0: any that is free)"
        ) from error


@contextlib.contextmanager
def _environment(private: str) -> Iterator[None]:
    """Gradio's switches: no telemetry, and what visitors upload goes to a folder of this process alone."""
    wanted = {"GRADIO_TEMP_DIR": private, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
