"""JSONL: objects of a file line by line, and files that grow by whole batches, safe against a kill.

read_lines, read_jsonl, parse   what others wrote
LineFile                        rows appended and synced; a torn last line is cut off, here alone
Rows                            rows under keys, batch by batch, only those that are missing
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from trueline.errors import DataError
from trueline.records.disk import naming, open_appended

T = TypeVar("T")
BOM = b"\xef\xbb\xbf"
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def dump(row: Mapping[str, Any]) -> str:
    """Return one line of JSON, text as it is and not as escapes."""
    return json.dumps(row, ensure_ascii=False)


def plain(value: Any) -> Any:
    """Return `value` as JSON that every reader takes: nan is null, infinity a string."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def shown(value: object) -> str:
    """Return a value as JSON, cut to 40 characters, for a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."


# What others wrote


class Content(NamedTuple):
    """The bytes of a file, read once: a pipe gives them only once."""

    lines: list[tuple[int, bytes]]
    """(line number, bytes) of each line that is not blank."""
    sha256: str


def read_input(path: str | Path) -> bytes:
    """Return the bytes of a file or a pipe that is to hold text in UTF-8.

    Raises `DataError` with the path if it is missing, a folder, a device, or in UTF-16.
    """
    if "\0" in str(path):
        raise DataError(f"{str(path)!r}: no path can hold a NUL.")
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not file.isatty()):
                raise DataError(f"{path}: is a device. Give a file or a pipe.")
            content = file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    if content.startswith(UTF_16) or b"\0" in content[:2]:
        raise DataError(f"{path}: is UTF-16. Save it as UTF-8.")
    return content


def read_content(path: str | Path) -> Content:
    """Return the lines of a file or a pipe, and the hash of its bytes.

    Raises `DataError` as `read_input` does, and for a file that is empty.
    """
    content = read_input(path)
    lines = content.removeprefix(BOM).split(b"\n")
    found = [(n, raw) for n, raw in enumerate(lines, 1) if raw.strip()]
    if not found:
        raise DataError(f'{path}: the file is empty. Give a JSON object a line, with "prompt".')
    return Content(found, hashlib.sha256(content).hexdigest())


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for each line of a JSONL file; blank lines are passed over.

    Raises `DataError` with path:line at the first line that is no JSON object in UTF-8, and with
    the path for a file that cannot be used, see `read_content`.
    """
    for line, raw in read_content(path).lines:
        try:
            yield line, parse(raw)
        except DataError as error:
            raise DataError(f"{path}:{line}: {error}") from None


def parse(raw: bytes) -> dict[str, Any]:
    """Return the JSON object on a line; `DataError` without path or line if there is none."""
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
        row = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
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
        raise DataError(f"not a JSON object but {kind_of(row)}.")
    return row


def kind_of(value: object) -> str:
    """Return what JSON calls a value's type: "a list"."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return kinds.get(type(value), "null" if value is None else "a number")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


# What a run writes


class LineFile:
    """A JSONL file of a run that rows are added to.

    A kill can leave the last line torn. `rows` passes over it, and the first `append` cuts it off.

    Raises:
        ConfigError: It is no regular file, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_appended(path)
        self._whole = False

    def rows(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yield (line number, offset of its end, row) of each whole line.

        Raises `DataError` with path:line at one that is no JSON object.
        """
        self._file.seek(0)
        end = 0
        for line, raw in enumerate(self._file, 1):
            if not raw.endswith(b"\n"):
                return
            end += len(raw)
            try:
                row = json.loads(raw)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise self.foreign(line)
            yield line, end, row

    def foreign(self, line: int) -> DataError:
        """Return the error for a line that this run did not write."""
        return DataError(f"{self.path}:{line}: not a row of this run. Give --overwrite.")

    def cut(self, end: int) -> None:
        """Drop all behind the offset `end`."""
        with naming(self.path):
            self._file.truncate(end)
        self._whole = True

    def append(self, rows: Iterable[Mapping[str, Any]], *, sync: bool = True) -> None:
        """Write a batch of rows; with `sync` they are on the disk when this returns."""
        if not self._whole:
            self.cut(self._last_end())
        text = "".join(dump(row) + "\n" for row in rows)
        with naming(self.path):
            self._file.write(text.encode("utf-8", "surrogatepass"))
            self._file.flush()
            if sync:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        with naming(self.path):
            self._file.close()

    def _last_end(self) -> int:
        self._file.seek(0)
        end = 0
        for raw in self._file:
            end += len(raw) if raw.endswith(b"\n") else 0
        return end


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a file whose last line is whole; the file is open for this row alone."""
    with naming(path), open_appended(path) as file:
        file.write((dump(row) + "\n").encode("utf-8", "surrogatepass"))


class Rows:
    """A JSONL file of rows in batches, each row with its `key` and its `index` under the key.

    Opened again it holds the whole batches that were written; what a kill cut short is cut off, so
    that the batches that follow are made of the same items as in an unbroken run.

    Raises:
        DataError: A line is none that a run wrote.
        ConfigError: It cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self._file = LineFile(path)
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def done(self, key: str, total: int) -> int:
        """Return how many of a key's `total` rows are there."""
        return min(len(self.rows.get(key, ())), total)

    def compute(
        self,
        key: str,
        items: Sequence[T],
        batch_size: int,
        work: Callable[[Sequence[T], int], Sequence[Mapping[str, Any]]],
        on_done: Callable[[int], object] = lambda count: None,
    ) -> list[dict[str, Any]]:
        """Return a row for every item; `work(batch, first index)` makes those that are missing."""
        rows = self.rows.setdefault(key, [])
        for first in range(len(rows), len(items), batch_size):
            batch = items[first : first + batch_size]
            made = work(batch, first)
            last = len(batch) - 1
            new = [
                plain(
                    {"key": key, "index": first + i, **({"ends": True} if i == last else {}), **r}
                )
                for i, r in enumerate(made)
            ]
            self._file.append(new)
            rows += [json.loads(dump(row)) for row in new]
            on_done(len(batch))
        return rows

    def _read(self) -> None:
        """Read the whole batches and cut the file behind the last one."""
        end = 0
        pending: list[dict[str, Any]] = []
        for line, position, row in self._file.rows():
            key = row.get("key")
            known = self.rows.get(key, []) if isinstance(key, str) else None
            if known is None or row.get("index") != len(known) + len(pending):
                raise self._file.foreign(line)
            pending.append(row)
            if row.get("ends"):
                self.rows.setdefault(str(key), []).extend(pending)
                pending, end = [], position
        self._file.cut(end)
