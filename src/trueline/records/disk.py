"""Files written whole, held by one process, and never through a link.

cache_folder   where what can be made again lies
replace_file   the old content or the new, at every moment
whole_folder   a folder with all that belongs in it, or none
open_appended  a regular file to add to
Held           a lock that ends with the process
naming, saving errors of the disk that say which path
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from trueline.errors import ConfigError

NO_LINK = getattr(os, "O_NOFOLLOW", 0)
FULL = 1 << 20
"""Bytes: a disk with less than this free is taken to be full."""


def cache_folder() -> Path:
    """Return where what can be made again lies: TRUELINE_CACHE, or the user's folder of caches."""
    if own := os.environ.get("TRUELINE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trueline"


def replace_file(path: str | Path, content: str | bytes) -> None:
    """Write a file so that at every moment the old or the new one is there, whole.

    A link at `path` is replaced and not followed. Raises `OSError` that names the path.
    """
    path = Path(path)
    with naming(path), _part(path) as part:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK, 0o666)
        with open(descriptor, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def _part(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`, moved into its place at the end or removed."""
    check_regular(path)
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, moved into its place at the end or removed with all in it.

    `path` may be an empty folder. Raises `OSError` that names it.
    """
    with naming(path), saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.mkdir()
        try:
            yield part
            os.replace(part, path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def check_regular(path: Path) -> None:
    """Raise `ConfigError` if something other than a file or a link is at `path`."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise ConfigError(f'"{path}" is {_named(mode)}, not a file. Give another path.')


def open_appended(path: Path) -> BinaryIO:
    """Open a file to read it and to add to its end; it is made if there is none.

    Raises `ConfigError` for a link, a folder, a device or a pipe, and where it cannot be written.
    """
    check_regular(path)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | NO_LINK, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f'"{path}" is a link. Give the file that it leads to.') from None
        raise ConfigError(f'Cannot write "{path}": {error.strerror}.') from None
    return open(descriptor, "a+b")


def make_folder(path: Path) -> None:
    """Make a folder and those above it; `ConfigError` where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f'Cannot make the folder "{path}": {error.strerror}.') from None
    except ValueError as error:  # a NUL in the name
        raise ConfigError(f"Cannot make the folder {str(path)!r}: {error}.") from None


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Held:
    """What one process alone may write, until `release` or its end.

    Args:
        lock: The file of the lock; it goes at the release.
        what: What is locked, for the message.

    Raises:
        ConfigError: Another process holds it, or no file can be made there.
    """

    def __init__(self, lock: Path, what: Path) -> None:
        self._lock = FileLock(lock, blocking=False)
        refused = os.path.lexists(lock.parent) and not os.access(lock.parent, os.W_OK)
        try:
            if refused:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            self._lock.acquire()
        except Timeout:
            raise ConfigError(f'Another run is writing to "{what}". Wait for it to end.') from None
        except OSError as error:
            raise ConfigError(f'Cannot write to "{what}": {error.strerror}.') from None

    def release(self) -> None:
        """Let another process have it."""
        if self._lock.is_locked:
            # Still held: whoever waits for this file finds that it has no name, and makes another.
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give every error of the disk this path."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """As `naming`, for writers of other libraries, which have errors of their own for a full disk.

    safetensors says "os error 28", torch speaks of its stream.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
    except (SafetensorError, RuntimeError) as error:
        number = re.search(r"os error (\d+)", str(error))
        torch = re.search(r"PytorchStreamWriter|inline_container|unexpected pos", str(error))
        if number is None and torch is None:
            raise
        code = int(number[1]) if number else errno.ENOSPC if _full(path) else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from None


def _full(path: str | Path) -> bool:
    place = next((p for p in (Path(path), *Path(path).parents) if p.exists()), Path("."))
    return shutil.disk_usage(place).free < FULL


def _named(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
    }
    return next(name for test, name in kinds.items() if test(mode))
