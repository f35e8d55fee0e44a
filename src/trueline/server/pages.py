"""The page at `/`: its files, what it must know of the methods, and the runs that it can draw."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse, JSONResponse, Response

from trueline.methods import METHODS, method_values
from trueline.records.web_page import FILES, folder
from trueline.server.run_pictures import found
from trueline.settings.options import Option, Range, options_of, ranges_of

if TYPE_CHECKING:
    from trueline.server.config import ServeConfig
    from trueline.types import Method

POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""Nothing from elsewhere, and no script that stands in a text."""
NAMES = {
    "plain": ("The prompt",),
    "linear-alignment": ("With the principle", "Without it"),
    "self-cd": ("With the safety prompt", "Without it"),
    "ada-cd": ("Asked to refuse", "Without it"),
    "contrast": ("Wanted prompt", "Unwanted prompt"),
}
"""What the branches of a method are, in plain words."""


def router(config: ServeConfig) -> APIRouter:
    """Return the routes of the page."""
    routes = APIRouter(include_in_schema=False)
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
    home = None if config.runs is None else Path(config.runs).expanduser().resolve()

    @routes.get("/")
    async def page() -> Response:
        return FileResponse(folder() / "index.html", headers=headers)

    @routes.get("/page/methods.json")
    async def methods() -> Response:
        own = config.method
        about = {
            "default": own.name if own is not None else "linear-alignment",
            "allowed": config.allowed,
            "methods": [describe(name, own) for name in METHODS if name != "blend"],
            "runs": home is not None,
        }
        return JSONResponse(about)

    @routes.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in FILES:
            raise HTTPException(404, "no such file")
        return FileResponse(folder() / name, media_type=FILES[name], headers=headers)

    @routes.get("/v1/runs")
    def listed() -> Response:
        return JSONResponse([] if home is None else found(home))

    return routes


def describe(name: str, own: Method | None = None) -> dict[str, Any]:
    """Return a method's name, first sentence, branches and fields, for the page.

    Fields begin at the values of `own`, where that is the method, else at their defaults.
    """
    cls = METHODS[name]
    held = method_values(own) if own is not None and own.name == name else {}
    ranges = ranges_of(cls)
    fields = [
        _field(option, held.get(option.name, option.default), ranges.get(option.name))
        for option in options_of(cls)
        if option.kind is not bool
    ]
    doc = (inspect.getdoc(cls) or "").split(".")[0] + "."
    branches = list(NAMES.get(name, ()))
    return {"name": name, "about": doc, "branches": branches, "fields": fields}


def _field(option: Option, value: Any, limits: Range | None) -> dict[str, Any]:
    """Return what an input of the page is: a slider, a number that may be absent, or a text."""
    about: dict[str, Any] = {
        "name": option.name,
        "doc": option.doc,
        "default": None,
        "kind": "text",
    }
    if isinstance(value, (str, int, float)):
        about["default"] = value
    if limits is None:
        return about
    low, high, step = span(value if isinstance(value, (int, float)) else None, limits)
    about |= {"low": low, "high": high, "step": step}
    return about | {"kind": "number" if option.default is None else "slider"}


def span(value: float | None, limits: Range) -> tuple[float, float, float]:
    """Return least, most and step of a slider.

    The whole range where it is at most 1 wide, else from -1 (or the least) to three times the
    value, at least 4: far enough to see a method break.
    """
    left, right = max(limits.low, -1.0), min(limits.high, max(4.0, 3 * abs(value or 0)))
    step = 1.0 if limits.whole else 0.01 if right - left <= 1 else 0.25
    return left + step * limits.low_open, right, step
