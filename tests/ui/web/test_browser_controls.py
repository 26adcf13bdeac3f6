"""The page's controls in a real browser, on the demo model: address, plan, attention; keyboard, dark colours, a phone."""

from __future__ import annotations

import re

from page_visitor import Visitor, expect

from tilewise.ui.web.page import TABS


def selected(visitor: Visitor):
    return visitor.page.locator("#tabs button[role=tab][aria-selected=true]:visible")


def test_the_address_holds_settings_and_tab(visitor):
    page = visitor.open(tab="batch", steps=4, seed=9, **{"batch-seeds": "0-3"})
    expect(selected(visitor)).to_have_text(TABS["batch"])
    expect(page.locator("#batch-seeds :is(input, textarea)")).to_have_value("0-3")
    for part in ("tab=batch", "steps=4", "seed=9", "batch-seeds=0-3"):
        assert part in page.url
    visitor.fill("seed", 10)
    visitor.tab("history")
    page.wait_for_url(re.compile(r"seed=10.*tab=history"))
    page.reload()
    expect(selected(visitor)).to_have_text(TABS["history"])
    expect(page.locator("#seed :is(input, textarea)").first).to_have_value("10")
    visitor.tab("generate")
    page.wait_for_url(lambda address: "tab=" not in address)


def test_the_plan_follows_the_controls_before_anything_runs(visitor):
    page = visitor.open()
    plan = page.locator("#plan")
    density = plan.locator("tr", has_text="density where sparse")
    expect(density).to_be_visible()
    page.locator("#dice").click()
    expect(page.locator("#seed :is(input, textarea)").first).not_to_have_value("0")
    before = density.inner_text()
    visitor.method("draft-fast")
    expect(density).not_to_have_text(before)
    visitor.method("dense")
    expect(plan).to_contain_text("100% of dense")
    visitor.fill("height", 72)
    expect(plan.get_by_role("alert")).to_contain_text("height")
    page.locator("#generate").click()
    expect(page.locator("#status").get_by_role("alert")).to_contain_text("height")
    visitor.fill("height", 16000)
    visitor.fill("steps", 100)
    expect(plan.get_by_role("alert")).to_contain_text("times what this page was started for")
    visitor.fill("height", 64)
    visitor.fill("steps", 2)
    visitor.method("sta-fast")
    expect(density).to_be_visible()
    page.locator("#more").get_by_role("button").first.click()
    expect(page.locator("#options textarea")).to_have_value(re.compile('"cell"'))  # it has put its own there
    visitor.fill("options", '{"windw": 3}')
    expect(plan.get_by_role("alert")).to_contain_text("unknown option")


def test_a_click_moves_the_query_and_a_run_is_watched(visitor):
    page = visitor.open(tab="attention")
    words, image = page.locator("#attention-words"), page.locator("#attention img")
    sees = words.locator("tr", has_text="sees")
    expect(words).to_contain_text("latent frame 4, row 7, column 7 of 5×8×8")
    before = image.get_attribute("src")
    page.wait_for_function("() => document.querySelector('#attention img')?.naturalWidth > 0")
    box = image.bounding_box()
    image.click(position={"x": box["width"] * 0.9, "y": box["height"] * 0.2})
    expect(words).to_contain_text("latent frame 4, row 1, column 7 of 5×8×8")
    expect(image).not_to_have_attribute("src", before)
    assert 0 < float(sees.inner_text().split(":")[-1].strip(" %\n")) < 100
    film = page.locator("#attention-strip img")
    box = film.bounding_box()
    film.click(position={"x": box["width"] * 0.07, "y": box["height"] * 0.5})
    expect(words).to_contain_text("latent frame 0,")
    visitor.fill("query-h", 6)  # from the keyboard
    expect(words).to_contain_text("row 6,")
    visitor.fill("query-step", 1)  # before the method begins
    expect(words).to_contain_text("dense: the method runs from 20% to 100% of the steps")
    expect(words).to_contain_text("100.0%")
    # a method that decides while the model runs
    page.locator("#more").get_by_role("button").first.click()
    options = page.locator("#options textarea")
    expect(options).to_have_value(re.compile('"cell"'))  # the box is open, with sta's
    visitor.method("draft")
    expect(options).to_have_value(re.compile('"safety"'))  # it has put its own in their place
    expect(page.locator("#plan")).to_contain_text("draft pays from")
    page.locator("#measure").get_by_label("recall").check()  # only what the method has is there
    expect(page.locator("#density")).to_be_hidden()
    page.locator("#measure").get_by_label("density").check()
    visitor.fill("density", 0.3)
    visitor.fill("options", '{"min_tokens": 1}')  # so small a clip would stay dense
    expect(options).to_have_value('{"min_tokens": 1}')
    expect(page.locator("#plan")).to_contain_text("0.300")
    visitor.fill("query-step", 2)
    expect(words).to_contain_text("draft decides it from the queries and keys: watch a run of this block")
    page.locator("#watch").click()
    expect(words).to_contain_text("draft, as it decided in the watched run")
    assert 0 < float(sees.inner_text().split(":")[-1].strip(" %\n")) < 100
    page.locator("#attention-draft img").wait_for()
    visitor.fill("query-step", 1)
    expect(words).to_contain_text("dense")


UNNAMED = """() => [...document.querySelectorAll('input, textarea, select, button, video')].filter((e) =>
    e.offsetParent && e.type !== 'file' && !(e.labels && e.labels.length) && !e.getAttribute('aria-label')
    && !e.getAttribute('aria-labelledby') && !e.innerText && !e.title
    && !e.querySelector('img[alt]:not([alt=""])') && !e.closest('label')).map((e) => e.outerHTML)"""
CUT = """() => [...document.querySelectorAll('.gradio-container *')].filter((e) => { const box = e.getBoundingClientRect();
    return e.offsetParent && box.width > 0 && (box.right > innerWidth + 1 || box.left < -1)
    && !e.closest('.tw-wide, .cm-editor') && getComputedStyle(e).position !== 'absolute'; })
    .map((e) => e.outerHTML.slice(0, 200))"""


def test_dark_keyboard_labels_and_a_phone(browser, url):
    dark = Visitor(browser, url, color_scheme="dark", viewport={"width": 390, "height": 844})
    page = dark.open()
    colours = page.evaluate("() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]; }")
    bright = [sum(int(n) for n in c[c.index("(") + 1 : -1].split(",")[:3]) for c in colours]
    assert bright[0] > 400 > bright[1]
    for name in TABS:  # each can be reached, each control has a name, and nothing is cut
        dark.tab(name)
        expect(selected(dark)).to_have_text(TABS[name])
        if name == "attention":
            expect(page.locator("#attention-words table")).to_be_visible()
        assert page.evaluate(UNNAMED) == [], name
        assert page.evaluate(CUT) == [], name
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390, name
    dark.tab("generate")
    box = page.locator("#generate").bounding_box()
    assert box["y"] + box["height"] < 600  # right after the prompt
    page.locator("#generate").focus()
    page.keyboard.press("Enter")
    page.locator("#result .tw-result video").wait_for()
    assert page.evaluate(CUT) == []
    dark.close()
