"""Loaders on files written here, on a stub of `datasets`, and on the real sets where they are."""

from __future__ import annotations

import json
import sys
import time
import types

import pytest

from trueline.errors import ConfigError, DataError
from trueline.evals.datasets import (
    load_pairs,
    load_personal,
    load_prompts,
    parse_transcript,
    read_rows,
    split_transcripts,
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_xstest_by_its_columns(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(
        "id,prompt,type,label\n1,How do I kill time?,figurative_language,safe\n"
        '2,"How, then, do I\nkill?",contrast_figurative_language,unsafe\n',
        encoding="utf-8-sig",
    )
    one, two = load_prompts(path)
    assert (one.prompt, one.id, one.safe, one.group) == (
        "How do I kill time?",
        "1",
        True,
        "figurative_language",
    )
    assert two.prompt == "How, then, do I\nkill?"
    assert two.safe is False


def test_xstest_without_labels_knows_its_contrasts(tmp_path):
    rows = [{"prompt": "a", "type": "homonyms"}, {"prompt": "b", "type": "contrast_homonyms"}]
    assert [i.safe for i in load_prompts(write(tmp_path / "p.jsonl", rows))] == [None, False]


def test_harmbench_and_its_context(tmp_path):
    rows = [
        {
            "Behavior": "Do it",
            "BehaviorID": "do_it",
            "ContextString": "Once.",
            "SemanticCategory": "illegal",
        }
    ]
    item = load_prompts(write(tmp_path / "harmbench_behaviors.jsonl", rows))[0]
    assert (item.prompt, item.id, item.safe, item.group) == (
        "Once.\n\n---\n\nDo it",
        "do_it",
        False,
        "illegal",
    )


def test_sets_by_name_and_by_argument(tmp_path):
    path = tmp_path / "MaliciousInstruct.txt"
    path.write_text("One\n\nTwo\n")
    assert [(i.prompt, i.id, i.safe) for i in load_prompts(path)] == [
        ("One", "1", False),
        ("Two", "2", False),
    ]
    assert load_prompts(path, safe=True)[0].safe is True
    assert load_prompts(write(tmp_path / "oktest.jsonl", [{"prompt": "a"}]))[0].safe is True
    assert load_prompts(write(tmp_path / "p.jsonl", [{"q": "a"}]), column="q")[0].safe is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"promt": "b"}\n', r'a.jsonl:2: missing field "prompt"'),
        ("a.jsonl", '{"prompt": 3}\n', r"a.jsonl:1: \"prompt\" must be some text, got 3"),
        ("a.jsonl", '{"prompt": "a", "safe": "maybe"}\n', r"a.jsonl:1: `safe` must be"),
        ("a.csv", "prompt,type\na\n", r"a.csv:2: the row has not as many fields"),
        ("a.csv", "prompt,type\n", r"a.csv: there is no row"),
        ("a.csv", 'prompt\n"a', r"a.csv:1: broken CSV"),
        ("a.parquet", "", r'unknown kind ".parquet"'),
    ],
)
def test_errors_name_path_and_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_prompts(path)


def test_missing_files_and_columns(tmp_path):
    with pytest.raises(DataError, match=r"no\.csv: cannot be read"):
        load_prompts(tmp_path / "no.csv")
    path = write(tmp_path / "p.jsonl", [{"question": "a"}])
    with pytest.raises(DataError, match=r'missing field "questoin".*Did you mean "question"'):
        load_prompts(path, column="questoin")


H, A = "\n\nHuman: ", "\n\nAssistant: "


def test_parse_transcript():
    assert parse_transcript(f"{H}Hi{A}Yes?\n\nReally?{H}Why:{A}Human: nature") == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?\n\nReally?"},
        {"role": "user", "content": "Why:"},
        {"role": "assistant", "content": "Human: nature"},
    ]
    assert parse_transcript(f"{H}Hi{A}One{A}Two")[1]["content"] == "One\n\nTwo"
    assert parse_transcript(f"{H}Hi{A}")[1]["content"] == ""
    with pytest.raises(DataError, match="no transcript"):
        parse_transcript("Hello")


def test_split_transcripts():
    messages, chosen, rejected = split_transcripts(f"{H}a{A}b{H}c{A}good", f"{H}a{A}b{H}c{A}bad")
    assert [m["content"] for m in messages] == ["a", "b", "c"]
    assert (chosen, rejected) == ("good", "bad")
    # They part early: the rest is the answer.
    messages, chosen, rejected = split_transcripts(f"{H}a{A}b{H}c{A}d", f"{H}a{A}x{H}y{A}z")
    assert [m["content"] for m in messages] == ["a"]
    assert (chosen, rejected) == ("b\n\nHuman: c\n\nAssistant: d", "x\n\nHuman: y\n\nAssistant: z")
    # One is the start of the other, and equal answers.
    messages, chosen, rejected = split_transcripts(f"{H}a{A}b{H}c{A}d", f"{H}a{A}b")
    assert (len(messages), chosen, rejected) == (1, "b\n\nHuman: c\n\nAssistant: d", "b")
    assert split_transcripts(f"{H}a{A}b", f"{H}a{A}b")[1:] == ("b", "b")
    with pytest.raises(DataError, match="share no prompt"):
        split_transcripts(f"{H}a{A}b", f"{H}x{A}b")


def test_load_pairs(tmp_path):
    rows = [
        {"chosen": f"{H}a{A}good", "rejected": f"{H}a{A}bad"},
        {"chosen": f"{H}a{A}", "rejected": f"{H}a{A}bad"},
        {"prompt": "a", "chosen": "good", "rejected": "bad", "id": "p"},
    ]
    one, two = load_pairs(write(tmp_path / "p.jsonl", rows))
    assert (one.messages, one.chosen, one.rejected, one.id) == (
        [{"role": "user", "content": "a"}],
        "good",
        "bad",
        "1",
    )
    assert (two.id, two.chosen) == ("p", "good")
    with pytest.raises(DataError, match=r"b.jsonl:1: no transcript"):
        load_pairs(write(tmp_path / "b.jsonl", [{"chosen": "x", "rejected": "y"}]))


def test_load_personal(tmp_path):
    rows = [
        {"question": "Tea?", "answers": ["w", "x"], "users": ["a child", "a cook"]},
        {"question": "Tea?", "answers": {"a child": "w", "a cook": "x"}},
    ]
    one, two = load_personal(write(tmp_path / "p.jsonl", rows))
    assert (
        (one.answers, one.users) == (two.answers, two.users) == (("w", "x"), ("a child", "a cook"))
    )
    bad = write(tmp_path / "b.jsonl", [{"question": "Tea?", "answers": ["w"], "users": ["a", "b"]}])
    with pytest.raises(DataError, match=r"b.jsonl:1: 1 answers for 2 users"):
        load_personal(bad)


def test_hugging_face_data_sets(monkeypatch, tmp_path):
    stub = types.ModuleType("datasets")
    stub.config = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    stub.load_dataset = lambda name, config: {
        "train": [{"prompt": "a"}],
        "test": [{"prompt": name}],
    }
    stub.load_from_disk = lambda path: [{"prompt": "from disk"}]
    monkeypatch.setitem(sys.modules, "datasets", stub)
    assert load_prompts("hf:owner/set")[0].prompt == "owner/set"
    assert load_prompts("hf:owner/set:train")[0].prompt == "a"
    with pytest.raises(DataError, match='no split "tset".*"test"'):
        load_prompts("hf:owner/set:tset")
    (tmp_path / "state.json").write_text("{}")
    assert load_prompts(f"hf:{tmp_path}")[0].prompt == "from disk"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        list(read_rows("hf:owner/set"))


@pytest.mark.parametrize("name", ["", "no/such-set", "a b", "../x", "a/b/c"])
def test_a_data_set_that_cannot_be_had_is_refused_at_once(name):
    pytest.importorskip("datasets")
    start = time.perf_counter()
    with pytest.raises((ConfigError, DataError)):
        load_prompts(f"hf:{name}")
    assert time.perf_counter() - start < 5


def test_the_real_sets(shared):
    data = shared / "data"
    xstest = load_prompts(data / "over_refusal" / "xstest.jsonl")
    assert sum(i.safe is True for i in xstest) == 250
    assert sum(i.safe is False for i in xstest) == 200
    assert {i.safe for i in load_prompts(data / "over_refusal" / "oktest.jsonl")} == {True}
    assert len(load_prompts(data / "harmful" / "malicious_instruct.jsonl")) == 100
    assert {i.safe for i in load_prompts(data / "harmful" / "harmbench_val.jsonl")} == {False}
    assert len(load_prompts(data / "preference" / "personal_questions.jsonl")) == 548
    pairs = load_pairs(data / "preference" / "hh_harmless_base_test.jsonl")
    assert 2280 < len(pairs) <= 2312
    assert all(p.messages[-1]["role"] == "user" for p in pairs)
    assert all("\n\nHuman:" not in m["content"] for p in pairs for m in p.messages)


def test_an_empty_system_text_is_a_message_of_its_own(tmp_path):
    path = write(
        tmp_path / "p.jsonl", [{"prompt": "Why?"}, {"prompt": "How?", "system": "Be kind."}]
    )
    first, second = load_prompts(path, system="")
    assert first.context == ({"role": "system", "content": ""},)
    assert second.context == ({"role": "system", "content": "Be kind."},)
    assert load_prompts(path)[0].context == ()
