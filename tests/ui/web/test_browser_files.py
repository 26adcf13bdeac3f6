"""In a browser: the fields are those that the model takes; the size follows an uploaded picture, and a clip is made from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import page_visitor
import pytest
from page_visitor import Visitor, expect
from tiny_conditioned import picture, save, without_ftfy

from tilewise.pipelines.media.video import read_settings
from tilewise.ui.web.common.safety import Address, Limits
from tilewise.ui.web.server import serving


@pytest.fixture(scope="module")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    base = tmp_path_factory.mktemp("files")
    model = save(base / "i2v", "i2v")
    with (
        serving([str(model), "demo"], base / "outputs", Address(port=0), Limits(), device="cpu") as url,
        page_visitor.chromium() as browser,
    ):
        one = Visitor(browser, url)
        one.folder = base
        yield one
        one.close()


def test_a_clip_from_an_uploaded_picture(visitor, monkeypatch):
    without_ftfy(monkeypatch)
    page = visitor.page
    page.goto(visitor.url)
    expect(page.locator("#plan")).to_contain_text("needs a file for --image")
    expect(page.locator("#image")).to_be_visible()
    expect(page.locator("#video")).to_have_count(0)
    page.locator("#image input[type=file]").set_input_files(str(picture(visitor.folder / "start.png", (48, 32))))
    expect(page.locator("#width input[type=number]")).to_have_value("48")
    expect(page.locator("#height input[type=number]")).to_have_value("32")
    visitor.fill("steps", 1)
    expect(page.locator("#plan")).to_contain_text("3×4×6 = 72 tokens")
    page.click("#generate")
    expect(page.locator("#result video")).to_be_visible()
    clips = list((visitor.folder / "outputs" / "ui").glob("*.mp4"))
    told = read_settings(clips[0])
    assert told is not None
    kept = Path(told["image"].partition("@")[0])
    assert kept.parent == (visitor.folder / "outputs" / "inputs").resolve()
    assert kept.read_bytes() == (visitor.folder / "start.png").read_bytes()
    assert visitor.wrong == []
