"""JSONL files: prompts in as checked rows, completions out, one row for each, safe against a kill.

    read_prompts   file -> rows, and the bad ones with their line and reason
    RowFile        whole batches appended and synced; what a killed run left is continued

Nothing here knows of a model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from trueline.errors import ConfigError, DataError
from trueline.types import SEEDS, Message, check_messages

WRITTEN = (
    *("text", "token_ids", "finish_reason", "prompt_tokens", "samples"),
    *("logprobs", "branch_logprobs"),
)
"""Fields that a run adds to its rows; a row that brings one of its own is refused."""


@dataclass(frozen=True)
class BadRow:
    """A line that cannot be used."""

    line: int
    error: str
    row: Any
    """The parsed row, or the line's text where it could not be parsed."""


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


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for each line of a JSONL file; blank lines are passed over.

    Raises `DataError` with path:line at the first line that is no JSON object in UTF-8, and with
    the path for a file that is missing, a folder or empty.
    """
    for line, raw in read_lines(path):
        try:
            yield line, parse(raw)
        except DataError as error:
            raise DataError(f"{path}:{line}: {error}") from None


def read_prompts(path: str | Path) -> tuple[list[PromptRow], list[BadRow]]:
    """Return the rows of a file of prompts, and the bad ones, each in the file's order.

    A row has `prompt` (a string) or `messages` (a list); `id`, `system`, `principle` and `seed`
    are optional, further fields are kept. Raises `DataError` if the file itself cannot be used.
    """
    rows: list[PromptRow] = []
    bad: list[BadRow] = []
    lines_of_ids: dict[str, int] = {}
    for line, raw in read_lines(path):
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
    return rows, bad


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, bytes) for each line that is not blank."""
    empty = True
    try:
        with open(path, "rb") as file:
            for line, raw in enumerate(file, 1):
                raw = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
                if raw.strip():
                    empty = False
                    yield line, raw
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    if empty:
        raise DataError(f'{path}: the file is empty. Give a JSON object a line, with "prompt".')


def parse(raw: bytes) -> dict[str, Any]:
    """Return the JSON object on a line; `DataError` without path or line if there is none."""
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
        row = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise DataError(f"not UTF-8: byte 0x{byte:02x} at byte {error.start + 1}.") from None
    except UnicodeEncodeError:
        raise DataError("not text: an escape is half of a surrogate pair.") from None
    except json.JSONDecodeError as error:
        raise DataError(f"broken JSON at column {error.colno}: {error.msg}.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot read the JSON: {error}.") from None
    if not isinstance(row, dict):
        raise DataError(f"not a JSON object but {_kind(row)}.")
    return row


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
        raise DataError(f'field "id" must be a string or a whole number, got {_kind(row["id"])}.')
    seed = row.get("seed")
    if "seed" in row and (not isinstance(seed, int) or isinstance(seed, bool) or seed not in SEEDS):
        raise DataError(f'field "seed" must be a whole number below 2^63, got {json.dumps(seed)}.')
    fields = dict(row) if "id" in row else {"id": line, **row}
    return PromptRow(line, messages, row.get("principle"), seed, fields)


def _messages(row: Mapping[str, Any]) -> list[Message]:
    if "messages" in row and not isinstance(row["messages"], list):
        raise DataError(f'field "messages" must be a list, got {_kind(row["messages"])}.')
    messages = check_messages(row["prompt"] if "prompt" in row else row["messages"])
    if "system" in row:
        if messages[0]["role"] == "system":
            raise DataError('has "system" and a system message. Keep one.')
        messages.insert(0, {"role": "system", "content": row["system"]})
    return messages


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise DataError(f'field "{name}" must be a string, got {_kind(value)}.')
    if not value.strip():
        raise DataError(f'field "{name}" is empty. Give it some text.')


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return kinds.get(type(value), "null" if value is None else "a number")


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(f'"{name}"' for name in list(row)[:8]) or "no fields"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def dump(row: Mapping[str, Any]) -> str:
    """Return one line of JSON, text as it is and not as escapes."""
    return json.dumps(row, ensure_ascii=False)


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RowFile:
    """The output of a run: rows appended batch by batch, so that a kill loses no finished batch.

    Beside it lies `<path>.run.json` with the settings that the rows belong to. Opened again with
    the same settings it holds the whole batches that were written; a batch cut short by a kill is
    cut off, and so the batches that follow are made of the same rows as in an unbroken run.

    Raises:
        ConfigError: The file belongs to a run with other settings, has no settings beside it, or
            another process writes to it.
        DataError: A row of it is not the one the run would have written.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        ids: Sequence[Any],
        batch_size: int,
        *,
        overwrite: bool = False,
    ) -> None:
        self.path, self.sidecar = Path(path), Path(f"{path}.run.json")
        self.settings, self.total = dict(settings), len(ids)
        self.sessions: list[dict[str, Any]] = []
        if not overwrite:
            self.sessions = check_settings(path, settings)["sessions"]
        try:
            self._file: BinaryIO = open(self.path, "a+b")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f'Cannot write "{self.path}": {error.strerror}.') from None
        try:
            lock(self._file, self.path)
            if overwrite:
                self._file.truncate(0)
            self.done = self._check_rows(ids, batch_size)
            self._save()
        except BaseException:
            self._file.close()
            raise

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a batch of rows; when this returns they are on the disk."""
        written = "".join(dump(row) + "\n" for row in rows)
        self._file.write(written.encode("utf-8"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done += written.count("\n")

    def close(self, session: Mapping[str, Any] | None = None) -> None:
        """Close the file; `session` (rows, tokens, seconds) is added to the settings file."""
        if session is not None:
            self.sessions.append(dict(session))
            self._save()
        self._file.close()

    def _check_rows(self, ids: Sequence[Any], batch_size: int) -> int:
        """Return how many rows to keep, after cutting the file to them."""
        ends = [0]
        self._file.seek(0)
        for line, raw in enumerate(self._file, 1):
            if not raw.endswith(b"\n"):
                break
            try:
                known = line <= len(ids) and json.loads(raw)["id"] == ids[line - 1]
            except (ValueError, KeyError, TypeError):
                known = False
            if not known:
                raise DataError(f"{self.path}:{line}: not a row of this run. Give --overwrite.")
            ends.append(ends[-1] + len(raw))
        done = len(ends) - 1
        done -= 0 if done == len(ids) else done % batch_size
        self._file.truncate(ends[done])
        return done

    def _save(self) -> None:
        kept = {"settings": self.settings, "rows": self.total, "sessions": self.sessions}
        replace_file(self.sidecar, json.dumps(kept, ensure_ascii=False, indent=1) + "\n")


def check_settings(path: str | Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what lies beside the output at `path`: `settings`, `rows` in all, `sessions`.

    Raises `ConfigError` if the output belongs to a run with other settings, or to none.
    """
    path, sidecar = Path(path), Path(f"{path}.run.json")
    way_out = "Give another --output, or --overwrite."
    if not sidecar.exists():
        if path.exists() and path.stat().st_size:
            text = f'Output "{path}" exists, and no "{sidecar}" says which run it belongs to.'
            raise ConfigError(f"{text} {way_out}")
        return {"settings": dict(settings), "rows": None, "sessions": []}
    try:
        kept: dict[str, Any] = json.loads(sidecar.read_text(encoding="utf-8"))
        old, _, _ = kept["settings"], kept["rows"], list(kept["sessions"])
    except (OSError, ValueError, KeyError, TypeError):
        text = f'Cannot read "{sidecar}", the settings of "{path}". {way_out}'
        raise ConfigError(text) from None
    new = json.loads(dump(settings))
    names = [name for name in {**new, **old} if old.get(name) != new.get(name)]
    if names:
        changes = (f"{n} was {shown(old.get(n))}, now {shown(new.get(n))}" for n in names)
        text = f'Output "{path}" belongs to another run: {"; ".join(changes)}. {way_out}'
        raise ConfigError(text)
    return kept


def replace_file(path: Path, text: str) -> None:
    """Write a file so that at every moment the old or the new one is there, whole."""
    part = Path(f"{path}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def lock(file: BinaryIO, path: Path) -> None:
    """Take the file for this process until it ends, where the system can."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f'Another run is writing to "{path}". Wait for it to end.') from None


def shown(value: object) -> str:
    """Return a value as JSON, cut to 40 characters, for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
