"""A visitor of the web page, with a real browser: Debian's Chromium through Playwright. A module that imports this is skipped
where either is missing. The fixtures of ``tests/ui/web/conftest.py`` serve the page and open the browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlencode

import pytest

pytest.importorskip("gradio", reason="the page needs Gradio: pip install -e '.[ui]'")
playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("needs Debian's chromium: apt-get install chromium", allow_module_level=True)

from tilewise.ui.web.page import TABS  # noqa: E402

WAIT = 60_000  # milliseconds: an answer takes a second, or many where other tests run beside this one
LONG = 1000  # steps of a job that is still at work when somebody looks at it: the most that the page allows
AT_WORK = re.compile(rf"denoise [1-9]\d*/{LONG}")
SMALL = {"height": 64, "width": 64, "frames": 9, "steps": 2}  # a clip that takes a second
SMALL_GRID = "5×8×8"  # its tokens
# The document of a code box, which CodeMirror keeps beside the elements; "" while there is none.
DOCUMENT = (
    "const text = (id) => document.querySelector(`#${id} .cm-content`)?.cmTile?.view.state.doc.toString().trim() ?? '';"
)

expect = playwright.expect
expect.set_options(timeout=WAIT)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without windows."""
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


class Visitor:
    """One person with a browser profile of their own. `wrong`: what the console complained about, and requests to elsewhere."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1400, "height": 1800}, **context})
        self.context.set_default_timeout(WAIT)
        self.url = url
        self.wrong: list[str] = []
        self.page = self.new_page()

    def new_page(self) -> Any:
        """A browser tab, which becomes `page`."""
        self.page = page = self.context.new_page()
        page.on("console", lambda m: self.wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", self._requested)
        return page

    def _requested(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.wrong.append(f"a request to {request.url}")

    def open(self, tab: str = "", **settings: object) -> Any:
        """The page with settings and a tab from its address; those of SMALL, unless others are given."""
        query = {**SMALL, **settings, **({"tab": tab} if tab else {})}
        self.page.goto(f"{self.url}?{urlencode(query)}")
        if not settings.keys() & {"height", "width", "frames"}:
            expect(self.page.locator("#plan")).to_contain_text(SMALL_GRID)
        return self.page

    def fill(self, name: str, value: object) -> None:
        """Types into the field with an element id, and leaves it."""
        field = self.page.locator(f"#{name} input[type=number], #{name} textarea, #{name} input[type=text]").first
        field.fill(str(value))
        field.press("Tab")

    def method(self, name: str) -> None:
        self.page.get_by_label("Attention method").click()
        self.page.get_by_role("option", name=re.compile(rf"^{name}( \(preset\))?$")).click()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=TABS[name], exact=True).click()

    def generate(self) -> dict[str, Any]:
        """Clicks, waits for the clip, returns its settings as the page shows them."""
        self.tab("generate")  # what other tabs hold is not in the document
        self.page.evaluate("() => document.querySelectorAll('#result video').forEach((v) => v.classList.add('old'))")
        self.page.locator("#generate").click()
        self.page.locator("#result .tw-result video:not(.old)").wait_for()
        return self.settings()

    def settings(self) -> dict[str, Any]:
        box = self.page.locator("#again-box")
        if not self.page.locator("#settings").is_visible():
            box.get_by_role("button").first.click()
        self.page.wait_for_function(f"() => {{ {DOCUMENT} return /^{{[^]*}}$/.test(text('settings')); }}")
        return dict(json.loads(self.code("settings")))

    def code(self, name: str) -> str:
        """The text of a code box, all of it: what is out of view is not in its elements."""
        self.page.locator(f"#{name} .cm-content").wait_for()
        return str(self.page.evaluate(f"(name) => {{ {DOCUMENT} return text(name); }}", name))

    def clip(self, where: str = "#result .tw-result", number: int = 0) -> Path:
        """The file of a clip that is shown."""
        source = self.page.locator(f"{where} video").nth(number).get_attribute("src")
        return Path(unquote(source.split("file=")[1].split("?")[0]))

    def close(self) -> None:
        self.context.close()
        assert not self.wrong, self.wrong
