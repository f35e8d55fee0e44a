"""The page in a browser: one set of files, served as they are or written as one file with its data.

`trueline serve` serves them; `standalone` puts style, script and what is shown into one HTML file
that needs nothing from outside and runs no script but its own (its hash is in the policy).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

FILES = {
    "style.css": "text/css",
    "api.js": "text/javascript",
    "strip.js": "text/javascript",
    "runs.js": "text/javascript",
    "ask.js": "text/javascript",
    "main.js": "text/javascript",
}
"""Name -> content type; scripts in an order in which each needs only those before it."""
STYLE = '<link rel="stylesheet" href="page/style.css">'
SCRIPT = '<script type="module" src="page/main.js"></script>'


def folder() -> Path:
    """Return where the page's files lie."""
    return Path(str(resources.files("trueline") / "assets" / "page"))


def standalone(data: Any, title: str) -> str:
    """Return the page as one file that shows `data`, plain values with finite numbers alone."""
    style = (folder() / "style.css").read_text(encoding="utf-8")
    script = "\n".join(map(_module, (name for name in FILES if name.endswith(".js"))))
    own = {"style": _hash(style), "script": _hash(script)}
    policy = (
        f"default-src 'none'; style-src '{own['style']}'; script-src '{own['script']}'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    kept = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    page = (folder() / "index.html").read_text(encoding="utf-8")
    parts = {
        "<title>Trueline</title>": f"<title>{_escaped(title)}</title>\n"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        STYLE: f"<style>{style}</style>",
        SCRIPT: f'<script type="application/json" id="data">{kept}</script>\n'
        f'<script type="module">{script}</script>',
    }
    for old, new in parts.items():
        assert page.count(old) == 1
        page = page.replace(old, new)
    return page


def _module(name: str) -> str:
    """Return a module's text without what ties it to the others."""
    text = (folder() / name).read_text(encoding="utf-8")
    return re.sub(r"(?m)^import .*\n|^export ", "", text)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
