"""What the command line shows while a model loads, on a terminal and off it."""

from __future__ import annotations

import io
import sys

import pytest
from conftest import byte_tokenizer, random_model

from trueline import load_model
from trueline.cli import main
from trueline.cli.loading import loading
from trueline.models.hub import LOADING


class Terminal(io.StringIO):
    """What a terminal gets."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    random_model("llama").save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def last_line(text):
    """What is left on the last line of a terminal."""
    return text.rsplit("\r\033[K", 1)[-1]


def test_a_terminal_shows_a_line_that_goes_away(folder, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with loading():
        load_model(folder)
    assert f"loading {folder} …" in terminal.getvalue()
    assert last_line(terminal.getvalue()) == ""
    assert LOADING.get() is None


def test_what_happens_once_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with loading():
        LOADING.get()("converting Small (Apache-2.0), once", 1, 4)
    assert last_line(terminal.getvalue()) == (
        "converting Small (Apache-2.0), once [#####...............]"
    )


def test_an_error_is_on_a_line_of_its_own(folder, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("[]")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main(["generate", "Hi", "--model", str(tmp_path)]) == 2
    assert last_line(terminal.getvalue()).startswith("error: Cannot load")


def test_off_a_terminal_only_what_happens_once_is_said(folder, capsys):
    with loading():
        load_model(folder)
        for done in (1, 2):
            LOADING.get()("converting Small (Apache-2.0), once", done, 4)
    assert capsys.readouterr() == ("", "converting Small (Apache-2.0), once\n")
