"""The live tab in a real browser: a stream of the bundled model plays while it is made."""

from __future__ import annotations

import contextlib
import json
import re
import time
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
import pytest
from page_visitor import Visitor, expect

from tilewise.pipelines.batch.manifest import read_manifest
from tilewise.pipelines.quality.content_detection import ClipContent, analyse
from tilewise.ui.web.common.safety import Address, Limits
from tilewise.ui.web.server import serving

RED, GREEN = (f"a {colour} circle moving right on a blue background" for colour in ("red", "green"))
TINY = {"height": 32, "width": 32, "seed": 3, "prompt": RED, "fps": 4}  # made faster than it is played, on a CPU too
# Watches as fast as frames come.
LEAP = """() => setInterval(() => {
  const video = document.querySelector('#live-video'), all = video.buffered;
  if (all.length && all.end(0) - 1 > video.currentTime) video.currentTime = all.end(0) - 1;
}, 100)"""
VIDEO = "const video = document.querySelector('#live-video');"
# Pictures of the playing video, RGBA: what somebody sees in 1.2 seconds.
SEEN = f"""async () => {{
  {VIDEO} const canvas = document.createElement('canvas'), all = [];
  canvas.width = video.videoWidth; canvas.height = video.videoHeight;
  for (let i = 0; i < 8; i++) {{
    const context = canvas.getContext('2d');
    context.drawImage(video, 0, 0);
    all.push(Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data));
    await new Promise((later) => setTimeout(later, 150));
  }}
  return all;
}}"""


def playing(page) -> None:
    """Waits until the video moves on from where it is."""
    page.wait_for_function(
        f"() => {{ {VIDEO} if (!video || video.error) return false; window.from ??= video.currentTime;"
        " return video.currentTime > window.from + 0.5 && !video.paused; }"
    )


def stream(page) -> str:
    """What the stream that a page shows is called."""
    return re.search(r"job-live=(\w+)", page.url)[1]


def state(url: str, name: str) -> dict:
    with urlopen(f"{url}live/{name}", timeout=30) as answer:
        return dict(json.load(answer))


def another_plays(page) -> None:
    begun = """(last) => {
      if (!location.search.includes(last)) return true;
      document.querySelector('#live-start')?.click();
    }"""
    last = page.evaluate("() => new URLSearchParams(location.search).get('job-live')")
    # Again where a click is lost, as while the page builds itself anew for its server; the button is off once one is not.
    page.wait_for_function(begun, arg=last, polling=2000)
    page.evaluate("window.from = undefined")
    playing(page)


def seen(page) -> ClipContent:
    """What the detector finds in the pixels that the page shows now."""
    frames = np.array(page.evaluate(SEEN), np.uint8)
    return analyse(frames.reshape(len(frames), TINY["height"], TINY["width"], 4)[..., :3])


@contextlib.contextmanager
def served(outputs, port: int = 0):
    with serving(["demo"], outputs, Address(port=port), Limits(work=64 * 64 * 9 * 1000, waiting=2)) as url:
        yield url


@pytest.fixture
def visitor(browser):
    """Without a look at the console: Gradio complains there when a page is reloaded while a job goes on."""
    made = []

    def visit(url: str) -> Visitor:
        made.append(Visitor(browser, url))
        return made[-1]

    yield visit
    for one in made:
        one.context.close()


def test_a_stream_plays_and_changes_and_is_saved(visitor, outputs):
    """One story, as each page that is opened costs seconds."""
    with served(outputs) as url:
        page = a_stream_is_changed_and_saved(visitor(url), url, outputs)
        another_plays(page)
    with served(outputs, urlsplit(url).port):
        # the page comes back by itself, and says what became of its stream; the next one plays
        expect(page.locator("#live-status")).to_contain_text("interrupted: the server stopped")
        another_plays(page)
        a_closed_tab_ends_its_stream(page, url)


def a_stream_is_changed_and_saved(visitor, url, outputs):
    page = visitor.open(tab="live", **TINY)
    page.locator("#live-start").click()
    playing(page)
    expect(page.locator("#live-numbers")).to_contain_text("latents in the cache")
    expect(page.locator("#live-picture .tw-sink")).to_have_count(3)
    # another prompt, which a mark on the time-line shows
    visitor.fill("prompt", GREEN)
    page.locator("[data-live=prompt]").click()
    expect(page.locator(".tw-timeline u")).to_have_count(1)
    expect(page.locator("#live-numbers")).to_contain_text(GREEN)
    # pause: nothing more is made
    page.locator("[data-live=pause]").click()
    expect(page.locator("[data-live=pause]")).to_have_text("Go on")
    page.wait_for_function(f"() => {{ {VIDEO} return video.paused; }}")
    page.wait_for_timeout(500)  # for the chunk under way
    before = state(url, stream(page))["frames"]
    page.wait_for_timeout(500)
    assert state(url, stream(page))["frames"] == before
    page.locator("[data-live=pause]").click()
    # what was shown long ago is taken out of the buffer
    page.evaluate(LEAP)
    page.wait_for_function(f"() => {{ {VIDEO} return video.buffered.length && video.buffered.start(0) > 0; }}")
    # the new prompt is what somebody sees
    assert "green" in {thing.colour for thing in seen(page).objects}
    # a second tab starts none of its own while this one is made, and its visit ends nothing
    second = visitor.new_page()
    visitor.open(tab="live", **TINY)
    second.locator("#live-start").click()
    expect(second.locator("#live-status").get_by_role("alert")).to_contain_text("one at a time")
    second.close()
    visitor.page = page
    # a reload goes on with the same stream where it is now
    page.reload()
    playing(page)
    assert page.evaluate(f"() => {{ {VIDEO} return video.buffered.start(0); }}") > 0
    assert [prompt for _, prompt in state(url, stream(page))["prompts"]] == [RED, GREEN]
    # stop, and save
    last = stream(page)
    page.locator("#live-stop").click()
    expect(page.locator("#live-result")).to_contain_text("frames")
    page.locator("[data-live=save]").click()
    expect(page.locator("#live-words")).to_contain_text("saved as live/")
    (line,) = read_manifest(outputs / "live").values()
    (change,) = line["run"]["stream"]["settings"]["prompt_at"]
    assert line["prompt"] == RED and change.endswith(f"s={GREEN}")
    assert last == stream(page)
    return page


def a_closed_tab_ends_its_stream(page, url):
    name = stream(page)
    page.close()
    closed = time.monotonic()
    while state(url, name)["status"] == "running":
        assert time.monotonic() - closed < 30
        time.sleep(0.2)
