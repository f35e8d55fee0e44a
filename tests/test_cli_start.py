"""How the command line starts: nothing heavy, one module a command, clean ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from trueline import __all__ as public
from trueline.cli import COMMANDS

HEAVY = ("torch", "transformers", "numpy", "peft", "matplotlib", "tqdm", "jinja2")


def in_a_new_process(code: str, *argv: str) -> str:
    """Run Python and return the last line that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


STARTED = """
import sys, time
start = time.process_time()
from trueline.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0
seconds = time.process_time() - start
ours = (name.partition("trueline.cli.")[2] for name in sys.modules)
print(seconds, *sorted(filter(None, ours)))
"""


def test_help_takes_a_quarter_of_a_second_and_no_command():
    """CPU seconds of the process, the best of three: other work on the machine does not count."""
    runs = [in_a_new_process(STARTED, "--help").split() for _ in range(3)]
    assert {name for _, *modules in runs for name in modules}.isdisjoint(COMMANDS)
    assert min(float(seconds) for seconds, *_ in runs) < 0.25


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_imports_no_other_command(command):
    seconds, *modules = in_a_new_process(STARTED, command, "--help").split()
    assert command.replace("-", "_") in modules
    assert set(modules).isdisjoint({c.replace("-", "_") for c in COMMANDS if c != command})
    assert float(seconds) < 0.5


def test_import_loads_nothing_heavy_and_no_name_is_missing():
    code = f"import sys, trueline; print(*sorted({set(HEAVY)} & set(sys.modules)))"
    assert in_a_new_process(code) == ""
    code = (
        "import trueline; print(*(type(getattr(trueline, n)).__name__ for n in trueline.__all__))"
    )
    assert len(in_a_new_process(code).split()) == len(public)


def trueline(*words: str, stdout: object) -> subprocess.CompletedProcess[bytes]:
    """Run a command that writes there, through Python's own buffer as it does for users."""
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "trueline", *words]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=plain)


@pytest.mark.parametrize("words", [("methods",), ("methods", "self-cd"), ("--help",)])
def test_a_reader_that_has_gone_is_no_error(words):
    """`trueline ... | head`: the pipe is closed before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    done = trueline(*words, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = trueline("methods", "self-cd", stdout=full)
    assert done.returncode == 2
    assert done.stderr == b"error: No space left on device\n"
