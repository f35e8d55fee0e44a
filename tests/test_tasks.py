"""Tasks and streams: presets, prompts, labels, and what is said of files that are wrong."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from trueline.errors import ConfigError, DataError
from trueline.train.tasks.stream_files import preset, read_stream, read_task, stream_from
from trueline.train.tasks.task import (
    INSTRUCTIONS,
    ORDERS,
    Example,
    PromptForm,
    Task,
    TaskSettings,
    draw,
    normalise,
    order_names,
    same_label,
    union_of_labels,
)

TOPICS = ["World", "Sports"]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_layout(root, name="news", labels=TOPICS, category="TC", extra=()):
    rows = [{"sentence": f"{name} {i}", "label": labels[i % len(labels)]} for i in range(6)]
    for split in ("train", "validation", "test"):
        write_rows(root / name / f"{split}.jsonl", [*rows, *extra])
    (root / name / "labels.json").write_text(json.dumps(labels))
    (root / name / "category.txt").write_text(category + "\n")
    return root


def task(**changes):
    row = (Example("a text", "World"),)
    fields = {"name": "news", "train": row, "validation": (), "test": row, "labels": TOPICS}
    return Task(**(fields | changes))


def test_rows_are_questions_and_answers_in_three_forms(tmp_path):
    user, bot = {"role": "user", "content": "a rose"}, {"role": "assistant", "content": "red"}
    system = {"role": "system", "content": "Which colour?"}
    forms = {
        "sentence": {"sentence": "a rose", "label": "red"},
        "prompt": {"prompt": "a rose", "answer": "red"},
        "messages": {"messages": [user, bot]},
        "system": {"messages": [system, user, bot]},
    }
    for name, row in forms.items():
        write_rows(tmp_path / f"{name}.jsonl", [row])
        table = {"train": f"{name}.jsonl", "test": f"{name}.jsonl", "labels": ["red", "blue"]}
        sentence = "Which colour?\na rose" if name == "system" else "a rose"
        assert read_task("t", table, folder=tmp_path).train == (Example(sentence, "red"),)
    table = {"train": "x.jsonl", "test": "x.jsonl", "labels": ["red", "blue"]}
    for row, wanted in (
        ({"messages": [user]}, r"x.jsonl:1: `messages` must be a question .* roles \['user'\]"),
        ({"messages": [user, bot, user, bot]}, "x.jsonl:1: `messages` must be"),
        ({"messages": "a rose"}, "x.jsonl:1: `messages` must be"),
        ({"messages": [user, {"role": "assistant", "content": ["red"]}]}, "must be a text"),
        ({"prompt": "a rose"}, 'x.jsonl:1: missing field "sentence"; the row has prompt'),
    ):
        write_rows(tmp_path / "x.jsonl", [row])
        with pytest.raises(DataError, match=wanted):
            read_task("t", table, folder=tmp_path)
    # A named column goes before any of them.
    write_rows(tmp_path / "x.jsonl", [forms["prompt"] | {"q": "a sky", "a": "blue"}])
    assert read_task("t", {**table, "text": "q", "label": "a"}, folder=tmp_path).test == (
        Example("a sky", "blue"),)  # fmt: skip


def test_the_streams_in_the_docs_can_be_read(tmp_path):
    docs = (Path(__file__).parents[1] / "docs/streams.md").read_text(encoding="utf-8")
    whole, tables = re.findall(r"```toml\n(.*?)```", docs, re.DOTALL)
    for name in ("dbpedia", "amazon", "agnews"):
        write_layout(tmp_path / "shared/data/cl_benchmark", name)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/stream.toml").write_text(whole)
    stream = read_stream(tmp_path / "here/stream.toml")
    assert [t.name for t in stream.tasks] == ["dbpedia", "amazon", "agnews"]
    assert [t.settings.lambda_1 for t in stream.tasks] == [0.5, 0.1, 0.5]
    [rows] = re.findall(r"```json\n(.*?)```", docs, re.DOTALL)
    [shown] = re.findall(r"```text\n(.*?)\n```", docs, re.DOTALL)
    for split in ("train", "test"):
        (tmp_path / "colours").mkdir(exist_ok=True)
        (tmp_path / f"colours/{split}.jsonl").write_text(rows)
    colours = tomllib.loads(tables)["tasks"]["colours"]
    found = read_task("colours", colours, folder=tmp_path)
    assert [e.label for e in found.train] == ["red", "blue", "blue"]
    assert PromptForm().text(found, found.train[0].sentence) == shown
    with pytest.raises(DataError, match="dair-ai/emotion"):
        read_task("emotions", tomllib.loads(tables)["tasks"]["emotions"], folder=tmp_path)


def test_a_nul_in_a_path_is_one_line(tmp_path):
    for content in (
        {"data": "a\0b", "order": ["news"]},
        {"tasks": {"t": {"train": "a\0b", "test": "c"}}},
        {"tasks": {"t": {"dataset": "a\0b"}}},
    ):
        with pytest.raises(ConfigError, match="has a NUL"):
            stream_from(content, tmp_path)


def test_the_six_orders():
    four, fifteen = {"dbpedia", "amazon", "yahoo", "agnews"}, set(ORDERS["order-4"].split())
    for name in ("order-1", "order-2", "order-3"):
        assert set(order_names(name)) == four
    assert len(fifteen) == 15
    for name in ("order-4", "order-5", "order-6"):
        assert len(order_names(name)) == 15
        assert set(order_names(name)) == fifteen
    assert order_names("order-6")[:3] == ["yelp", "amazon", "MNLI"]
    assert order_names(["b", "a"]) == ["b", "a"]
    with pytest.raises(ConfigError, match='Did you mean "order-1"'):
        order_names("order_1")


def test_prompts_do_not_give_the_task_away_unless_asked():
    own = task(instruction="What topic?", category="TC")
    assert PromptForm().text(own, " Ajax won.\n") == (
        "What topic?\nOption: World, Sports\nAjax won.\nAnswer:"
    )
    assert PromptForm(task_lines=True).text(own, "Ajax won.") == (
        "Task:TC\nDataset:news\nWhat topic?\nOption: World, Sports\nAjax won.\nAnswer:"
    )
    assert PromptForm(instruction=False, options=False).text(own, "x") == "x\nAnswer:"
    with pytest.raises(ConfigError, match="options"):
        PromptForm(options="yes")


def test_labels_are_compared_without_case_and_punctuation():
    assert same_label(" Science or  technology.", "Science or Technology")
    assert same_label("TRUE!", "True")
    assert not same_label("positive", "very positive")
    assert normalise("A-b") == "ab"


def test_union_keeps_one_place_for_equal_labels():
    first, second = task(), task(labels=["sports", "World", "Art"], test=(), train=(
        Example("x", "Art"),))  # fmt: skip
    assert union_of_labels([first, second]) == ("World", "Sports", "Art")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": ()}, "no training rows"),
        ({"labels": ["World"]}, "two labels or more"),
        ({"labels": ["World", "world!"]}, "one label twice"),
        ({"labels": ["World", "World"]}, "one label twice"),
        ({"labels": ["World", "?"]}, "without a letter"),
        ({"test": (Example("x", "Art"),)}, 'test row 1: label "Art"'),
    ],
)
def test_tasks_are_checked(changes, message):
    with pytest.raises(DataError, match=message):
        task(**changes)


def test_settings_are_checked_and_laid_over_each_other():
    with pytest.raises(ConfigError, match="rank"):
        TaskSettings(rank=0)
    with pytest.raises(ConfigError, match="lambda_1"):
        TaskSettings(lambda_1=-1)
    own = TaskSettings(lambda_1=0.0, rank=4)
    assert own.over(TaskSettings(lambda_1=0.5, limit=7)) == TaskSettings(
        lambda_1=0.0, rank=4, limit=7
    )


def test_draw_is_repeatable_nested_and_in_order():
    rows = list(range(100))
    ten, twenty = draw(rows, 10, 3, "a"), draw(rows, 20, 3, "a")
    assert ten == sorted(ten) == draw(rows, 10, 3, "a")
    assert len(set(ten)) == 10
    assert set(ten) < set(twenty)
    assert ten != draw(rows, 10, 4, "a")
    assert ten != draw(rows, 10, 3, "b")
    assert draw(rows, None, 0) == draw(rows, 200, 0) == rows


def test_fingerprint_tells_data_but_not_settings():
    assert task().fingerprint() == task(settings=TaskSettings(rank=2)).fingerprint()
    assert task().fingerprint() != task(instruction="?").fingerprint()
    assert task().fingerprint() != task(test=(Example("a text", "Sports"),)).fingerprint()


def test_a_stream_of_all_three_sources(tmp_path):
    datasets = pytest.importorskip("datasets")
    write_layout(tmp_path / "data")
    write_rows(tmp_path / "own/train.jsonl", [{"q": "why", "c": "so", "a": "yes"},
                                              {"q": "who", "c": "me", "a": "no"}])  # fmt: skip
    write_rows(tmp_path / "own/test.jsonl", [{"q": "how", "c": "thus", "a": "YES."}])
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["sad", "glad"])}
    )
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    whole = datasets.DatasetDict({"train": part, "evaluation": part})
    whole.save_to_disk(str(tmp_path / "moods"))
    (tmp_path / "stream.toml").write_text(
        """
        title = "three"
        data = "data"
        order = ["moods", "news", "own"]
        [prompt]
        options = false
        [defaults]
        limit = 5
        lambda_1 = 0.5
        [tasks.news]
        lambda_1 = 0
        instruction = "Which part of the paper?"
        [tasks.own]
        train = "own/train.jsonl"
        test = "own/test.jsonl"
        text = ["q", "c"]
        label = "a"
        category = "BoolQA"
        [tasks.moods]
        dataset = "moods"
        splits = {train = "train", test = "evaluation"}
        text = "text"
        rank = 2
        """
    )
    stream = read_stream(tmp_path / "stream.toml")
    moods, news, own = stream.tasks
    assert (stream.title, stream.prompt) == ("three", PromptForm(options=False))
    assert [t.name for t in stream.tasks] == ["moods", "news", "own"]
    assert moods.labels == ("sad", "glad")
    assert moods.train == (Example("a", "glad"), Example("b", "sad"))
    assert moods.validation == ()
    assert moods.settings == TaskSettings(lambda_1=0.5, rank=2, limit=5)
    assert (news.labels, news.category) == (("World", "Sports"), "TC")
    assert news.instruction == "Which part of the paper?"
    assert news.settings == TaskSettings(lambda_1=0, limit=5)
    assert len(news.train) == len(news.validation) == 6
    assert own.train[0] == Example("q: why\nc: so", "yes")
    assert own.test == (Example("q: how\nc: thus", "yes"),)
    assert own.labels == ("no", "yes")
    assert own.instruction == INSTRUCTIONS["BoolQA"]


def test_missing_tasks_of_a_preset_are_named_and_can_be_left_out(tmp_path):
    for name in ("dbpedia", "amazon", "agnews"):
        write_layout(tmp_path, name)
    with pytest.raises(DataError, match=r'no data for yahoo .*leave_out = \["yahoo"\]'):
        preset("order-1", tmp_path)
    left = preset("order-1", tmp_path, leave_out=["yahoo"], settings=TaskSettings(limit=3))
    assert [t.name for t in left] == ["dbpedia", "amazon", "agnews"]
    assert {t.settings.limit for t in left} == {3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ordr": []}, 'Unknown key "ordr".*Did you mean "order"'),
        ({"defaults": {"lambda1": 1}}, 'Unknown key "lambda1".*Did you mean "lambda_1"'),
        ({"prompt": {"option": True}}, 'Did you mean "options"'),
        ({"tasks": {"x": {"trian": "f"}}}, 'Did you mean "train"'),
        ({"tasks": {"x": 1}}, "must be a table"),
        ({"tasks": []}, "`tasks` must be a table"),
        ({"order": 3}, "`order` must be a list"),
        ({"order": ["a", "a"]}, "stands in the order twice"),
        ({"order": ["a"], "leave_out": ["b"]}, 'leave_out` names "b"'),
        ({"order": ["news"], "tasks": {"nws": {}}}, 'Did you mean "news"'),
        ({}, "has no tasks"),
        ({"order": ["news"], "leave_out": ["news"]}, "has no tasks"),
        ({"defaults": {"rank": 0}}, r"\[defaults\] of the stream: `rank` must be"),
        ({"tasks": {"x": {"train": 3}}}, r"`train` in \[tasks.x\].* must be a text, got 3"),
        ({"tasks": {"x": {"instruction": ["a"]}}}, "`instruction` in .* must be a text"),
        ({"tasks": {"x": {"category": 3}}}, "`category` in .* must be a text"),
        ({"tasks": {"x": {"text": 3}}}, "`text` in .* a column or a list"),
        ({"tasks": {"x": {"text": []}}}, "`text` in .* a column or a list"),
        ({"tasks": {"x": {"dataset": "d", "splits": "train"}}}, "`splits` in .* must be a table"),
        ({"tasks": {"x": {"dataset": "d", "splits": {"trian": "a"}}}}, 'Did you mean "train"'),
        ({"tasks": {"x": {"dataset": "d", "test": "f"}}}, "has `dataset` and `test`"),
        ({"tasks": {"x": {"test": "f"}}}, "has `test` without `train`"),
        ({"tasks": {"x": {"train": "f", "config": "c"}}}, "has `config` without `dataset`"),
    ],
)
def test_wrong_streams_are_refused(content, message):
    with pytest.raises(ConfigError, match=message):
        stream_from(content)


def test_broken_data_name_file_and_line(tmp_path):
    write_layout(tmp_path, extra=[{"sentence": "x", "label": "Art"}])
    with pytest.raises(DataError, match=r'train.jsonl:7: label "Art" is not one of World, Sports'):
        preset(["news"], tmp_path)
    write_layout(tmp_path, extra=[{"text": "x", "label": "World"}])
    with pytest.raises(DataError, match=r'train.jsonl:7: missing field "sentence"'):
        preset(["news"], tmp_path)
    write_layout(tmp_path, extra=[{"sentence": "x", "label": ["World"]}])
    with pytest.raises(DataError, match=r'train.jsonl:7: field "label" must be a text'):
        preset(["news"], tmp_path)
    with pytest.raises(DataError, match=r'no data for newz in .* Did you mean "news"\? To do'):
        preset(["newz"], tmp_path)
    write_layout(tmp_path, extra=[{"sentence": " ", "label": "World"}])
    with pytest.raises(DataError, match=r"train.jsonl:7: the sentence is empty"):
        preset(["news"], tmp_path)
    write_layout(tmp_path)
    with pytest.raises(ConfigError, match=r'`labels` of task "news" must be a list of texts'):
        read_task("news", {"labels": []}, root=tmp_path)
    write_layout(tmp_path, category="TCC")
    with pytest.raises(ConfigError, match='category "TCC".*Did you mean "TC"'):
        preset(["news"], tmp_path)
    (tmp_path / "news/labels.json").write_text("[")
    with pytest.raises(DataError, match=r"labels.json: not JSON"):
        preset(["news"], tmp_path)


def test_rows_without_an_agreed_label_are_left_out(tmp_path):
    write_layout(tmp_path, extra=[{"sentence": "x", "label": "-"}])
    assert len(preset(["news"], tmp_path)[0].train) == 6


def test_the_real_tasks_of_the_long_orders(shared):
    root = shared / "data" / "cl_benchmark"
    if not root.is_dir():
        pytest.skip("real tasks: put data/cl_benchmark into ../shared")
    for order in ("order-4", "order-5", "order-6"):
        tasks = preset(order, root, leave_out=["yahoo"])
        assert len(tasks) == 14
        assert all(t.train and t.validation and t.test and t.instruction for t in tasks)
    by_name = {t.name: t for t in tasks}
    assert len(by_name["dbpedia"].labels) == 14
    assert by_name["RTE"].instruction == by_name["MNLI"].instruction == INSTRUCTIONS["NLI"]
    assert {e.label for e in by_name["QQP"].train} == {"True", "False"}
