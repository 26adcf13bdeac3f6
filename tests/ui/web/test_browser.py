"""Clips made on the page in a real browser, on the demo model: live, compared, in a batch, in two stages, made again."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
from pathlib import Path
from urllib.parse import urlsplit

from page_visitor import AT_WORK, LONG, expect

from tilewise.pipelines.batch.manifest import read_manifest
from tilewise.ui.web.tabs.examples import examples

DEMO_GRID = "9×16×16"  # tokens of a clip of the model's own size
PROMPT = "a green square moving left"


def test_a_run_is_shown_live_cancelled_and_made(visitor, outputs):
    page = visitor.open(steps=LONG, prompt=PROMPT, seed=5)
    status, preview, cancel = (page.locator(f"#{name}") for name in ("status", "preview img", "cancel"))
    expect(cancel).to_be_disabled()
    page.locator("#generate").click()
    expect(status).to_contain_text(AT_WORK)
    expect(preview).to_be_visible()
    expect(page.locator("#queue-line")).to_contain_text("denoise")  # which every tab sees
    expect(page.locator("#generate")).to_be_disabled()
    cancel.click()
    expect(status).to_contain_text("cancelled; nothing was written")
    expect(preview).to_have_count(0)
    expect(cancel).to_be_disabled()
    assert not read_manifest(outputs / "ui")
    visitor.fill("steps", 6)
    settings = visitor.generate()
    page.wait_for_function(
        "() => { const v = document.querySelector('#result video'); return v.currentTime > 0.2 && !v.error; }"
    )
    expect(preview).to_have_count(0)
    assert (settings["prompt"], settings["seed"], settings["steps"], settings["height"]) == (PROMPT, 5, 6, 64)
    assert visitor.clip().parent == outputs / "ui"
    assert "--method sta-balanced --height 64" in visitor.code("command")
    assert "tilewise.patch(pipe, 'sta-balanced')" in visitor.code("program")
    page.locator("#summary-box").get_by_role("button").first.click()
    expect(page.locator("#summary table")).to_contain_text("sparse")
    with page.expect_download() as download:
        page.locator("#result .tw-download").click()
    assert Path(download.value.path()).read_bytes() == visitor.clip().read_bytes()


def test_an_empty_page_has_an_example(visitor):
    page = visitor.open()
    page.wait_for_function(
        """() => { const all = [...document.querySelectorAll('#examples video')];
        return all.length === 2 && all.every((v) => v.currentTime > 0.2 && !v.error); }"""
    )
    page.locator("#load-example").click()
    expect(page.locator("#prompt textarea")).to_have_value(examples()[1].settings.prompt)
    expect(page.locator("#plan")).to_contain_text(DEMO_GRID)
    visitor.fill("steps", LONG // 10)
    page.locator("#generate").click()
    expect(page.locator("#examples")).to_have_count(0)
    page.locator("#cancel").click()
    expect(page.locator("#status")).to_contain_text("cancelled")
    page.reload()  # the address holds the job
    expect(page.locator("#status")).to_contain_text("cancelled")
    expect(page.locator("#examples")).to_have_count(0)


def test_compare_plays_both_in_step(visitor):
    page = visitor.open(seed=3, tab="compare")
    page.locator("#compare").click()
    page.locator("#compare-result video").nth(1).wait_for()
    for words in ("speed-up, denoising", "PSNR", "SSIM"):
        expect(page.locator("#compare-result")).to_contain_text(words)
    page.wait_for_function(  # by themselves
        """() => { const [a, b] = document.querySelectorAll('#compare-result video');
        return !a.paused && !b.paused && a.currentTime > 0.2 && Math.abs(a.currentTime - b.currentTime) < 0.2; }"""
    )
    page.locator("#compare-result .tw-play").click()
    page.wait_for_function("() => [...document.querySelectorAll('#compare-result video')].every((v) => v.paused)")


def test_a_batch_of_prompts(visitor, outputs):
    page = visitor.open(tab="batch")
    visitor.fill("batch-prompts", "a red circle\na blue square\n# no prompt")
    visitor.fill("batch-seeds", "0-1")
    page.locator("#batch").click()
    expect(page.locator("#batch-result")).to_contain_text("4 of 4 clips are in")
    expect(page.locator("#batch-result video")).to_have_count(4)
    folder = next(path for path in outputs.iterdir() if path.name.startswith("batch-a-red-circle"))
    assert len(read_manifest(folder)) == 4
    page.locator("#batch").click()
    expect(page.locator("#batch-result")).to_contain_text("0 made now")
    visitor.fill("batch-seeds", "0-")
    page.locator("#batch").click()
    expect(page.locator("#batch-status").get_by_role("alert")).to_contain_text("0-9 or 0-3,7")


def test_settings_come_back(visitor, outputs):
    page = visitor.open(seed=7, prompt="a blue circle <img src=x onerror=alert(1)>")
    first = visitor.generate()
    made = {line["seed"]: line for line in read_manifest(outputs / "ui").values()}[7]
    visitor.fill("seed", 8)
    visitor.fill("prompt", "something else")
    visitor.tab("history")
    card = page.locator("#history").get_by_label("seed 7").first
    page.wait_for_function("() => document.querySelector('#history .tw-card img')?.naturalWidth > 0")
    card.click()
    page.locator("#history-clip video").wait_for()
    page.locator("#use-again").click()
    expect(page.locator("#history-words")).to_contain_text("the controls are set")
    visitor.tab("generate")
    dropped = outputs.parent / "dropped.mp4"
    visitor.clip().rename(dropped)
    assert visitor.generate() == first
    again = {line["seed"]: line for line in read_manifest(outputs / "ui").values()}[7]
    assert again["run"]["frames_sha256"] == made["run"]["frames_sha256"]
    # and from JSON, with values that no control of a browser could count
    changed = {**first, "seed": 2**63 - 1, "method": {"method": {"name": "sta", "window": [1, 2, 3]}, "blocks": "2:"}}
    visitor.tab("history")
    page.get_by_role("button", name="Or settings as JSON").click()
    page.locator("#paste-settings textarea").fill(json.dumps(changed))
    page.locator("#use-pasted").click()
    seed = page.locator("#seed input, #seed textarea").first
    expect(seed).to_have_value(str(2**63 - 1))
    page.locator("#paste-settings textarea").fill(json.dumps({**changed, "model": "/etc"}))
    page.locator("#use-pasted").click()
    expect(page.locator("#history-words").get_by_role("alert")).to_contain_text("not started with the model")
    settings = visitor.generate()
    assert "--window 1,2,3 --blocks 2:" in visitor.code("command")
    assert settings["seed"] == 2**63 - 1
    assert settings["method"]["method"]["window"] == [1, 2, 3]
    # and from a clip that is dropped onto the page
    drop = page.evaluate_handle(
        """(data) => { const it = new DataTransfer();
        it.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], 'a clip.mp4')); return it; }""",
        base64.b64encode(dropped.read_bytes()).decode(),
    )
    for kind in ("dragover", "drop"):
        page.dispatch_event("#plan", kind, {"dataTransfer": drop})
    expect(page.locator("#load-words")).to_contain_text("the controls are set")
    expect(seed).to_have_value("7")
    expect(page.locator("#density input[type=number]")).to_have_value("0.4")
    page.wait_for_function("() => new URL(location).searchParams.get('seed') === '7'")


def test_in_high_resolution(visitor, outputs):
    page = visitor.open(height=48, width=48, frames=5, steps=4, tab="highres")
    plan, result = page.locator("#highres-plan"), page.locator("#highres-result")
    visitor.fill("highres-height", 32)
    visitor.fill("highres-width", 64)
    expect(plan.get_by_role("alert")).to_contain_text("smaller than the native stage's 48")
    visitor.fill("highres-height", 64)
    expect(plan).to_contain_text("48×48 → 64×64 pixels")
    expect(plan).to_contain_text("2 of 4 (strength 0.5)")
    visitor.fill("highres-strength", 0.75)
    expect(plan).to_contain_text("3 of 4 (strength 0.75)")
    page.locator("#highres").click()
    result.locator("video").nth(1).wait_for()
    result.locator("video").nth(1).scroll_into_view_if_needed()  # a browser plays by itself what is in view
    page.wait_for_function(
        """() => { const [a, b] = document.querySelectorAll('#highres-result video');
        return a.videoWidth === 48 && b.videoWidth === 64 && b.currentTime > 0.1 && !a.error && !b.error; }"""
    )
    expect(page.locator("#highres-native video")).to_have_count(0)
    expect(result).to_contain_text("repetition")
    path = visitor.clip("#highres-result", 1)
    assert path.parent == outputs / "highres"
    page.locator("#highres-again").get_by_role("button").first.click()
    page.locator("#highres-settings .cm-content").wait_for()
    expect(page.locator("#highres-command")).to_contain_text("--highres --height 64 --width 64 --native 48x48")
    with page.expect_download() as download:
        result.locator(".tw-download").nth(1).click()
    assert Path(download.value.path()).read_bytes() == path.read_bytes()
    # the native clip is shown while the other is made: here by many steps, and kept when those are cancelled
    visitor.fill("steps", 40)
    page.locator("#highres").click()
    page.locator("#highres-native video").wait_for()
    expect(result.locator("video")).to_have_count(0)
    page.locator("#highres-cancel").click()
    expect(page.locator("#highres-status")).to_contain_text("a native clip that was finished is kept")
    expect(result.locator("video")).to_have_count(1)
    # History knows both stages' settings, and gives them back
    for name, value in {"height": 64, "highres-height": 128, "highres-strength": ""}.items():
        visitor.fill(name, value)
    visitor.tab("history")
    page.locator("#history").get_by_label("two stages, from 48×48").first.click()
    page.locator("#history-clip video").nth(1).wait_for()
    page.locator("#use-again").click()
    expect(page.locator("#history-words")).to_contain_text("those of High resolution")
    visitor.tab("highres")
    expect(plan).to_contain_text("48×48 → 64×64 pixels")
    expect(plan).to_contain_text("3 of 4 (strength 0.75)")


def test_only_the_output_folder_can_be_fetched(url, outputs):
    def get(path: str, **headers: str) -> tuple[http.client.HTTPResponse, str]:
        """Asked as it stands: browsers take dots out of a path."""
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", f"/{path}", headers=headers)
            answer = connection.getresponse()
            return answer, answer.read().decode(errors="replace")

    files = {
        name: outputs / name for name in ("ui/made.mp4", "report.html", "../secret.txt", "../outputs-not/clip.mp4")
    }
    for name, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("hush" if ".." in name else "<script>alert(1)</script>")
    try:
        assert get(f"gradio_api/file={files['ui/made.mp4']}")[0].status == 200
        tries = [
            "/etc/passwd",
            f"{outputs.parent}/secret.txt",
            f"{outputs}/../secret.txt",
            f"{outputs}/%2e%2e/secret.txt",
        ]
        tries += ["README.md", __file__, f"{outputs}-not/clip.mp4", f"{outputs}//..//secret.txt"]
        for path in tries:
            for route in ("gradio_api/file=", "file=", "gradio_api/file/"):
                answer, body = get(f"{route}{path}")
                assert answer.status in (403, 404), (route, path)
                assert "hush" not in body
        assert get("gradio_api/file=/etc/passwd")[0].status == 403
        report = get(f"gradio_api/file={files['report.html']}")[0]
        assert report.status == 200 and report.headers["content-disposition"].startswith("attachment")
        assert get("", Host="evil.example")[0].status == 421
    finally:
        files["ui/made.mp4"].unlink()
