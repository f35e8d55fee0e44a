"""What users get wrong, through the command line: one line that says what, and exit code 2."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import byte_tokenizer, random_model

from trueline.cli import COMMANDS, main

CHAT_ROW = '{"prompt": "Hi"}'
LA = ("--method", "linear-alignment")
RUN = ("--input", "in.jsonl", "--output", "out.jsonl", "--max-new-tokens", "2")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder: prompts, models and adapters that are not what they should be."""
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text(f"{CHAT_ROW}\n")
    Path("broken.jsonl").write_text(f"{CHAT_ROW}\n" + '{"prompt": "Hi"\n')
    Path("no_prompt.jsonl").write_text('{"question": "Hi"}\n')
    Path("twice.jsonl").write_text('{"prompt": "Hi", "id": 1}\n' * 2)
    Path("latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    Path("long.jsonl").write_text(json.dumps({"prompt": "a " * 3000}) + "\n")
    Path("role.jsonl").write_text('{"messages": [{"role": "bot", "content": "Hi"}]}\n')
    Path("no_user.jsonl").write_text('{"messages": [{"role": "system", "content": "Hi"}]}\n')
    Path("principle.jsonl").write_text('{"prompt": "Hi", "principle": "Be brief."}\n')
    Path("mixed.jsonl").write_text(f'{{"prompt": "A", "principle": "B"}}\n{CHAT_ROW}\n')
    Path("empty.jsonl").write_text("")
    Path("other.jsonl").write_text("precious\n")
    Path("picky.jinja").write_text("{{ raise_exception('no ' + messages[0]['role']) }}")
    Path("broken.jinja").write_text("{% for %}")
    for name in ("empty_folder", "adapter", "damaged"):
        Path(name).mkdir()
    Path("damaged/config.json").write_text("{")
    return tmp_path


@pytest.fixture(scope="module")
def base_model(tmp_path_factory) -> str:
    """The folder of a model with no chat template."""
    path = str(tmp_path_factory.mktemp("base"))
    random_model("gpt2", positions=32).save_pretrained(path)
    byte_tokenizer(template=None).save_pretrained(path)
    return path


CASES: dict[str, tuple[tuple[str, ...], str]] = {
    # the command line itself
    "no command": ((), "COMMAND"),
    "misspelt command": (("generat", "Hi"), 'Did you mean "generate"?'),
    "misspelt option": (("generate", "Hi", "--metod", "plain"), 'Did you mean "--method"?'),
    "option of another command": (("methods", "--ratio", "2"), 'Unknown argument "--ratio"'),
    "no number": (("generate", "Hi", *LA, "--ratio", "two"), "invalid float value: 'two'"),
    "no value": (("generate", "Hi", "--method"), "expected one argument"),
    "no question": (("generate",), "Give a question, or `--input FILE`"),
    "two questions": (("generate", "Hi", "Ho"), 'Unknown argument "Ho"'),
    "empty question": (("generate", ""), "The question is empty"),
    "blank question": (("generate", " \n"), "The question is empty"),
    "half a character": (("generate", "\udcff"), "bytes that are no UTF-8"),
    "empty system": (("generate", "Hi", "--system", " "), "`--system` is only white space"),
    # methods
    "unknown method": (("generate", "Hi", "--method", "linear-aligment"), '"linear-alignment"?'),
    "option of another method": (
        ("generate", "Hi", *LA, "--principle", "X", "--alpha", "2"),
        'Method "linear-alignment" has no option `alpha`. It belongs to self-cd.',
    ),
    "missing principle": (("generate", "Hi", *LA), "needs `principle`"),
    "empty principle": (("generate", "Hi", "--principle", ""), "`principle` is empty"),
    "ratio nan": (("generate", "Hi", "--principle", "X", "--ratio", "nan"), "got nan"),
    "ratio inf": (("generate", "Hi", "--principle", "X", "--ratio", "inf"), "got inf"),
    "ratio and epsilon": (
        ("generate", "Hi", "--principle", "X", "--ratio", "1", "--epsilon", "1"),
        "not both",
    ),
    "principles with no weight": (
        ("generate", "Hi", "--method", "blend", "--principles", "Be brief."),
        "WEIGHT:TEXT",
    ),
    "compare plain": (("generate", "Hi", "--compare"), "nothing to compare"),
    "compare several": (
        ("generate", "Hi", "--principle", "X", "--compare", "--n", "2"),
        "Leave out `--n`",
    ),
    "base with no adapter": (
        ("generate", "Hi", "--method", "contrast", "--base"),
        'model "tiny" has no adapter',
    ),
    # sampling
    "top-p 1.5": (("generate", "Hi", "--top-p", "1.5"), "`top_p` must be"),
    "candidates 0": (
        ("generate", "Hi", "--principle", "X", "--candidates", "0"),
        "`candidates` must be",
    ),
    "temperature -1": (("generate", "Hi", "--temperature", "-1"), "`temperature` must be"),
    "no tokens": (("generate", "Hi", "--max-new-tokens", "0"), "`max_new_tokens` must be"),
    "empty stop": (("generate", "Hi", "--stop", ""), "`stop` must be"),
    "n 0": (("generate", "Hi", "--n", "0"), "`n` must be"),
    "huge seed": (("generate", "Hi", "--seed", str(2**63)), "`seed` must be"),
    # models
    "folder with no model": (("generate", "Hi", "--model", "./empty_folder"), "no config.json"),
    "damaged model": (("generate", "Hi", "--model", "./damaged"), 'Cannot load "./damaged"'),
    "no such folder": (
        ("generate", "Hi", "--model", "./nowhere"),
        'No model folder at "./nowhere"',
    ),
    "a file as the model": (("generate", "Hi", "--model", "in.jsonl"), "No model folder at"),
    "name not on the hub": (("generate", "Hi", "--model", "no/such-model"), "Cannot load"),
    "no chat template": (("generate", "Hi", "--model", "BASE"), "has no chat template"),
    "unknown dtype": (("generate", "Hi", "--dtype", "float31"), 'Did you mean "float32"?'),
    "unknown device": (("generate", "Hi", "--device", "gpu"), 'Unknown device "gpu"'),
    "device that is not there": (("generate", "Hi", "--device", "cuda:99"), 'Device "cuda:99"'),
    "device and map": (
        ("generate", "Hi", "--device", "cpu", "--device-map", "auto"),
        "not both",
    ),
    "quantize": (("generate", "Hi", "--quantize", "2bit"), "invalid choice: '2bit'"),
    "threads 0": (("generate", "Hi", "--threads", "0"), "`threads` must be"),
    "template missing": (
        ("generate", "Hi", "--chat-template", "x.jinja"),
        "Cannot read chat template",
    ),
    "template refuses": (("generate", "Hi", "--chat-template", "picky.jinja"), "refuses this chat"),
    "template broken": (("generate", "Hi", "--chat-template", "broken.jinja"), "chat template"),
    "adapter folder empty": (("generate", "Hi", "--adapter", "./adapter"), "holds no adapter"),
    "adapter missing": (("generate", "Hi", "--adapter", "./nowhere"), "adapter"),
    "prompt too long": (("generate", "a" * 33, "--model", "BASE", "--raw"), "33 tokens"),
    "prompt too long, the limit": (
        ("generate", "a" * 33, "--model", "BASE", "--raw"),
        "32 positions",
    ),
    # files
    "question and input": (("generate", "Hi", *RUN), "not both"),
    "input and compare": (("generate", *RUN, "--compare"), "`--compare` takes one question"),
    "output alone": (("generate", "Hi", "--output", "out.jsonl"), "goes with `--input FILE`"),
    "input alone": (("generate", "--input", "in.jsonl"), "needs `--output FILE`"),
    "missing file": (("generate", *RUN, "--input", "x.jsonl"), "x.jsonl: cannot be read: No such"),
    "input is a folder": (("generate", *RUN, "--input", "adapter"), "Is a directory"),
    "empty file": (("generate", *RUN, "--input", "empty.jsonl"), "empty.jsonl: the file is empty"),
    "broken JSON": (
        ("generate", *RUN, "--input", "broken.jsonl"),
        "broken.jsonl:2: broken JSON at column 16",
    ),
    "no prompt": (
        ("generate", *RUN, "--input", "no_prompt.jsonl"),
        'no_prompt.jsonl:1: missing field "prompt"',
    ),
    "not UTF-8": (("generate", *RUN, "--input", "latin.jsonl"), "latin.jsonl:1: not UTF-8"),
    "duplicate id": (("generate", *RUN, "--input", "twice.jsonl"), "twice.jsonl:2: duplicate id 1"),
    "row too long": (("generate", *RUN, "--input", "long.jsonl"), "long.jsonl:1: The prompt has "),
    "unknown role": (("generate", *RUN, "--input", "role.jsonl"), "role.jsonl:1: `role` must be"),
    "no user message": (
        ("generate", *RUN, "--input", "no_user.jsonl"),
        "no_user.jsonl:1: The prompt has no user message",
    ),
    "principle for a method with none": (
        ("generate", *RUN, "--input", "principle.jsonl", "--method", "self-cd"),
        'principle.jsonl:1: has a "principle", but method "self-cd" takes none',
    ),
    "principle in some rows only": (
        ("generate", *RUN, "--input", "mixed.jsonl"),
        'mixed.jsonl:2: missing field "principle"',
    ),
    "no good row": (
        ("generate", *RUN, "--input", "no_prompt.jsonl", "--skip-bad"),
        "no row can be used",
    ),
    "output of something else": (
        ("generate", *RUN, "--output", "other.jsonl"),
        'Output "other.jsonl" exists',
    ),
    "output is a folder": (("generate", *RUN, "--output", "adapter"), "is a folder"),
    "output in no folder": (("generate", *RUN, "--output", "no/out.jsonl"), "does not exist"),
    "output is the input": (("generate", *RUN, "--output", "in.jsonl"), "are the same file"),
    "batch of none": (("generate", *RUN, "--batch-size", "0"), "`batch_size` must be"),
    # chat
    "chat: samples": (("chat", "--n", "2"), "Leave out `--n`"),
    "chat: unknown method": (("chat", "--method", "magic"), 'Unknown method "magic"'),
    "chat: unknown model": (("chat", "--model", "./nowhere"), "No model folder at"),
}


@pytest.mark.parametrize(("argv", "fragment"), CASES.values(), ids=CASES)
def test_one_line_and_exit_code_2(folder, base_model, monkeypatch, capfd, argv, fragment):
    before = sorted(p.name for p in folder.iterdir())
    start = time.perf_counter()
    assert main([base_model if word == "BASE" else word for word in argv]) == 2
    assert time.perf_counter() - start < 10
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert fragment in err
    assert "Traceback" not in err
    left = {p.name for p in folder.iterdir()} - {"out.jsonl.bad.jsonl"}
    assert sorted(left) == before


def test_a_file_that_holds_work_is_not_touched(folder):
    assert main(["generate", *RUN, "--output", "other.jsonl"]) == 2
    assert Path("other.jsonl").read_text() == "precious\n"


def test_an_output_of_other_settings(folder, capsys):
    assert main(["generate", *RUN]) == 0
    written = Path("out.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["generate", *RUN, "--seed", "1"]) == 2
    assert "belongs to another run: seed was 0, now 1." in capsys.readouterr().err
    Path("in.jsonl").write_text('{"prompt": "Ho"}\n')
    assert main(["generate", *RUN]) == 2
    assert "another run: input.sha256 was " in capsys.readouterr().err
    assert Path("out.jsonl").read_bytes() == written
    assert main(["generate", *RUN, "--overwrite"]) == 0
    assert json.loads(Path("out.jsonl").read_text())["prompt"] == "Ho"


@pytest.mark.parametrize("given", [b"", b" \n", b"caf\xe9"], ids=["nothing", "blank", "not UTF-8"])
def test_a_bad_question_on_stdin(given, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
    assert main(["generate", "-"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: The question")
    assert err.count("\n") == 1


HELP = """
import sys, time
start = time.process_time()  # of this process: other work on the machine does not count
from trueline.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0
heavy = {"torch", "transformers", "numpy", "matplotlib", "peft"} & set(sys.modules)
print("HEAVY", sorted(heavy), time.process_time() - start)
"""


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_loads_nothing_heavy_and_answers_at_once(command):
    argv = [command, "--help"] if command else ["--help"]
    done = subprocess.run(
        [sys.executable, "-c", HELP, *argv], capture_output=True, text=True, check=True
    )
    assert "usage: trueline" in done.stdout
    heavy, seconds = done.stdout.splitlines()[-1].removeprefix("HEAVY ").rsplit(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < 0.5


def in_a_new_process(*argv: str, **environment: str) -> str:
    """Run a command that must fail, and return all that it says on stderr."""
    code = "import sys; from trueline.cli import main; sys.exit(main(sys.argv[1:]))"
    environment |= {"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))}
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=40)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_a_hub_that_cannot_be_reached_is_not_asked_again_and_again(tmp_path):
    """With the hub's own offline switch off: its client would retry for most of a minute."""
    hub = {"HOME": str(tmp_path), "HF_ENDPOINT": "https://hub.invalid"}
    error = in_a_new_process("generate", "Hi", "--model", "no/such-model", **hub)
    assert error.startswith('error: Cannot load "no/such-model": ')


def test_libraries_add_nothing_to_the_one_line():
    """Their loggers write to the stderr of when they were loaded: only a new process shows it."""
    error = in_a_new_process("generate", "a " * 3000)
    assert 'model "tiny" has 1024 positions' in error
