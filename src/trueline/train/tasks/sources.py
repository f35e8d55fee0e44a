"""The rows behind a task: CL_Benchmark's layout, JSONL files, Hugging Face data sets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trueline.errors import DataError
from trueline.models.hub import load_dataset
from trueline.records.lines import read_jsonl
from trueline.train.tasks.task import Example, normalise

SPLITS = ("train", "validation", "test")
NO_LABEL = "-"
"""How MNLI marks a row on whose label its annotators did not agree; such rows are left out."""
Row = tuple[str, str, Any]
"""Where it is from, sentence, label as it stands there."""


def from_layout(
    folder: Path, table: Mapping[str, Any]
) -> tuple[dict[str, list[Row]], list[str], str]:
    """Return the rows, the labels and the category of a task in CL_Benchmark's layout."""
    found = {
        split: list(from_file(path, table))
        for split in SPLITS
        if (path := folder / f"{split}.jsonl").exists() or split != "validation"
    }
    labels = table.get("labels")
    try:
        if labels is None:
            labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        path = folder / "category.txt"
        category = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    except OSError as error:
        raise DataError(f"{folder / 'labels.json'}: cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise DataError(f"{folder / 'labels.json'}: not JSON: {error}.") from None
    return found, labels, category


def from_file(path: Path, table: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the rows of a JSONL file."""
    for line, row in read_jsonl(path):
        yield _row(f"{path}:{line}", row, table)


def from_datasets(
    name: str, table: Mapping[str, Any], folder: Path
) -> tuple[dict[str, list[Row]], list[str] | None]:
    """Return the rows of a Hugging Face data set, and the names of its labels if it has them."""
    source, splits = table["dataset"], table.get("splits", {s: s for s in SPLITS})
    local = folder / Path(source).expanduser()
    try:
        whole = load_dataset(str(local) if local.is_dir() else source, table.get("config"))
    except DataError as error:
        raise DataError(f'Task "{name}": {error}') from None
    if not isinstance(whole, dict):  # of splits
        raise DataError(f'Task "{name}": data set "{source}" has no splits. It needs "train".')
    given = table.get("splits", {})
    found: dict[str, list[Row]] = {}
    names: list[str] | None = None
    for split, key in splits.items():
        if key not in whole:
            if split in given or split != "validation":
                raise DataError(
                    f'Task "{name}": data set "{source}" has no split "{key}", but '
                    f"{', '.join(whole)}. Name them by `splits`."
                )
            continue
        feature = whole[key].features.get(table.get("label", "label"))
        if names is None and hasattr(feature, "names"):
            names = list(feature.names)
        where = f"{source}[{key}]"
        found[split] = [_row(f"{where}:{i}", row, table) for i, row in enumerate(whole[key])]
    return found, names


def _row(where: str, row: Mapping[str, Any], table: Mapping[str, Any]) -> Row:
    """Return a row with its columns read; a list of columns is written as "column: value" lines.

    Where the task names no columns, `prompt` and `answer` serve as well as `sentence` and `label`,
    and so do `messages` that end with the assistant's answer.
    """
    if "text" not in table and "label" not in table and "sentence" not in row:
        if "messages" in row:
            row = _turns(where, row["messages"])
        if "prompt" in row and "answer" in row:
            return _columns(where, row, "prompt", "answer")
    return _columns(where, row, table.get("text", "sentence"), table.get("label", "label"))


def _turns(where: str, messages: Any) -> dict[str, Any]:
    """Return the question and the answer of a dialogue of one turn, perhaps with a system text."""
    wanted = "a question of the user and the assistant's answer, perhaps after a system text"
    turns = messages if isinstance(messages, list) else []
    roles = [m.get("role") if isinstance(m, dict) else None for m in turns]
    texts = [m.get("content") if isinstance(m, dict) else None for m in turns]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise DataError(f"{where}: `messages` must be {wanted}, got the roles {roles}.")
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: every message's `content` must be a text.")
    return {"prompt": "\n".join(map(str, texts[:-1])), "answer": texts[-1]}


def _columns(where: str, row: Mapping[str, Any], columns: str | Sequence[str], label: str) -> Row:
    for column in (*([columns] if isinstance(columns, str) else columns), label):
        if row.get(column) is None:
            raise DataError(
                f'{where}: missing field "{column}"; the row has {", ".join(row)}. Name the '
                "columns by `text` and `label`."
            )
    if isinstance(row[label], (list, dict)):
        raise DataError(f'{where}: field "{label}" must be a text or a number, got {row[label]!r}.')
    if isinstance(columns, str):
        return where, str(row[columns]), row[label]
    return where, "\n".join(f"{column}: {row[column]}" for column in columns), row[label]


def examples(
    rows: Iterable[Row], labels: Sequence[str], spelled: Mapping[str, str]
) -> tuple[Example, ...]:
    """Return checked examples; a whole number is the place of a label, True and False are texts."""
    found = []
    for where, sentence, label in rows:
        if label == NO_LABEL and NO_LABEL not in labels:
            continue
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
            text = labels[label] if str(label) not in labels else str(label)
        else:
            text = spelled.get(normalise(str(label)), str(label))
        if text not in labels:
            raise DataError(f'{where}: label "{label}" is not one of {", ".join(labels)}.')
        if not sentence.strip():
            raise DataError(f"{where}: the sentence is empty.")
        found.append(Example(sentence, text))
    return tuple(found)
