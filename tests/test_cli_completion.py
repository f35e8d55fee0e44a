"""`trueline completion`: what bash offers when it runs the script."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from trueline.cli import COMMANDS, build_parser, main
from trueline.cli.completion import places
from trueline.methods import METHODS

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
_trueline
printf '%s\\n' "${COMPREPLY[@]}"
complete -p trueline
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> str:
    """The script for bash, as the command line prints it."""
    import contextlib
    import io

    path = tmp_path_factory.mktemp("bash") / "trueline.bash"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["completion", "bash"]) == 0
    path.write_text(out.getvalue())
    return str(path)


@pytest.fixture
def offered(script):
    """A function: the words so far, the last one unfinished, in; what bash offers out."""

    def ask(*words: str) -> list[str]:
        done = subprocess.run(
            ["bash", "--norc", "-c", ASK, "bash", script, "trueline", *words],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stderr == ""
        *found, registered = done.stdout.splitlines()
        assert registered == "complete -o bashdefault -o default -F _trueline trueline"
        return [word for word in found if word]

    return ask


def test_commands(offered):
    assert set(offered("")) == {*COMMANDS, "--help", "--version"}
    assert offered("gen") == ["generate"]
    assert offered("--v") == ["--version"]


def test_options_and_choices(offered):
    assert offered("generate", "--princ") == ["--principle", "--principles"]
    assert offered("generate", "--method", "") == list(METHODS)
    assert offered("generate", "--quantize", "8") == ["8bit"]
    assert set(offered("generate", "a question", "--ra")) == {"--ratio", "--raw"}
    assert offered("eval", "ref") == ["refusal"]
    assert "--safe" in offered("eval", "refusal", "--limit", "3", "--")
    assert "--safe" not in offered("eval", "preference", "--")
    assert offered("completion", "") == ["bash", "zsh", "fish", "--help"]


def test_files_are_left_to_the_shell(offered):
    assert offered("generate", "--input", "") == []
    assert offered("generate", "--json", "--inp") == ["--input"]


def test_every_option_of_every_parser_is_known(offered):
    for place in places(build_parser(complete=True)):
        found = offered(*place.path, "--")
        assert sorted(found) == sorted(flag.name for flag in place.flags)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_know_the_same(shell, capsys):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for place in places(build_parser(complete=True)):
        for flag in place.flags:
            wanted = flag.name if shell == "zsh" else f"-l {flag.name.removeprefix('--')} "
            assert wanted in text
        assert all(word in text for word in place.path)
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=text, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, "")
