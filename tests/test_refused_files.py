"""Files that cannot be: rows of prompts and of data sets, checkpoints, adapters, runs of others."""

from __future__ import annotations

import pytest
from bad_world import DISTIL, STACK

from trueline.jobs import stacking

GENERATE = ("generate", "--output", "out.jsonl", "--max-new-tokens", "2", "--input")
TRAIN = (*DISTIL, "--output", "new", "--principle", "X", "--batch-size", "1", "--prompts")
REFUSAL = ("eval", "refusal", "--no-plot", "--output", "new", "--max-new-tokens", "2")
PREFERENCE = ("eval", "preference", "--no-plot", "--output", "new", "--max-new-tokens", "2")

# Rows of prompts: the message names the file and its line, and says what of the row is wrong.
PROMPTS = {
    "torn": ":2: broken JSON at column 16",
    "number": ":1: not a JSON object",
    "null": ":1: not a JSON object",
    "list": ":1: not a JSON object",
    "nan": ":1:",
    "huge_number": ":1:",
    "deep": ":1:",
    "long_integer": ":1:",
    "latin": ":1: not UTF-8",
    "utf16": "UTF-16",
    "surrogate": ":1: not text",
    "nothing": ':1: missing field "prompt"',
    "question": ':1: missing field "prompt"',
    "both": ':1: has both "prompt" and "messages"',
    "prompt_number": '"prompt" must be a string, got a number',
    "prompt_null": '"prompt" must be a string, got null',
    "prompt_list": '"prompt" must be a string, got a list',
    "prompt_blank": '"prompt" is empty',
    "messages_text": '"messages" must be a list, got a string',
    "messages_none": "no user message",
    "messages_words": ":1: A message must be",
    "messages_parts": "list",
    "messages_calls": "tool_calls",
    "messages_name": "name",
    "role": "`role` must be one of",
    "role_escape": "`role` must be one of",
    "role_list": "`role` must be one of",
    "no_user": "no user message",
    "late_system": "system message must come first",
    "system_number": '"system" must be a string',
    "system_blank": '"system" is empty',
    "system_twice": "Keep one",
    "principle_number": '"principle" must be a string',
    "principle_blank": '"principle" is empty',
    "id_list": '"id" must be',
    "id_true": '"id" must be',
    "id_float": '"id" must be',
    "twice": "duplicate id 1",
    "seed_text": '"seed" must be',
    "seed_huge": '"seed" must be',
    "seed_float": '"seed" must be',
    "written": '"text"',
    "long": ":1: The prompt has",
    "empty": "the file is empty",
    "blank": "the file is empty",
}
UNTRAINED = {"principle_blank", "id_list", "id_true", "id_float", "twice", "seed_text",
             "seed_huge", "seed_float", "written"}  # fmt: skip
"""What a training does not read, or judges in its own way."""


@pytest.mark.parametrize("name", PROMPTS)
def test_rows_to_answer(refuse, name):
    refuse((*GENERATE, f"{name}.jsonl"), f"{name}.jsonl", PROMPTS[name])


@pytest.mark.parametrize("name", sorted(PROMPTS.keys() - UNTRAINED))
def test_rows_to_train_on(refuse, name):
    refuse((*TRAIN, f"{name}.jsonl"), f"{name}.jsonl")


@pytest.mark.parametrize("name", ["torn", "latin", "utf16", "nothing", "prompt_number", "deep",
                                  "prompt_blank", "empty", "blank", "nan", "long", "safe_odd",
                                  "system_number", "messages_calls"])  # fmt: skip
def test_rows_to_measure(refuse, name):
    argv = (*REFUSAL, "--safe", f"{name}.jsonl", "--unsafe", "in.jsonl", "--alpha", "1")
    line = refuse(argv)
    assert f"{name}.jsonl" in line or "prompt" in line


# Command, and what the line names.
DATA = [
    ((*REFUSAL, "--safe", "uneven.csv"), "uneven.csv:2"),
    ((*REFUSAL, "--safe", "quote.csv"), "quote.csv"),
    ((*REFUSAL, "--safe", "header.csv"), "header.csv"),
    ((*REFUSAL, "--safe", "other.csv"), "other.csv:2"),
    ((*REFUSAL, "--safe", "nothing.txt"), "nothing.txt"),
    ((*REFUSAL, "--safe", "prompts.yaml"), "prompts.yaml"),
    ((*REFUSAL, "--safe", "good"), "good"),
    ((*PREFERENCE, "--prompts", "pattern_number.jsonl"), "pattern_number.jsonl"),
    ((*PREFERENCE, "--prompts", "pattern_list.jsonl"), "pattern_list.jsonl"),
    ((*PREFERENCE, "--prompts", "pattern_open.jsonl"), "pattern_open.jsonl"),
    ((*PREFERENCE, "--prompts", "pattern_huge.jsonl"), "pattern_huge.jsonl"),
    ((*PREFERENCE, "--prompts", "pattern_once.jsonl"), "pattern"),
    ((*PREFERENCE, "--prompts", "principle_number.jsonl"), "principle_number.jsonl"),
    ((*PREFERENCE, "--questions", "personal_few.jsonl"), "personal_few.jsonl:1"),
    ((*PREFERENCE, "--questions", "personal_uneven.jsonl"), "personal_uneven.jsonl:1"),
    ((*PREFERENCE, "--questions", "personal_text.jsonl"), "personal_text.jsonl:1"),
    ((*PREFERENCE, "--questions", "personal_none.jsonl"), "personal_none.jsonl:1"),
    ((*PREFERENCE, "--responses", "responses.jsonl", "responses_none.jsonl", "--judge", "local",
      "--judge-model", "tiny"), "responses_none.jsonl:1"),
    ((*PREFERENCE, "--responses", "responses.jsonl", "nowhere.jsonl", "--judge", "local",
      "--judge-model", "tiny"), "nowhere.jsonl"),
    ((*PREFERENCE, "--pairs", "pairs_none.jsonl", "--principle", "X"), "pairs_none.jsonl:1"),
    ((*PREFERENCE, "--pairs", "pairs_number.jsonl", "--principle", "X"), "pairs_number.jsonl:1"),
    ((*PREFERENCE, "--pairs", "pairs_talk.jsonl", "--principle", "X"), "pairs_talk.jsonl:1"),
    (("eval", "judge", "--output", "new", "--labels", "labels_odd.jsonl"), "labels_odd.jsonl:1"),
    (("eval", "judge", "--output", "new", "--labels", "labels_none.jsonl"), "labels_none.jsonl:1"),
    (("eval", "judge", "--output", "new", "--labels", "labels_number.jsonl"),
     "labels_number.jsonl:1"),
    (("eval", "judge", "--output", "new", "--labels", "nowhere.csv"), "nowhere.csv"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "said"), DATA, ids=[" ".join(argv[-3:]) for argv, _ in DATA])
def test_data_to_measure(refuse, argv, said):
    refuse(argv, said)


# Checkpoints: what the line names besides the folder.
MODELS = {
    "missing_tensor": "layers.0.self_attn.q_proj.weight",
    "missing_many": "",
    "foreign_tensor": "x.y",
    "other_shape": "layers.0.self_attn.q_proj.weight",
    "nan_weights": "",
    "no_weights": "",
    "empty_weights": "",
    "short_weights": "",
    "noise_weights": "",
    "pickled": "",
    "escaping_index": "",
    "more_layers": "99",
    "no_heads": "",
    "negative_vocabulary": "",
    "text_hidden_size": "",
    "odd_type": "",
    "no_type": "",
    "own_code": "",
    "config_list": "",
    "config_null": "",
    "config_text": "",
    "config_binary": "",
    "no_tokenizer": "",
    "broken_tokenizer": "",
    "null_tokenizer": "",
    "no_template": "chat template",
}


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints(refuse, name):
    refuse(("generate", "Hi", "--max-new-tokens", "2", "--model", f"m_{name}"),
           f"m_{name}", MODELS[name])  # fmt: skip


TRAINED = ["empty_weights", "config_list", "pickled", "own_code", "other_shape", "more_layers"]
TRAININGS = {
    "distil": (*TRAIN, "in.jsonl"),
    "stack": (*STACK, "--output", "new", "--tasks", "s_good.toml"),
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("command", TRAININGS)
def test_checkpoints_to_train(refuse, command, name):
    refuse((*TRAININGS[command], "--model", f"m_{name}"), f"m_{name}")


ADAPTERS = ["foreign_keys", "missing_key", "other_rank", "rank_0", "nan", "other_size",
            "no_weights", "no_config", "empty_weights", "short_weights", "pickled", "config_list",
            "config_null", "config_text", "odd_type", "no_type", "text_rank",
            "odd_modules"]  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(refuse, name):
    argv = ("generate", "Hi", "--model", "good", "--adapter", f"a_{name}", "--max-new-tokens", "2")
    line = refuse(argv, f"a_{name}")
    assert "Repo id" not in line


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_to_export(refuse, name):
    refuse(("export", "--adapters", f"a_{name}", "--to", "new"), f"a_{name}")


@pytest.mark.parametrize("name", ["strangers_base", "no_base", "other_base"])
def test_a_base_that_is_only_named(refuse, name):
    refuse(("export", "--adapters", f"a_{name}", "--to", "new", "--form", "merged"))


RESULTS = ["no_results", "results_text", "results_list", "results_null", "results_deep",
           "settings_list", "settings_text", "settings_none", "kind_number", "data_text",
           "metric_number", "points_text", "points_numbers", "points_empty",
           "title_list"]  # fmt: skip


@pytest.mark.parametrize("name", RESULTS)
def test_runs_to_report(refuse, name):
    refuse(("report", f"r_{name}", "--output", "new"), f"r_{name}")


@pytest.mark.parametrize("name", ["rows_junk", "rows_number", "verdicts_junk"])
def test_runs_to_go_on_with(refuse, name):
    argv = ("eval", "refusal", "--alpha", "1", "--limit", "1", "--max-new-tokens", "2", "--no-plot")
    touched = (f"r_{name}/manifest.json",)  # this call is noted in it
    refuse((*argv, "--output", f"r_{name}"), f"r_{name}", ":1", touched=touched)


def test_a_training_to_go_on_with(refuse):
    argv = (*DISTIL, "--principle", "Be brief.", "--prompts", "in.jsonl", "--steps", "1")
    more = ("--batch-size", "1", "--max-new-tokens", "4", "--resume", "--output", "d_log_junk")
    refuse((*argv, *more), "d_log_junk/log.jsonl:1: not a row of this run")


def test_a_stream_to_go_on_with_before_its_model_is_loaded(refuse, monkeypatch):
    def load(*_args, **_options):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(stacking, "model_factory", load)
    argv = (*STACK, "--tasks", "s_good.toml", "--rank", "2", "--resume", "--output", "s_log_junk")
    refuse(argv, "s_log_junk/log.jsonl:1: not a row of this run")


CHAT = {
    # lines -> what is said; the conversation goes on
    "/set": "option",
    "/set nonsense 1": "nonsense",
    "/set ratio": "",
    "/set alpha x": "alpha",
    "/set alpha 1e308": "alpha",
    "/set alpha nan": "alpha",
    "/set principles a": "principles",
    "/set principles nan:a": "principles",
    "/set temperature -1": "temperature",
    "/set temperature 1e-320": "temperature",
    "/set top_k 1.5": "top_k",
    "/set max_new_tokens 0": "max_new_tokens",
    "/set seed x": "seed",
    "/ratio 1e308": "ratio",
    "/ratio": "",
    "/method": "method",
    "/method magic": "magic",
    "/method plan": '"plain"',
    "/method blend": "principles",
    "/compare": "",
    "/nonsense": "/nonsense",
    "/retry": "",
    "/undo": "",
    "/save": "",
    "/save dirty": "dirty",
    "/save no/such/folder/x": "no/such",
    "/save other.jsonl": "other.jsonl",
    "/system \udcff": "",
}


@pytest.mark.parametrize("line", CHAT, ids=[line.encode("ascii", "replace") for line in CHAT])
def test_a_chat_goes_on(world, capfd, monkeypatch, line):
    import io
    import sys

    from refusals import UNTOUCHED, snapshot

    from trueline.cli import main

    text = f"{line}\n/help\n".encode("utf-8", "surrogatepass")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8",
                                                       errors="surrogateescape"))  # fmt: skip
    code = main(["chat"])
    out, err = capfd.readouterr()
    assert code == 0
    assert "/quit" in out
    assert "Traceback" not in err
    assert err.count("\n") <= 1
    assert CHAT[line] in err
    assert snapshot(world) == UNTOUCHED
