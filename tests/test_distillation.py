"""The job `distil`: from a sentence to an adapter, and one more on top of it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trueline
from trueline.errors import ConfigError, DataError
from trueline.train.distil.stacked import earlier_adapters, stage_name

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    # transformers renamed the option; PEFT still uses the old name.
    "ignore:`[a-z_]*gradient_checkpointing[a-z_]*` is:FutureWarning"
)

QUESTIONS = ["What is the moon?", "Who bakes bread?", "What is snow?", "Where do fish live?"]
FEW = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "max_completion_length": 6,
    "effect_rows": 2,
    "warmup_steps": 0,
    "lora": {"rank": 4},
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": q}) + "\n" for q in QUESTIONS))
    return path


def config(prompts: Path, principle: str = "Talk like a pirate.", **more) -> trueline.DistilConfig:
    return trueline.DistilConfig.of(prompts=str(prompts), principle=principle, **FEW | more)


@pytest.fixture(scope="module")
def first(prompts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "pirate"
    trueline.distil(config(prompts, keep="drift"), folder)
    return folder


@pytest.fixture(scope="module")
def second(prompts, first, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("second") / "both"
    more = {"after": str(first), "keep": "drift", "learning_rate": 1e-2}
    trueline.distil(config(prompts, "Answer in French.", **more), folder)
    return folder


def logits(adapters: list[Path]) -> torch.Tensor:
    """Of the bundled model with adapters merged into it one after the other, by PEFT alone."""
    model = trueline.load_model("tiny", dtype="float32", packed_weights=False)
    net = model.model
    for folder in adapters:
        net = peft.PeftModel.from_pretrained(net, folder).merge_and_unload()
    ids = torch.tensor([model.tokenizer("What is the moon?")["input_ids"]])
    with torch.no_grad():
        return net(ids).logits


def test_it_tells_how_far_it_is_and_returns_what_it_found(prompts, tmp_path):
    told = []
    found = trueline.distil(
        config(prompts), tmp_path / "o", progress=lambda *said: told.append(said)
    )
    assert [(done, total) for _, done, total in told][-1] == (2, 2)
    assert told[0] == ("", 0, 2)
    assert any("loss " in what and "kl_start " in what for what, *_ in told)
    assert found.folder == tmp_path / "o"
    assert found.as_dict()["steps"] == 2
    assert json.loads(json.dumps(found.as_dict()))["folder"] == str(tmp_path / "o")
    assert "--max-lora-rank 8 " in found.note
    written = {p: p.stat().st_mtime_ns for p in found.folder.iterdir() if p.is_file()}
    again = trueline.distil(config(prompts), tmp_path / "o")
    assert again.numbers == found.numbers
    del written[found.folder / "manifest.json"]
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


def test_a_model_in_memory_is_trained(prompts, tmp_path):
    model = trueline.load_model("tiny", dtype="float32", packed_weights=False)
    trueline.distil(config(prompts), tmp_path / "o", model=model)
    found = load_file(tmp_path / "o" / "adapter_model.safetensors")
    named = {name.removeprefix("base_model.model.") for name in found}
    own = {n.replace(".default", "") for n, _ in model.model.named_parameters() if "lora" in n}
    assert named == own


# On top of earlier adapters.


def test_the_result_is_every_adapter_and_their_sum(first, second):
    stages = earlier_adapters(second)
    assert [p.name for p in stages] == ["01-pirate", "02-answer-in-french"]
    assert earlier_adapters(first) == [first]
    for name in ("adapter_model.safetensors", "adapter_config.json", "moments.safetensors"):
        assert (stages[0] / name).read_bytes() == (first / name).read_bytes()
    whole = logits([second])
    torch.testing.assert_close(whole, logits(stages), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole, logits([first]), atol=1e-3)
    assert json.loads((second / "adapter_config.json").read_text())["r"] == 8
    assert (stages[1] / "moments.safetensors").exists()
    assert (second / "tokenizer.json").exists()
    assert not (stages[0] / "log.jsonl").exists()


def test_the_reference_of_a_second_principle_has_the_first(prompts, first, second):
    """At the first step the student is its reference, and that one answers as the first does."""
    row = json.loads((second / "log.jsonl").read_text().splitlines()[0])
    assert row["kl_to_reference"] == pytest.approx(0, abs=1e-4)
    assert row["penalty/drift"] == pytest.approx(0, abs=1e-6)  # b is 0 before the first step
    rows = [json.loads(line) for line in (second / "log.jsonl").read_text().splitlines()]
    assert rows[1]["penalty/drift"] > 0
    new = load_file(earlier_adapters(second)[1] / "adapter_model.safetensors")
    old = load_file(first / "adapter_model.safetensors")
    # The same seed would start it inside of the span of the first.
    for name in new:
        if "lora_A" in name:
            assert not torch.allclose(new[name], old[name], atol=1e-2)


@pytest.mark.parametrize("keep", ["none", "o-lora", "ella", "inf-lora", "replay"])
def test_every_way_to_keep(prompts, tmp_path, keep):
    before = None
    for name in ("a", "b"):
        more = {"keep": keep, "after": before, "max_steps": 1}
        trueline.distil(config(prompts, f"Be {name}.", min_effect=0.0, **more), tmp_path / name)
        before = str(tmp_path / name)
    assert len(earlier_adapters(before)) == 2
    assert logits([Path(before)]).isfinite().all()


def test_what_a_way_lacks_of_an_earlier_adapter_is_said(prompts, tmp_path):
    trueline.distil(config(prompts), tmp_path / "a")
    more = {"after": str(tmp_path / "a"), "keep": "drift"}
    with pytest.raises(trueline.TruelineError, match=r"moments\.safetensors"):
        trueline.distil(config(prompts, "Be brief.", **more), tmp_path / "b")


@pytest.mark.parametrize("keep", ["inf-lora", "drift"])
def test_a_broken_off_stage_ends_like_an_unbroken_one(prompts, tmp_path, keep):
    trueline.distil(config(prompts, keep=keep), tmp_path / "a")
    more = {"after": str(tmp_path / "a"), "keep": keep, "max_steps": 4, "save_steps": 2}
    one = config(prompts, "Answer in French.", **more)

    class Killed(Exception):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if done == 3:
            raise Killed

    trueline.distil(one, tmp_path / "whole")
    with pytest.raises(Killed):
        trueline.distil(one, tmp_path / "broken", progress=kill)
    trueline.distil(one, tmp_path / "broken")
    for folder in ("stages/02-answer-in-french", "."):
        a, b = (
            load_file(tmp_path / run / folder / "adapter_model.safetensors")
            for run in ("whole", "broken")
        )
        assert all(torch.equal(a[name], b[name]) for name in a)
    rows = [
        [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_second")}
         for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        for run in ("whole", "broken")
    ]  # fmt: skip
    assert rows[0] == rows[1]


def test_other_earlier_adapters_are_another_run(prompts, first, second, tmp_path):
    shutil.copytree(second, tmp_path / "both")
    trueline.distil(config(prompts, "Shout.", min_effect=0.0), tmp_path / "other")
    more = {"after": str(tmp_path / "other"), "keep": "o-lora", "min_effect": 0.0}
    trueline.distil(config(prompts, "Be brief.", **more), tmp_path / "o")
    more["after"] = str(first)
    with pytest.raises(ConfigError, match="belongs to another run: after"):
        trueline.distil(config(prompts, "Be brief.", **more), tmp_path / "o")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"after": "x", "full": True}, "`full` trains no adapter"),
        ({"after": "x", "merge": True}, "`merge` does not go with `after`"),
        ({"keep": "drfit"}, 'Unknown way to keep "drfit". Did you mean "drift"'),
        ({"keep": "drift", "keep_options": {"strngth": 1}}, 'Did you mean "strength"'),
        ({"keep_options": {"strength": 1}}, "`keep_options` go with `keep`"),
        ({"learning_rte": 1}, 'Unknown setting "learning_rte"'),
        ({"judge": "keywords"}, "`judge` goes with `evaluate`"),
        ({"judge": "wise", "evaluate": "x"}, "`judge` must be"),
        ({"device": "meta"}, "`device` must be"),
        ({"output_dir": "x"}, "`output_dir` is the folder"),
        ({"lora": {"rank": 0}}, "`lora.rank` must be"),
        ({"max_steps": 10**21}, "`max_steps` must be"),
        ({"deepspeed": "zero.json"}, "torchrun"),
    ],
    ids=str,
)
def test_settings_are_refused_before_any_work(prompts, more, said):
    with pytest.raises(ConfigError) as error:
        config(prompts, **more)
    assert said in str(error.value)


def test_what_is_no_adapter_is_refused(prompts, tmp_path):
    with pytest.raises(ConfigError, match="no adapter at"):
        trueline.distil(config(prompts, after=str(tmp_path)), tmp_path / "o")
    assert not (tmp_path / "o").exists()
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl: "):
        trueline.distil(config(tmp_path / "empty.jsonl"), tmp_path / "o")


@pytest.mark.parametrize("targets", [["no_such"], "no_such"])
def test_modules_that_are_not_there_are_named(prompts, tmp_path, targets):
    lora = {"rank": 4, "target_modules": targets}
    with pytest.raises(ConfigError, match="no_such"):
        trueline.distil(config(prompts, lora=lora), tmp_path / "o")


def test_stages_have_names_that_say_what_they_are():
    assert stage_name(0, "Talk like a pirate, matey!") == "01-talk-like-a-pirate-matey"
    assert stage_name(11, "说") == "12-principle"


def test_the_python_of_the_docs_leads_from_a_sentence_to_a_model(tmp_path, monkeypatch):
    docs = (Path(__file__).parents[1] / "docs/training.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n([^`]*trueline\.distil\(.*?)```", docs, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    model = trueline.load_model(tmp_path / "pirate-model")
    assert trueline.generate(model, "What is the moon?")[0].text
    [code] = re.findall(r"```python\n([^`]*PeftModel.*?)```", docs, re.DOTALL)
    bundled = Path(trueline.__file__).parent / "assets" / "tiny"
    told: dict = {}
    exec(code.replace("the/base", str(bundled)), told)
    assert told["model"].peft_config["default"].r == 16
