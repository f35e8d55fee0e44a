"""The folder of a run: held by one process, safe against a kill, with all that repeats it.

    manifest.json   what decides the result, the command, each call, the names of what was written
    *.jsonl         rows that grow; a torn last line is cut off
    results.json    every number, when the run has ended
    checkpoints/    what a killed training goes on from

Nothing is read for good, removed or written before the lock is held and the folder is known to be
this run's. Everything is written through the folder, which keeps the names: `--overwrite` removes
these and nothing else. No link inside the folder is followed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.errors import ConfigError, DataError
from trueline.records.checkpoints import broken_checkpoints, last_checkpoint
from trueline.records.disk import Held, make_folder, naming, remove, replace_file, saving
from trueline.records.lines import LineFile, Rows, plain
from trueline.records.manifest import (
    WAY_OUT,
    as_settings,
    check_same,
    read_json,
    read_manifest,
    write_json,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHECKPOINTS = "checkpoints"
MANIFEST, RESULTS = "manifest.json", "results.json"


class RunFolder:
    """The folder of a run.

    Made, it holds the folder; `start` takes it for this run.

    Args:
        folder: Made if it does not exist.
        kind: What kind of run; one of another kind is refused, also with `overwrite`.
        settings: What decides the result; another run's folder is refused with what differs.
        command: What the user typed.
        resume: Whether an unfinished run is gone on with, from its last whole checkpoint if it has
            checkpoints; None always goes on, False refuses it.
        overwrite: `start` removes what a run left in the folder.
        main: Whether this process writes; of several that train together only the first does.

    Raises:
        ConfigError: The folder is another run's, an unfinished one's without `resume`, holds other
            things, or another process writes to it.
    """

    def __init__(
        self,
        folder: str | Path,
        kind: str,
        settings: Mapping[str, Any],
        *,
        command: str = "",
        resume: bool | None = None,
        overwrite: bool = False,
        main: bool = True,
    ) -> None:
        if resume and overwrite:
            raise ConfigError("Give --resume or --overwrite, not both.")
        self.folder, self.command, self.main = Path(folder), command, main
        self.settings = as_settings({"kind": kind, **settings})
        self.overwrite, self.resume = overwrite, resume
        self.checkpoint: Path | None = None
        self.broken: list[str] = []
        """Checkpoints that could not be gone on from: "checkpoint-50/optimizer.pt"."""
        self._open: dict[str, LineFile | Rows] = {}
        self._held: Held | None = None
        self._started = False
        if main:
            self._check()  # a folder that is refused stays as it is, without a lock in it
            self._made = not self.folder.exists()
            make_folder(self.folder)
            self._held = Held(self.folder / ".lock", self.folder)
        try:
            kept = self._check() if main else {}
            self.facts: dict[str, Any] = kept.get("facts", {})
            """What was found on the way and goes into the results."""
            self.sessions: list[dict[str, Any]] = kept.get("sessions", [])
            self.files: list[str] = kept.get("files", [])
            """Names of what was written."""
            self.finished = bool(kept.get("finished"))
            if resume and not self.finished:
                self._find_checkpoint()
        except BaseException:
            self.close()
            raise

    def start(self, facts: Mapping[str, Any] | None = None) -> None:
        """Take the folder for this run, now that everything was checked; the same at every call."""
        if self.overwrite:
            self._clear()
            self.overwrite = False
        if self.resume and self.main and not (self._started or self.finished):
            last_checkpoint(self.folder / CHECKPOINTS, remove=True)
        self.facts |= {k: v for k, v in (facts or {}).items() if v is not None}
        self._save()

    def close(self, session: Mapping[str, Any] | None = None) -> None:
        """Let another process have the folder; `session` says how long this call took."""
        try:
            if session is not None:
                self.note(session)
            for file in self._open.values():
                file.close()
        finally:
            self._open = {}
            if self._held is not None:
                self._held.release()
            if not self._started and self.main and self._made:
                for path in (self.folder / CHECKPOINTS, self.folder):  # a trainer makes the first
                    with contextlib.suppress(OSError):
                        path.rmdir()

    # -- what is written

    def path(self, name: str) -> Path:
        """Return where the run may write a file or folder of this name, now one of its own."""
        path = self.folder / name
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"not a name in a run's folder: {name!r}")
        if path.is_symlink():
            raise ConfigError(f'"{path}" is a link, and a run writes through none. Remove it.')
        if name not in self.files:
            if path.exists():
                raise ConfigError(f'"{path}" is there, and this run did not write it. Move it.')
            self.files = sorted({*self.files, name})
            self._save()
        return path

    def lines(self, name: str) -> LineFile:
        """Return a file that rows are added to; closed with the folder."""
        if name not in self._open:
            self._open[name] = LineFile(self.path(name))
        found = self._open[name]
        assert isinstance(found, LineFile)
        return found

    def rows(self, name: str) -> Rows:
        """Return a file of rows under keys; closed with the folder."""
        if name not in self._open:
            self._open[name] = Rows(self.path(name))
        found = self._open[name]
        assert isinstance(found, Rows)
        return found

    def subfolder(self, name: str) -> Path:
        """Return a folder of the run, made if need be."""
        path = self.path(name)
        make_folder(path)
        return path

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file whole."""
        replace_file(self.path(name), content)

    def draw(self, name: str, figure: Figure, **options: Any) -> None:
        """Write a figure, whole, in the format of the name's ending."""
        path = self.path(name)
        part = path.with_name(f".part-{name}")
        try:
            with naming(path):
                figure.savefig(part, **options)
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def put(self, save: Callable[[str], object], *, keep: tuple[str, ...] = ()) -> None:
        """Call `save(folder)` on an empty folder and move what it wrote into the run's.

        What stands in the run's folder under a name of `keep` stays, as a card of ours does when a
        library writes one too.
        """
        part = self.folder / ".part"
        if not self.main:
            save(str(part))
            return
        remove(part)
        try:
            with saving(self.folder):
                part.mkdir()
                save(str(part))
                for path in sorted(part.iterdir()):
                    if path.name in keep:
                        continue
                    target = self.path(path.name)
                    if target.is_dir():
                        shutil.rmtree(target)
                    os.replace(path, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def note(self, session: Mapping[str, Any]) -> None:
        """Keep what this call did: steps, seconds."""
        self.sessions.append(dict(session))
        self._save()

    def finish(self, results: Mapping[str, Any]) -> dict[str, Any]:
        """Write results.json with the settings and the command, and mark the run as ended.

        Returns what was written.
        """
        whole: dict[str, Any] = plain(
            {**results, "settings": self.settings, "command": self.command}
        )
        write_json(self.path(RESULTS), whole)
        self.finished = True
        self._save()
        return whole

    @property
    def results(self) -> dict[str, Any] | None:
        """The results of a run that has ended."""
        if not self.finished:
            return None
        kept = read_json(self.folder / RESULTS)
        return {k: v for k, v in kept.items() if k not in ("settings", "command")}

    # -- whose it is

    def _check(self) -> dict[str, Any]:
        """Return what the manifest holds, empty for a new run; refuse all other folders."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f'"{self.folder}" is a file. Give a folder as --output.')
        way_out = "Give another --output." if self.overwrite else WAY_OUT
        kept = read_manifest(self.folder / MANIFEST, way_out)
        if kept is None:
            found = [p.name for p in sorted(self.folder.glob("[!.]*")) if not _is_nothing(p)]
            if found:
                raise ConfigError(
                    f'Folder "{self.folder}" holds no run but {", ".join(found[:4])}. '
                    "Give an empty one."
                )
            return {}
        kind, own = kept["settings"].get("kind"), self.settings["kind"]
        if self.overwrite and kind == own:
            return {"files": kept.get("files", [])}
        if self.overwrite:
            raise ConfigError(
                f'Folder "{self.folder}" holds a run of another kind, "{kind}". {way_out}'
            )
        check_same(f'Folder "{self.folder}"', kept["settings"], self.settings)
        if self.resume is False and not kept.get("finished"):
            raise ConfigError(
                f'Folder "{self.folder}" holds this run, unfinished. Give --resume to go on, or '
                "--overwrite to start again."
            )
        return kept

    def _find_checkpoint(self) -> None:
        place = self.folder / CHECKPOINTS
        if place.is_symlink():
            raise ConfigError(f'"{place}" is a link, and a run writes through none. Remove it.')
        self.broken = broken_checkpoints(place)
        self.checkpoint = last_checkpoint(place)

    def _clear(self) -> None:
        """Remove what a run wrote, and nothing else."""
        for name in {*self.files, CHECKPOINTS, RESULTS}:
            if isinstance(name, str) and Path(name).name == name:
                remove(self.folder / name)
        self.files, self.finished = [], False

    def _save(self) -> None:
        self._started = True
        if not self.main:
            return
        kept = {
            "settings": self.settings,
            "command": self.command,
            "facts": self.facts,
            "sessions": self.sessions,
            "files": self.files,
            "finished": self.finished,
        }
        write_json(self.folder / MANIFEST, kept)


def read_results(folder: str | Path) -> dict[str, Any]:
    """Return the results of a measurement; `DataError` if the folder has none."""
    path = Path(folder) / RESULTS
    hint = "Give the folder of a finished `trueline eval` run."
    if not path.is_file():
        raise DataError(f"{path}: there is no such file. {hint}")
    results = read_json(path)
    settings = results.get("settings")
    if not isinstance(settings, dict) or not isinstance(settings.get("kind"), str):
        raise DataError(f"{path}: not the results of a run. {hint}")
    return {**results, "kind": settings["kind"], "folder": str(folder)}


def _is_nothing(path: Path) -> bool:
    """Return whether this is what a trainer makes before its first step."""
    made = path.name == CHECKPOINTS and path.is_dir() and not path.is_symlink()
    return made and not any(path.iterdir())
