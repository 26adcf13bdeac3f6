"""Jobs belong to the server: across a reload, in two browser tabs, and across a restart, in a real browser on the demo model."""

from __future__ import annotations

import re
from contextlib import ExitStack
from urllib.parse import urlsplit

from page_visitor import AT_WORK, LONG, SMALL, Visitor, expect

from tilewise.pipelines.batch.manifest import read_manifest
from tilewise.ui.web.common.safety import Address, Limits
from tilewise.ui.web.server import serving

LIMITS = Limits(work=SMALL["height"] * SMALL["width"] * SMALL["frames"] * LONG, waiting=2)


def test_jobs_outlast_tabs_and_the_server(browser, outputs):
    """One story, as each page that is opened costs seconds."""
    with ExitStack() as stack:
        with serving(["demo"], outputs, Address(port=0), LIMITS) as url:
            port = urlsplit(url).port
            visitor = Visitor(browser, url)
            stack.callback(visitor.context.close)
            first = visitor.open(steps=LONG, seed=11, prompt="a red circle")
            first.locator("#generate").click()
            expect(first.locator("#status")).to_contain_text(AT_WORK)
            # a reload: the same settings, and the tab goes on showing its job
            first.reload()
            expect(first.locator("#status")).to_contain_text(AT_WORK)
            expect(first.locator("#preview img")).to_be_visible()
            expect(first.locator("#seed :is(input, textarea)").first).to_have_value("11")
            expect(first.locator("#generate")).to_be_disabled()
            # a second tab has a job of its own, which waits, and sees the other in the list
            second = visitor.new_page()
            visitor.open(seed=12, prompt="a blue square")
            expect(second.locator("#generate")).to_be_enabled()
            second.locator("#generate").click()
            expect(second.locator("#status")).to_contain_text("waiting: 1 job ahead")
            # closing the first tab leaves its job at work
            first.close()
            visitor.tab("jobs")
            rows = second.locator("#jobs .tw-job")
            expect(rows).to_have_count(2)
            expect(rows.nth(1)).to_contain_text(re.compile(rf"a red circle.*denoise \d+/{LONG}", re.DOTALL))
            # which this tab can show, and cancel
            rows.nth(1).get_by_role("button", name="show").click()
            expect(second.locator("#status")).to_contain_text(AT_WORK)
            second.locator("#cancel").click()
            expect(second.locator("#status")).to_contain_text("cancelled; nothing was written")
            visitor.tab("jobs")
            expect(rows.nth(0)).to_contain_text("done")
            expect(rows.nth(1)).to_contain_text("cancelled")
            rows.nth(0).get_by_role("button", name="show").click()
            expect(second.locator("#result .tw-result")).to_contain_text("seed 12")
            assert [line["seed"] for line in read_manifest(outputs / "ui").values()] == [12]
            # the cancelled one again, and the server is stopped while it runs and another one waits
            visitor.tab("jobs")
            rows.nth(1).get_by_role("button", name="run again").click()
            expect(second.locator("#status")).to_contain_text(AT_WORK)
            third = visitor.new_page()
            visitor.open(steps=3, seed=13, prompt="a blue square")
            third.locator("#generate").click()
            expect(third.locator("#status")).to_contain_text("waiting: 1 job ahead")
            third.close()
            visitor.page = second
        with serving(["demo"], outputs, Address(port=port), LIMITS):
            # the open tab comes back by itself, and says what happened; the one that waited has run
            expect(second.locator("#status")).to_contain_text("interrupted: the server stopped")
            assert "job-generate=" in second.url
            visitor.tab("jobs")
            expect(rows.nth(0)).to_contain_text("done")
            expect(rows.nth(1)).to_contain_text("interrupted: the server stopped while it ran")
            assert sorted(line["seed"] for line in read_manifest(outputs / "ui").values()) == [12, 13]
