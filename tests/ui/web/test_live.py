"""Live streams over HTTP, as programs use them, and the pieces that readers share."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from urllib.parse import urlencode, urlsplit

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the page needs Gradio: pip install -e '.[ui]'")

from tilewise.pipelines.batch.manifest import read_manifest
from tilewise.pipelines.media.video import read_frames
from tilewise.ui.web.common.safety import Limits
from tilewise.ui.web.jobs.job_queue import JobQueue
from tilewise.ui.web.jobs.models import Models
from tilewise.ui.web.live.hub import LiveHub
from tilewise.ui.web.live.pictures import source_svg
from tilewise.ui.web.live.pieces import Pieces
from tilewise.ui.web.live.requests import asked_of
from tilewise.ui.web.live.routes import LiveRoutes

RED, GREEN = (f"a {colour} circle moving right on a blue background" for colour in ("red", "green"))
TINY = {"prompt": RED, "height": 32, "width": 32, "seed": 3}


@contextlib.contextmanager
def asked(
    url: str, path: str, method: str = "GET", body: str | None = None, **headers: str
) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, f"/{path}", body, headers)
        yield connection.getresponse()


def told(url: str, path: str, method: str = "GET", body: str | None = None, **headers: str) -> tuple[int, str]:
    with asked(url, path, method, body, **headers) as answer:
        return answer.status, answer.read().decode()


def test_a_program_streams(url, outputs, tmp_path):
    """One story, on one server and one model."""
    with asked(url, f"live.mp4?{urlencode({**TINY, 'seconds': 2})}") as answer:
        assert (answer.status, answer.headers["content-type"]) == (200, "video/mp4")
        name = answer.headers["x-stream"]
        (tmp_path / "a.mp4").write_bytes(answer.read())
    assert read_frames(tmp_path / "a.mp4").shape == (16, 32, 32, 3)
    state = json.loads(told(url, f"live/{name}")[1])
    assert (state["status"], state["frames"], state["fps"]) == ("done", 16, 8)
    assert state["source"]["kind"] == "cache" and "<svg" in state["picture"]
    # saved, it is in the outputs and says how it was made
    saved = json.loads(told(url, f"live/{name}/save", "POST")[1])["saved"]
    assert np.array_equal(read_frames(outputs / saved), read_frames(tmp_path / "a.mp4"))
    (line,) = read_manifest(outputs / "live").values()
    assert line["run"]["stream"]["settings"]["seconds"] == 2 and line["frames"] == 16
    # another one: its prompt is changed; nobody else can begin one beside it; its end is the program's
    with asked(url, f"live.mp4?{urlencode(TINY)}") as answer:
        name = answer.headers["x-stream"]
        assert told(url, f"live/{name}/prompt", "POST", "  ")[0] == 400
        assert told(url, f"live/{name}/prompt", "POST", GREEN)[0] == 200
        status, words = told(url, f"live.mp4?{urlencode(TINY)}")
        assert status == 409 and "one at a time" in words
        while [prompt for _, prompt in json.loads(told(url, f"live/{name}")[1])["prompts"]] != [RED, GREEN]:
            assert answer.read1(1 << 16)
        assert told(url, f"live/{name}/save", "POST")[0] == 400  # it goes on
        with asked(url, f"live/{name}.mp4") as joined:  # a second reader begins with the header
            assert joined.read(8)[4:] == b"ftyp"
    closed = time.monotonic()
    while json.loads(told(url, f"live/{name}")[1])["status"] == "running":
        assert time.monotonic() - closed < 20
        time.sleep(0.05)
    unsaved = list((outputs / "live" / ".unsaved").iterdir())
    assert len(unsaved) == 1
    with asked(url, f"live/{name}.mp4") as late:  # what is left of it
        assert late.read(8)[4:] == b"ftyp"


def test_a_server_that_stops_interrupts_its_stream(tmp_path):
    models = Models(["demo"], device="cpu")
    queue = JobQueue(2, tmp_path)
    hub = LiveHub(models, Limits(), queue, tmp_path)
    queue.start()
    live = hub.start(asked_of({name: str(value) for name, value in TINY.items()}, models))
    live.grace = 60
    begun = time.monotonic()
    while not live.state(None).get("frames"):
        assert time.monotonic() - begun < 60 and live.job.error is None
        time.sleep(0.02)
    queue.close()
    hub.close()
    assert live.job.status == "interrupted" and live.pieces.ended
    assert not list((tmp_path / "live").glob(".unsaved/*"))


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ({}, 400, "there is no prompt"),
        ({**TINY, "height": 7}, 400, "multiple of"),
        ({**TINY, "colour": "red"}, 400, "unknown option of a live stream 'colour'"),
        ({**TINY, "causal": "/etc/passwd"}, 400, "unknown option of a live stream 'causal'"),
        ({**TINY, "decode_device": "cuda:1"}, 400, "unknown option"),
        ({**TINY, "model": "/etc"}, 409, "not started with the model"),
        ({**TINY, "method": "/etc/passwd"}, 400, "no method or preset"),
        ({**TINY, "seconds": 10_000}, 409, "at most 3,600 seconds"),
        ({**TINY, "height": 4096, "width": 4096}, 409, "what this page was started for"),
    ],
)
def test_what_is_refused(url, query, status, words):
    found, said = told(url, f"live.mp4?{urlencode(query)}")
    assert (found, words in said) == (status, True), said


def test_other_sites_and_unknown_names(url):
    query = f"live.mp4?{urlencode(TINY)}"
    assert told(url, query, **{"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert told(url, query, Host="evil.example")[0] == 421
    assert told(url, query, "HEAD")[0] == 405
    assert told(url, "live/abc")[0] == told(url, "live/abc.mp4")[0] == told(url, "live/abc/stop", "POST")[0] == 404


def test_a_password_is_asked_for():
    app = SimpleNamespace(cookie_id="x", tokens={"right": "user"})
    routes = LiveRoutes(None, ("user", "word"))

    def is_user(password: str = "", cookie: str = "", scheme: str = "Basic") -> bool:
        told = base64.b64encode(password.encode()).decode()
        headers = {"authorization": f"{scheme} {told}"} if password else {}
        cookies = {"access-token-x": cookie} if cookie else {}
        return routes._is_user(SimpleNamespace(app=app, headers=headers, cookies=cookies))

    assert is_user("user:word") and is_user(cookie="right")
    assert not (is_user() or is_user("user:other") or is_user(cookie="wrong") or is_user("user:word", scheme="Bearer"))


def read_all(pieces: Pieces, got: list[bytes]) -> None:
    async def read() -> None:
        reader = pieces.reader()
        while (piece := await reader.next()) is not None:
            got.append(piece)
        reader.close()

    asyncio.run(read())


def test_readers_get_whole_pieces_and_hold_the_encoder_back():
    pieces, first = Pieces(most=100), []
    pieces.put(b"header")
    pieces.put(b"0" * 60)
    blocked = threading.Thread(target=lambda: [pieces.put(bytes([n]) * 60) for n in range(3)])
    reading = threading.Thread(target=read_all, args=(pieces, first))
    reading.start()
    while len(first) < 2:
        time.sleep(0.01)
    blocked.start()
    blocked.join(10)
    assert not blocked.is_alive()
    late: list[bytes] = []
    joined = threading.Thread(target=read_all, args=(pieces, late))
    joined.start()
    while len(late) < 3:
        time.sleep(0.01)
    pieces.put(b"last")
    pieces.end()
    for thread in (reading, joined):
        thread.join(10)
    assert first == [b"header", b"0" * 60, *(bytes([n]) * 60 for n in range(3)), b"last"]
    assert late == [b"header", bytes([1]) * 60, bytes([2]) * 60, b"last"]  # the newest two
    assert pieces.left is not None


def test_a_reader_that_does_not_read_is_waited_for_until_the_end_is_near():
    pieces = Pieces(most=100)

    async def idle() -> None:
        reader = pieces.reader()
        pieces.put(b"header")
        pieces.put(b"0" * 90)
        waits = threading.Thread(target=pieces.put, args=(b"1" * 90,))
        waits.start()
        waits.join(0.2)
        assert waits.is_alive()
        pieces.hurry()
        waits.join(10)
        assert not waits.is_alive()
        reader.close()

    asyncio.run(idle())


def test_a_picture_of_noise():
    svg = source_svg({"kind": "noise", "levels": [[0.0, 0.5, 1.0]] * 2, "passes": [0, 7]})
    assert svg.count("<rect") == 6 and "before pass 8, latent frame 2 of the window: 0.50" in svg
    assert svg.count('fill-opacity="0.500"') == 2
