"""Files of prompts: JSONL rows, checked, the bad ones with their line and reason."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueline.errors import DataError
from trueline.records.lines import kind_of, parse, read_content
from trueline.types import EMPTY, SEEDS, Message, check_messages

WRITTEN = (
    *("text", "token_ids", "finish_reason", "prompt_tokens", "samples"),
    *("logprobs", "branch_logprobs"),
)
"""Fields that a run adds to its rows; a row that brings one of its own is refused."""
SHOWN = 20
"""Bad rows are listed up to this many, then counted."""


@dataclass(frozen=True)
class BadRow:
    """A line that cannot be used."""

    line: int
    error: str
    row: Any
    """The parsed row, or the line's text where it could not be parsed."""


class BadRowsError(DataError):
    """Rows of a file cannot be used: `rows` has them all, `lines` as many as `SHOWN`."""

    def __init__(self, path: str, rows: Sequence[BadRow]) -> None:
        self.path, self.rows = path, rows
        more = f" (and {len(rows) - 1} more bad rows)" if len(rows) > 1 else ""
        super().__init__(f"{path}:{rows[0].line}: {rows[0].error}{more}")

    def lines(self) -> list[str]:
        """Return a line for each row, up to `SHOWN`, and how many more there are."""
        found = [str(DataError(f"{self.path}:{r.line}: {r.error}")) for r in self.rows[:SHOWN]]
        if (more := len(self.rows) - SHOWN) > 0:
            found.append(f"and {more} more bad rows. --skip-bad runs the others.")
        return found


@dataclass(frozen=True)
class PromptRow:
    """A checked row of a file of prompts."""

    line: int
    messages: list[Message]
    """The chat, with the row's own system message if it has one."""
    principle: str | None
    seed: int | None
    fields: dict[str, Any] = field(repr=False)
    """The row as it was, with an `id`: the line number where it had none."""


@dataclass(frozen=True)
class PromptFile:
    """A file of prompts, read once."""

    rows: list[PromptRow]
    bad: list[BadRow]
    sha256: str
    """Hash of its bytes."""


def read_prompts(path: str | Path) -> PromptFile:
    """Return the rows of a file of prompts, and the bad ones, each in the file's order.

    A row has `prompt` (a string) or `messages` (a list); `id`, `system`, `principle` and `seed`
    are optional, further fields are kept. Raises `DataError` if the file itself cannot be used.
    """
    rows: list[PromptRow] = []
    bad: list[BadRow] = []
    lines_of_ids: dict[str, int] = {}
    content = read_content(path)
    for line, raw in content.lines:
        row: Any = raw.decode("utf-8", errors="replace").rstrip("\r\n")
        try:
            row = parse(raw)
            checked = check_row(row, line)
            name = json.dumps(checked.fields["id"])
            first = lines_of_ids.setdefault(name, line)
            if first != line:
                raise DataError(f"duplicate id {name}, first seen on line {first}.")
            rows.append(checked)
        except DataError as error:
            bad.append(BadRow(line, str(error), row))
    return PromptFile(rows, bad, content.sha256)


def check_row(row: Mapping[str, Any], line: int) -> PromptRow:
    """Return the row checked; raise `DataError` with the reason alone."""
    if "prompt" in row and "messages" in row:
        raise DataError('has both "prompt" and "messages". Keep one.')
    if "prompt" not in row and "messages" not in row:
        raise DataError(f'missing field "prompt" (or "messages"); the row has {_names(row)}.')
    for name in WRITTEN:
        if name in row:
            raise DataError(f'field "{name}" is one that the output adds. Rename it.')
    for name in ("prompt", "system", "principle"):
        if name in row:
            _check_text(name, row[name])
    messages = _messages(row)
    if not isinstance(row.get("id", ""), str | int) or isinstance(row.get("id"), bool):
        raise DataError(f'field "id" must be a string or a whole number, got {kind_of(row["id"])}.')
    seed = row.get("seed")
    if "seed" in row and (not isinstance(seed, int) or isinstance(seed, bool) or seed not in SEEDS):
        raise DataError(f'field "seed" must be a whole number below 2^63, got {json.dumps(seed)}.')
    fields = dict(row) if "id" in row else {"id": line, **row}
    return PromptRow(line, messages, row.get("principle"), seed, fields)


def _messages(row: Mapping[str, Any]) -> list[Message]:
    if "messages" in row and not isinstance(row["messages"], list):
        raise DataError(f'field "messages" must be a list, got {kind_of(row["messages"])}.')
    messages = check_messages(row["prompt"] if "prompt" in row else row["messages"])
    if "system" in row:
        if messages[0]["role"] == "system":
            raise DataError('has "system" and a system message. Keep one.')
        messages.insert(0, {"role": "system", "content": row["system"]})
    return messages


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise DataError(f'field "{name}" must be a string, got {kind_of(value)}.')
    if not value.strip() and (name, value) != EMPTY:
        raise DataError(f'field "{name}" is empty. Give it some text.')


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(f'"{name}"' for name in list(row)[:8]) or "no fields"
