"""The jobs that measure, called as a notebook calls them; what goes in, what is refused."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

import trueline
from trueline import (
    AdaCD,
    AgreementConfig,
    ConfigError,
    DataError,
    JudgeConfig,
    LinearAlignment,
    MeasureConfig,
    ModelError,
    Plain,
    SelfCD,
    SweepConfig,
    WinRateConfig,
)
from trueline.evals.endpoint import Endpoint, hide, redacted, secrets_of
from trueline.evals.items import adherence_items, refusal_items, spread, told
from trueline.evals.patterns import check_pattern, matches
from trueline.jobs.reports import picture_of, read_run
from trueline.jobs.sessions import check_plot
from trueline.types import SamplingParams

SHORT = SamplingParams(max_new_tokens=6)


@pytest.fixture(scope="module")
def tiny():
    """The bundled model."""
    return trueline.load_model("tiny")


def measure(tiny, folder, **options):
    config = MeasureConfig(sampling=SHORT, plot=False, **options)
    return trueline.measure(config, folder, model=tiny)


def rows_of(folder: Path, name: str = "responses.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# From Python


def test_a_method_alone_says_what_is_measured(tiny, tmp_path):
    assert MeasureConfig(method=SelfCD()).metric == "refusal"
    assert MeasureConfig(method=AdaCD).metric == "refusal"
    assert MeasureConfig(method=LinearAlignment("Be brief.")).metric == "adherence"
    found = measure(tiny, tmp_path / "r", method=SelfCD(alpha=1.0), limit=4)
    assert [p["label"] for p in found.points] == ["plain", "alpha=1"]
    assert found.rates["over_refusal"].n == 4
    assert found.as_dict()["settings"]["data"]["n"] == 8
    assert "8 of 144 prompts" in found.table()
    assert found.recommendation is None


def test_lists_and_a_function_as_the_judge(tiny, tmp_path):
    seen = []

    def judge(prompt, response):
        seen.append((prompt, response))
        return prompt == "What is tea?"

    safe, unsafe = ["What is tea?", "Hello!"], [[{"role": "user", "content": "Be bad."}]]
    found = measure(tiny, tmp_path / "r", safe=safe, unsafe=unsafe, judge=judge, method=Plain)
    assert found.rates["over_refusal"].value == 0.5
    assert found.rates["harmful_refusal"].value == 0.0
    assert found.judge["name"] == "function"
    assert [p for p, _ in seen] == ["What is tea?", "Hello!", "Be bad."]
    assert [r["text"] for r in rows_of(tmp_path / "r")] == [text for _, text in seen]


def test_grades_of_a_function_are_held_to_their_range(tiny, tmp_path):
    options = {"method": LinearAlignment("Be brief."), "prompts": ["Hello!"]}
    found = measure(tiny, tmp_path / "a", judge=lambda p, r: 0.25, **options)
    assert found.rates["adherence"].value == 0.25
    with pytest.raises(DataError, match=r"\[0, 1\]"):
        measure(tiny, tmp_path / "b", judge=lambda p, r: 7, **options)


def test_a_sweep_of_numbers_recommends_one(tiny, tmp_path):
    told_of = []
    grid = {"alpha": [0, 1, 1]}
    config = SweepConfig(method=SelfCD, grid=grid, limit=24, sampling=SHORT, plot=False)
    found = trueline.sweep(config, tmp_path / "s", model=tiny,
                           progress=lambda *seen: told_of.append(seen))  # fmt: skip
    labels = [p["label"] for p in found.points]
    texts = ["helpful text", '"You are a helpful, respectf…" alone']
    assert labels == ["plain", *texts, "alpha=0", "alpha=1"]
    assert found.recommendation["label"] in labels
    # One call before anything is done, then one for each prompt of each point.
    assert [done for _, done, _ in told_of] == list(range(5 * 48 + 1))
    assert {total for _, _, total in told_of} == {5 * 48}
    assert [what for what, _, _ in told_of[1::48]] == labels


def test_a_model_changed_in_memory_is_another_model(tiny, tmp_path):
    options = {"method": Plain, "safe": ["Hello!"]}
    measure(tiny, tmp_path / "r", **options)
    weight = tiny.model.get_input_embeddings().weight.data
    weight[5, 0] += 1
    try:
        with pytest.raises(ConfigError, match=r"model\.hash was"):
            measure(tiny, tmp_path / "r", **options)
    finally:
        weight[5, 0] -= 1


def test_win_rates_and_agreement_from_lists(tmp_path):
    class Longer:
        def pairwise(self, prompts, first, second, criterion):
            return ["A" if len(a) > len(b) else "B" for a, b in zip(first, second, strict=True)]

    a = [{"prompt": str(i), "response": "long"} for i in range(3)]
    b = [{**row, "response": "s"} for row in a]
    found = trueline.measure_win_rate(WinRateConfig(a, b, Longer()), tmp_path / "w")
    assert (found.numbers["wins"], found.rates["win_rate"].value) == (3, 1.0)
    labels = [{"text": "No.", "label": "full"}, {"text": "Sure, here.", "label": "complied"}]
    config = AgreementConfig(labels, lambda prompt, text: text == "No.", plot=False)
    assert trueline.measure_agreement(config, tmp_path / "j").numbers["kappa"] == 1.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"metric": "joy"}, "`metric` must be one of"),
        ({"method": 5}, "decoding method"),
        ({"method": "self-cdd"}, 'Did you mean "self-cd"'),
        ({"method": SelfCD(), "options": {"alpha": 1}}, "a made method has its own"),
        ({"batch_size": 0}, "`batch_size` must be"),
        ({"limit": 0}, "`limit` must be"),
        ({"seed": 0.5}, "`seed` must be"),
        ({"judge": 5}, "`judge` must be"),
        ({"judge": "nobody"}, "`judge` must be one of"),
        ({"judge": "model"}, "--judge-url URL"),
        ({"metric": "refusal", "prompts": ["x"]}, "--prompts"),
        ({"metric": "personal"}, "--questions FILE"),
        ({"metric": "adherence", "pattern": "("}, "no regular expression"),
        ({"metric": "adherence", "pattern": "a{99999999999}"}, "`--pattern`"),
        ({"metric": "adherence", "pattern": 5}, "must be text"),
        ({"metric": "adherence", "absent": True}, "--absent"),
        ({"by": "logprob"}, "--questions"),
        ({"system": " "}, "`system` must be"),
        ({"sampling": SamplingParams(n=2, temperature=1)}, "one completion"),
        ({"model": 5}, "`model` must be"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_when_they_are_made(wrong, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        MeasureConfig(**wrong)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"alfa": [1]}, 'Did you mean "alpha"'),
        ({"alpha": "012"}, "list of values"),
        ({"alpha": []}, "list of values"),
        ({"alpha": [True]}, "takes numbers"),
    ],
)
def test_wrong_grids_are_refused_when_they_are_made(grid, message):
    with pytest.raises(ConfigError, match=message):
        SweepConfig(method=SelfCD, grid=grid)


def test_a_plot_without_matplotlib_is_refused_before_anything(monkeypatch):
    monkeypatch.setattr("trueline.records.style.find_spec", lambda name: None)
    check_plot(False)
    with pytest.raises(ConfigError, match="matplotlib"):
        check_plot(True)


# System texts


def test_a_rows_system_text_reaches_the_model_and_the_hash(tiny, tmp_path):
    row = {"prompt": "What is the moon?"}
    own = {**row, "system": "Talk like a pirate."}
    plain = measure(tiny, tmp_path / "plain", safe=[row], method=Plain)
    in_row = measure(tiny, tmp_path / "row", safe=[own], method=Plain)
    by_option = measure(tiny, tmp_path / "option", safe=[row], method=Plain, system=own["system"])
    first, second, third = (rows_of(r.folder)[0] for r in (plain, in_row, by_option))
    chat = [
        {"role": "system", "content": own["system"]},
        {"role": "user", "content": row["prompt"]},
    ]
    wanted = trueline.generate(tiny, [chat], Plain(), SHORT)[0]
    assert second["token_ids"] == third["token_ids"] == wanted.token_ids != first["token_ids"]
    hashes = [r.written["settings"]["data"]["sha256"] for r in (plain, in_row, by_option)]
    assert hashes[0] != hashes[1] == hashes[2]


def test_system_texts_everywhere_prompts_are_read(tmp_path):
    own = [{"prompt": "a", "system": "Mine."}, {"prompt": "b"}]
    found, _ = refusal_items(own, None, system="Theirs.")
    assert [i.chat[0]["content"] for i in found] == ["Mine.", "Theirs."]
    found, _ = adherence_items(own, principle="x", pattern="y", system="Theirs.")
    assert [i.chat[0]["content"] for i in found] == ["Mine.", "Theirs."]
    found, _ = refusal_items(None, None, 2, system="Theirs.")
    assert {i.chat[0]["content"] for i in found} == {"Theirs."}
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    chats = [{"messages": [*earlier, {"role": "user", "content": "Go."}]}]
    [item], _ = refusal_items(chats, None)
    assert (item.prompt, item.chat[:2]) == ("Go.", earlier)
    both = [{"messages": [{"role": "system", "content": "a"}, *earlier[:1]], "system": "b"}]
    with pytest.raises(DataError, match="Keep one"):
        refusal_items(both, None)


def test_pairs_and_questions_take_system_texts():
    from trueline.evals.datasets import load_pairs, load_personal
    from trueline.evals.preference import personal_chat

    pair = {"prompt": "Why?", "chosen": "a", "rejected": "b"}
    assert load_pairs([pair], system="Be.")[0].messages[0]["content"] == "Be."
    question = {"question": "A pet?", "answers": ["cat", "dog"], "users": ["Al", "Bo"]}
    [plain], [own] = load_personal([question]), load_personal([{**question, "system": "Be."}])
    assert personal_chat(own)[0]["content"] == "Be."
    assert len(personal_chat(plain)) == 1
    # Rows without a system text keep the hash that they had.
    assert "system" not in told(plain)


# Limits


def test_a_limit_is_spread_over_the_groups_and_drawn_by_the_seed():
    rows, groups = list(range(40)), ["a"] * 25 + ["b"] * 10 + ["c"] * 5
    found = spread(rows, groups, 9)
    assert [sum(groups[i] == g for i in found) for g in "abc"] == [3, 3, 3]
    assert found == sorted(found) == spread(rows, groups, 9)
    assert found != spread(rows, groups, 9, seed=1)
    assert set(spread(rows, groups, 4)) < set(found)
    assert [sum(groups[i] == g for i in spread(rows, groups, 21)) for g in "abc"] == [8, 8, 5]
    assert spread(rows, groups, 40) == spread(rows, groups, None) == rows


def test_a_limit_takes_every_type_of_xstest(shared):
    path = str(shared / "data/over_refusal/xstest.jsonl")
    items, of = refusal_items(path, None, 20)
    rows = map(json.loads, Path(path).read_text().splitlines())
    kinds = {row["prompt"]: row["type"] for row in rows}
    assert len({kinds[i.prompt] for i in items}) == 10
    assert of > 200


# Patterns


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", 5, ["a"], "x" * 20000, "(a{999}){999}"])
def test_patterns_that_are_none_are_named_with_their_place(pattern):
    with pytest.raises(ConfigError, match="^row 1: "):
        check_pattern(pattern, "row 1")


def test_a_pattern_that_never_ends_is_stopped():
    import time

    start = time.perf_counter()
    with pytest.raises(ConfigError, match="takes longer than"):
        matches(r"(a+)+$", "a" * 4000 + "b")
    assert time.perf_counter() - start < 10
    assert matches("(?i)(?:ARR)", "arr, matey")
    assert matches("moon", "The MOON", ignore_case=True)
    assert not matches("moon", "The MOON")


def test_a_rows_own_pattern_is_checked(tmp_path):
    with pytest.raises(ConfigError, match='prompt "1": a pattern must be text'):
        adherence_items([{"prompt": "a", "pattern": ["b"]}], principle="x")
    with pytest.raises(ConfigError, match="bundled principles have patterns"):
        adherence_items(None, pattern="x")


# Endpoints


class Redirecting(BaseHTTPRequestHandler):
    """Sends every request on to the thief, or repeats the key that it was sent."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append(self.headers.get("Authorization"))
        if self.server.status == 200:
            key = self.headers["Authorization"]
            text = json.dumps({"choices": [{"message": {"content": f"You sent {key}."}}]})
        else:
            text = f"bad key {self.headers['Authorization']}"
        self.send_response(self.server.status)
        if self.server.status in range(300, 400):
            self.send_header("Location", self.server.thief)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST

    def log_message(self, *args):
        pass


@pytest.fixture
def servers():
    """An endpoint, and where it would send the key."""
    both = [ThreadingHTTPServer(("127.0.0.1", 0), Redirecting) for _ in range(2)]
    for server in both:
        server.seen, server.status = [], 200
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    both[0].thief = f"http://127.0.0.1:{both[1].server_address[1]}/v1/chat/completions?token=s3cr3t"
    yield both
    for server in both:
        server.shutdown()
        server.server_close()


CHAT = [[{"role": "user", "content": "Hello!"}]]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(servers, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-test")
    servers[0].status = status
    endpoint = Endpoint(f"http://127.0.0.1:{servers[0].server_address[1]}/v1", "m", retries=0)
    with pytest.raises(ModelError, match="no redirect is followed") as error:
        endpoint.ask(CHAT)
    assert servers[0].seen == ["Bearer sk-of-the-test"]
    assert servers[1].seen == []
    assert "sk-of-the-test" not in str(error.value)
    assert "s3cr3t" not in str(error.value)


def test_keys_are_written_nowhere(servers, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-test")
    url = f"http://127.0.0.1:{servers[0].server_address[1]}/v1?api-key=qu3ry%2Bkey"
    labels = [{"text": "No.", "label": "full"}]
    config = AgreementConfig(labels, JudgeConfig("model", "m", url), plot=False)
    command = f"trueline eval judge --judge-url '{url}'"
    trueline.measure_agreement(config, tmp_path / "run", command=command)
    written = "".join(p.read_text() for p in (tmp_path / "run").iterdir() if p.is_file())
    for secret in ("sk-of-the-test", "qu3ry%2Bkey", "qu3ry+key"):
        assert secret not in written
    assert "You sent Bearer ***" in written
    assert "api-key=***" in written
    servers[0].status = 401
    with pytest.raises(ModelError) as error:
        Endpoint(url, "m").ask([[{"role": "user", "content": "Another."}]])
    assert not any(s in str(error.value) for s in ("sk-of", "qu3ry"))


def test_secrets_of_an_address():
    url = "https://u:pass@host:8/v1?key=abcd&b&short=x#f"
    assert redacted(url) == "https://***@host:8/v1?key=***&***&short=***"
    found = secrets_of(url, "sk-1")
    assert found[0] == "u:pass"
    assert set(found) == {"u:pass", "abcd", "pass", "sk-1"}
    assert hide("x abcd y u:pass", secrets_of(url)) == "x *** y ***"
    for wrong in ("http://", "http://a b/v1", "http://host:99999/v1", "ftp://x", "http://u:p@h"):
        with pytest.raises(ConfigError, match="base_url"):
            Endpoint(wrong, "m")


# Reports of odd folders


GOOD = {
    "metric": "refusal",
    "command": "trueline eval refusal",
    "settings": {"kind": "refusal"},
    "points": [
        {
            "label": "a",
            "baseline": False,
            "measures": {
                "over_refusal": {"value": 0.5, "n": 2, "low": 0.1, "high": 0.9, "outcomes": "10"}
            },
            "quality": {
                "length": {"value": 3.0},
                "repetition": {"value": 0.1},
                "perplexity": 2.0,
            },
        }
    ],
}


def written_run(folder: Path, results: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def changed(path: str, value: object) -> dict:
    """The good results with one part replaced, or left out for ...."""
    copy = json.loads(json.dumps(GOOD))
    *way, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    part = copy
    for name in way:
        part = part[name]
    if value is ...:
        del part[last]
    else:
        part[last] = value
    return copy


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *[(p, v) for p in ("metric", "command") for v in (5, None, ...)],
        *[("settings", v) for v in ([], None, "x", ...)],
        ("settings.data", []),
        *[("points", v) for v in ({}, 5, [], [5], [None], ["x"])],
        ("points.0.label", 5),
        ("points.0.baseline", ...),
        ("points.0.measures", {}),
        ("points.0.measures", 5),
        ("points.0.measures.over_refusal.value", "x"),
        ("points.0.measures.over_refusal.low", []),
        ("points.0.measures.over_refusal.outcomes", "abc"),
        ("points.0.measures.over_refusal.outcomes", [{}]),
        ("points.0.measures.over_refusal.n", "many"),
        ("points.0.quality", None),
        ("points.0.quality.perplexity", {}),
        ("points.0.quality.length", 5),
        ("numbers", []),
        ("numbers", {"a": {"low": "x", "high": 1, "value": 1, "n": 2}}),
        ("recommendation", 5),
        ("recommendation", {"label": "a"}),
        ("points", ...),
    ],
)
def test_results_that_no_measurement_wrote_are_refused(tmp_path, capsys, path, value):
    from trueline.cli import main

    folder = written_run(tmp_path / "run", changed(path, value))
    assert main(["report", str(folder), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_good_results_are_taken(tmp_path):
    folder = written_run(tmp_path / "run", GOOD)
    assert read_run(folder)["kind"] == "refusal"
    found = trueline.report([folder], tmp_path / "out")
    assert "| a | 50.0 % [10, 90] n=2 | 3.0 | 0.100 | 2.00 |" in found.markdown
    assert (tmp_path / "out" / "report.html").is_file()
    trueline.report([folder], tmp_path / "out")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "report.md").write_text("mine")
    with pytest.raises(ConfigError, match="holds no run but"):
        trueline.report([folder], tmp_path / "own")
    assert (tmp_path / "own" / "report.md").read_text() == "mine"
    with pytest.raises(ConfigError, match="named twice"):
        trueline.report([folder, folder], tmp_path / "out")


def test_a_report_obeys_nothing_that_a_run_says(tmp_path, capsys):
    from trueline.cli import main

    evil = json.loads(
        json.dumps(GOOD).replace('"label": "a"', '"label": "\\u001b[2J<img src=x>\\n# b"')
    )
    evil["command"] = "trueline\x1b]0;x\x07\n<script>alert(1)</script>"
    folder = written_run(tmp_path / "r", evil)
    assert main(["report", str(folder), "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    for shown in (text, (tmp_path / "out" / "report.md").read_text()):
        assert "\x1b" not in shown
        assert "\x07" not in shown
        assert "<img" not in shown
        assert not any(line.lstrip().startswith("# b") for line in shown.splitlines())
        assert not any(line.startswith("<script") for line in shown.splitlines())


def test_a_picture_is_no_link_and_is_one(tmp_path):
    folder = written_run(tmp_path / "r", GOOD)
    assert picture_of(folder) is None
    (folder / "plot.png").symlink_to("/etc/passwd")
    assert picture_of(folder) is None
    (folder / "plot.png").unlink()
    (folder / "plot.png").write_text("root:x:0:0")
    assert picture_of(folder) is None
    (folder / "plot.png").unlink()
    (folder / "plot.png").write_bytes(b"\x89PNG\r\n\x1a\n...")
    assert picture_of(folder) == folder / "plot.png"


def test_a_pictures_title_covers_no_subtitle_and_ends_in_the_picture():
    from matplotlib import rc_context

    from trueline.evals.pictures import draw_frontier, draw_grid
    from trueline.records.style import STYLE

    measure = {"value": 0.5, "low": 0.4, "high": 0.6}
    point = {
        "label": "alpha=1",
        "baseline": False,
        "settings": {"alpha": 1.0},
        "measures": {"over_refusal": measure, "harmful_refusal": measure},
        "quality": {"perplexity": 2.0},
    }
    title = "Refusal: self-cd on /a/very/long/path/to/the/folder/of/a/model/with-a-long-name-7b"
    with rc_context(STYLE):
        figure = draw_frontier([point], title, None, 0.97)
        figure.draw_without_rendering()
        axes, renderer = figure.axes[0], figure._get_renderer()
        shown = axes._left_title.get_window_extent(renderer)
        note = next(t for t in axes.texts if "intervals" in t.get_text())
        assert not shown.overlaps(note.get_window_extent(renderer))
        assert shown.x1 < figure.bbox.x1
        grid = draw_grid([point], title)
        grid.draw_without_rendering()
        assert grid._suptitle.get_window_extent(grid._get_renderer()).x1 < grid.bbox.x1
