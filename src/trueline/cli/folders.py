"""What the user typed."""

from __future__ import annotations

import argparse
import shlex
import sys


def command(args: argparse.Namespace) -> str:
    """Return what the user typed."""
    return shlex.join(["trueline", *getattr(args, "argv", sys.argv[1:])])
