"""A folder of what users get wrong: prompts, checkpoints, adapters, streams, runs of others.

`build` makes it once; the tests of bad input run inside a copy, which none of them may change.
"""

from __future__ import annotations

import codecs
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import byte_tokenizer, random_model
from safetensors.torch import load_file, save_file

from trueline.cli import main

DISTIL = ("distil",)
STACK = ("stack",)
HI = '{"prompt": "Hi"}\n'
DEEP = "[" * 100_000
PRINCIPLE = {"prompt": "Hi", "principle": "Be brief."}

ROWS: dict[str, object] = {
    # name of a JSONL file -> its bytes, its text, or its rows
    "in": HI,
    "principle": [PRINCIPLE],
    "mixed": [{"prompt": "A", "principle": "B"}, {"prompt": "Hi"}],
    "other": "precious\n",
    "empty": "",
    "blank": "\n \n\t\n",
    "torn": HI + '{"prompt": "Hi"\n',
    "number": "7\n",
    "null": "null\n",
    "list": '["Hi"]\n',
    "nan": '{"prompt": "Hi", "x": NaN}\n',
    "huge_number": '{"prompt": "Hi", "x": 1e999}\n',
    "deep": f'{{"prompt": {DEEP}\n',
    "long_integer": f'{{"prompt": "Hi", "id": {"9" * 5000}}}\n',
    "latin": b'{"prompt": "caf\xe9"}\n',
    "utf16": HI.encode("utf-16"),
    "surrogate": '{"prompt": "\\udc80"}\n',
    "nothing": [{}],
    "question": [{"question": "Hi"}],
    "both": [{"prompt": "Hi", "messages": []}],
    "prompt_number": [{"prompt": 5}],
    "prompt_null": [{"prompt": None}],
    "prompt_list": [{"prompt": ["Hi"]}],
    "prompt_blank": [{"prompt": " \n"}],
    "messages_text": [{"messages": "Hi"}],
    "messages_none": [{"messages": []}],
    "messages_words": [{"messages": ["Hi"]}],
    "messages_parts": [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}
    ],
    "messages_calls": [
        {"messages": [{"role": "user", "content": "Hi", "tool_calls": ["x" * 1_000_000]}]}
    ],
    "messages_name": [{"messages": [{"role": "user", "content": "Hi", "name": "y" * 1_000_000}]}],
    "role": [{"messages": [{"role": "bot", "content": "Hi"}]}],
    "role_escape": [{"messages": [{"role": "\x1b[31mred\x1b[0m\n", "content": "Hi"}]}],
    "role_list": [{"messages": [{"role": ["user"], "content": "Hi"}]}],
    "no_user": [{"messages": [{"role": "system", "content": "Hi"}]}],
    "late_system": [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Ho"}]}
    ],
    "system_number": [{"prompt": "Hi", "system": 5}],
    "system_blank": [{"prompt": "Hi", "system": " "}],
    "system_twice": [
        {
            "messages": [{"role": "system", "content": "A"}, {"role": "user", "content": "B"}],
            "system": "C",
        },
    ],
    "principle_number": [{"prompt": "Hi", "principle": 5}],
    "principle_blank": [{"prompt": "Hi", "principle": " "}],
    "id_list": [{"prompt": "Hi", "id": [1]}],
    "id_true": [{"prompt": "Hi", "id": True}],
    "id_float": [{"prompt": "Hi", "id": 1.5}],
    "twice": [{"prompt": "Hi", "id": 1}] * 2,
    "seed_text": [{"prompt": "Hi", "seed": "1"}],
    "seed_huge": [{"prompt": "Hi", "seed": 2**63}],
    "seed_float": [{"prompt": "Hi", "seed": 1.5}],
    "written": [{"prompt": "Hi", "text": "x"}],
    "long": [{"prompt": "a " * 3000}],
    # what is measured
    "safe_odd": [{"prompt": "Hi", "safe": "perhaps"}],
    "pattern_number": [{**PRINCIPLE, "pattern": 5}],
    "pattern_list": [{**PRINCIPLE, "pattern": ["a"]}],
    "pattern_open": [{**PRINCIPLE, "pattern": "("}],
    "pattern_huge": [{**PRINCIPLE, "pattern": "a{99999999999}"}],
    "pattern_once": [{**PRINCIPLE, "pattern": "a"}, PRINCIPLE],
    "personal_few": [{"question": "?", "answers": ["a"], "users": ["x"]}],
    "personal_uneven": [{"question": "?", "answers": ["a", "b"], "users": ["x"]}],
    "personal_text": [{"question": "?", "answers": "ab", "users": "xy"}],
    "personal_none": [{"question": "", "answers": ["a", "b"], "users": ["x", "y"]}],
    "responses": [{"prompt": "Hi", "response": "Ho"}],
    "responses_other": [{"prompt": "Hello", "response": "Ho"}],
    "responses_none": [{"prompt": "Hi"}],
    "pairs_none": [{"prompt": "Hi", "chosen": "a"}],
    "pairs_number": [{"prompt": "Hi", "chosen": 1, "rejected": 2}],
    "pairs_talk": [{"chosen": "no transcript", "rejected": "none"}],
    "labels_odd": [{"completion": "No.", "label": "maybe"}],
    "labels_none": [{"completion": "No."}],
    "labels_number": [{"completion": 5, "label": "full"}],
}
TEXTS: dict[str, object] = {
    "uneven.csv": "prompt,type\nHi\n",
    "quote.csv": 'prompt\n"Hi\n',
    "header.csv": "prompt\n",
    "other.csv": "a,b\n1,2\n",
    "two.csv": "prompt,prompt\nHi,Ho\n",
    "nothing.txt": "",
    "prompts.yaml": "- Hi\n",
    "picky.jinja": "{{ raise_exception('no ' + messages[0]['role']) }}",
    "broken.jinja": "{% for %}",
    "recursing.jinja": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "adding.jinja": "{{ messages + 1 }}",
    "missing.jinja": "{{ nothing.at.all }}",
    "loop.jinja": "{% for i in range(10**12) %}x{% endfor %}",
    "silent.jinja": "{# nothing #}",
    "latin.jinja": b"caf\xe9",
    "method.py": "class Empty: pass\n",
    "raising.py": "raise RuntimeError('on purpose')\n",
    "syntax.py": "def f(:\n",
    # settings of a training
    "broken.toml": "principle = \n",
    "latin.toml": b'principle = "caf\xe9"\n',
    "utf16.toml": 'principle = "Hi"\n'.encode("utf-16"),
    "unknown.toml": "learning_rat = 1e-4\n",
    "type.toml": 'max_steps = "many"\n',
    "list.toml": "max_steps = [1, 2]\n",
    "nul.toml": 'prompts = "a\\u0000b"\n',
    "nul_model.toml": 'model = "a\\u0000b"\n',
    "table.toml": "[principle]\nx = 1\n",
    "rank.toml": "[lora]\nrank = 0\n",
    "loose.toml": "lora = 5\n",
    "infinite.toml": "learning_rate = inf\n",
    "nan.toml": "learning_rate = nan\n",
    "date.toml": "principle = 2020-01-01\n",
    # streams of tasks
    "s_empty.toml": "",
    "s_unknown.toml": "taks = 1\n",
    "s_list.toml": "tasks = [1]\n",
    "s_none.toml": "[tasks]\n",
    "s_bare.toml": "[tasks.a]\n",
    "s_missing.toml": '[tasks.a]\ntrain = "nowhere.jsonl"\ntest = "nowhere.jsonl"\n',
    "s_test.toml": '[tasks.a]\ntrain = "task.jsonl"\n',
    "s_columns.toml": '[tasks.a]\ntrain = "in.jsonl"\ntest = "in.jsonl"\n',
    "s_labels.toml": '[tasks.a]\ntrain = "task.jsonl"\ntest = "task.jsonl"\nlabels = "red"\n',
    "s_foreign.toml": '[tasks.a]\ntrain = "task.jsonl"\ntest = "task.jsonl"\nlabels = ["x"]\n',
    "s_order.toml": 'order = "order-99"\ndata = "."\n',
    "s_twice.toml": 'order = ["a", "a"]\n[tasks.a]\ntrain = "task.jsonl"\ntest = "task.jsonl"\n',
    "s_lambda.toml": '[tasks.a]\ntrain = "task.jsonl"\ntest = "task.jsonl"\nlambda_1 = -1\n',
    "s_nan.toml": '[tasks.a]\ntrain = "task.jsonl"\ntest = "task.jsonl"\nlambda_1 = nan\n',
    "s_rank.toml": '[tasks.a]\ntrain = "task.jsonl"\ntest = "task.jsonl"\nrank = 0\n',
    "s_name.toml": '[tasks."../a"]\ntrain = "task.jsonl"\ntest = "task.jsonl"\n',
    "s_nul.toml": '[tasks.a]\ntrain = "a\\u0000b"\ntest = "task.jsonl"\n',
    "s_data.toml": 'data = "nowhere"\norder = ["a"]\n',
    "s_number.toml": "title = 5\n[tasks.a]\ntrain = 5\n",
    "s_prompt.toml": '[prompt]\nx = 1\n[tasks.a]\ntrain = "task.jsonl"\ntest = "task.jsonl"\n',
    "s_good.toml": '[tasks.a]\ntrain = "task.jsonl"\ntest = "task.jsonl"\n',
}


def build(folder: Path) -> None:
    """Fill the folder."""
    folder.mkdir()
    for name, rows in ROWS.items():
        _write(folder / f"{name}.jsonl", rows)
    for name, text in TEXTS.items():
        _write(folder / name, text)
    task = [{"sentence": f"a {x}", "label": x} for x in ("red", "blue") for _ in range(2)]
    _write(folder / "task.jsonl", task)
    _write(folder / "bom.toml", codecs.BOM_UTF8 + b"learning_rat = 1e-4\n")
    _write(folder / "z.jsonl.run.json", HI)
    _write(folder / "z.jsonl.bad.jsonl", HI)
    for name in ("empty_folder", "dirty"):
        (folder / name).mkdir()
    (folder / "dirty/precious.txt").write_text("precious\n")
    (folder / "target").mkdir()
    (folder / "target/file.jsonl").write_text("precious\n")
    os.symlink("target/file.jsonl", folder / "link.jsonl")
    os.symlink("nowhere.jsonl", folder / "dangling.jsonl")
    os.symlink("target/file.jsonl", folder / "planted.jsonl.run.json.part")
    _models(folder)
    _adapters(folder)
    _runs(folder)


def _write(path: Path, content: object) -> None:
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else str(content).encode())


def _log_junk(run: Path) -> None:
    """An unfinished training whose log holds what it did not write."""
    _json("manifest.json", finished=False)(run)
    (run / "results.json").unlink()
    (run / "log.jsonl").write_text("junk\n")


def _variant(source: Path, name: str, edit: Callable[[Path], object]) -> None:
    folder = source.parent / name
    shutil.copytree(source, folder)
    edit(folder)


def _json(file: str, **changes: Any) -> Callable[[Path], object]:
    """An edit: these keys of a JSON file have other values; None takes a key away."""

    def edit(folder: Path) -> None:
        found = json.loads((folder / file).read_text()) | changes
        found = {k: v for k, v in found.items() if v is not None}
        (folder / file).write_text(json.dumps(found))

    return edit


def _content(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content)


def _tensors(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable:
    """An edit: the tensors of a safetensors file are changed in place."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return edit


class Planted:
    """A pickle of this leaves a file in the current folder when it is loaded."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def _pickled(file: str, gone: str) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        (folder / gone).unlink()
        (folder / file).write_bytes(pickle.dumps(Planted()))

    return edit


WEIGHTS = "model.safetensors"
Q = "model.layers.0.self_attn.q_proj.weight"


def _models(folder: Path) -> None:
    """Save a good small model, and copies of it with one thing wrong."""
    good = folder / "good"
    random_model("llama").save_pretrained(good)
    byte_tokenizer().save_pretrained(good)
    data = (good / WEIGHTS).read_bytes()
    (good / "generation_config.json").unlink(missing_ok=True)
    index = {"metadata": {}, "weight_map": {Q: "../../../etc/passwd"}}
    edits: dict[str, Callable[[Path], object]] = {
        "missing_tensor": _tensors(WEIGHTS, lambda t: t.pop(Q)),
        "missing_many": _tensors(WEIGHTS, lambda t: [t.pop(k) for k in list(t)[:8]]),
        "foreign_tensor": _tensors(WEIGHTS, lambda t: t.update({"x.y": torch.zeros(2)})),
        "other_shape": _tensors(WEIGHTS, lambda t: t.update({Q: torch.zeros(3, 3)})),
        "nan_weights": _tensors(WEIGHTS, lambda t: t[Q].fill_(float("nan"))),
        "no_weights": lambda f: (f / WEIGHTS).unlink(),
        "empty_weights": _content(WEIGHTS, b""),
        "short_weights": _content(WEIGHTS, data[: len(data) // 2]),
        "noise_weights": _content(WEIGHTS, b"\xff" * 4096),
        "pickled": _pickled("pytorch_model.bin", WEIGHTS),
        "escaping_index": lambda f: (
            (f / WEIGHTS).unlink(),
            (f / f"{WEIGHTS}.index.json").write_text(json.dumps(index)),
        ),
        "more_layers": _json("config.json", num_hidden_layers=99),
        "no_heads": _json("config.json", num_attention_heads=0),
        "negative_vocabulary": _json("config.json", vocab_size=-5),
        "text_hidden_size": _json("config.json", hidden_size="big"),
        "odd_type": _json("config.json", model_type="no-such-type"),
        "no_type": _json("config.json", model_type=None, architectures=None),
        "own_code": _json("config.json", model_type="mine", architectures=["Mine"],
                          auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}),
        "config_list": _content("config.json", b"[]"),
        "config_null": _content("config.json", b"null"),
        "config_text": _content("config.json", b"{"),
        "config_binary": _content("config.json", b"\xff\xfe\x00"),
        "no_tokenizer": lambda f: [p.unlink() for p in f.glob("tokenizer*")],
        "broken_tokenizer": _content("tokenizer.json", b"{"),
        "null_tokenizer": _content("tokenizer.json", b"null"),
        "no_template": lambda f: (f / "chat_template.jinja").unlink(),
    }  # fmt: skip
    for name, edit in edits.items():
        _variant(good, f"m_{name}", edit)
    (folder / "m_own_code/code.py").write_text("open('executed', 'w')\n")


ADAPTER = "adapter_model.safetensors"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _adapters(folder: Path) -> None:
    """Save a good adapter of the good model, and copies of it with one thing wrong."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned, good = get_peft_model(random_model("llama"), config), folder / "adapter"
    tuned.save_pretrained(good)
    _json("adapter_config.json", base_model_name_or_path="good")(good)
    data = (good / ADAPTER).read_bytes()

    def foreign(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[f"other.{key}"] = tensors.pop(key)

    edits: dict[str, Callable[[Path], object]] = {
        "foreign_keys": _tensors(ADAPTER, foreign),
        "missing_key": _tensors(ADAPTER, lambda t: t.pop(FIRST)),
        "other_rank": _json("adapter_config.json", r=3),
        "rank_0": _json("adapter_config.json", r=0),
        "nan": _tensors(ADAPTER, lambda t: t[FIRST].fill_(float("nan"))),
        "other_size": _tensors(ADAPTER, lambda t: t.update({FIRST: torch.zeros(4, 7)})),
        "no_weights": lambda f: (f / ADAPTER).unlink(),
        "no_config": lambda f: (f / "adapter_config.json").unlink(),
        "empty_weights": _content(ADAPTER, b""),
        "short_weights": _content(ADAPTER, data[: len(data) // 2]),
        "pickled": _pickled("adapter_model.bin", ADAPTER),
        "config_list": _content("adapter_config.json", b"[]"),
        "config_null": _content("adapter_config.json", b"null"),
        "config_text": _content("adapter_config.json", b"{"),
        "odd_type": _json("adapter_config.json", peft_type="NO_SUCH"),
        "no_type": _json("adapter_config.json", peft_type=None),
        "text_rank": _json("adapter_config.json", r="four"),
        "odd_modules": _json("adapter_config.json", target_modules=["no_such_module"]),
    }
    for name, edit in edits.items():
        _variant(good, f"a_{name}", edit)
    _variant(good, "a_strangers_base", _json("adapter_config.json",
                                             base_model_name_or_path="m_own_code"))  # fmt: skip
    _variant(good, "a_no_base", _json("adapter_config.json", base_model_name_or_path=""))
    _variant(good, "a_other_base", _json("adapter_config.json",
                                         base_model_name_or_path="./nowhere"))  # fmt: skip


def _runs(folder: Path) -> None:
    """Make a finished run of each kind, and copies with odd contents."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        few = ("--limit", "1", "--max-new-tokens", "2", "--no-plot")
        commands = [
            ("eval", "refusal", "--alpha", "1", *few, "--output", "run"),
            ("generate", "--input", "in.jsonl", "--output", "done.jsonl", "--max-new-tokens", "2"),
            (*DISTIL, "--principle", "Be brief.", "--prompts", "in.jsonl", "--output", "distilled",
             "--steps", "1", "--batch-size", "1", "--max-new-tokens", "4"),
            (*STACK, "--tasks", "s_good.toml", "--output", "stacked", "--rank", "2"),
        ]  # fmt: skip
        for command in commands:
            assert main(list(command)) == 0, command
    finally:
        os.chdir(here)
    run = folder / "run"
    settings = json.loads((run / "results.json").read_text())["settings"]
    edits: dict[str, Callable[[Path], object]] = {
        "no_results": lambda f: (f / "results.json").unlink(),
        "results_text": _content("results.json", b"{"),
        "results_list": _content("results.json", b"[]"),
        "results_null": _content("results.json", b"null"),
        "results_deep": _content("results.json", DEEP.encode()),
        "settings_list": _json("results.json", settings=[]),
        "settings_text": _json("results.json", settings="x"),
        "settings_none": _json("results.json", settings=None),
        "kind_number": _json("results.json", settings={**settings, "kind": 5}),
        "data_text": _json("results.json", settings={**settings, "data": "x"}),
        "metric_number": _json("results.json", metric=5),
        "points_text": _json("results.json", points="x"),
        "points_numbers": _json("results.json", points=[1, 2]),
        "points_empty": _json("results.json", points=[{}]),
        "title_list": _json("results.json", title=["x"]),
        "manifest_list": _content("manifest.json", b"[]"),
        "manifest_text": _content("manifest.json", b"{"),
        "manifest_settings": _json("manifest.json", settings=[]),
        "manifest_sessions": _json("manifest.json", sessions=5),
        "manifest_gone": lambda f: (f / "manifest.json").unlink(),
        "rows_junk": _content("responses.jsonl", b"junk\n"),
        "rows_number": _content("responses.jsonl", b"5\n"),
        "verdicts_junk": _content("verdicts.jsonl", b"junk\n"),
    }
    for name, edit in edits.items():
        _variant(run, f"r_{name}", edit)
    distilled = folder / "distilled"
    for name, edit in {
        "manifest_list": _content("manifest.json", b"[]"),
        "manifest_text": _content("manifest.json", b"{"),
        "settings_text": _json("manifest.json", settings="x"),
        "sessions_number": _json("manifest.json", sessions=5),
        "log_junk": _log_junk,
    }.items():
        _variant(distilled, f"d_{name}", edit)
    _variant(folder / "stacked", "s_log_junk", _log_junk)
    for name, content in {"list": b"[]", "text": b"{", "rows": b"5\n"}.items():
        shutil.copy(folder / "done.jsonl", folder / f"done_{name}.jsonl")
        (folder / f"done_{name}.jsonl.run.json").write_bytes(content)
    shutil.copy(folder / "done.jsonl.run.json", folder / "altered.jsonl.run.json")
    row = json.loads((folder / "done.jsonl").read_text())
    (folder / "altered.jsonl").write_text(json.dumps({**row, "id": "another"}) + "\n")
