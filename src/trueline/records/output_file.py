"""A file of a run: rows appended batch by batch, and beside it what they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trueline.errors import ConfigError
from trueline.records.disk import Held
from trueline.records.lines import LineFile
from trueline.records.manifest import WAY_OUT, as_settings, check_same, read_manifest, write_json


class OutputFile:
    """The output of a run: rows appended batch by batch, so that a kill loses no finished batch.

    Beside it lies `<path>.run.json` with the settings that the rows belong to. Opened again with
    the same settings it holds the whole batches that were written; a batch cut short by a kill is
    cut off, and so the batches that follow are made of the same rows as in an unbroken run.

    Raises:
        ConfigError: The file belongs to a run with other settings, has no settings beside it, is
            no regular file, or another process writes to it.
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
        self.path = Path(path)
        self.settings, self.total = as_settings(settings), len(ids)
        if not overwrite:
            kept_settings(path, settings)  # an output that is refused stays as it is
        self._held = Held(self.path.with_name(f".{self.path.name}.lock"), self.path)
        try:
            kept = {} if overwrite else kept_settings(path, settings)
            self.sessions: list[dict[str, Any]] = kept.get("sessions", [])
            self._file = LineFile(self.path)
        except BaseException:
            self._held.release()
            raise
        try:
            if overwrite:
                self._file.cut(0)
            self.done = self._check_rows(ids, batch_size)
            self._save()
        except BaseException:
            self.close()
            raise

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a batch of rows; when this returns they are on the disk."""
        rows = list(rows)
        self._file.append(rows)
        self.done += len(rows)

    def close(self, session: Mapping[str, Any] | None = None) -> None:
        """Close the file; `session` (rows, tokens, seconds) is added to the settings file."""
        try:
            if session is not None:
                self.sessions.append(dict(session))
                self._save()
            self._file.close()
        finally:
            self._held.release()

    def _check_rows(self, ids: Sequence[Any], batch_size: int) -> int:
        """Return how many rows to keep, after cutting the file to them."""
        ends = [0]
        for line, end, row in self._file.rows():
            if line > len(ids) or "id" not in row or row["id"] != ids[line - 1]:
                raise self._file.foreign(line)
            ends.append(end)
        done = len(ends) - 1
        done -= 0 if done == len(ids) else done % batch_size
        self._file.cut(ends[done])
        return done

    def _save(self) -> None:
        kept = {"settings": self.settings, "rows": self.total, "sessions": self.sessions}
        write_json(sidecar_of(self.path), kept)


def sidecar_of(path: str | Path) -> Path:
    """Return where the settings of an output are kept."""
    return Path(f"{path}.run.json")


def kept_settings(path: str | Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what lies beside the output at `path`: `settings`, `rows` in all, `sessions`.

    Raises `ConfigError` if the output belongs to a run with other settings, or to none.
    """
    path, sidecar = Path(path), sidecar_of(path)
    kept = read_manifest(sidecar)
    if kept is None:
        if path.exists() and path.stat().st_size:
            text = f'Output "{path}" exists, and no "{sidecar}" says which run it belongs to.'
            raise ConfigError(f"{text} {WAY_OUT}")
        return {"rows": None, "sessions": []}
    check_same(f'Output "{path}"', kept["settings"], as_settings(settings))
    return kept
