"""How bad input is refused: exit 2, one line on stderr, nothing on the disk changed, at once."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bad_world import build
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from trueline.cli import main

SECONDS = 10
FORWARDS = 4
"""A command that decodes or trains longer than this has taken the bad input for a good one."""
MEMORY = 4 * 2**30
"""Bytes beyond those of the test process: a command that reads an endless file ends here."""
LONGEST = 700
"""Characters of a message, paths included."""


UNTOUCHED: dict[str, tuple] = {}
"""The snapshot of this worker's folder as it was made."""


class RealWork(BaseException):
    """The command has begun what it should have refused."""


@pytest.fixture(scope="session")
def _world(made_once, tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("refusals") / "world"
    _restore(made_once("bad-world", build), copy)
    return copy


def _restore(original: Path, copy: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(original, copy, symlinks=True)
    os.mkfifo(copy / "pipe.jsonl")
    UNTOUCHED.clear()
    UNTOUCHED.update(snapshot(copy))


def snapshot(folder: Path) -> dict[str, tuple]:
    """Every file, folder and link below, with what a write would change."""
    found: dict[str, tuple] = {}
    open_folders = [str(folder)]
    while open_folders:
        with os.scandir(open_folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    open_folders.append(entry.path)
                    found[entry.path] = ()
                else:
                    about = entry.stat(follow_symlinks=False)
                    found[entry.path] = (about.st_size, about.st_mtime_ns, about.st_ino)
    return found


def different(copy: Path, original: Path) -> list[str]:
    """Return the names of what is there, is gone, or has other bytes than at first."""
    now = snapshot(copy)
    changed = [name for name in {**now, **UNTOUCHED} if now.get(name) != UNTOUCHED.get(name)]
    names = [os.path.relpath(name, copy) for name in changed]
    return [name for name in names if not _same(copy / name, original / name)]


def _same(one: Path, two: Path) -> bool:
    files = all(path.is_file() and not path.is_symlink() for path in (one, two))
    return files and one.read_bytes() == two.read_bytes()


@pytest.fixture
def no_real_work() -> Iterator[None]:
    """Stop a command that computes in earnest, or that waits."""
    calls = 0

    def count(module, _):
        nonlocal calls
        calls += isinstance(module, PreTrainedModel)
        if calls > FORWARDS:
            raise RealWork(f"more than {FORWARDS} forward passes")

    def ring(*_):
        raise RealWork(f"more than {SECONDS} seconds")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    hook, old = register_module_forward_pre_hook(count), signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        hook.remove()
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def world(_world, made_once, monkeypatch, no_real_work) -> Iterator[Path]:
    """The folder of `bad_world`, as the current one; made anew where a test changed it."""
    monkeypatch.chdir(_world)
    yield _world
    if snapshot(_world) != UNTOUCHED:
        _restore(made_once("bad-world", build), _world)


@pytest.fixture
def refuse(world, made_once, capfd) -> Callable[..., str]:
    """`refuse(argv, *fragments)`: run a command that must be refused, and return its one line."""

    def refused(argv, *fragments: str, touched: tuple[str, ...] = ()) -> str:
        code = main(list(argv))
        out, err = capfd.readouterr()
        changed = set(different(world, made_once("bad-world", build))) - set(touched)
        assert not changed, f"changed on the disk: {changed}"
        assert code == 2, f"exit {code}: {out[:300]} {err[-300:]}"
        assert err.startswith("error: "), err[-1500:]
        line = err.removesuffix("\n")
        assert line.isprintable(), f"not one line of plain text: {err[:1500]!r}"
        assert len(line) <= LONGEST, f"{len(line)} characters: {line[:300]}"
        assert out == ""
        for fragment in fragments:
            assert fragment in line, line
        return line

    return refused
