"""The bar of a job: fits in the terminal, moves an item at a time, leaves lines to others."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from trueline.cli.bars import bar, fitted

LONG = "self-cd, alpha 2.5, top_p 0.95: loss 0.123, kl_teacher 0.0123, reward -0.25, length 34.5"
JOB = """
import sys, time
from trueline.cli.bars import bar
with bar("prompt") as progress:
    for done in range(int(sys.argv[1]) + 1):
        progress(sys.argv[2], done, 12345)
        time.sleep(0.12)
print("the end", file=sys.stderr)
"""
STOPPED = """
import signal, sys, time
from trueline import cli
from trueline.cli.bars import bar
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
def run(args):
    with bar("prompt") as progress:
        for done in range(100000):
            progress("self-cd", done, 100000)
            time.sleep(0.01)
from trueline.cli import methods
methods.run = run
sys.exit(cli.main(["methods"]))
"""


def on_a_terminal(
    code: str, *argv: str, columns: int = 80, stop_after: float = 0
) -> tuple[int, str]:
    """Run Python on a terminal so wide; return its exit code and what it wrote there."""
    ours, theirs = pty.openpty()
    with contextlib.suppress(OSError):
        import fcntl

        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen(
        [sys.executable, "-c", code, *argv], stderr=theirs, stdin=theirs, stdout=subprocess.PIPE
    )
    os.close(theirs)
    seen, start = b"", time.monotonic()
    with contextlib.suppress(OSError):  # the terminal's other end is closed
        while piece := os.read(ours, 65536):
            seen += piece
            if stop_after and b"self-cd" in seen and time.monotonic() - start > stop_after:
                child.send_signal(signal.SIGINT)
                stop_after = 0
    os.close(ours)
    child.communicate()
    return child.returncode, seen.decode()


@pytest.mark.parametrize("columns", [80, 110])
def test_it_fits_and_moves_an_item_at_a_time(columns):
    code, seen = on_a_terminal(JOB, "4", LONG, columns=columns)
    assert code == 0
    states = [part for part in re.split(r"[\r\n]+", seen) if "|" in part]
    assert [re.search(r"\| (\d+)/", state)[1] for state in states][-5:] == list("01234")
    for state in states:
        assert len(state) <= columns
        assert len(re.search(r"\|(.*)\|", state)[1]) >= 8
        assert state.startswith("self-cd, alpha 2.5")
    *_, last = seen.splitlines()
    assert last == "the end"


def test_what_is_done_stands_in_front_as_far_as_there_is_room():
    assert fitted("", 80) == ""
    assert fitted("point", 80) == "point "
    assert fitted("a\nb", 80) == "a b "
    assert len(fitted(LONG, 80)) == 21
    assert len(fitted(LONG, 10)) == 9


def test_ctrl_c_has_a_line_of_its_own():
    code, seen = on_a_terminal(STOPPED, stop_after=0.5)
    assert code == 130
    last = re.sub(r"\x1b\[.", "", seen).splitlines()[-1]
    assert last.split("\r")[-1].strip() == "interrupted"
    assert seen.count("interrupted") == 1


LOADING = """
import sys, time
from trueline.cli.bars import bar
with bar("prompt") as progress:
    progress("loading tiny", 0, 1)
    time.sleep(0.05)
    progress("loading tiny", 1, 1)
    progress("", 0, 2)
    progress("", 2, 2)
print("the end", file=sys.stderr)
"""


def test_what_cannot_be_counted_is_named_while_it_lasts():
    code, seen = on_a_terminal(LOADING)
    assert code == 0
    first, rest = seen.split("loading tiny …")
    assert first == "\r\x1b[K"
    assert rest.startswith("\r\x1b[K")
    assert " 0/2 " in rest
    assert rest.splitlines()[-1] == "the end"
    done = subprocess.run([sys.executable, "-c", LOADING], capture_output=True, text=True)
    assert "loading" not in done.stderr  # in a file it would be noise


def test_what_was_there_before_is_said_and_a_new_total_is_a_new_bar(capsys):
    with bar("row") as progress:
        progress("a", 3, 5)
        progress("a", 5, 5)
        progress("b", 1, 2)
    err = capsys.readouterr().err
    assert err.startswith("3 rows are there already; going on.\n")
    assert "| 5/5 [" in err
    assert "b  50%" in err
