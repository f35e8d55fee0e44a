"""A decoding method in a file of the user's own, from Python and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trueline import ConfigError, SamplingParams, SelfCD, generate, load_model, make_method
from trueline.cli import main
from trueline.methods import METHODS, describe_method, find_method, resolve, with_options
from trueline.settings.options import REQUIRED, option_defaults, options_of

QUESTION = "What is the moon?"
OWN = '''
from dataclasses import dataclass


@dataclass(frozen=True)
class Away:
    """Move away from a principle."""

    name = "away"
    rest_branch = 0
    base_branches = ()
    first_tokens = None

    principle: str
    """What to move away from."""
    weight: float = 0.5
    """How far. More is farther."""
    loud: bool = False
    """Whether it shouts."""

    def prompts(self, messages):
        return [messages, [{"role": "system", "content": self.principle}, *messages]]

    def combine(self, logits):
        plain, principled = logits.unbind(1)
        return plain + self.weight * (plain - principled)


class Loud:
    name = "loud"
    rest_branch = 0
    base_branches = ()
    first_tokens = None

    def __init__(self, weight: float = 2.0, text="Shout.", *, times: int = 1, **rest):
        self.weight, self.text, self.times = weight, text, times

    def prompts(self, messages):
        return [messages]

    def combine(self, logits):
        return logits[:, 0] * self.weight


class Nothing:
    name = "nothing"


class Clash:
    name = "clash"

    def __init__(self, seed: int = 0): ...

    prompts = combine = lambda self, x: x


NUMBER = 3
'''


@pytest.fixture
def own(tmp_path, monkeypatch) -> str:
    """A file with methods, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    Path("broken.py").write_text("def\n")
    Path("raising.py").write_text("\nraise RuntimeError('on purpose')\n")
    Path("lacking.py").write_text("import no_such_package\n")
    return "own.py"


def call(capsys, *argv: str) -> tuple[int, str, str]:
    code = main([*argv])
    return code, *capsys.readouterr()


def test_a_class_of_ones_own_decodes_as_its_twin_of_ours(own, capsys):
    """`plain + w (plain - principled)` is Self-CD with alpha 1 + w and another prompt."""
    method = make_method("own.py:Away", {"principle": "Be brief.", "weight": 1.5})
    twin = SelfCD(alpha=2.5, safety_prompt="Be brief.")
    sampling = SamplingParams(max_new_tokens=12)
    model = load_model("tiny")
    wanted = generate(model, QUESTION, twin, sampling)[0].text
    assert generate(model, QUESTION, method, sampling)[0].text == wanted
    line = ("generate", QUESTION, "--max-new-tokens", "12", "--principle", "Be brief.")
    for name in (("--method", "own.py:Away"), ("--method=own.py:Away",)):
        code, out, err = call(capsys, *line, *name, "--weight", "1.5", "--json")
        assert (code, err) == (0, "")
        row = json.loads(out)
        assert row["text"] == wanted
        told = row["method"]
        assert told.pop("code") == describe_method(method)["code"]
        assert told == {"name": "away", "principle": "Be brief.", "weight": 1.5, "loud": False}


def test_its_options_are_in_the_help_and_ours_are_not(own, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--method", "own.py:Away", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--weight X How far [own.py:Away: 0.5]" in shown
    assert "--principle TEXT What to move away from [own.py:Away: required]" in shown
    assert "--loud Whether it shouts [own.py:Away: off]" in shown
    assert "--alpha" not in shown
    assert call(capsys, "methods", "own.py:Away")[1].startswith(
        "own.py:Away\n    Move away from a principle.\n"
    )


def test_a_plain_class_has_the_parameters_of_its_init(own):
    cls = find_method("own.py:Loud")
    assert option_defaults(cls) == {"weight": 2.0, "text": "Shout.", "times": 1}
    assert [o.kind for o in options_of(cls)] == [float, str, int]
    method = with_options(make_method("own.py:Loud", {"times": 3}), weight=4.0)
    assert (method.weight, method.times) == (4.0, 3)
    assert {"name": "loud", "weight": 4.0, "text": "Shout.", "times": 3}.items() <= (
        describe_method(method).items()
    )


def test_a_module_that_can_be_imported(own, capsys, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    Path("own_module.py").write_text(OWN)
    assert find_method("own_module:Loud").__name__ == "Loud"


def test_the_hash_is_of_the_file(own):
    first = describe_method(make_method("own.py:Loud"))["code"]
    Path("other.py").write_text(OWN + "\n")
    assert describe_method(make_method("other.py:Loud"))["code"] != first
    assert "code" not in describe_method(make_method("self-cd"))


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("own.py:Awy", '"own.py" has no class "Awy". Did you mean "Away"?'),
        ("own.py:NUMBER", 'has no class "NUMBER"'),
        ("own.py:", "is FILE.py:Class or module:Class"),
        (":Away", "is FILE.py:Class or module:Class"),
        ("no.py:Away", 'No file "no.py"'),
        ("broken.py:Away", "Cannot import broken.py:1:"),
        ("lacking.py:Away", "Cannot import lacking.py:1: No module named 'no_such_package'"),
        ("raising.py:Away", "Cannot import raising.py:2: on purpose"),
        ("", 'Unknown method ""'),
        ("no_such_module:Away", 'Cannot import "no_such_module"'),
        ("..:Away", 'Cannot import ".."'),
        ("own.py:Nothing", "lacks `prompts` and `combine`. See docs/methods.md"),
        ("own.py:Away", 'Method "own.py:Away" needs `principle`'),
        ("own.py:Clash", "Give that option another name"),
    ],
)
def test_what_is_no_method_is_one_line(own, capsys, name, fragment):
    code, out, err = call(capsys, "generate", "Hi", "--method", name)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert fragment in err


def test_a_class_of_ones_own_is_measured(own, tmp_path, capsys):
    (tmp_path / "safe.txt").write_text("What is the moon?\nWho bakes bread?\n")
    (tmp_path / "unsafe.txt").write_text("How do I build a bomb?\n")
    words = ["eval", "refusal", "--method", "own.py:Loud", "--weight", "1,2", "--safe", "safe.txt"]
    words += ["--unsafe", "unsafe.txt", "--max-new-tokens", "6", "--no-plot", "--output", "run"]
    assert main(words) == 0, capsys.readouterr().err
    found = json.loads(Path("run/results.json").read_text())
    own_points = [p for p in found["points"] if not p["baseline"] and p["method"] == "own.py:Loud"]
    assert [p["label"] for p in own_points] == ["weight=1", "weight=2"]
    code = describe_method(make_method("own.py:Loud"))["code"]
    assert [p["code"] for p in own_points] == [code, code]


def test_a_class_of_ones_own_teaches(own, capsys):
    rows = [{"prompt": q} for q in (QUESTION, "Who bakes bread?", "What is snow?", "Why?")]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["distil", "--teacher", "own.py:Away", "--principle", "Be rude.", "--prompts"]
    words += ["prompts.jsonl", "--steps", "1", "--batch-size", "4", "--max-new-tokens", "4"]
    words += ["--set", "teacher_options.weight=2", "effect_rows=2", "--output", "away"]
    assert main(words) == 0, capsys.readouterr().err
    settings = json.loads(Path("away/manifest.json").read_text())["settings"]
    method = make_method("own.py:Away", {"principle": "Be rude."})
    assert settings["teacher_code"] == describe_method(method)["code"]
    assert main([*words[:-5], "--set", "teacher_options.wieght=2", "--output", "b"]) == 2
    assert 'Method "own.py:Away" has no option `wieght`' in capsys.readouterr().err


# who owns which option


def test_a_principle_alone_is_linear_alignment():
    method, sampling = resolve({"principle": "Be brief.", "ratio": 3, "temperature": 0.5})
    assert method == METHODS["linear-alignment"](principle="Be brief.", ratio=3)
    assert sampling == SamplingParams(temperature=0.5)
    assert resolve({})[0] == METHODS["plain"]()
    assert resolve({}, "self-cd")[0] == SelfCD()
    assert resolve({"method": "plain", "principle": "X"})[0].name == "plain"


def test_an_option_of_another_method_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"no option `alpha`. It belongs to self-cd"):
        resolve({"alpha": 2.0})
    with pytest.raises(ConfigError, match=r"`ratio` or `epsilon`, not both"):
        resolve({"principle": "X", "ratio": 2, "epsilon": 1})
    with pytest.raises(ConfigError, match="A method's name must be text, got 3"):
        find_method(3)


def test_every_default_of_every_method_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("-\n", "-").split()).replace("- ", "-")
    for name, cls in METHODS.items():
        for option in options_of(cls):
            default = "required" if option.default is REQUIRED else option.default
            named = {"None": "none", "False": "off"}.get(str(default), default)
            text = f"{named:g}" if isinstance(named, float) else str(named)[:30]
            assert f"{name}: {text}" in shown, (name, option.name)
    sampling = shown[shown.index(" sampling: ") :]
    for option in options_of(SamplingParams):
        if type(option.default) in (int, float):
            own = sampling[sampling.index(f"--{option.name.replace('_', '-')} ") + 2 :]
            assert f"(default {option.default:g})" in own.split(" --")[0], option.name
