"""Pages of the site that are made from the code: command line, settings, and the API's names."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
from collections.abc import Iterable
from typing import Any

import trueline
from trueline.cli import COMMANDS, build_parser
from trueline.settings.options import field_docs
from trueline.settings.reader import explain

SUMMARY = (
    "Trueline brings a language model into line with what you want by contrast: a principle is "
    "followed while decoding, measured, distilled into an adapter, and the next one stacked on top."
)
API = {
    "decoding": ("Decoding", "load_model generate generate_file guided Decoder Request Prompt "
                 "SamplingParams Completion Step Ticket Message LanguageModel ModelConfig "
                 "PromptFileConfig"),
    "methods": ("Methods", "Method Plain LinearAlignment SelfCD AdaCD Contrast Blend METHODS "
                "SAFETY_PROMPT make_method"),
    "measuring": ("Measuring", "measure MeasureConfig MeasureResults sweep SweepConfig diagnose "
                  "DiagnoseConfig Diagnosis report ReportConfig JudgeConfig measure_agreement "
                  "AgreementConfig measure_win_rate WinRateConfig"),
    "training": ("Training", "distil DistilConfig DistilResults stack StackConfig export "
                 "ExportConfig"),
    "aligning": ("Aligning", "align AlignConfig Principle Safety Thresholds AlignResults"),
    "errors": ("Errors", "TruelineError ConfigError DataError ModelError"),
}  # fmt: skip
"""File below reference/ -> title, and the public names on it."""
INTERNAL = {
    "tensors": ("Losses and penalties", (
        "trueline.methods.inverse_q", "trueline.methods.o_lora", "trueline.methods.inf_lora",
        "trueline.methods.ella", "trueline.methods.drift")),
    "extending": ("For extensions", (
        "trueline.train.keep.stage", "trueline.train.keep.terms", "trueline.train.keep.penalty",
        "trueline.train.adapters.stack", "trueline.engine.protocol", "trueline.evals.judges")),
}  # fmt: skip
"""Modules that are shown whole."""
API_PAGES = {f"API: {t}": f"reference/{n}.md" for n, (t, _) in (API | INTERNAL).items()}


def homes() -> dict[str, str]:
    """Return public name -> the module that defines it."""
    found = dict(trueline._HOME)
    shown = [name for _, names in API.values() for name in names.split()]
    if wrong := set(shown) ^ set(found):
        raise SystemExit(f"docs/generated.py: API and trueline.__all__ differ: {sorted(wrong)}")
    return found


def pages() -> dict[str, str]:
    """Return every page by its place."""
    home = homes()
    found = {"reference/cli.md": cli_page(), "reference/settings.md": settings_page()}
    for name, (title, names) in API.items():
        options = "\n    options:\n      heading: trueline.{0}\n      toc_label: {0}"
        rows = [f"::: {home[n]}.{n}{options.format(n)}" for n in names.split()]
        found[f"reference/{name}.md"] = f"# {title}\n\n" + "\n\n".join(rows) + "\n"
    for name, (title, modules) in INTERNAL.items():
        rows = [f"::: {module}" for module in modules]
        found[f"reference/{name}.md"] = f"# {title}\n\n" + "\n\n".join(rows) + "\n"
    return found


def cli_page() -> str:
    """Return the help of every command, 88 columns wide."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "88"
    try:
        return _helps()
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _helps() -> str:
    parser = build_parser(complete=True)
    commands = next(a for a in parser._actions if a.choices)
    parts = ["# Command line", "What `trueline COMMAND --help` prints."]
    for name in COMMANDS:
        own = commands.choices[name]  # type: ignore[index]
        parts += [f"## trueline {name}", f"```text\n{own.format_help().rstrip()}\n```"]
        for action in own._actions:
            for sub, inner in action.choices.items() if _nested(action) else ():
                text = inner.format_help().rstrip()
                parts += [f"### trueline {name} {sub}", f"```text\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def _nested(action: Any) -> bool:
    return isinstance(action.choices, dict)


def settings_page() -> str:
    """Return every setting with its default and meaning, from the one reader."""
    from trueline.jobs.distil_config import DistilConfig
    from trueline.jobs.projects import AlignConfig, Principle
    from trueline.jobs.stacking import StackConfig
    from trueline.methods import METHODS
    from trueline.server.config import ServeConfig
    from trueline.train.distil.config import InverseQConfig
    from trueline.train.keep import KEEP

    own = {name for cls in (DistilConfig, InverseQConfig) for name in declared(cls)}
    distil = [row for row in DistilConfig.explained() if row[0].split(".")[0] in own]
    align = [row for row in explain([AlignConfig]) if row[0] not in ("principles", "folder")]
    parts = [
        "# Settings",
        "Every setting of a command, as `--list-settings` prints it: in a TOML file (`--config`), "
        "or behind `--set NAME=VALUE`. Most are options of the command line too.",
        "## trueline distil", table(distil),
        "Beside these, every argument of transformers' `TrainingArguments`.",
        "## trueline stack", table(r for r in StackConfig.explained() if r[0] not in _ways(KEEP)),
        "## trueline align", table(align),
        "### Each `[[principle]]`", table(explain([Principle])),
        "## trueline serve", table(explain([ServeConfig])),
        "## Ways to keep",
        "`--keep NAME`, and its settings by `--set keep_options.NAME=VALUE` (distil, align) or "
        "`--set NAME=VALUE` (stack).",
    ]  # fmt: skip
    for name, way in KEEP.items():
        parts += [f"### --keep {name}", doc(way), table(explain([way]))]
    parts += ["## Decoding methods", "`--method NAME`; each field is an option."]
    for name, method in METHODS.items():
        parts += [f"### --method {name}", doc(method), table(explain([method]))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _ways(ways: dict[str, Any]) -> set[str]:
    return {row[0] for way in ways.values() for row in explain([way])}


def declared(cls: type) -> set[str]:
    """Return the names of fields that classes of this package declare."""
    parts = [c for c in cls.__mro__ if c.__module__.startswith("trueline")]
    return {name for part in parts for name in vars(part).get("__annotations__", {})}


def table(rows: Iterable[tuple[str, Any, str]]) -> str:
    """Return settings as a Markdown table; empty where there are none."""
    lines = [f"| `{name}` | `{cell(default)}` | {cell(text)} |" for name, default, text in rows]
    return "\n".join(["| setting | default | |", "|---|---|---|", *lines]) if lines else ""


def cell(value: Any) -> str:
    """Return a value for a cell of a table."""
    text = str(value).replace("|", "\\|").replace("<", "&lt;")
    return "none" if text == "null" else text


def doc(thing: Any) -> str:
    """Return a docstring's first paragraph."""
    return (inspect.getdoc(thing) or "").split("\n\n")[0]


def api_twins() -> dict[str, str]:
    """Return the API's pages as plain Markdown: signatures and docstrings."""
    found, home = {}, homes()
    for name, (title, names) in API.items():
        things = [(f"trueline.{n}", getattr(trueline, n)) for n in names.split()]
        found[f"reference/{name}.md"] = _twin(title, things)
    for name, (title, modules) in INTERNAL.items():
        things = []
        for module in map(importlib.import_module, modules):
            things.append((module.__name__, module))
            things += [(f"{module.__name__}.{n}", thing) for n, thing in vars(module).items()
                       if getattr(thing, "__module__", "") == module.__name__ and n[0] != "_"
                       and (inspect.isclass(thing) or inspect.isfunction(thing))]  # fmt: skip
        found[f"reference/{name}.md"] = _twin(title, things)
    assert home
    return found


def _twin(title: str, things: Iterable[tuple[str, Any]]) -> str:
    parts = [f"# {title}"]
    for name, thing in things:
        parts.append(f"## {name}")
        if inspect.isclass(thing) or inspect.isfunction(thing):
            parts.append(f"```python\n{name.rsplit('.')[-1]}{_signature(thing)}\n```")
        own = inspect.isclass(thing) or inspect.isfunction(thing) or inspect.ismodule(thing)
        parts.append(inspect.getdoc(thing) or "" if own else f"```python\n{thing!r}\n```")
        if inspect.isclass(thing) and (rows := _fields(thing)):
            parts.append(rows)
    return "\n\n".join(part for part in parts if part) + "\n"


def _signature(thing: Any) -> str:
    try:
        return re.sub(r"<factory>", "...", str(inspect.signature(thing)))
    except ValueError:
        return "(...)"


def _fields(cls: type) -> str:
    if not dataclasses.is_dataclass(cls):
        return ""
    docs = field_docs(cls)
    rows = [
        (f.name, "" if f.default is dataclasses.MISSING else f.default, docs.get(f.name, ""))
        for f in dataclasses.fields(cls)
    ]
    return table((name, default, " ".join(text.split())) for name, default, text in rows)
