"""The folder of a training run, safe against a kill, with all that repeats it.

    run.json      what decides the result, the command, each call, the results
    config.toml   the same settings as a file for --config
    log.jsonl     a row for every logged step
    curves.png, README.md, the weights           when the run has ended
    checkpoints/  what a killed run goes on from

Weights are moved into place whole: a kill leaves the old ones or the new ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.errors import ConfigError
from trueline.records.data import dump, lock, replace_file
from trueline.records.runs import different, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHECKPOINTS = "checkpoints"
WRITTEN = ("run.json", "config.toml", "log.jsonl", "curves.png", "README.md")
COMPLETE = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
"""Files without which a checkpoint cannot be gone on from; the first is written last."""
WAY_OUT = "Give another --output, or --overwrite."


class RunFolder:
    """The folder of a training run, held by one process at a time.

    Args:
        folder: Made if it does not exist.
        settings: What decides the result; another run's folder is refused with what differs.
        command: What the user typed.
        resume: Go on from the last whole checkpoint, or from the start where there is none.
        overwrite: Remove what a run left in the folder.
        main: Whether this process writes; of several that train together only the first does.

    Raises:
        ConfigError: The folder is another run's, an unfinished one's without `resume`, holds other
            things, or another process writes to it.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        *,
        command: str = "",
        resume: bool = False,
        overwrite: bool = False,
        main: bool = True,
    ) -> None:
        self.folder, self.command, self.main = Path(folder), command, main
        self.checkpoint: Path | None = None
        self.settings: dict[str, Any] = json.loads(json.dumps(plain(settings)))
        if resume and overwrite:
            raise ConfigError("Give --resume or --overwrite, not both.")
        kept = {} if overwrite or not main else self._read()
        self.overwrite = overwrite
        self.facts: dict[str, Any] = kept.get("facts", {})
        """What was found before the first step and goes into the results."""
        self.sessions: list[dict[str, Any]] = kept.get("sessions", [])
        self.results: dict[str, Any] | None = kept.get("results")
        self.files: list[str] = kept.get("files", [])
        if kept and self.results is None and not resume:
            raise ConfigError(
                f'Folder "{self.folder}" holds this run, unfinished. Give --resume to go on, or '
                "--overwrite to start again."
            )
        if not main:
            if resume:
                self.checkpoint = last_checkpoint(self.folder / CHECKPOINTS)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._log = open(self.folder / "log.jsonl", "a+b")  # noqa: SIM115
        except OSError as error:
            raise ConfigError(f'Cannot write to "{folder}": {error.strerror}.') from None
        try:
            lock(self._log, self.folder)
            if self.results is None and resume:
                self.checkpoint = last_checkpoint(self.folder / CHECKPOINTS, remove=True)
        except BaseException:
            self._log.close()
            raise

    def start(self, config: str, facts: Mapping[str, Any]) -> None:
        """Take the folder for this run, now that everything was checked; `config` is TOML."""
        if self.overwrite:
            self._clear()
        self._cut()
        self.facts |= {k: v for k, v in facts.items() if v is not None}
        replace_file(self.folder / "config.toml", config)
        self._save()

    def close(self) -> None:
        """Let another process have the folder."""
        if self.main:
            self._log.close()

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of the log."""
        self._log.seek(0)
        return [json.loads(raw) for raw in self._log if raw.endswith(b"\n")]

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row to the log."""
        self._log.write((dump(plain(row)) + "\n").encode("utf-8"))
        self._log.flush()

    def note(self, session: Mapping[str, Any]) -> None:
        """Keep what this call did: steps, seconds."""
        self.sessions.append(dict(session))
        self._save()

    def put(self, save: Callable[[str], object]) -> None:
        """Call `save(folder)` on an empty folder and move what it wrote into the run's."""
        part = self.folder / ".part"
        if not self.main:
            save(str(part))
            return
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        save(str(part))
        for path in sorted(part.iterdir()):
            if path.name in WRITTEN:
                continue  # a card by another library, before ours
            target = self.folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
            self.files = sorted({*self.files, path.name})
        shutil.rmtree(part)

    def finish(self, results: Mapping[str, Any], card: str, figure: Figure | None) -> None:
        """Write the card, the curves, and last the results, which mark the run as ended."""
        if figure is not None:
            figure.savefig(self.folder / "curves.png")
        replace_file(self.folder / "README.md", card)
        self.results = plain(results)
        self._save()

    def _cut(self) -> None:
        """Drop the rows after the checkpoint, which a resumed run makes again."""
        last = step_of(self.checkpoint) if self.checkpoint else -1
        self._log.seek(0)
        end = 0
        for raw in self._log:
            if not raw.endswith(b"\n") or json.loads(raw)["step"] > last:
                break
            end += len(raw)
        self._log.truncate(end)

    def _read(self) -> dict[str, Any]:
        path = self.folder / "run.json"
        if not path.exists():
            if self.folder.exists() and not self.folder.is_dir():
                raise ConfigError(f'"{self.folder}" is a file. Give a folder as --output.')
            found = [p for p in sorted(self.folder.glob("[!.]*")) if not _empty(p)]
            if found:
                names = ", ".join(p.name for p in found[:4])
                raise ConfigError(
                    f'Folder "{self.folder}" holds no run but {names}. Give an empty one.'
                )
            return {}
        try:
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            old, _ = kept["settings"], list(kept["sessions"])
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f'Cannot read "{path}". {WAY_OUT}') from None
        if changed := different(old, self.settings):
            changes = "; ".join(f"{name} was {a}, now {b}" for name, a, b in changed[:6])
            raise ConfigError(
                f'Folder "{self.folder}" belongs to another run: {changes}. {WAY_OUT}'
            )
        return kept

    def _clear(self) -> None:
        """Remove what a run wrote, and nothing else."""
        try:
            left = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))["files"]
        except (OSError, ValueError, KeyError, TypeError):
            left = []
        self._log.truncate(0)
        for name in (*WRITTEN, *left):
            path = self.folder / name
            if name == "log.jsonl" or path.parent != self.folder:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)

    def _save(self) -> None:
        kept = {
            "settings": self.settings,
            "command": self.command,
            "facts": self.facts,
            "sessions": self.sessions,
            "files": self.files,
            "results": self.results,
        }
        replace_file(
            self.folder / "run.json", json.dumps(kept, ensure_ascii=False, indent=1) + "\n"
        )


def last_checkpoint(folder: Path, *, remove: bool = False) -> Path | None:
    """Return the last checkpoint that was written to its end; `remove` those that were not."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        if not re.fullmatch(r"checkpoint-\d+", path.name):
            continue
        try:
            json.loads((path / COMPLETE[0]).read_text(encoding="utf-8"))
            there = all((path / name).is_file() for name in COMPLETE)
        except (OSError, ValueError):
            there = False
        if there:
            whole.append(path)
        elif remove:
            shutil.rmtree(path)
    return max(whole, key=step_of, default=None)


def _empty(path: Path) -> bool:
    """Return whether this is all that a run which never made a step leaves."""
    if path.name == CHECKPOINTS:
        return path.is_dir() and not any(path.iterdir())
    return path.name == "log.jsonl" and path.stat().st_size == 0


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])
