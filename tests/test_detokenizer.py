"""Text piece by piece: no split characters, no missed stop strings, nothing given too early."""

from __future__ import annotations

import pytest
from conftest import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from trueline.models.detokenizer import Detokenizer

TOKENIZER = byte_tokenizer()


def pieces(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """Feed a text byte by byte; stop feeding where the detokenizer says so."""
    detokenizer, given_pieces = Detokenizer(TOKENIZER, stop), []
    for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]:
        given_pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            break
    return [*given_pieces, detokenizer.finish()], detokenizer.stopped


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\ufffd", exclude_categories=["Cs"]))
)
def test_pieces_join_to_the_text(text):
    assert "".join(pieces(text)[0]) == TOKENIZER.decode(
        TOKENIZER(text, add_special_tokens=False)["input_ids"]
    )


def test_a_character_comes_whole():
    assert [p for p in pieces("a\u00e9\U0001f600")[0] if p] == ["a", "\u00e9", "\U0001f600"]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ("END",), "one "),
        ("one EN two", ("END",), "one EN two"),
        ("one EN", ("END",), "one EN"),
        ("aaab", ("aab",), "a"),
        ("x\n\ny", ("\n\n",), "x"),
        ("first, second", (" second", ","), "first"),
        ("END", ("END",), ""),
    ],
)
def test_stop_strings(text, stop, expected):
    got, stopped = pieces(text, stop)
    assert "".join(got) == expected
    assert stopped == (expected != text)


def test_nothing_of_a_possible_stop_string_is_given():
    got, _ = pieces("abEN!", ("END",))
    assert got == ["a", "b", "", "", "EN!", ""]
