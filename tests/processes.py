"""Processes that start at once: forks of one that has imported torch, transformers and Trueline.

Each would import them again, 4 to 6 seconds of a core. `Process` has what tests need of
`subprocess.Popen`. What is forked has a state of its own, its own files as stdout and stderr, and
can be killed; the one it comes from computes nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
IMPORTED = (
    *("torch", "transformers.trainer", "transformers.models.llama.modeling_llama"),
    *("transformers.models.auto.modeling_auto", "peft", "datasets", "accelerate"),
    *("trueline.cli.generate", "trueline.cli.eval", "trueline.cli.distil", "trueline.cli.stack"),
    *("trueline.engine.decoding", "trueline.jobs.distillation", "trueline.jobs.stacking"),
)

SCRIPT = """
import runpy, sys, warnings
warnings.simplefilter("ignore")
sys.argv = {argv!r}
sys.path.insert(0, {folder!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Process:
    """A running `trueline WORD...`, Python code or a script; a file takes what it says.

    Args:
        words: The command line after `trueline`.
        code: Run in place of a command line.
        script: A file to run in place of it, with these `arguments`.
        environment: Changes to the environment.
    """

    def __init__(
        self,
        *words: object,
        code: str = "",
        script: str | Path = "",
        arguments: Sequence[object] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if script:
            argv = [str(script), *map(str, arguments)]
            code = SCRIPT.format(argv=argv, folder=str(Path(script).parent))
        self._said = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        path = f"/proc/{os.getpid()}/fd/{self._said.fileno()}"
        told = {"words": list(map(str, words)), "code": code, "said": path, "here": os.getcwd()}
        self.pid: int = _ask(**told, environment=dict(environment or {}))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, minus the signal if one ended it; None while it runs."""
        return self._wait(False)

    def wait(self) -> int:
        """Return the exit code once it has ended."""
        code = self._wait(True)
        assert code is not None
        return code

    def kill(self) -> None:
        """End it without a word, if it still runs."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    @property
    def said(self) -> str:
        """Everything that it wrote."""
        if not self._said.closed:
            self._text = os.pread(self._said.fileno(), 2**26, 0).decode(errors="replace")
        return self._text

    def _wait(self, blocking: bool) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(wait=self.pid, blocking=blocking)
            if self.returncode is not None:
                self._text = self.said
                self._said.close()
        return self.returncode


def together(code: str, count: int) -> None:
    """Run code in so many processes that train together, with what torchrun tells each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    group |= {"LOCAL_WORLD_SIZE": str(count)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    processes = [Process(code=code, environment=group | rank) for rank in ranks]
    for process in processes:
        assert process.wait() == 0, process.said[-3000:]


@cache
def _origin() -> subprocess.Popen[bytes]:
    """Start the process that the others come from."""
    paths = [str(HERE), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    atexit.register(process.communicate)  # the end of its input ends it
    return process


def _ask(**question: Any) -> Any:
    process = _origin()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(question).encode() + b"\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def _answer(question: dict[str, Any], answers: Any) -> Any:
    if "wait" in question:
        pid, status = os.waitpid(question["wait"], 0 if question["blocking"] else os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None
    if child := os.fork():
        return child
    answers.close()
    _become(question)


def _become(question: dict[str, Any]) -> None:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        said = os.open(question["said"], os.O_WRONLY | os.O_APPEND)
        for stream, flags in ((0, os.O_RDONLY), (1, None), (2, None)):
            os.dup2(said if flags is None else os.open(os.devnull, flags), stream)
        os.chdir(question["here"])
        os.environ.update(question["environment"])
        if question["code"]:
            exec(question["code"], {"__name__": "__main__"})
            code = 0
        else:
            from trueline.cli import main

            sys.argv = ["trueline", *question["words"]]
            code = main(question["words"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line), answers)) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
