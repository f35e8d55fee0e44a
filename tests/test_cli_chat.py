"""`trueline chat`, driven by lines on stdin."""

from __future__ import annotations

import io
import json
import sys

import pytest
from conftest import byte_tokenizer, random_model

from trueline import (
    LanguageModel,
    LinearAlignment,
    Plain,
    Request,
    SamplingParams,
    SelfCD,
    generate,
    load_model,
)
from trueline.cli import main
from trueline.cli.conversation import Chat, parse
from trueline.cli.flow import Flow
from trueline.engine.decoding import Decoder
from trueline.errors import ConfigError
from trueline.models.prompts import encode

PIRATE = "Talk like a pirate."
SHORT = SamplingParams(max_new_tokens=40)
MOON, SUN = "What is the moon?", "What is the capital of France?"


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    """The bundled model."""
    return load_model("tiny")


@pytest.fixture
def talk(tiny, monkeypatch, capsys):
    """A function: lines and options in, (stdout, stderr) out."""

    def run(*lines: str, model: LanguageModel = tiny, options: tuple[str, ...] = ()):
        monkeypatch.setattr("trueline.models.load.load_model", lambda *args, **kwargs: model)
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(["chat", "--max-new-tokens", "40", *options]) == 0
        return tuple(capsys.readouterr())

    return run


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def test_two_turns_are_one_conversation(tiny, talk):
    first = generate(tiny, MOON, None, SHORT)[0].text
    chat = [user(MOON), {"role": "assistant", "content": first}, user(SUN)]
    second = generate(tiny, [chat], None, SHORT)[0].text
    assert talk(MOON, "", SUN) == (f"{first}\n{second}\n", "")


def test_settings_change_what_follows(tiny, talk):
    out, err = talk(f"/principle {PIRATE}", "/ratio 3", MOON, "/reset", "/method plain", MOON)
    method = LinearAlignment(principle=PIRATE, ratio=3)
    wanted = [generate(tiny, MOON, m, SHORT)[0].text for m in (method, Plain(principle=PIRATE))]
    assert out == "".join(f"{text}\n" for text in wanted)
    assert "ratio=3.0" in err
    out, _ = talk("/principle X", "/principle", "/system Be kind.", MOON, "/system", "/reset", MOON)
    chat = [{"role": "system", "content": "Be kind."}, user(MOON)]
    wanted = [c.text for c in generate(tiny, [chat, MOON], None, SHORT)]
    assert out == "".join(f"{text}\n" for text in wanted)


def test_sampling_is_set_too(tiny, talk):
    out, _ = talk("/set max-new-tokens 3", "/temperature 2", "/top_k 5", MOON, "/set top_k", MOON)
    params = SamplingParams(max_new_tokens=3, temperature=2, top_k=5)
    assert out.startswith(generate(tiny, MOON, None, params)[0].text + "\n")


def test_compare_shows_the_last_question(tiny, talk, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out, err = talk(MOON, f"/principle {PIRATE}", "/compare", "/method self-cd", "/compare")
    pirate = (Plain(), Plain(principle=PIRATE), LinearAlignment(principle=PIRATE))
    for method in pirate:
        assert f"---\n{generate(tiny, MOON, method, SHORT)[0].text}\n" in out
    titles = [line for line in out.splitlines() if line.startswith("--- ")]
    assert titles == [
        *("--- plain ---", "--- principle prompt ---", "--- linear-alignment ---"),
        *("--- plain ---", "--- safety prompt ---", "--- self-cd ---"),
    ]
    assert "error" not in err


@pytest.mark.parametrize(
    ("line", "fragment"),
    [
        ("/metod plain", 'Unknown command "/metod". Did you mean "/method"?'),
        ("/method linear-aligment", 'Did you mean "linear-alignment"?'),
        ("/method linear-alignment", "needs `principle`"),
        ("/method", 'Unknown method ""'),
        ("/alpha 2", 'Method "plain" has no option `alpha`. It belongs to self-cd.'),
        ("/set ration 2", 'Unknown option "ration". Did you mean "ratio"?'),
        ("/set", 'Unknown option ""'),
        ("/temperature hot", '`temperature` must be a number, got "hot"'),
        ("/temperature -1", "`temperature` must be a finite number of at least 0"),
        ("/max_new_tokens 1.5", '`max_new_tokens` must be a whole number, got "1.5"'),
        ("/compare", "There is no question yet"),
        ("/retry", "There is no question yet"),
        ("/undo", "There is no question yet"),
        ("/save", "/save FILE"),
        ("/save new.json", "There is no question yet"),
        ("/set principles a", '`principles` takes WEIGHT:TEXT, e.g. "1.5:Be brief.", got "a"'),
        ("/set principles x:a", "`principles` takes WEIGHT:TEXT"),
        ("/top_k 1e400", '`top_k` must be a whole number, got "1e400"'),
    ],
)
def test_a_bad_command_is_one_line_and_the_chat_goes_on(tiny, talk, line, fragment):
    out, err = talk(line, MOON)
    assert out == generate(tiny, MOON, None, SHORT)[0].text + "\n"
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert fragment in err


@pytest.mark.parametrize("bad", ["/set alpha 1e308", "/alpha inf", "/set principles a"])
def test_a_value_out_of_range_keeps_the_conversation(tiny, talk, bad):
    out, err = talk(MOON, "/method self-cd", bad, SUN)
    first = generate(tiny, MOON, None, SHORT)[0].text
    chat = [user(MOON), {"role": "assistant", "content": first}, user(SUN)]
    assert out == f"{first}\n{generate(tiny, [chat], SelfCD(), SHORT)[0].text}\n"
    assert [line.startswith("error: ") for line in err.splitlines()] == [False, True]


def test_retry_draws_again_and_undo_takes_back(tiny, talk):
    hot = SamplingParams(max_new_tokens=12, temperature=2.0)
    options = ("--temperature", "2", "--max-new-tokens", "12")
    out, _ = talk(MOON, "/retry", "/retry", options=options)
    seeds = [Request(MOON, seed=seed) for seed in range(3)]
    answers = [c.text for c in generate(tiny, seeds, None, hot)]
    assert out == "".join(f"{text}\n" for text in answers)
    assert len(set(answers)) == 3
    out, err = talk(SUN, MOON, "/undo", "/undo", MOON)
    assert out.endswith(generate(tiny, MOON, None, SHORT)[0].text + "\n")
    assert err == f"(taken back: {MOON})\n(taken back: {SUN})\n"


def test_a_greedy_retry_says_that_it_is_one(tiny, talk):
    out, err = talk(MOON, "/retry")
    assert out == 2 * (generate(tiny, MOON, None, SHORT)[0].text + "\n")
    assert "/temperature" in err


def test_an_answer_that_cannot_be_retried_stays(talk, tiny, capsys):
    chat = Chat(Decoder(tiny, share_prefixes=False, keep_turns=True), "plain", {}, SHORT)
    chat.handle(MOON)
    before, chat.sampling = list(chat.turns), SamplingParams(max_new_tokens=1)
    chat.method_name = "linear-alignment"  # which lacks its principle
    chat.handle("/retry")
    assert chat.turns == before
    assert "needs `principle`" in capsys.readouterr().err


def test_save_writes_a_row_and_replaces_nothing(tiny, talk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ("/system Be kind.", MOON, "/method self-cd", "/alpha 2", "/save talk.json")
    out, err = talk(*lines, "/save talk.json")
    row = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][2]["content"] == out[:-1]
    assert (row["method"]["name"], row["method"]["alpha"]) == ("self-cd", 2.0)
    assert "1 questions and answers in talk.json" in err
    assert err.endswith('error: File "talk.json" exists. Give another name.\n')
    assert 'Cannot write "no/x": ' in talk(MOON, "/save no/x")[1]


def test_compare_of_a_text_is_not_kept(tiny, talk, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out, _ = talk("/method self-cd", f"/compare {SUN}", MOON)
    plain, kept = (
        generate(tiny, [q], m, SHORT)[0].text for q, m in ((SUN, None), (MOON, SelfCD()))
    )
    assert f"--- plain ---\n{plain}\n" in out
    assert out.endswith(f"\n{kept}\n")


def flowing(pieces, width):
    file = io.StringIO()
    flow = Flow(file, width)
    for piece in pieces:
        flow.write(piece)
    flow.end()
    return file.getvalue()


def test_lines_break_at_words_on_a_terminal_only():
    text = "The quick brown fox jumps over the lazy dog, again and again.\nNew line."
    pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
    assert flowing(pieces, None) == text + "\n"
    shown = flowing(pieces, 20)
    assert max(map(len, (line.rstrip(" ") for line in shown.split("\n")))) <= 20
    assert shown.replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "")
    assert "quick\n" not in shown
    assert "again.\nNew line.\n" in shown
    assert flowing(["日本語 日本語 日本語 日本語"], 20).count("\n") == 2


def test_compare_needs_a_method(talk):
    assert "nothing to compare" in talk(MOON, "/compare")[1]


def test_quit_help_and_slashes(tiny, talk):
    out, err = talk("/help", "/quit", MOON)
    assert "/principle TEXT" in out
    assert "moon" not in out
    out, err = talk("//help")
    assert out == generate(tiny, "/help", None, SHORT)[0].text + "\n"
    assert err == ""


def count_fed(model: LanguageModel, counts: list[int]):
    """Note the shape of the ids of every forward: rows times new positions."""
    return model.model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(args[0].numel()), with_kwargs=True
    )


@pytest.mark.parametrize("method", [None, LinearAlignment(principle=PIRATE)], ids=["plain", "la"])
def test_a_second_turn_feeds_only_what_is_new(tiny, method, talk):
    fed: list[int] = []
    hook = count_fed(tiny, fed)
    talk(MOON, SUN, options=("--principle", PIRATE) if method else ())
    hook.remove()
    prompts = Decoder(tiny).encode([user(MOON)], method).branches
    answer = generate(tiny, MOON, method, SHORT)[0]
    # Fed in the first turn: the prompts, then each token of the answer but the last, every branch.
    rows, tokens = len(prompts), len(answer.token_ids)
    assert fed[:tokens] == [rows * max(map(len, prompts)), *[rows] * (tokens - 1)]
    # New in the second turn: the last token of the answer and the new question with its marks.
    after = [user(MOON), {"role": "assistant", "content": answer.text}, user(SUN)]
    known = len(encode(tiny, [user(MOON)])) + tokens - 1
    assert fed[tokens] == rows * (len(encode(tiny, after)) - known)
    assert set(fed[tokens + 1 :]) == {rows}


def test_ctrl_c_stops_the_answer_and_not_the_chat(tiny, capsys):
    calls: list[int] = []

    def interrupt(module, args, kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    chat = Chat(Decoder(tiny, share_prefixes=False, keep_turns=True), "plain", {}, SHORT)
    hook = tiny.model.register_forward_pre_hook(interrupt, with_kwargs=True)
    assert chat.handle(MOON)
    hook.remove()
    out, err = capsys.readouterr()
    whole = generate(tiny, MOON, None, SHORT)[0].text
    assert out.endswith("\n")
    assert 0 < len(out) < len(whole)
    assert whole.startswith(out[:-1])
    assert err == "(stopped)\n"
    assert [turn["content"] for turn in chat.turns] == [MOON, out[:-1]]
    assert chat.handle(SUN)
    assert len(chat.turns) == 4


def test_a_conversation_that_is_too_long(talk):
    model = LanguageModel(random_model("gpt2", positions=64), byte_tokenizer(), "small")
    out, err = talk("a" * 40, "b" * 40, "/reset", "c", model=model)
    answers = out.splitlines()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert 'model "small" has 64 positions' in errors[0]
    assert "/reset" in errors[0]
    tokens = 40 + 3 + len(generate(model, "a" * 40, None, SHORT)[0].text.encode()) + 1 + 40 + 3
    assert any(word in errors[0] for word in (f"{tokens} tokens", f"{tokens - 1} tokens"))
    assert answers


def test_full_positions_are_said(talk):
    model = LanguageModel(random_model("gpt2", positions=64), byte_tokenizer(), "small")
    _, err = talk("a" * 56, model=model)
    assert "64 positions are full; /reset" in err
    assert "cut at 40 tokens" in talk("a", model=model)[1]


def test_the_answer_streams(tiny, talk, monkeypatch):
    pieces: list[str] = []

    class Terminal(io.StringIO):
        def flush(self):
            pieces.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    talk(MOON)
    assert len(set(pieces)) > 4


def test_the_store_does_not_grow_with_the_turns(tiny, capsys):
    decoder = Decoder(tiny, share_prefixes=False, keep_turns=True)
    chat = Chat(decoder, "linear-alignment", {"principle": PIRATE}, SHORT)
    for _ in range(5):
        chat.handle(MOON)
    assert len(chat.turns) == 10
    assert len(decoder.backend.store.entries) == 2


def test_values_as_typed():
    pairs = tuple[tuple[str, float], ...]
    assert parse("norm", float, "inf") == float("inf")
    assert parse("epsilon", float | None, "2") == 2.0
    assert parse("base", bool, "on") is True
    assert parse("principles", pairs, "1:A. | -2:B: c") == (("A.", 1.0), ("B: c", -2.0))
    with pytest.raises(ConfigError, match="`base` must be on or off"):
        parse("base", bool, "maybe")


def test_options_on_the_command_line(tiny, talk):
    options = ("--principle", PIRATE, "--candidates", "1", "--system", "Be kind.")
    chat = [{"role": "system", "content": "Be kind."}, user(MOON)]
    method = LinearAlignment(principle=PIRATE, candidates=1)
    assert talk(MOON, options=options)[0] == generate(tiny, [chat], method, SHORT)[0].text + "\n"
