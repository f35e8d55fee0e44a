"""Streams of tasks from files: the TOML of a stream, and the data behind its tasks.

The format is described in docs/streams.md. An unknown key is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from trueline.errors import ConfigError, DataError, suggestion
from trueline.settings.reader import read_toml
from trueline.train.tasks.sources import (
    SPLITS,
    examples,
    from_datasets,
    from_file,
    from_layout,
)
from trueline.train.tasks.task import (
    INSTRUCTIONS,
    PromptForm,
    Task,
    TaskSettings,
    normalise,
    order_names,
)

SETTINGS = [f.name for f in fields(TaskSettings)]
TOP = ("title", "data", "order", "leave_out", "prompt", "defaults", "tasks")
TEXTS = (*SPLITS, "dataset", "config", "label", "instruction", "category")
"""Keys of a task whose value is a text."""
TASK = (*TEXTS, "splits", "text", "labels", *SETTINGS)
NEEDS = {"dataset": ("config", "splits"), "train": ("validation", "test")}
"""Keys that say something only beside another."""
MOST_LABELS = 100
"""More different labels than this in the training rows are taken for a mistake in the column."""


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they are trained, and how the model is asked."""

    tasks: tuple[Task, ...]
    prompt: PromptForm = field(default_factory=PromptForm)
    title: str = ""


def read_stream(path: str | Path, *, data: str | Path | None = None) -> Stream:
    """Return the stream of a TOML file; see the module for what it may hold.

    Args:
        path: The file.
        data: Replaces the file's `data` folder.

    Raises:
        ConfigError: Unknown or wrong keys.
        DataError: The file is no TOML, or the data of a task are missing or broken.
    """
    path = Path(path)
    return stream_from(read_toml(path), path.parent, data=data, source=str(path))


def stream_from(
    content: Mapping[str, Any],
    folder: str | Path = ".",
    *,
    data: str | Path | None = None,
    source: str = "the stream",
) -> Stream:
    """Return the stream of a TOML file's content; paths are relative to `folder`."""
    folder = Path(folder)
    _known(content, TOP, source)
    tables = {
        name: _typed(content, name, dict, "a table", source) or {}
        for name in ("prompt", "defaults", "tasks")
    }
    _known(tables["prompt"], [f.name for f in fields(PromptForm)], f"[prompt] of {source}")
    _known(tables["defaults"], SETTINGS, f"[defaults] of {source}")
    defaults = _settings(tables["defaults"], f"[defaults] of {source}")
    own: dict[str, Mapping[str, Any]] = {}
    for name, table in tables["tasks"].items():
        if not isinstance(table, dict):
            raise ConfigError(f"{source}: `tasks.{name}` must be a table, got {table!r}.")
        _check_task(table, f"[tasks.{name}] of {source}")
        own[name] = table
    if data is None and (text := _typed(content, "data", str, "a folder", source)) is not None:
        data = folder / Path(text).expanduser()
    if "\0" in str(data):
        raise ConfigError(f"{source}: `data` has a NUL: {str(data)!r}.")
    root = None if data is None else Path(data)
    names = _names(content, own, source)
    missing = [n for n in names if not _has_source(own.get(n, {})) and not _is_task(root, n)]
    if missing:
        where = f'in "{root}"' if root is not None else "(no `data` folder is given)"
        there = [] if root is None else [p.parent.name for p in root.glob("*/train.jsonl")]
        hint = suggestion(missing[0], there)
        raise DataError(
            f"{source}: no data for {', '.join(missing)} {where}."
            f"{hint if 'Did you mean' in hint else ''} To do without, write "
            f"leave_out = {json.dumps(missing)}."
        )
    tasks = [read_task(n, own.get(n, {}), folder=folder, root=root, defaults=defaults)
             for n in names]  # fmt: skip
    title = _typed(content, "title", str, "a text", source) or ""
    return Stream(tuple(tasks), PromptForm(**tables["prompt"]), title)


def preset(
    order: str | Sequence[str],
    root: str | Path,
    *,
    leave_out: Sequence[str] = (),
    settings: TaskSettings | None = None,
) -> list[Task]:
    """Return the tasks of one of the paper's orders, or of a list of names, from a data folder.

    Raises `DataError` naming the tasks that the folder lacks, unless they are in `leave_out`.
    """
    content = {"order": order if isinstance(order, str) else list(order),
               "leave_out": list(leave_out)}  # fmt: skip
    tasks = stream_from(content, data=root, source=f'Order "{order}"').tasks
    if settings is None:
        return list(tasks)
    return [replace(task, settings=settings) for task in tasks]


def read_task(
    name: str,
    table: Mapping[str, Any] | None = None,
    *,
    folder: Path = Path("."),
    root: Path | None = None,
    defaults: TaskSettings | None = None,
) -> Task:
    """Return one task: `table` as under `[tasks.NAME]`, or empty for one in the data folder."""
    table = table or {}
    _check_task(table, f"[tasks.{name}]")
    settings = _settings({k: v for k, v in table.items() if k in SETTINGS}, f"[tasks.{name}]")
    category, labels = table.get("category", ""), table.get("labels")
    if "dataset" in table:
        found, known = from_datasets(name, table, folder)
        labels = labels or known
    elif "train" in table:
        paths = {s: folder / Path(table[s]).expanduser() for s in SPLITS if s in table}
        found = {split: list(from_file(path, table)) for split, path in paths.items()}
    else:
        if root is None:
            raise DataError(f'Task "{name}" has no `train`, no `dataset`, and no `data` folder.')
        found, labels, kept = from_layout(root / name, table)
        category = category or kept
    if labels is None:
        labels = sorted({str(label) for _, _, label in found["train"]})
        if len(labels) > MOST_LABELS:
            raise DataError(
                f'Task "{name}" has {len(labels)} different labels in its training rows. Name the '
                "right column by `label`, or give `labels`."
            )
    if not _is_texts(labels):
        raise ConfigError(f'`labels` of task "{name}" must be a list of texts, got {labels!r}.')
    if "instruction" not in table and category and category not in INSTRUCTIONS:
        raise ConfigError(
            f'Task "{name}" has the category "{category}" and no instruction.'
            f"{suggestion(category, INSTRUCTIONS)}"
        )
    spelled = {normalise(label): label for label in labels}
    parts = {s: examples(found.get(s, ()), labels, spelled) for s in SPLITS}
    if not parts["test"]:
        raise DataError(f'Task "{name}" has no test rows. Give `test`.')
    return Task(
        name,
        parts["train"],
        parts["validation"],
        parts["test"],
        tuple(labels),
        table.get("instruction", INSTRUCTIONS.get(category, "")),
        category,
        settings if defaults is None else settings.over(defaults),
    )


def _names(content: Mapping[str, Any], own: Mapping[str, Any], source: str) -> list[str]:
    """Return the names of the tasks to train, in their order."""
    order, leave_out = content.get("order"), content.get("leave_out", [])
    for key, value in (("order", order), ("leave_out", leave_out)):
        if value is None or (key == "order" and isinstance(value, str)):
            continue
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ConfigError(f"{source}: `{key}` must be a list of task names, got {value!r}.")
    names = list(own) if order is None else order_names(order)
    if stray := [name for name in leave_out if name not in names]:
        raise ConfigError(f'{source}: `leave_out` names "{stray[0]}".{suggestion(stray[0], names)}')
    if double := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f'{source}: task "{double[0]}" stands in the order twice.')
    names = [name for name in names if name not in leave_out]
    if stray := [name for name in own if name not in names and name not in leave_out]:
        raise ConfigError(
            f'{source}: task "{stray[0]}" has settings, but the order has none of that name.'
            f"{suggestion(stray[0], names)}"
        )
    if not names:
        raise ConfigError(f"{source} has no tasks. Give `order`, or tables [tasks.NAME].")
    return names


def _check_task(table: Mapping[str, Any], where: str) -> None:
    """Raise `ConfigError` for a key that is unknown, of another type, or says nothing here."""
    _known(table, TASK, where)
    for key in TEXTS:
        if key in table and not (isinstance(table[key], str) and table[key].strip()):
            empty = key == "instruction" and table[key] == ""
            if not empty:
                raise ConfigError(f"`{key}` in {where} must be a text, got {table[key]!r}.")
        if "\0" in str(table.get(key, "")):
            raise ConfigError(f"`{key}` in {where} has a NUL: {table[key]!r}.")
    columns, splits = table.get("text", "sentence"), table.get("splits", {})
    if not isinstance(columns, str) and not _is_texts(columns):
        raise ConfigError(f"`text` in {where} must be a column or a list of them, got {columns!r}.")
    if not isinstance(splits, dict) or not all(isinstance(v, str) for v in splits.values()):
        raise ConfigError(
            f'`splits` in {where} must be a table such as {{train = "train"}}, got {splits!r}.'
        )
    _known(splits, SPLITS, f"`splits` in {where}")
    if "dataset" in table and (double := [s for s in SPLITS if s in table]):
        raise ConfigError(f"{where} has `dataset` and `{double[0]}`. Give one of the two.")
    for key, others in NEEDS.items():
        if key not in table and (stray := [other for other in others if other in table]):
            raise ConfigError(f"{where} has `{stray[0]}` without `{key}`. Give both.")


def _settings(table: Mapping[str, Any], where: str) -> TaskSettings:
    try:
        return TaskSettings(**table)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _has_source(table: Mapping[str, Any]) -> bool:
    return "train" in table or "dataset" in table


def _is_task(root: Path | None, name: str) -> bool:
    return root is not None and (root / name / "train.jsonl").is_file()


def _known(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise ConfigError(f'Unknown key "{key}" in {where}.{suggestion(key, known)}')


def _typed(content: Mapping[str, Any], key: str, kind: type, what: str, source: str) -> Any:
    value = content.get(key)
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{source}: `{key}` must be {what}, got {value!r}.")
    return value
