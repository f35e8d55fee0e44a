"""The page, in a real browser: streams, sliders, alternatives, forcing, errors, axe, widths."""

from __future__ import annotations

import json
import shutil

import pytest

from trueline import LinearAlignment, Request, SamplingParams, generate, load_model
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
        {"label": name, "measures": {"over_refusal": {"value": a}, "harmful_refusal": {"value": b}}}
        for name, a, b in [("plain", 0.1, 0.9), ("alpha 1", 0.2, 0.8), ("<b>x</b>", 0.0, 0.5)]
    ]
    (folder / "refusal").mkdir()
    results = {"title": "Refusal", "points": points, "recommendation": {"label": "plain"}}
    (folder / "refusal" / "results.json").write_text(json.dumps(results))
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
    expect(page.locator("#strip .detail .note")).to_contain_text("Token 2:")


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
    page.locator("#view-runs").click()
    marks = page.locator("#runs circle")
    expect(marks).to_have_count(3, timeout=WAIT)
    assert [m.get_attribute("fill-opacity") for m in marks.all()] == ["1", "0", "1"]
    assert "<b>x</b>" in page.locator("#runs").text_content()


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_for_everybody(browser, address, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    ask(page, address)
    page.locator("#strip .token[data-index='1']").focus()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = Axe().run(page).response["violations"]
    serious = [v["id"] for v in found if v["impact"] in ("serious", "critical")]
    assert serious == []
    page.close()
