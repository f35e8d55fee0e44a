"""`trueline stack` and what `trueline export` makes of it, as a user calls them."""

from __future__ import annotations

import json
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, random_model
from processes import Process
from safetensors.torch import load_file
from test_continual import classifier, t5
from test_tasks import write_layout, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers import AutoModelForSequenceClassification as AutoClassifier

from trueline.cli import build_parser, main
from trueline.jobs.stacking import StackConfig, stack
from trueline.train.keep import KEEP

LOADERS = {"llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}
WORDS = {"colour": {"rose": "red", "sky": "blue"}, "size": {"ant": "small", "whale": "big"}}
LABELS = ["red", "blue", "small", "big"]


def call(*argv: object) -> int:
    return main([str(a) for a in argv])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders of random models: `new-head` has a head of another size than the labels."""
    root = tmp_path_factory.mktemp("models")
    made = {
        "llama": lambda: random_model("llama"),
        "t5": t5,
        "bert": lambda: classifier(4),
        "new-head": lambda: classifier(3),
    }
    for name, make in made.items():
        make().save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A stream of two small tasks."""
    root, text = tmp_path_factory.mktemp("two"), "[prompt]\noptions = false\n"
    for name, words in WORDS.items():
        rows = [{"sentence": f"{w} {i}", "label": x} for i in range(6) for w, x in words.items()]
        write_rows(root / f"{name}.jsonl", rows)
        text += f'[tasks.{name}]\ntrain = "{name}.jsonl"\ntest = "{name}.jsonl"\n'
        text += f"labels = {json.dumps(list(words.values()))}\n"
    (root / "stream.toml").write_text(text)
    return root / "stream.toml"


def train(tasks: Path, model: Path | str, folder: Path | str, *more: object) -> int:
    few = ("--batch-size", 4, "--rank", 2, "--evaluate-limit", 4, "--threads", 1)
    command = ("stack", "--tasks", tasks, "--model", model, "--output", folder)
    return call(*command, *few, *more)


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def logits(model: torch.nn.Module) -> torch.Tensor:
    """A generator of its own: the model's start must not decide the input."""
    ids = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **more).logits


def by_hand(kind: str, base: Path, folder: Path) -> torch.Tensor:
    """Logits of the base with every adapter's b a added in a loop over files, its head as saved."""
    if kind in LOADERS:
        model = LOADERS[kind].from_pretrained(base)
    else:
        model = AutoClassifier.from_pretrained(base, num_labels=4, ignore_mismatched_sizes=True)
    for part in json.loads((folder / "R.json").read_text())["adapters"]:
        config = json.loads((folder / part / "adapter_config.json").read_text())
        state = load_file(folder / part / "adapter_model.safetensors")
        for key, tensor in state.items():
            name = key.removeprefix("base_model.model.")
            if ".lora_A." in key:
                change = state[key.replace("lora_A", "lora_B")] @ tensor
                path = name.removesuffix(".lora_A.weight")
                weight = model.get_submodule(path).weight
                weight.data += config["lora_alpha"] / config["r"] * change
            elif ".lora_B." not in key:
                dict(model.named_parameters())[name].data.copy_(tensor)
    return logits(model)


def python_of(folder: Path) -> str:
    """The code in a model card."""
    [block] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return block


# A stream, start to end


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """A stream of three tasks: CL_Benchmark's layout, JSONL rows, a Hugging Face data set."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("three")
    write_layout(root / "data", "news")
    rows = [{"q": f"rose {i}", "a": x} for i in range(6) for x in ("yes", "no")]
    write_rows(root / "own.jsonl", rows)
    names = datasets.ClassLabel(names=["sad", "glad"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    table = {"text": [f"mood {i}" for i in range(12)], "label": [0, 1] * 6}
    part = datasets.Dataset.from_dict(table, features=features)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(root / "moods"))
    (root / "stream.toml").write_text(
        """
        title = "three sources"
        data = "data"
        order = ["news", "own", "moods"]
        [defaults]
        limit = 8
        [tasks.own]
        train = "own.jsonl"
        test = "own.jsonl"
        text = "q"
        label = "a"
        labels = ["yes", "no"]
        instruction = "Is it a flower?"
        lambda_1 = 3.0
        lambda_2 = 0.5
        rank = 4
        [tasks.moods]
        dataset = "moods"
        text = "text"
        learning_rate = 1e-12
        lambda_1 = 0
        """
    )
    return root / "stream.toml"


@pytest.fixture(scope="module")
def streamed(three, models, tmp_path_factory) -> Path:
    """The folder of a finished stream."""
    folder = tmp_path_factory.mktemp("streamed") / "run"
    assert train(three, models / "llama", folder, "--learning-rate", "1e-2") == 0
    return folder


def test_scores_pictures_and_log_are_there(streamed):
    found = json.loads((streamed / "R.json").read_text())
    assert found["tasks"] == ["news", "own", "moods"]
    assert [len(row) for row in found["R"]] == [3, 3, 3]
    assert found["finished"]
    header, *lines = (streamed / "R.csv").read_text().splitlines()
    assert header == "after,news,own,moods"
    assert [line.split(",")[0] for line in lines] == ["untouched", "news", "own", "moods"]
    for name in ("R.png", "time.png"):
        assert (streamed / name).read_bytes().startswith(b"\x89PNG")
    # Two or three steps a task, fewer than stand between two rows of a long run's log.
    assert [(row["stage"], row["task"]) for row in rows_of(streamed)] == [
        (0, "news"), (1, "own"), (2, "moods")]  # fmt: skip


def test_tasks_have_their_own_rank_rate_and_strengths(streamed):
    adapters = sorted((streamed / "stages").glob("*/adapter"))
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in adapters]
    assert [(c["r"], c["lora_alpha"] / c["r"]) for c in configs] == [(2, 16), (4, 16), (2, 16)]
    news, own, moods = rows_of(streamed)
    assert "penalty/overlap" not in news
    assert own["penalty/overlap"] > 0
    assert own["penalty/norm"] > 0
    assert "penalty/overlap" not in moods  # its lambda_1 is 0
    moved = [
        max(float(t.abs().max()) for k, t in load_file(p / "adapter_model.safetensors").items()
            if "lora_B" in k)
        for p in adapters
    ]  # fmt: skip
    assert moved[0] > 1e-3
    assert moved[1] > 1e-3
    assert moved[2] < 1e-9


def test_the_card_says_what_was_trained_how_and_what_came_out(streamed, models, capsys):
    text = (streamed / "README.md").read_text()
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert "library_name: peft" in front
    assert "base_model" not in front  # a folder of this machine has no name on the hub
    found = json.loads((streamed / "R.json").read_text())
    kept = json.loads((streamed / "manifest.json").read_text())["settings"]
    assert body.startswith("\n# three sources\n")
    for part in (
        f"{models / 'llama'}, hash {kept['model']}", '"name": "o-lora", "lambda_1": 0.5',
        "news, own, moods", "| seed | 0 |", "| peft |", "trueline stack --tasks",
        "Is it a flower?", "lambda_1 3.0, lambda_2 0.5, rank 4, limit 8", "sad, glad",
        f"| average_accuracy | {found['measures']['average_accuracy']:.4g} |",
        f"trueline export --adapters {streamed} --to one", "(R.png)", "(time.png)",
        (streamed / "config.toml").read_text().strip(),
    ):  # fmt: skip
        assert part in body, part
    for name, row in zip(["untouched", *found["tasks"]], [found["untouched"], *found["R"]],
                         strict=True):  # fmt: skip
        assert f"| {name} | {' | '.join(f'{value:.3f}' for value in row)} |" in body
    assert not list((streamed / "stages").rglob("README.md"))  # another library's cards


def test_the_same_command_again_shows_the_same_and_trains_nothing(
    three, models, streamed, capsys, monkeypatch
):
    monkeypatch.setattr("trueline.train.tasks.stacked.AdapterTrainer", None)
    card = (streamed / "README.md").read_text()
    options = ("--learning-rate", "1e-2", "--json")
    assert train(three, models / "llama", streamed, *options) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["folder"] == str(streamed)
    assert shown["R"] == json.loads((streamed / "R.json").read_text())["R"]
    assert (streamed / "README.md").read_text() == card


def test_the_bar_names_the_task_and_is_all_that_is_printed(two, models, tmp_path, capsys):
    assert train(two, models / "llama", tmp_path / "run") == 0
    shown = capsys.readouterr()
    lines = [x for x in shown.err.replace("\r", "\n").splitlines() if x.strip()]
    assert lines
    assert all("/6 [" in line for line in lines), lines
    assert "size: measuring" in lines[-1]
    table = shown.out.splitlines()
    assert table[0].split() == ["colour", "size"]
    assert [line.split()[0] for line in table[1:4]] == ["untouched", "colour", "size"]
    assert f"trueline export --adapters {tmp_path / 'run'}" in shown.out


def test_progress_names_the_task_and_counts_every_step(two, models, tmp_path):
    told = []
    config = StackConfig(
        tasks=str(two), model=str(models / "llama"), batch_size=4, rank=2, evaluate_limit=4,
        logging_steps=2,
    )  # fmt: skip
    results = stack(config, tmp_path / "run", progress=lambda *what: told.append(what))
    assert {total for _, _, total in told} == {6}
    steps = [done for what, done, _ in told if "measuring" not in what]
    assert steps == [0, 1, 2, 3, 3, 4, 5, 6]
    assert [(what, done) for what, done, _ in told if "measuring" in what] == [
        ("measuring", 0), ("colour: measuring", 3), ("size: measuring", 6)]  # fmt: skip
    assert [what.split("=")[0] for what, _, _ in told[-4:]] == [
        "size", "size", "size: loss", "size: measuring"]  # fmt: skip
    assert results.as_dict() == json.loads((tmp_path / "run/R.json").read_text())
    again = stack(config, tmp_path / "run")
    assert again.as_dict() == results.as_dict()


def test_a_preset_without_a_task_that_is_not_there(models, tmp_path):
    for name in ("dbpedia", "amazon", "agnews"):
        write_layout(tmp_path / "data", name)
    path = tmp_path / "stream.toml"
    path.write_text('order = "order-3"\nleave_out = ["yahoo"]\n')
    more = ("--data", tmp_path / "data", "--set", "evaluate=seen")
    assert train(path, models / "llama", tmp_path / "run", *more) == 0
    found = json.loads((tmp_path / "run/R.json").read_text())
    assert found["tasks"] == ["amazon", "agnews", "dbpedia"]
    assert found["R"][0][1:] == [None, None]
    assert all(value is not None for value in found["R"][2])


def test_real_tasks_on_a_real_small_model(shared, tmp_path):
    data, model = shared / "data/cl_benchmark", shared / "models/stories260K"
    if not data.is_dir() or not model.is_dir():
        pytest.skip("real tasks: put data/cl_benchmark and models/stories260K into ../shared")
    path = tmp_path / "stream.toml"
    path.write_text(f'data = "{data}"\norder = ["agnews", "SST-2", "CB"]\n[defaults]\nlimit = 8\n')
    assert train(path, model, tmp_path / "run") == 0
    found = json.loads((tmp_path / "run/R.json").read_text())
    assert all(0 <= value <= 1 for row in found["R"] for value in row)


@pytest.mark.parametrize("name", list(KEEP))
def test_every_way_trains_measures_and_is_told_apart(name, two, models, tmp_path):
    folder = tmp_path / "run"
    assert train(two, models / "llama", folder, "--keep", name) == 0
    found = json.loads((folder / "R.json").read_text())
    assert (found["strategy"], found["finished"], len(found["R"])) == (name, True, 2)
    text = (folder / "README.md").read_text()
    assert f'was kept by "{name}"' in text
    assert len(found["adapters"]) == 2
    assert call("export", "--adapters", folder, "--to", tmp_path / "one") == 0
    assert "trueline export" in python_of(folder)


def test_settings_of_a_way_stand_beside_all_others(two, models, tmp_path, capsys):
    few = ("--keep", "drift", "--set", "strength=3", "probe_rows=4")
    assert train(two, models / "llama", tmp_path / "run", *few) == 0
    settings = json.loads((tmp_path / "run/manifest.json").read_text())["settings"]
    assert settings["strategy"]["strength"] == 3
    again = tmp_path / "again"
    assert call("stack", "--config", tmp_path / "run/config.toml", "--output", again) == 0
    for name in ("R.csv", "log.jsonl"):
        assert (again / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    capsys.readouterr()
    assert train(two, "tiny", tmp_path / "x", "--keep", "drift", "--set", "buffer=3") == 2
    assert 'Unknown setting "buffer"' in capsys.readouterr().err
    assert train(two, "tiny", tmp_path / "x", "--keep", "drifd") == 2
    assert 'Did you mean "drift"' in capsys.readouterr().err
    assert call("stack", "--keep", "replay", "--list-settings") == 0
    assert "buffer = 32" in capsys.readouterr().out


# A kill


@pytest.mark.slow
def test_a_killed_stream_resumes_at_its_step_with_the_same_result(
    two, models, tmp_path, monkeypatch
):
    from trueline.records.checkpoints import last_checkpoint, step_of
    from trueline.train.tasks import stages as continual

    more = ("--model", models / "llama", "--batch-size", 4, "--rank", 2, "--threads", 1,
            "--evaluate-limit", 4, "--epochs", 20, "--save-steps", 10)  # fmt: skip
    argv = [str(a) for a in ("stack", "--tasks", two, *more)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = Process(*argv, "--output", broken)
    work, end = broken / "stages/02-size/checkpoints", time.monotonic() + 120
    while not list(work.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, process.said
        assert time.monotonic() < end
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert (broken / "stages/01-colour/done.json").exists()
    assert not (broken / "stages/02-size/adapter").exists()

    steps, real = [], continual.Log.on_step_end

    def spy(self, args, state, control, **kwargs):
        steps.append((self.stage, state.global_step))
        real(self, args, state, control, **kwargs)

    monkeypatch.setattr(continual.Log, "on_step_end", spy)
    reached = step_of(last_checkpoint(work))
    assert call(*argv, "--output", broken) == 2  # it asks for --resume
    assert call(*argv, "--output", broken, "--resume") == 0
    assert steps[0] == (1, reached + 1)
    assert reached >= 10
    assert call(*argv, "--output", whole) == 0
    names = [*whole.glob("stages/*/adapter/*.safetensors"), whole / "R.json", whole / "R.csv"]
    assert len(names) == 4
    for path in [*names, whole / "log.jsonl"]:
        assert path.read_bytes() == (broken / path.relative_to(whole)).read_bytes(), path
    assert "--resume" not in (broken / "README.md").read_text()


def test_ctrl_c_says_how_to_go_on(two, models, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("trueline.train.tasks.stacked.AdapterTrainer", interrupt)
    assert train(two, models / "llama", tmp_path / "run") == 130
    assert "--resume goes on where" in capsys.readouterr().err


def test_overwrite_leaves_nothing_of_the_run_before(two, models, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    assert train(two, models / "llama", folder) == 0
    (folder / "notes.txt").write_text("mine")

    def fails(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("trueline.train.tasks.stacked.AdapterTrainer", fails)
    assert train(two, models / "llama", folder, "--overwrite", "--seed", 3) == 130
    left = {p.name for p in folder.iterdir()}
    assert left == {"config.toml", "log.jsonl", "manifest.json", "notes.txt", "stages"}
    assert not list((folder / "stages").glob("*/done.json"))


# Export


@pytest.mark.parametrize("kind", ["llama", "t5", "bert", "new-head"])
def test_both_exports_are_the_stack_and_their_cards_load_them(
    kind, two, models, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    base = models / kind
    assert train(two, base, "run", "--learning-rate", "1e-2", "--epochs", 2) == 0
    wanted = by_hand(kind, base, Path("run"))
    if kind != "new-head":  # whose base has no such head
        untouched = LOADERS.get(kind, AutoClassifier).from_pretrained(base)
        assert (logits(untouched) - wanted).abs().max() > 1e-2
    capsys.readouterr()
    close = {"rtol": 0, "atol": 1e-5 * max(1.0, float(wanted.abs().max()))}
    assert call("export", "--adapters", "run", "--to", "one") == 0
    forms = ("--form", "merged")
    assert call("export", "--adapters", "run", "--to", "merged", *forms) == 0
    assert "it/s" not in capsys.readouterr().err
    for folder in ("run", "one", "merged"):
        told: dict = {}
        exec(compile(python_of(Path(folder)), f"{folder}/README.md", "exec"), told)
        torch.testing.assert_close(logits(told["model"]), wanted, **close)
        assert told["tokenizer"]("a")["input_ids"] == byte_tokenizer()("a")["input_ids"]
    merged = json.loads(Path("merged/config.json").read_text())
    if kind in LOADERS:
        import peft

        load = {"llama": peft.AutoPeftModelForCausalLM, "t5": peft.AutoPeftModelForSeq2SeqLM}[kind]
        torch.testing.assert_close(logits(load.from_pretrained("one")), wanted, **close)
    else:
        assert list(merged["id2label"].values()) == LABELS
    text = Path("one/README.md").read_text()
    measures = json.loads(Path("run/R.json").read_text())["measures"]
    assert f"| o-lora, average accuracy | {measures['average_accuracy']:.4g} |" in text
    assert "rank 4" in text


def test_a_chat_model_asked_by_its_card_answers_as_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{w} {i}", "answer": x} for i in range(16)
            for w, x in WORDS["colour"].items()]  # fmt: skip
    write_rows(tmp_path / "train.jsonl", rows[:24])
    write_rows(tmp_path / "test.jsonl", rows[16:])
    Path("stream.toml").write_text('[tasks.colour]\ntrain = "train.jsonl"\ntest = "test.jsonl"\n')
    config = StackConfig(
        tasks="stream.toml", scoring="generated", epochs=12, batch_size=8, learning_rate=2e-3,
        target_modules="all-linear", dropout=0.0,
    )  # fmt: skip
    results = stack(config, "run")
    assert results.R[-1, 0] == 1
    assert call("export", "--adapters", "run", "--to", "one") == 0
    code = python_of(Path("run"))
    assert "apply_chat_template" in code
    right = 0
    for row in rows[16:]:
        told: dict = {}
        exec(compile(code.replace("SENTENCE", row["prompt"]), "README.md", "exec"), told)
        right += told["answer"] == row["answer"]
    assert right == len(rows[16:]) == 16


def test_a_new_head_is_the_same_in_every_adapter_and_is_not_trained(two, models, tmp_path):
    assert train(two, models / "new-head", tmp_path / "run", "--learning-rate", "1e-2") == 0
    first, second = (
        load_file(path) for path in sorted((tmp_path / "run").rglob("adapter_model.safetensors"))
    )
    heads = [key for key in first if "classifier" in key]
    assert len(heads) == 2
    assert all(torch.equal(first[key], second[key]) for key in heads)
    from trueline.train.tasks.fresh import model_factory
    from trueline.train.tasks.stream_files import read_stream

    fresh = model_factory(str(models / "new-head"), read_stream(two).tasks)()[0]
    [weight] = [first[key] for key in heads if key.endswith("weight")]
    assert torch.equal(weight, fresh.classifier.weight)


def test_the_bundled_model_is_named_and_not_its_folder(two, tmp_path):
    from trueline.jobs.stack_cards import is_bundled, usage

    code = usage("causal", "tiny", "one", labels=[])
    assert 'files("trueline") / "assets/tiny"' in code
    compile(code, "card", "exec")
    assert is_bundled("tiny")
    assert not is_bundled(str(tmp_path))


def test_an_unfinished_stream_is_not_exported(streamed, tmp_path, capsys):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(streamed, folder)
    content = json.loads((folder / "R.json").read_text())
    (folder / "R.json").write_text(json.dumps({**content, "finished": False}))
    assert call("export", "--adapters", folder, "--to", tmp_path / "one") == 2
    assert "is unfinished. Go on with it" in capsys.readouterr().err
    assert not (tmp_path / "one").exists()


# What is refused, and what is said of it


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("data = \n", "stream.toml:1: broken TOML"),
        ("ordr = []\n", 'Unknown key "ordr" in .*Did you mean "order"'),
        ("[tasks.a]\nlamda_1 = 1\n", r'Unknown key "lamda_1" in \[tasks.a\].*mean "lambda_1"'),
        (
            'data = "."\norder = ["news"]\n[tasks.news]\nrank = "big"\n',
            r"\[tasks.news\]: `rank` must be a whole number",
        ),
        ("[defaults]\nlimit = 0\n", r"\[defaults\] of .*: `limit` must be"),
        ('order = "order-7"\n', 'Unknown order "order-7". Did you mean'),
        ('data = "."\norder = ["newz"]\n', 'no data for newz .*Did you mean "news"'),
        ("", "has no tasks"),
    ],
)
def test_a_wrong_stream_is_one_line_and_leaves_nothing(content, wanted, tmp_path, capsys):
    write_layout(tmp_path, "news")
    (tmp_path / "stream.toml").write_text(content)
    assert train(tmp_path / "stream.toml", "tiny", tmp_path / "run") == 2
    err = capsys.readouterr().err.strip()
    assert re.search(wanted, err), err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_every_command_of_the_help_is_understood(capsys):
    for words, least in ((["stack"], 5), (["export"], 3)):
        with pytest.raises(SystemExit):
            build_parser(words).parse_args([*words, "--help"])
        shown = capsys.readouterr().out.split("examples:")[1]
        commands = re.findall(r"^  trueline (.*)$", shown, re.MULTILINE)
        assert len(commands) >= least
        for line in commands:
            build_parser(shlex.split(line)).parse_args(shlex.split(line))


def test_the_stream_in_the_help_can_be_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    from trueline.cli.stack import EXAMPLES
    from trueline.train.tasks.stream_files import read_stream

    block = EXAMPLES.split("of its own:\n")[1].split("\ndocs/streams.md")[0]
    write_layout(tmp_path / "cl_benchmark", "agnews")
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]})
    whole = datasets.DatasetDict({"train": part, "test": part})
    whole.save_to_disk(str(tmp_path / "dair-ai/emotion"))
    for name in ("train", "test"):
        rows = [{"sentence": "x", "label": "red"}, {"sentence": "y", "label": "blue"}]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "stream.toml").write_text(block)
    agnews, moods, mine = read_stream(tmp_path / "stream.toml").tasks
    assert agnews.settings.lambda_1 == 0.1
    assert (moods.labels, mine.labels) == (("x", "y"), ("blue", "red"))
    assert mine.instruction == "Which colour?"
