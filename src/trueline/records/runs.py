"""Runs: one folder for each measurement, safe against a kill, with all that repeats it.

    manifest.json     what decides the responses, the command, how long it took
    responses.jsonl   a row for every prompt and point, whole batches appended and synced
    verdicts.jsonl    what the judge says of each, the same way
    results.json      every number; results.md, plot.png    the same to look at

A row belongs to a key, the hash of what decides it. The same command run again computes only rows
that are not there; a folder takes further points and other judges, but no other model, data or
sampling.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from trueline.errors import ConfigError, DataError
from trueline.records.data import dump, file_hash, lock, replace_file, shown

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel

T = TypeVar("T")
WRITTEN = (
    *("manifest.json", "responses.jsonl", "verdicts.jsonl", "judge.jsonl"),
    *("results.json", "results.md", "plot.png"),
)
WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model")
"""Files of a model's folder that decide what it says."""


def digest(content: Any) -> str:
    """Return a short hash of anything that JSON can hold; the order of keys plays no part."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def plain(value: Any) -> Any:
    """Return `value` as JSON that every reader takes: nan is null, infinity a string."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def versions() -> dict[str, str]:
    """Return the versions that a number may depend on."""
    import torch
    import transformers

    from trueline import __version__

    return {
        "trueline": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def folder_hash(folder: str | Path) -> str:
    """Return one hash of the files in a model's or adapter's folder."""
    paths = sorted({p for pattern in WEIGHTS for p in Path(folder).glob(pattern)})
    return digest([[p.name, file_hash(p)] for p in paths if p.name != "held_out.json"])


def model_hash(model: LanguageModel, folder: str | Path | None = None) -> str:
    """Return what tells the weights: a hash of the folder's files, or the hub's commit.

    Where there is neither (a model made in memory) it is a hash of the parameters.
    """
    if folder is not None and Path(folder).is_dir():
        return folder_hash(folder)
    if commit := getattr(model.model.config, "_commit_hash", None):
        return f"commit {commit}"
    total = hashlib.sha256()
    for name, tensor in sorted(model.model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


class Rows:
    """A JSONL file of rows in batches, each row with its `key` and its `index` under the key.

    Opened again it holds the whole batches that were written; what a kill cut short is cut off, so
    that the batches that follow are made of the same items as in an unbroken run.

    Raises:
        DataError: A line is none that a run wrote.
        ConfigError: Another process writes to it, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, list[dict[str, Any]]] = {}
        try:
            self._file: BinaryIO = open(path, "a+b")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f'Cannot write "{path}": {error.strerror}.') from None
        try:
            lock(self._file, path)
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
                {"key": key, "index": first + i, **({"ends": True} if i == last else {}), **row}
                for i, row in enumerate(made)
            ]
            text = "".join(dump(plain(row)) + "\n" for row in new)
            self._file.write(text.encode("utf-8", "surrogatepass"))
            self._file.flush()
            os.fsync(self._file.fileno())
            rows += [json.loads(line) for line in text.split("\n")[:-1]]
            on_done(len(batch))
        return rows

    def _read(self) -> None:
        """Read the whole batches and cut the file behind the last one."""
        self._file.seek(0)
        end = position = 0
        pending: list[dict[str, Any]] = []
        for line, raw in enumerate(self._file, 1):
            if not raw.endswith(b"\n"):
                break
            position += len(raw)
            try:
                row = json.loads(raw)
                known = self.rows.get(row["key"], [])
                whole = row["index"] == len(known) + len(pending)
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole:
                raise DataError(f"{self.path}:{line}: not a row of this run. Give --overwrite.")
            pending.append(row)
            if row.get("ends"):
                self.rows.setdefault(row["key"], []).extend(pending)
                pending, end = [], position
        self._file.truncate(end)


class Run:
    """The folder of a run.

    Args:
        folder: Made if it does not exist.
        kind: Which measurement.
        settings: What decides the responses; another run's folder is refused with what differs.
        command: What the user typed.
        overwrite: Remove what a run left in the folder.

    Raises:
        ConfigError: The folder is another run's, or holds other things.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: str,
        settings: Mapping[str, Any],
        *,
        command: str = "",
        overwrite: bool = False,
    ) -> None:
        self.folder, self.command = Path(folder), command
        self.settings = json.loads(json.dumps(plain({"kind": kind, **settings})))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f'Cannot make the folder "{folder}": {error.strerror}.') from None
        if overwrite:
            for name in WRITTEN:
                (self.folder / name).unlink(missing_ok=True)
        self.sessions = self._check()
        self.responses = Rows(self.folder / "responses.jsonl")
        self.verdicts = Rows(self.folder / "verdicts.jsonl")
        self._save()

    def close(self, session: Mapping[str, Any] | None = None) -> None:
        """Close the files; `session` says how long this call took."""
        if session is not None:
            self.sessions.append(dict(session))
            self._save()
        self.responses.close()
        self.verdicts.close()

    def finish(self, results: Mapping[str, Any], markdown: str) -> dict[str, Any]:
        """Write results.json and results.md and return what was written."""
        whole = plain({**results, "settings": self.settings, "command": self.command})
        text = json.dumps(whole, ensure_ascii=False, indent=1) + "\n"
        replace_file(self.folder / "results.json", text)
        replace_file(self.folder / "results.md", markdown)
        return whole

    def _check(self) -> list[dict[str, Any]]:
        path = self.folder / "manifest.json"
        way_out = "Give another --output, or --overwrite."
        if not path.exists():
            if found := sorted(p.name for p in self.folder.iterdir() if not p.name.startswith(".")):
                raise ConfigError(
                    f'Folder "{self.folder}" holds no run but {", ".join(found[:4])}. '
                    "Give an empty one."
                )
            return []
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            old, sessions = kept["settings"], list(kept["sessions"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f'Cannot read "{path}". {way_out}') from None
        if names := different(old, self.settings):
            changes = "; ".join(f"{name} was {a}, now {b}" for name, a, b in names[:6])
            raise ConfigError(
                f'Folder "{self.folder}" belongs to another run: {changes}. {way_out}'
            )
        return sessions

    def _save(self) -> None:
        kept = {"settings": self.settings, "command": self.command, "sessions": self.sessions}
        text = json.dumps(plain(kept), ensure_ascii=False, indent=1) + "\n"
        replace_file(self.folder / "manifest.json", text)


def different(old: Any, new: Any, name: str = "") -> list[tuple[str, str, str]]:
    """Return (name, old, new) of everything in which two settings differ, names with dots."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(key for key in new if key not in old)]
        dotted = [(k, f"{name}.{k}" if name else str(k)) for k in keys]
        return [d for k, full in dotted for d in different(old.get(k), new.get(k), full)]
    return [] if old == new else [(name, shown(old), shown(new))]


def read_results(folder: str | Path) -> dict[str, Any]:
    """Return the results of a run; `DataError` if the folder has none."""
    path = Path(folder) / "results.json"
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = results["settings"]["kind"]
    except OSError as error:
        hint = "Give the folder of a finished `trueline eval` run."
        raise DataError(f"{path}: cannot be read: {error.strerror}. {hint}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the results of a run: {error!r}.") from None
    return {**results, "kind": kind, "folder": str(folder)}
