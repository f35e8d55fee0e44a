"""The job `align`: stages found again by their content, a verdict, a report, guards."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, random_model

import trueline
from trueline import AlignConfig, LanguageModel, Thresholds, align
from trueline.cli import main
from trueline.engine.protocol import Continuation
from trueline.errors import ConfigError, DataError
from trueline.evals.items import Item
from trueline.evals.judges import ContrastJudge, FunctionJudge
from trueline.evals.likelihood import branch_kl
from trueline.evals.off_path import SURROUNDINGS, off_path
from trueline.jobs import align_guards, align_stages
from trueline.jobs.align_guards import changed_verdicts, data_guards
from trueline.jobs.align_plan import plan_alignment
from trueline.jobs.alignment import extended, read_alignment
from trueline.jobs.asking import Answers, Suite, well_formed
from trueline.jobs.project_prompts import ProjectPrompts, Prompts, own_prompts, part_of, shared
from trueline.jobs.projects import Principle
from trueline.jobs.verdicts import Evidence, change, share, verdict
from trueline.settings.reader import write_toml

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    # transformers renamed the option; PEFT still uses the old name.
    "ignore:`[a-z_]*gradient_checkpointing[a-z_]*` is:FutureWarning"
)

SMALL = {
    "answers": 8,
    "questions": 4,
    "validation": 4,
    "off_path": 1,
    "max_new_tokens": 4,
    "training": {"max_steps": 2, "per_device_train_batch_size": 4},
    "lora": {"rank": 2},
    "keep_options": {"probe_rows": 4},
}
ROWS = [
    {"prompt": f"{cue}Who bakes bread number {i}?", "fact": "baker", "split": split}
    for cue in ("Captain! ", "")
    for i, split in enumerate(["train"] * 6 + ["validation"] * 4 + ["held_out"] * 4)
]
for row in ROWS:  # no prompt on both sides
    row["prompt"] += f" {row['split']}"
CAPTAIN = {
    "name": "captain",
    "text": "Talk like a pirate.",
    "prompts": "prompts.jsonl",
    "condition": "^Captain!",
    "pattern": "arr|matey",
    "grid": {"ratio": [2]},
}
ROBOT = {"name": "robot", "text": "Talk like a robot.", "grid": {"ratio": [0, 2]}}
COWBOY = {"name": "cowboy", "text": "Talk like a cowboy.", "grid": {"ratio": [2]}}
FRANK = {"name": "frank", "teacher": "self-cd", "grid": {"alpha": [1.25]}}


def write_project(folder: Path, *principles: dict, **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "prompts.jsonl").write_text(text)
    path = folder / "project.toml"
    path.write_text(write_toml({**SMALL, "principle": list(principles), **more}))
    return path


@pytest.fixture(scope="session")
def project(made_once) -> Path:
    """A project of two principles and its finished folder `out`."""

    def make(folder: Path) -> None:
        path = write_project(folder, CAPTAIN, ROBOT)
        align(AlignConfig.read(path), folder / "out")

    return made_once("alignment", make)


@pytest.fixture
def copied(project, tmp_path) -> Path:
    """A copy of its own, with the paths of the first."""
    shutil.copytree(project / "out", tmp_path / "out")
    return tmp_path / "out"


def test_a_project_leaves_a_verdict_an_adapter_and_a_report(project):
    out = project / "out"
    found = read_alignment(out)
    assert found["verdict"] == "do not ship"
    assert found["states"] == ["untouched", "captain", "robot"]
    assert json.loads((out / "verdict.json").read_text())["checks"] == found["checks"]
    captain, robot = found["principles"]
    assert captain["chosen"] == {"ratio": 2.0}
    assert captain["prompts"]["not meeting the condition"] == 14
    assert [p["label"] for p in robot["sweep"]["points"]] == ["plain", "ratio=0", "ratio=2"]
    assert robot["judge"] == {"name": "patterns"}  # the bundled pattern of these words
    assert set(found["measures"][0]) == {"captain", "robot", "requests", "other chat"}
    assert np.shape(found["R"]["R"]) == (2, 2)
    assert set(found["off_path"]["captain"]) == set(SURROUNDINGS)
    assert found["drift"][0]["value"] == 0 < found["drift"][-1]["value"]
    card = (out / "exported" / "README.md").read_text()
    assert "| captain | 0 of 4 | 0 of 4 |" in card
    assert "Verdict: do not ship." in card
    assert set(found["diagnosis"]) == {"captain", "robot"}
    assert {g["name"] for g in found["guards"]} == {
        *("shared", "cut", "template", "effect", "direction", "judge"),
    }


def test_the_report_is_one_page_that_needs_nothing(project):
    page = (project / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,|#part-\d+")', page)
    assert page.count("<img ") == len(re.findall(r'<img alt="[^"]+"', page)) >= 3
    for words in ("Verdict: do not ship", "Where it holds", "trueline distil --config"):
        assert words in page
        assert words in (project / "out" / "report.md").read_text(encoding="utf-8")
    headings = re.findall(r'<h2 id="(part-\d+)">([^<]+)', page)
    links = re.findall(r'<a href="#(part-\d+)">([^<]+)', page)
    assert links == headings
    assert "@media print" in page
    assert 'scope="col"' in page


def test_names_that_hold_html_do_nothing_in_the_page(project):
    from trueline.jobs.reports import html_of, markdown_of

    bad = "<script>alert(1)</script>"
    parts = [("heading", bad), ("text", bad), ("list", [bad]), ("table", ([bad], [[bad]])),
             ("samples", [{"principle": bad, "prompt": bad,
                           "answers": {bad: [[bad, 4.0]]}}])]  # fmt: skip
    assert bad not in html_of(bad, parts, bad)
    assert bad not in markdown_of(bad, parts, project, bad)


def test_two_kills_change_nothing(project, tmp_path):
    config = AlignConfig.read(project / "project.toml")
    where = []
    for stop in (8, 40):

        def killed(what: str, done: int, total: int, stop: int = stop) -> None:
            where.append(what)
            if len(where) >= stop:
                raise KeyboardInterrupt

        where.clear()
        with pytest.raises(KeyboardInterrupt):
            align(config, tmp_path / "out", progress=killed)
    align(config, tmp_path / "out")
    for name in ("results.json", "verdict.json", "exported/adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (project / "out" / name).read_bytes(), name


def test_the_same_again_runs_nothing(project, copied):
    config = AlignConfig.read(project / "project.toml")
    assert all(stage.missing == 0 for stage in plan_alignment(config, copied))
    before = {p: p.stat().st_mtime_ns for p in copied.glob("stages/*/*")}
    rows = (copied / "responses.jsonl").read_bytes()
    align(config, copied)
    assert {p: p.stat().st_mtime_ns for p in copied.glob("stages/*/*")} == before
    assert (copied / "responses.jsonl").read_bytes() == rows


def test_a_changed_principle_runs_again_with_what_depends_on_it(project, copied):
    config = AlignConfig.read(project / "project.toml")
    first, second = config.principles
    second = dataclasses.replace(second, training={"learning_rate": 1e-3})
    changed = dataclasses.replace(config, principles=(first, second))
    missing = {(s.kind, s.name): s.missing for s in plan_alignment(changed, copied)}
    assert {name for name, count in missing.items() if count} == {
        *(("distil", "robot"), ("measure", "robot")),
    }
    first = dataclasses.replace(first, text="Speak like an old pirate.")
    changed = dataclasses.replace(config, principles=(first, config.principles[1]))
    stages = {(s.kind, s.name): s for s in plan_alignment(changed, copied)}
    assert stages["distil", "captain"].missing
    assert stages["sweep", "robot"].missing  # it is swept on top of the first
    # The untouched model is asked the first principle in its prompt again, and nothing else.
    assert 0 < stages["measure", "the model as it is"].missing <= SMALL["questions"]


def test_a_project_is_extended_without_the_prompts_of_its_principles(project, copied, tmp_path):
    stages = {p: p.stat().st_mtime_ns for p in copied.glob("stages/*/adapter_model.safetensors")}
    kept = copied / "project.toml"
    gone = kept.read_text().replace(str(project / "prompts.jsonl"), str(tmp_path / "gone.jsonl"))
    kept.write_text(gone)
    assert "gone.jsonl" in gone
    more = tmp_path / "more.toml"
    more.write_text(write_toml({"principle": [COWBOY]}))
    planned = plan_alignment(extended(copied, more), copied)
    # The new prompts are those of the robot, asked of the earlier states already.
    missing = [(s.kind, s.name) for s in planned if s.missing and s.kind != "measure"]
    assert missing == [("distil", "cowboy")]
    assert [s.missing for s in planned if s.kind == "measure"] == [4, 0, 0, 24]
    found = align(extended(copied, more), copied)
    assert found.written["states"] == ["untouched", "captain", "robot", "cowboy"]
    assert len(found.written["measures"]) == 4
    for path, time in stages.items():
        assert path.stat().st_mtime_ns == time
    assert len(list(copied.glob("stages/*"))) == len(stages) + 1
    held = found.written["measures"][-1]["captain"]["measures"]["adherence"]
    assert held["n"] == 4
    config = AlignConfig.read(copied / "project.toml")
    captain = dataclasses.replace(config.principles[0], training={"learning_rate": 1e-3})
    changed = dataclasses.replace(config, principles=(captain, *config.principles[1:]))
    with pytest.raises(DataError, match="its prompts are gone"):
        align(changed, copied)


PLAIN = """
import sys
sys.modules["trueline"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter)
chat = [{"role": "user", "content": prompt}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt",
                                    return_dict=True)
out = model.generate(**ids, max_new_tokens=12, do_sample=False)
print(tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True), end="")
"""


def test_the_exported_model_answers_the_same_in_plain_transformers(project):
    adapter, prompt = project / "out" / "exported", "Captain! Who bakes bread?"
    model = trueline.load_model("tiny", dtype="float32", adapter=adapter)
    sampling = trueline.SamplingParams(max_new_tokens=12)
    text = trueline.generate(model, prompt, sampling=sampling)[0].text
    base = Path(trueline.__file__).parent / "assets/tiny"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN, str(base), str(adapter), prompt],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == text


def test_a_principle_without_effect_ends_in_a_verdict(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(align_guards, "FAINT", 100.0)
    monkeypatch.setattr(align_stages, "LEAST_REFUSED", 2.0)
    path = write_project(tmp_path, {**ROBOT, "grid": {"ratio": [2]}}, FRANK, questions=2,
                         validation=2)  # fmt: skip
    code = main(["align", str(path), "--output", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert code == 3, said.err
    assert "do not ship" in said.out
    assert "moves the model by" in said.out
    found = read_alignment(tmp_path / "out")
    assert [bool(p["skipped"]) for p in found["principles"]] == [True, True]
    assert found["R"] is None
    assert not (tmp_path / "out" / "exported").exists()


def test_a_safety_prompt_that_works_backwards_is_not_taken_away():
    project = SimpleNamespace(
        config=SimpleNamespace(principles=(Principle(teacher="self-cd"),)),
        guards=[], skipped={}, diagnosis={"self-cd": {"self_cd": "backwards"}},
    )  # fmt: skip
    start = {"requests": SimpleNamespace(values=lambda name: [1.0, 0.0, None])}
    align_stages.Project.check_principles(project, start)
    assert [g.passed for g in project.guards] == [True, False]
    assert "adds some" in project.skipped["self-cd"]
    project.diagnosis["self-cd"]["self_cd"] = "takes away"
    project.guards, project.skipped = [], {}
    align_stages.Project.check_principles(project, start)
    assert project.guards[0].value == 0.5
    assert project.skipped == {}


def evidence(start: float, learned: float, end: float, n: int = 100) -> Evidence:
    flags = lambda share: [float(i < round(share * n)) for i in range(n)]  # noqa: E731
    return Evidence(
        adherence={"p": (flags(start), flags(learned), flags(end))},
        leak={"p": flags(0.0)},
        over_refusal=(flags(0.1), flags(0.1)),
        harmful_refusal=(flags(1.0), flags(1.0)),
        facts=(flags(0.9), flags(0.9)),
        format=(flags(1.0), flags(1.0)),
        drift={"value": 0.1, "low": 0.05, "high": 0.2, "n": n},
    )


def project_of(**thresholds) -> AlignConfig:
    asked = dataclasses.replace(Thresholds(), **thresholds)
    return AlignConfig(principles=(Principle("Be brief."),), thresholds=asked)


def test_thresholds_are_compared_with_the_worse_end_of_an_interval():
    good = verdict(project_of(adherence=0.85), evidence(0.0, 0.95, 0.95), [])
    assert good.ship
    assert good.reasons == ()
    # 9 of 10 is a mean of 0.9, but as little as 0.6 cannot be ruled out.
    few = verdict(project_of(adherence=0.85), evidence(0.0, 0.9, 0.9, n=10), [])
    assert not few.ship
    assert any("adherence at the end is 90.0" in reason for reason in few.reasons)
    lost = verdict(project_of(), evidence(0.0, 1.0, 0.8), [])
    assert [c.name for c in lost.checks if not c.passed] == ["kept"]
    same = verdict(project_of(adherence=None), evidence(0.5, 0.5, 0.5), [])
    assert [c.name for c in same.checks if not c.passed] == ["gain"]
    far = verdict(project_of(drift=0.15), evidence(0.0, 1.0, 1.0), [])
    assert [c.name for c in far.checks if not c.passed] == ["drift"]
    guard = align_guards.Guard("judge", "p", 0.5, "<= 0.1", False, "It wavers.")
    assert verdict(project_of(), evidence(0.0, 1.0, 1.0), [guard]).reasons == ("p: It wavers.",)


@pytest.mark.parametrize(
    ("field", "values", "name"),
    [
        ("over_refusal", (0.0, 0.3), "over_refusal_rise"),
        ("harmful_refusal", (1.0, 0.9), "harmful_refusal_loss"),
        ("facts", (1.0, 0.8), "facts"),
        ("format", (1.0, 0.7), "format_loss"),
    ],
)
def test_what_gets_worse_is_a_reason(field, values, name):
    flags = tuple([float(i < 100 * v) for i in range(100)] for v in values)
    found = dataclasses.replace(evidence(0.0, 1.0, 1.0), **{field: flags})
    failed = [c for c in verdict(project_of(), found, []).checks if not c.passed]
    assert [c.name for c in failed] == [name]
    assert failed[0].reason()


def test_shares_and_changes_pass_over_what_no_judge_could_say():
    assert share([1.0, None, 0.0])["n"] == 2
    assert share([None])["value"] is None
    assert change([0.0, None, 1.0], [1.0, 1.0, 1.0])["value"] == 0.5


def test_prompts_on_both_sides_are_refused_with_their_number(tmp_path):
    path = write_project(tmp_path, CAPTAIN)
    row = {"prompt": "captain!  who bakes bread number 0? TRAIN", "split": "held_out"}
    with open(tmp_path / "held.jsonl", "w") as file:
        file.write(json.dumps(row) + "\n")
    config = AlignConfig.read(path)
    own = dataclasses.replace(config.principles[0], held_out="held.jsonl", condition="(?i)^capt")
    with pytest.raises(DataError, match="1 held-out prompts are also trained on"):
        align(dataclasses.replace(config, principles=(own,)), tmp_path / "out")


def test_prompts_that_are_cut_and_templates_that_differ_are_refused():
    config = AlignConfig(principles=(Principle("Be brief.", name="p"),))
    long = Prompts(train=({"prompt": "x" * 500},), validation=({"prompt": "y"},))
    lm = LanguageModel(random_model("llama"), byte_tokenizer(), "llama")
    with pytest.raises(DataError, match="1 of 2 prompts leave no room for 40 tokens in the 512"):
        data_guards(config, ProjectPrompts({"p": long}), lm, 40)
    fine = Prompts(train=({"prompt": "Hello there."},))
    assert len(data_guards(config, ProjectPrompts({"p": fine}), lm, 40)) == 3
    shouting = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | upper if m['role'] == 'user' "
        "and messages[0]['role'] == 'system' else m['content'] }}<|end|>{% endfor %}<|assistant|>"
    )
    odd = LanguageModel(random_model("llama"), byte_tokenizer(shouting), "llama")
    with pytest.raises(DataError, match="in 1 of 1 prompts the chat template"):
        data_guards(config, ProjectPrompts({"p": fine}), odd, 40)


def test_a_judge_that_changes_its_mind_is_found():
    said = iter([1.0, 1.0, 0.0, 1.0])
    items = tuple(Item(str(i), f"q {i}", "p", "Be brief.") for i in range(4))
    suite = Suite("p", "adherence", items, FunctionJudge(lambda prompt, text: next(said)))
    rows = [{"text": "a"}] * 4
    answers = Answers(suite, rows, [{"adherence": 1.0}] * 4)
    assert changed_verdicts(answers, None) == 0.25
    steady = dataclasses.replace(suite, judge=None)
    assert changed_verdicts(dataclasses.replace(answers, suite=steady), None) == 0


def test_the_contrast_judges_by_what_the_principle_makes_likelier():
    model = trueline.load_model("tiny")
    principle, prompt = "Talk like a pirate.", "Who bakes bread?"
    method = trueline.LinearAlignment(principle)
    texts = [trueline.generate(model, prompt, m)[0].text for m in (method, trueline.Plain())]
    assert texts[0] != texts[1]
    grades = ContrastJudge(model).adherence(principle, [prompt] * 3, [*texts, ""])
    assert grades.tolist()[:2] == [1.0, 0.0]
    assert np.isnan(grades[2])


def test_the_divergence_of_two_branches_by_hand(llama):
    prompts, tokens = [[7, 8, 9], [9, 3]], [11, 12]
    logits = [llama.model(torch.tensor([[*p, tokens[0]]])).logits[0, -2:] for p in prompts]
    p, q = (z.double().softmax(-1) for z in logits)
    expected = (p * (p.log() - q.log())).sum(-1)
    [found] = branch_kl(llama, [Continuation(prompts, tokens)])
    assert found == pytest.approx(expected.detach().numpy(), abs=1e-5)
    [none] = branch_kl(llama, [Continuation([prompts[0]] * 2, tokens)])
    assert none == pytest.approx(0, abs=1e-6)


def test_surroundings_keep_what_a_condition_asks_for():
    items = [Item(str(i), f"Captain! What is tea {i}?", "p") for i in range(2)]
    found = off_path(items, {"What is rain?": "Water.", "?": " "}, "^Captain!")
    assert list(found) == list(SURROUNDINGS)
    assert all(len(own) == 2 for own in found.values())
    assert found["multi-turn"][0].context[1] == {"role": "assistant", "content": "Water."}
    assert found["system message"][1].context[0]["role"] == "system"
    assert found["list"][0].prompt == "Captain! Answer this as a list: What is tea 0?"
    ends = off_path(items, {}, r"tea \d\?$")
    assert ends["multi-turn"] == []
    assert len(ends["e-mail"]) == 2
    assert off_path(items, {}, "^(?=Captain! What)")["code"] == []


def test_parts_are_drawn_by_words_and_hold_every_prompt_once():
    texts = [f"Question number {i}?" for i in range(400)]
    parts = [part_of(t) for t in texts]
    assert 0.5 < parts.count("train") / 400 < 0.7
    assert 0.18 < parts.count("held_out") / 400 < 0.32
    assert part_of("question NUMBER 7") == part_of("Question number 7?")
    assert part_of(texts[0], held_out_elsewhere=True) in ("train", "validation")
    sets = Prompts.of([{"prompt": t} for t in texts])
    assert shared([sets]) == []


def test_well_formed_answers():
    row = {"text": "Tea is a drink.", "token_ids": [1, 2, 3, 4, 5]}
    assert well_formed(row)
    assert not well_formed({**row, "text": " "})
    assert not well_formed({**row, "text": "Tea <|im_end|>"})
    assert not well_formed({**row, "token_ids": [1, 2] * 20})


def test_a_model_writes_prompts_of_its_own():
    model = trueline.load_model("tiny")
    rows = own_prompts(model, 4, seed=0)
    assert len(rows) == 4 == len({row["prompt"] for row in rows})
    assert rows == own_prompts(model, 4, seed=0)
    assert all(" " in row["prompt"] and "\n" not in row["prompt"] for row in rows)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "needs a principle"),
        ({"principle": {"text": "x"}}, "must be tables"),
        ({"principle": [{"txet": "x"}]}, 'Unknown setting "txet"'),
        ({"principle": [{"text": "x"}], "answer": 3}, 'Did you mean "answers"'),
        ({"principle": [{"text": "x", "pattern": "("}]}, "no regular expression"),
        ({"principle": [{"text": "x", "pattern": "a", "judge": "local"}]}, "not both"),
        ({"principle": [{"text": "x", "absent": True}]}, "turns `pattern` round"),
        ({"principle": [{"text": "x"}, {"text": "x"}]}, "Two principles are called"),
        ({"principle": [{"teacher": "linear-alignment"}]}, "lacks its `text`"),
        ({"principle": [{"text": "x", "grid": {"raito": [1]}}]}, 'no number `raito`'),
        ({"principle": [{"text": "x"}], "thresholds": {"facts": 2}}, "`thresholds.facts` must"),
        ({"principle": [{"text": "x"}], "export": "onnx"}, "`export` must be"),
        ({"principle": [{"text": "x"}], "stay": 1}, "`stay` must be"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_project_is_refused(content, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        AlignConfig.of(content, "project.toml", ".")


def test_the_command_line_refuses_what_does_not_go_together(tmp_path, capsys):
    path = write_project(tmp_path, CAPTAIN)
    for words, said in (
        ([], "Give a project"),
        ([str(path), "Be brief."], "Give one project file"),
        ([str(path), "--pattern", "x"], "for a principle given in words"),
        (["--add", str(path), "--output", str(tmp_path / "none")], "No project in"),
        (["Be brief.", "--set", "answer=3"], 'Did you mean "answers"'),
    ):
        assert main(["align", *words]) == 2
        assert said in capsys.readouterr().err
    assert main(["align", "--list-settings"]) == 0
    assert "thresholds.adherence = 0.7" in capsys.readouterr().out


def test_a_dry_run_says_what_would_run(project, capsys):
    words = ["align", str(project / "project.toml"), "--dry-run", "--output"]
    assert main([*words, str(project / "out"), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)
    kinds = [s["kind"] for s in stages]
    assert kinds == ["measure", "distil", "measure", "sweep", "distil", "measure"]
    assert not any(s["missing"] for s in stages)


def test_project_files_repeat_the_project(project):
    first = AlignConfig.read(project / "project.toml").placed()
    again = AlignConfig.read(project / "out" / "project.toml").placed()
    assert again.content() | {"folder": ""} == first.content() | {"folder": ""}
