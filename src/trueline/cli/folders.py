"""What the user typed, and folders to write into."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from trueline.errors import ConfigError


def command(args: argparse.Namespace) -> str:
    """Return what the user typed."""
    return shlex.join(["trueline", *getattr(args, "argv", sys.argv[1:])])


def output_folder(name: str) -> Path:
    """Return the folder, made if need be; raise `ConfigError` if that cannot be."""
    folder = Path(name).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".write-test").touch()
        (folder / ".write-test").unlink()
    except OSError as error:
        raise ConfigError(f'Cannot write into "{name}": {error}.') from None
    return folder
