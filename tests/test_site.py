"""The documentation's site: built without network, and what a reader and a program find on it."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import tomllib
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import trueline

pytest.importorskip("zensical", reason="the site's tests need the extra docs")
ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """What stands on a page: anchors, links, and what a browser would fetch with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.fetched.append(given["src"])
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.fetched.append(given["href"])


@pytest.fixture(scope="module")
def site(made_once):
    def make(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(ROOT / "docs")
            importlib.import_module("build").build(folder)

    return made_once("site", make) / "site"


@pytest.fixture(scope="module")
def pages(site):
    found = {p.relative_to(site).as_posix(): p.read_text() for p in site.rglob("*.html")}
    return {name: (text, Page(text)) for name, text in found.items() if name != "404.html"}


def text_of(html: str) -> str:
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_no_link_is_broken(site, pages):
    broken = []
    for name, (_, page) in pages.items():
        for link in page.links:
            if re.match(r"(https?|mailto):", link):
                continue
            path, _, anchor = unquote(link).partition("#")
            meant = (site / name).parent.joinpath(path).resolve() if path else site / name
            place = meant.relative_to(site.resolve()).as_posix() if path else name
            if not meant.exists() or (anchor and anchor not in pages[place][1].ids):
                broken.append(f"{name}: {link}")
    assert broken == []


def test_nothing_comes_from_elsewhere(site, pages):
    for name, (_, page) in pages.items():
        for link in page.fetched:
            assert not re.match(r"(https?:)?//", link), f"{name}: {link}"
            assert (site / name).parent.joinpath(link.split("?")[0]).resolve().is_file(), link
    for path in site.rglob("*.css"):
        assert "url(http" not in path.read_text(), path.name


def test_the_api_is_there_with_signatures_and_docstrings(pages):
    for name in trueline.__all__:
        if name == "__version__":
            continue
        anchor = f"{trueline._HOME[name]}.{name}"
        home = [html for html, page in pages.values() if anchor in page.ids]
        assert home, f"{anchor} has no place on the site"
        thing = getattr(trueline, name)
        if isinstance(thing, type) and thing.__doc__ and trueline.__name__ in thing.__module__:
            said = re.split(r"[`*_<>\n]", thing.__doc__.strip())[0].strip()
            assert said in text_of(home[0]), f"{anchor}: its docstring is not there"
    align = next(
        html for html, page in pages.values() if "trueline.jobs.alignment.align" in page.ids
    )
    shown = text_of(align)
    assert "overwrite:bool=False" in shown.replace(" ", "")  # each token is a span of its own
    assert "Start again though the folder holds a project." in shown
    assert "Prompts that cannot be used" in shown


def test_every_setting_is_there(pages):
    from trueline.jobs.distil_config import DistilConfig
    from trueline.jobs.projects import AlignConfig, Principle
    from trueline.settings.reader import explain
    from trueline.train.keep import KEEP

    shown = text_of(pages["reference/settings.html"][0])
    for cls in (AlignConfig, Principle, DistilConfig, *KEEP.values()):
        for name, _, about in explain([cls]):
            if name in ("principles", "folder", "training"):
                continue
            assert f" {name} " in f" {shown} ", f"{cls.__name__}.{name}"
            assert about.split(":")[0].split("`")[0].split("<")[0].strip() in shown, name


def test_every_command_is_there(pages):
    from trueline.cli import COMMANDS

    _, page = pages["reference/cli.html"]
    assert {f"trueline-{name}" for name in COMMANDS} <= page.ids


def test_every_page_is_in_the_menu(site):
    config = tomllib.loads((site.parent / "zensical.toml").read_text())
    nav = re.findall(r"[\w/-]+\.md", json.dumps(config["project"]["nav"]))
    there = {p.relative_to(site.parent / "pages").as_posix()
             for p in (site.parent / "pages").rglob("*.md")}  # fmt: skip
    assert len(nav) == len(set(nav))
    tables = {name for name in there if "/results/" in name or name.count("/") > 1}
    assert set(nav) == there - tables - {"benchmarks/inverse_q/inverse_q.md"}


def test_formulas_are_mathml(pages):
    html, _ = pages["methods/linear-alignment.html"]
    assert "<math" in html
    assert "<mi>&#x003C1;</mi>" in html  # rho
    for name, (html, _) in pages.items():
        assert 'class="arithmatex"' not in html, name


def test_each_page_has_its_markdown_and_llms_lists_them(site, pages):
    for name in pages:
        twin = (site / name).with_suffix(".md")
        assert twin.read_text().strip().startswith("#"), name
    index = (site / "llms.txt").read_text()
    assert index.startswith("# Trueline\n\n> ")
    listed = re.findall(r"^- \[[^\]]+\]\(([^)]+)\): \S", index, re.MULTILINE)
    assert {"index.md", "tutorial.md", "methods/self-cd.md", "reference/aligning.md"} <= set(listed)
    assert all((site / place).is_file() for place in listed)
    assert ":::" not in (site / "reference/aligning.md").read_text()


def test_it_is_read_on_a_phone_and_in_the_dark(site):
    sync_api = pytest.importorskip("playwright.sync_api", reason="make browser")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium on this machine: make browser")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    flags += ["--allow-file-access-from-files"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        asked = []
        for scheme in ("light", "dark"):
            phone = {"width": 390, "height": 844}
            page = browser.new_page(viewport=phone, color_scheme=scheme)
            page.on("request", lambda r: asked.append(r.url))
            for name in ("index.html", "methods/o-lora.html", "reference/settings.html"):
                page.goto((site / name).as_uri())
                wide = page.evaluate("document.documentElement.scrollWidth")
                assert wide <= 390, f"{name} is {wide} wide on a phone"
                dark = page.evaluate("document.body.getAttribute('data-md-color-scheme')")
                assert dark == ("slate" if scheme == "dark" else "default")
            page.close()
        browser.close()
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
