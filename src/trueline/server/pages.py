"""The page at `/`: its files, what it must know of the methods, and the runs that it can draw."""

from __future__ import annotations

import dataclasses
import inspect
import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import FileResponse, JSONResponse, Response

from trueline.methods import METHODS
from trueline.types import Method

if TYPE_CHECKING:
    from collections.abc import Mapping

FILES = {
    "style.css": "text/css",
    "main.js": "text/javascript",
    "api.js": "text/javascript",
    "strip.js": "text/javascript",
    "runs.js": "text/javascript",
}
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
"""Nothing from elsewhere, and no script that stands in a text."""
RANGES: dict[str, tuple[float, float, float]] = {
    "ratio": (-1, 6, 0.25),
    "alpha": (0, 4, 0.25),
    "guidance": (0, 6, 0.25),
}
"""Least, most and step of a slider; numbers between 0 and 1 are what others are."""
NAMES = {
    "plain": ("The prompt",),
    "linear-alignment": ("With the principle", "Without it"),
    "self-cd": ("With the safety prompt", "Without it"),
    "ada-cd": ("Asked to refuse", "Without it"),
    "contrast": ("Wanted prompt", "Unwanted prompt"),
}
"""What the branches of a method are, in plain words."""
LARGEST = 4_000_000
"""Bytes of a run's file that the page takes."""


def folder() -> Path:
    """Return where the page's files lie."""
    return Path(str(resources.files("trueline") / "server" / "page"))


def router(default: Method | None, runs: str | Path | None) -> APIRouter:
    """Return the routes of the page; `runs` is a folder of runs to draw."""
    routes = APIRouter(include_in_schema=False)
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
    home = None if runs is None else Path(runs).expanduser().resolve()

    @routes.get("/")
    async def page() -> Response:
        return FileResponse(folder() / "index.html", headers=headers)

    @routes.get("/page/methods.json")
    async def methods() -> Response:
        name = default.name if default is not None else "linear-alignment"
        about = [describe(method) for method in METHODS if method not in ("contrast", "blend")]
        return JSONResponse({"default": name, "methods": about, "runs": home is not None})

    @routes.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in FILES:
            raise HTTPException(404, "no such file")
        return FileResponse(folder() / name, media_type=FILES[name], headers=headers)

    @routes.get("/v1/runs")
    def listed() -> Response:
        return JSONResponse([] if home is None else found(home))

    return routes


def describe(name: str) -> dict[str, Any]:
    """Return a method's name, first sentence, branches and fields, for the page."""
    cls = METHODS[name]
    fields: list[dict[str, Any]] = []
    for field in dataclasses.fields(cls):
        kind = "number" if str(field.type).split(" |")[0] in ("float", "int") else "text"
        default = None if field.default is dataclasses.MISSING else field.default
        if kind == "number" and (default is None or field.name == "norm"):
            continue  # options that replace another one, and go with those
        low, high, step = RANGES.get(field.name, (0, 1, 0.01) if kind == "number" else (0, 0, 0))
        if isinstance(default, (int, float)) and default > high:
            low, high, step = 0, 4 * default, 1
        fields.append(
            {"name": field.name, "kind": kind, "default": default}
            | {"low": low, "high": high, "step": step}
        )
    prompt = next((f["default"] for f in fields if str(f["name"]).endswith("prompt")), None)
    doc = (inspect.getdoc(cls) or "").split(".")[0] + "."
    names = list(NAMES.get(name, ()))
    return {"name": name, "about": doc, "branches": names, "prompt": prompt, "fields": fields}


def found(home: Path) -> list[dict[str, Any]]:
    """Return what the runs under `home` left, by folder: points, curves or scores.

    Files that are no run's, too large, or links out of the folder are left out.
    """
    runs = []
    for path in sorted(home.rglob("*.json*")):
        reader = READERS.get(path.name)
        inside = path.resolve().is_relative_to(home) and path.is_file()
        if reader is None or not inside or path.stat().st_size > LARGEST:
            continue
        try:
            content = reader(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        name = path.parent.relative_to(home).as_posix()
        runs.append({"name": home.name if name == "." else name, **content})
    return runs


def _points(text: str) -> dict[str, Any]:
    results: Mapping[str, Any] = json.loads(text)
    points = [
        {
            "label": str(point["label"]),
            "measures": {
                str(name): {"value": float(m["value"])}
                for name, m in point["measures"].items()
                if m.get("value") is not None
            },
        }
        for point in results["points"]
    ]
    recommended = (results.get("recommendation") or {}).get("label")
    title = str(results["title"])
    return {"kind": "points", "title": title, "points": points, "recommended": recommended}


def _curves(text: str) -> dict[str, Any]:
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    names = dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, (int, float)))
    curves = {
        name: [[row["step"], row[name]] for row in rows if row.get(name) is not None]
        for name in names
        if name in SHOWN
    }
    if not curves:
        raise ValueError("no curves")
    return {"kind": "curves", "title": "Distillation", "curves": curves}


def _scores(text: str) -> dict[str, Any]:
    content = json.loads(text)
    rows = [[float(v) for v in row] for row in content["R"]]
    title = "Scores after each task"
    return {"kind": "scores", "title": title, "tasks": content["tasks"], "R": rows}


SHOWN = ("loss", "kl_to_teacher", "kl_to_reference", "reward", "adherence")
"""Curves of a distillation that the page draws."""
READERS = {"results.json": _points, "log.jsonl": _curves, "R.json": _scores}
"""What a run leaves, and how it is read."""
