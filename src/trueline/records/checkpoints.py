"""Checkpoints of a trainer: which of them can be gone on from."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
"""Files without which a checkpoint cannot be gone on from."""


def last_checkpoint(folder: Path, *, remove: bool = False) -> Path | None:
    """Return the last whole checkpoint that has steps before it; `remove` all others.

    That of the last step is none: a trainer that goes on from it in the middle of an epoch makes
    one step more before it looks whether it has ended, and one that a budget has stopped knows no
    longer that it was.
    """
    whole = []
    for path in _checkpoints(folder):
        if broken_file(path) is None and not _ended(path):
            whole.append(path)
        elif remove:
            shutil.rmtree(path)
    return max(whole, key=step_of, default=None)


def broken_checkpoints(folder: Path) -> list[str]:
    """Return "checkpoint-50/optimizer.pt" for each checkpoint that cannot be gone on from.

    A kill leaves one without its `trainer_state.json`, which is written last: that is no damage.
    """
    found = [(path, broken_file(path)) for path in _checkpoints(folder)]
    return [
        f"{path.name}/{name}"
        for path, name in found
        if name is not None and (path / NEEDED[0]).is_file()
    ]


def broken_file(checkpoint: Path) -> str | None:
    """Return the name of a file that is missing or broken, None for a whole checkpoint."""
    for name in NEEDED:
        if not (checkpoint / name).is_file():
            return name
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".json" and not _reads(path):
            return path.name
        if path.suffix in (".pt", ".pth") and not _is_archive(path):
            return path.name
        if path.suffix == ".safetensors" and not _is_whole(path):
            return path.name
    return None


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in found if p.is_dir()), key=step_of)


def _ended(checkpoint: Path) -> bool:
    """Return whether the training ended there: at its last step, or where it was stopped."""
    state = json.loads((checkpoint / NEEDED[0]).read_text(encoding="utf-8"))
    steps = state.get("max_steps") if isinstance(state, dict) else None
    if isinstance(steps, int) and 0 < steps <= step_of(checkpoint):
        return True
    for key in ("stateful_callbacks", "TrainerControl", "args", "should_training_stop"):
        state = state.get(key) if isinstance(state, dict) else None
    return state is True


def _reads(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return True


def _is_archive(path: Path) -> bool:
    """Return whether a file of torch is whole: a zip archive whose checksums are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return False


def _is_whole(path: Path) -> bool:
    """Return whether a safetensors file is as long as its header says."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= path.stat().st_size - 8:
                return False
            header = json.loads(file.read(size))
        ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        return path.stat().st_size == 8 + size + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return False
