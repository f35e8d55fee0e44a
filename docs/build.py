"""The documentation as a site, without network: `make docs`, or `python docs/build.py [FOLDER]`.

    FOLDER/pages     what zensical reads: docs/, README, benchmarks and recipes, and generated pages
    FOLDER/site      the site, each page's Markdown beside it, and llms.txt

A page of the repository keeps its links: those to other pages lead to them, those to other files
are named instead. Formulas are made MathML here, so that no script is fetched to show them.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import generated
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(
    r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)"
)
FENCE = re.compile(r"^(```.*?^```$)", re.DOTALL | re.MULTILINE)
MATH = re.compile(r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL)
PICTURES = (".png", ".svg")


def places() -> dict[Path, str]:
    """Return every page of the repository, and where it stands in the site."""
    found = {ROOT / "README.md": "index.md", ROOT / "CONTRIBUTING.md": "contributing.md"}
    for path in [*DOCS.rglob("*.md"), *DOCS.glob("*.ipynb")]:
        found[path] = path.relative_to(DOCS).with_suffix(".md").as_posix()
    for path in (ROOT / "benchmarks").rglob("*.md"):
        name = path.relative_to(ROOT).as_posix()
        found[path] = name.replace("README.md", "index.md")
    for path in (ROOT / "recipes").glob("*/README.md"):
        found[path] = f"recipes/{path.parent.name}.md"
    return found


def lay_out(folder: Path) -> list[str]:
    """Write the pages, and return the names of the recipes'."""
    pages = places()
    for path, place in pages.items():
        text = path.read_text(encoding="utf-8")
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".ipynb":
            text = page_of(json.loads(text), target)
        target.write_text(linked(text, path, place, pages, folder), encoding="utf-8")
    for place, text in generated.pages().items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    (folder / "assets").mkdir()
    shutil.copy(DOCS / "site.css", folder / "assets/site.css")
    return sorted(place for place in pages.values() if place.startswith("recipes/"))


def linked(text: str, path: Path, place: str, pages: dict[Path, str], folder: Path) -> str:
    """Return a page's text with its links as they are in the site."""

    def replaced(match: re.Match[str]) -> str:
        picture, words, target, anchor = match.groups()
        meant = Path(os.path.normpath(path.parent / target))
        if meant in pages:
            to = os.path.relpath(pages[meant], Path(place).parent)
            return f"{picture}[{words}]({to}{anchor or ''})"
        if meant.suffix in PICTURES and meant.is_file():
            kept = folder / meant.relative_to(ROOT if ROOT / "docs" not in meant.parents else DOCS)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(meant, kept)
            return f"{picture}[{words}]({os.path.relpath(kept, (folder / place).parent)})"
        if not meant.exists() and path.suffix != ".ipynb":
            raise SystemExit(f"{path}: leads to {target}, which is not there")
        return match[0] if path.suffix == ".ipynb" and picture else words

    parts = FENCE.split(text)
    parts[::2] = [LINK.sub(replaced, part) for part in parts[::2]]
    return "".join(parts)


def page_of(notebook: dict, target: Path) -> str:
    """Return a notebook as Markdown: its cells, and what they printed and drew."""
    parts = []
    for index, cell in enumerate(notebook["cells"]):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            parts.append(_shown(output, target.with_name(f"{target.stem}-{index}.png")))
    return "\n\n".join(part for part in parts if part) + "\n"


def _shown(output: dict, picture: Path) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = output.get("data", {})
    if "image/png" in data:
        picture.write_bytes(base64.b64decode("".join(data["image/png"])))
        return f"![Drawn by the cell above]({picture.name})"
    if "text/markdown" in data:
        return re.sub(r"^(#+) ", r"###\1 ", "".join(data["text/markdown"]), flags=re.MULTILINE)
    return f"```text\n{''.join(data.get('text/plain', '')).rstrip()}\n```" if data else ""


def configured(folder: Path, recipes: list[str]) -> Path:
    """Write the configuration, and return it."""
    text = (DOCS / "zensical.toml").read_text(encoding="utf-8")
    rows = {
        "SOURCE": (ROOT / "src").as_posix(),
        "# recipes": "".join(f'{{ "Recipe: {Path(p).stem}" = "{p}" }},' for p in recipes),
        "# reference": "".join(f'{{ "{t}" = "{p}" }},' for t, p in generated.API_PAGES.items()),
    }
    for mark, row in rows.items():
        text = text.replace(mark, row)
    if (DOCS / "scaling.md").is_file():
        text = text.replace("# scaling", '{ "vLLM and scale" = "scaling.md" },')
    path = folder / "zensical.toml"
    path.write_text(text, encoding="utf-8")
    return path


def finish(folder: Path, config: Path) -> None:
    """Make formulas MathML, and put the Markdown of the pages and llms.txt beside them."""
    site, pages = folder / "site", folder / "pages"
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        path.write_text(MATH.sub(_mathml, text), encoding="utf-8")
    written = generated.api_twins()
    for path in pages.rglob("*.md"):
        place = path.relative_to(pages)
        text = written.get(place.as_posix()) or path.read_text(encoding="utf-8")
        (site / place).write_text(text, encoding="utf-8")
    nav = tomllib.loads(config.read_text(encoding="utf-8"))["project"]["nav"]
    (site / "llms.txt").write_text(index_of(nav, site), encoding="utf-8")


def _mathml(match: re.Match[str]) -> str:
    kind, latex = match.groups()
    for mark, sign in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&")):
        latex = latex.replace(mark, sign)
    return convert(latex.strip(), display="block" if kind == "div" else "inline")


def index_of(nav: list[dict], site: Path) -> str:
    """Return llms.txt: every page's Markdown with what it is about."""
    lines = ["# Trueline", "", f"> {generated.SUMMARY}", ""]
    for entry in nav:
        for title, part in entry.items():
            rows = part if isinstance(part, list) else [{title: part}]
            lines += [f"## {title}", ""]
            for row in rows:
                for name, place in row.items():
                    about = first_sentence((site / place).read_text(encoding="utf-8"))
                    lines.append(f"- [{name}]({place}): {about}")
            lines.append("")
    return "\n".join(lines)


def first_sentence(text: str) -> str:
    """Return the first sentence of a page that is no heading, table, code or picture."""
    for part in FENCE.sub("", text).split("\n\n"):
        words = " ".join(part.split())
        if words and words[0] not in "#|!*-<" and not part.lstrip("\n").startswith("    "):
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", words)
            return re.split(r"(?<=\.)\s", words, maxsplit=1)[0].removesuffix(":")
    return ""


def build(folder: Path) -> Path:
    """Build the site below a folder, which is emptied first, and return the site's."""
    if folder.exists():
        shutil.rmtree(folder)
    recipes = lay_out(folder / "pages")
    config = configured(folder, recipes)
    tool = Path(sys.executable).with_name("zensical")
    command = [str(tool), "build", "--clean", "--strict", "--config-file", str(config)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
        raise SystemExit(f"zensical: {said.strip()}")
    finish(folder, config)
    return folder / "site"


if __name__ == "__main__":
    print(build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "out/docs").resolve()))
