"""The page, in a real browser: streams, sliders, alternatives, forcing, errors, axe, widths."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from trueline import LinearAlignment, Request, SamplingParams, generate, load_model
from trueline.jobs.inspection import InspectConfig, inspect
from trueline.server.config import ServeConfig

pytest.importorskip("playwright", reason="the page's tests need playwright; make browser")
pytest.importorskip("openai", reason="the server's tests need the package openai")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no Chromium on this machine: make browser", allow_module_level=True)

sync_api = pytest.importorskip("playwright.sync_api")
server = pytest.importorskip("test_server")
expect, serving = sync_api.expect, server.serving
ASKED = "#message=What+is+the+moon%3F&principle=Talk+like+a+pirate.&method=linear-alignment"
WAIT = 20_000


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", dtype="float32")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    points = [
        {"label": name, "baseline": name == "plain",
         "measures": {"over_refusal": {"value": a},
                      "harmful_refusal": {"value": b, "low": b - 0.1, "high": b + 0.1}}}
        for name, a, b in [("plain", 0.1, 0.9), ("alpha 1", 0.2, 0.8), ("<b>x</b>", 0.0, 0.5)]
    ]  # fmt: skip
    results = {"title": "Refusal", "points": points, "recommendation": {"label": "plain"}}
    R = [[0.9, 0.1], [0.7, 0.8]]
    check = {"name": "gain", "principle": "pirate", "says": "its rise", "value": 0.4, "low": 0.3}
    check |= {"high": 0.5, "n": 9, "at_least": True, "limit": 0.2, "passed": True}
    left = {
        "refusal/results.json": results,
        "grid/results.json": {"title": "Grid", "points": [{"label": "ratio 1", "measures": {}}]},
        "tasks/results.json": {"tasks": ["a", "b"], "R": R, "untouched": [0.2, 0.3],
                               "measures": {"forgetting": 0.2}},
        "aligned/results.json": {"title": "Pirate", "verdict": "do not ship", "reasons": ["few"],
                                 "checks": [check, check | {"passed": False, "value": None}],
                                 "R": {"names": ["pirate", "sea"], "R": R, "untouched": [0, 0]}},
        "broken/results.json": {"points": 3},
        "distilled/manifest.json": {"settings": {"kind": "distillation"}, "finished": False},
        "tasks/manifest.json": {"settings": {"kind": "stack"}, "finished": True},
    }  # fmt: skip
    for name, content in left.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    rows = [json.dumps({"step": i, "loss": 1 / i, "reward": i, "epoch": 0}) for i in range(1, 9)]
    for name in ("distilled", "tasks"):
        (folder / name / "log.jsonl").write_text("\n".join(rows) + '\n{"step": 9, "lo')
    return folder


@pytest.fixture(scope="module")
def address(tiny, runs):
    with serving(tiny, ServeConfig(max_tokens=64, runs=runs)) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser():
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    flags += ["--disable-component-update", "--disable-sync", "--disable-quic"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    problems = []
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    yield page
    assert [p for p in problems if "status of 4" not in p] == []
    page.close()


def ask(page, address, state=ASKED):
    page.goto(f"{address}/{state}")
    expect(page.locator("#status")).to_contain_text("tokens", timeout=WAIT)


def answer(page):
    return "".join(page.locator("#strip .token[data-index]").all_text_contents())


def test_three_answers_stream_side_by_side(page, address, tiny):
    ask(page, address)
    method = LinearAlignment("Talk like a pirate.")
    params = SamplingParams(max_new_tokens=48)
    plain, aligned = generate(
        tiny, [Request("What is the moon?"), Request("What is the moon?", method)], sampling=params
    )
    assert page.locator("#plain").text_content() == plain.text
    assert answer(page) == aligned.text
    assert page.locator("#prompt").text_content().strip()
    assert page.locator("#strip svg rect").count() == len(aligned.token_ids)


def test_a_slider_asks_again(page, address):
    ask(page, address)
    before = answer(page)
    page.locator("#field-ratio").fill("-1")
    expect(page.locator("#strip .tokens")).not_to_have_text(before, timeout=WAIT)
    expect(page.locator("#stop")).to_be_disabled(timeout=WAIT)
    assert answer(page) == page.locator("#plain").text_content()
    assert "field-ratio=-1" in page.url


def test_hovering_and_the_keyboard_show_the_alternatives(page, address):
    ask(page, address)
    page.locator("#strip .token[data-index='2']").hover()
    tables = page.locator("#strip table")
    expect(tables).to_have_count(3)
    assert "With the principle" in page.locator("#strip .detail").text_content()
    page.locator("#strip .token[data-index='0']").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#strip .detail .note").first).to_contain_text("Token 2:")


def test_a_forced_token_changes_what_follows(page, address):
    ask(page, address)
    before = answer(page)
    page.locator("#strip .token[data-index='0']").focus()
    other = page.locator("#strip table").nth(2).locator("tr:not(.chosen) button").first
    word = other.text_content().replace("␣", " ")
    other.click()
    expect(page.locator("#strip .token.forced")).to_have_count(1, timeout=WAIT)
    expect(page.locator("#stop")).to_be_disabled(timeout=WAIT)
    whole = page.locator("#strip .tokens").text_content()
    assert whole.startswith(word)
    assert whole != before


def test_turns_go_on_and_stand_in_the_address(page, address):
    ask(page, address)
    said = answer(page)
    page.locator("#again").click()
    page.locator("#message").fill("And the sun?")
    page.locator("#go").click()
    expect(page.locator("#status")).to_contain_text("tokens", timeout=WAIT)
    assert said in page.locator("#history").text_content()
    second = answer(page)
    page.reload()
    expect(page.locator("#status")).to_contain_text("tokens", timeout=WAIT)
    assert answer(page) == second


def test_an_error_is_shown_as_an_error(page, address):
    page.goto(f"{address}/")
    page.locator("#max_tokens").fill("1000")
    page.locator("#go").click()
    expect(page.locator("#error")).to_contain_text("`max_tokens` must be", timeout=WAIT)


def test_texts_are_never_markup(page, address):
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    page.goto(f"{address}/")
    page.locator("#message").fill(hostile)
    page.locator("#go").click()
    expect(page.locator("#status")).to_contain_text("tokens", timeout=WAIT)
    page.locator("#again").click()
    assert page.locator("#history").text_content().startswith(f"user: {hostile}")
    assert page.locator("img, #history script").count() == 0


def test_runs_are_drawn_with_dominated_settings_marked(page, address):
    page.goto(f"{address}/")
    page.locator("#view-frontier").click()
    marks = page.locator("#runs .mark")
    expect(marks).to_have_count(3, timeout=WAIT)
    assert [m.get_attribute("fill-opacity") for m in marks.all()] == ["1", "0", "1"]
    assert [m.evaluate("m => m.tagName") for m in marks.all()] == ["rect", "circle", "circle"]
    assert "<b>x</b>" in page.locator("#runs").text_content()
    row = page.locator("#runs tbody tr").nth(1)
    assert row.locator("td").all_text_contents() == ["20.0 %", "80.0 % [70.0, 90.0]", "plain"]
    assert "view=frontier" in page.url


def test_curves_scores_sweeps_and_verdicts_have_their_tabs(page, address):
    page.goto(f"{address}/#view=curves")
    expect(page.locator("#runs path.curve")).to_have_count(2, timeout=WAIT)
    assert "(not finished)" in page.locator("#runs").text_content()
    page.locator("#view-scores").click()
    expect(page.locator("#runs tbody tr")).to_have_count(3, timeout=WAIT)
    assert page.locator("#runs tbody tr").nth(2).locator("td").all_text_contents() == [
        "0.70", "0.80",
    ]  # fmt: skip
    assert "forgetting 0.200" in page.locator("#runs").text_content()
    page.locator("#view-align").click()
    expect(page.locator("#runs .verdict")).to_have_text("Verdict: do not ship", timeout=WAIT)
    assert "FAILED" in page.locator("#runs").text_content()
    page.locator("#view-points").click()
    expect(page.locator("#runs h2")).to_have_text("grid", timeout=WAIT)
    page.locator("#view-ask").click()
    expect(page.locator("#form")).to_be_visible()


def test_the_gate_and_the_mask_say_what_they_left_out(page, address):
    ask(page, address, f"{ASKED}&field-gate=0.97&field-candidates=0.5")
    shut = page.locator("#strip .token.shut[data-index]")
    assert 0 < shut.count() < page.locator("#strip .token[data-index]").count()
    assert "left alone by the gate" in page.locator("#status").text_content()
    shut.first.focus()
    assert "The gate let 0.0 % of the step through" in page.locator("#strip .detail").inner_text()
    for token in page.locator("#strip .token[data-index]").all():
        token.focus()
        found = page.locator("#strip .detail").inner_text()
        if "Left out by the mask" in found:
            break
    assert "(left out)" in found


def test_what_is_looked_at_stands_in_the_address(page, address):
    ask(page, address)
    page.locator("#strip .against select").select_option("0")
    page.locator("#strip .token[data-index='3']").click()
    page.wait_for_url("**token=3**")
    seen = page.locator("#strip").inner_text()
    page.reload()
    expect(page.locator("#strip .detail .note").first).to_contain_text("Token 4:", timeout=WAIT)
    assert page.locator("#strip").inner_text() == seen


def test_the_keyboard_alone_is_enough(page, address):
    page.goto(f"{address}/")
    expect(page.locator("#model option")).to_have_count(1, timeout=WAIT)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"

    def tab_to(selector):
        for _ in range(40):
            if page.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
                return
            page.keyboard.press("Tab")
        raise AssertionError(selector)

    tab_to("#message")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("tokens", timeout=WAIT)
    before = answer(page)
    tab_to("#strip .token")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    tab_to("#strip table:nth-of-type(1) tr:not(.chosen) button")
    word = page.evaluate("document.activeElement.textContent").replace("␣", " ")
    page.keyboard.press("Enter")
    expect(page.locator("#strip .token.forced")).to_have_count(1, timeout=WAIT)
    assert page.locator("#strip .token.forced").text_content().endswith(word)
    expect(page.locator("#stop")).to_be_disabled(timeout=WAIT)
    assert answer(page) != before


def test_trace_and_picture_are_saved(page, address):
    ask(page, address)
    saved = {}
    for kind in ("json", "svg", "png"):
        with page.expect_download() as download:
            page.locator(f"#save-{kind}").click()
        saved[kind] = Path(download.value.path()).read_bytes()
    trace = json.loads(saved["json"])
    assert trace["answer"] == answer(page)
    assert trace["asked"]["alignment"]["ratio"] == 2
    svg = ElementTree.fromstring(saved["svg"])
    assert len(svg.findall(".//{*}rect")) == len(trace["tokens"])
    assert saved["png"].startswith(b"\x89PNG")


def test_a_server_whose_method_is_fixed_offers_no_other(page, tiny):
    config = ServeConfig(max_tokens=64, method=LinearAlignment("Talk like a pirate.", ratio=1))
    params = SamplingParams(max_new_tokens=48)
    [own] = generate(tiny, "What is the moon?", config.method, params)
    with serving(tiny, config) as (address, _):
        ask(page, address, "#message=What+is+the+moon%3F&method=plain")
        assert answer(page) == own.text
        assert page.locator("#error").is_hidden()
        assert page.locator("#settings, .alone").locator("visible=true").count() == 0
        assert "linear-alignment" in page.locator("#fixed").text_content()
    with serving(tiny, dataclasses.replace(config, overrides="settings")) as (address, _):
        ask(page, address)
        assert answer(page) == own.text
        page.locator("#field-ratio").fill("6")
        expect(page.locator("#strip .tokens")).not_to_have_text(own.text, timeout=WAIT)


def test_inspect_writes_the_same_page_with_its_data_inside(page, tiny, tmp_path):
    hostile = "What is the moon? <img src=x onerror=alert(1)></script><script>alert(2)</script>"
    config = InspectConfig(hostile, method=LinearAlignment("Talk like a pirate."))
    found = inspect(config, tmp_path / "out", model=tiny)
    page.goto((tmp_path / "out" / "index.html").as_uri())
    assert answer(page) == found.text
    assert page.locator("h1").text_content() == hostile
    assert page.locator("img").count() == 0
    assert page.locator("#form").is_hidden()
    page.locator("#strip .token[data-index='1']").hover()
    expect(page.locator("#strip table")).to_have_count(3)
    assert page.locator("#strip table button").count() == 0
    texts = [own.text for own in found.recording.comparisons]
    assert (
        page.locator("#answers article:not(.main):not(.alone) .text").all_text_contents() == texts
    )
    with page.expect_download() as download:
        page.locator("#save-json").click()
    rows = json.loads(Path(download.value.path()).read_text())["tokens"]
    assert [row["token_id"] for row in rows] == [t.token_id for t in found.recording.tokens]


@pytest.mark.parametrize("name", ["serve", "serve-phone"])
def test_screenshots(browser, address, name):
    """What stands in docs/: TRUELINE_SCREENSHOTS=docs python -m pytest tests/test_page.py."""
    small = name.endswith("phone")
    page = browser.new_page(
        viewport={"width": 390 if small else 1100, "height": 844 if small else 1000},
        color_scheme="dark" if small else "light",
    )
    ask(page, address, f"{ASKED}&max_tokens=32&token=4")
    expect(page.locator("#strip table")).to_have_count(3, timeout=WAIT)
    if small:
        page.locator("#status").scroll_into_view_if_needed()
        page.evaluate("document.getElementById('h-aligned').scrollIntoView()")
    taken = page.screenshot(full_page=not small)
    page.close()
    pillow = pytest.importorskip("PIL.Image")
    picture = pillow.open(io.BytesIO(taken))
    assert len(picture.getcolors(1 << 24) or ()) > 50  # something was drawn
    if folder := os.environ.get("TRUELINE_SCREENSHOTS"):
        picture.convert("RGB").quantize(64).save(Path(folder) / f"{name}.png", optimize=True)


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_for_everybody(browser, address, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    ask(page, address)
    page.locator("#strip .token[data-index='1']").focus()
    for view in ("ask", "frontier", "curves", "scores", "align"):
        page.locator(f"#view-{view}").click()
        if view != "ask":
            expect(page.locator("#runs h2").first).to_be_visible(timeout=WAIT)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view
        found = Axe().run(page).response["violations"]
        assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == [], view
    page.close()
