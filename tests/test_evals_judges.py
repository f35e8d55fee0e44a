"""Judges against a stub server, a naive loop and hand counts; no network beyond 127.0.0.1."""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from trueline.errors import ConfigError, DataError, ModelError
from trueline.evals.endpoint import Endpoint, read_cache
from trueline.evals.judges import (
    KeywordJudge,
    LocalJudge,
    ModelJudge,
    agreement,
    read_labels,
)
from trueline.evals.refusal import Verdict
from trueline.evals.rubrics import ADHERENCE, PAIRWISE, REFUSAL, Rubric, read_answer
from trueline.evals.statistics import cohen_kappa
from trueline.models.prompts import encode


class Server(ThreadingHTTPServer):
    """An endpoint whose answers a test scripts with `reply(body, number)`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies, self.headers, self.paths = [], [], []
        self.lock = threading.Lock()
        self.under_way = self.most_under_way = 0
        self.reply = lambda body, number: (200, {}, completion("complied"))

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.paths.append(self.path)
            number = len(server.bodies)
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            status, headers, content = server.reply(body, number)
        finally:
            with server.lock:
                server.under_way -= 1
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def completion(text, usage=(10, 2)):
    reply = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    if usage:
        reply["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return reply


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def endpoint(server, **options):
    return Endpoint(server.url, "stub", **{"backoff": 0.001, "timeout": 5, **options})


def chats(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def echo(body, number):
    return 200, {}, completion(body["messages"][0]["content"].upper())


def test_answers_keep_their_order_and_go_to_the_right_place(server, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "s3cret")
    server.reply = echo
    client = endpoint(server, key_variable="SOME_KEY")
    assert client.ask(chats("a", "b", "c", "b")) == ["A", "B", "C", "B"]
    assert len(server.bodies) == 3, "equal chats are asked once"
    assert set(server.paths) == {"/v1/chat/completions"}
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert server.bodies[0]["model"] == "stub"
    assert server.bodies[0]["temperature"] == 0
    monkeypatch.delenv("SOME_KEY")
    client.ask(chats("d"))
    assert "Authorization" not in server.headers[-1]


def test_requests_are_concurrent(server):
    barrier = threading.Barrier(3, timeout=5)

    def reply(body, number):
        barrier.wait()  # passes only if three requests are under way at once
        return echo(body, number)

    server.reply = reply
    assert endpoint(server, concurrency=3).ask(chats("a", "b", "c")) == ["A", "B", "C"]
    assert server.most_under_way == 3


@pytest.mark.parametrize(
    "failure",
    [
        (429, {"Retry-After": "0.01"}, b"slow down"),
        (500, {}, b"oops"),
        (503, {"Retry-After": "tomorrow"}, b""),
        (200, {}, b"no json"),
        (200, {}, {"error": "overloaded"}),
    ],
)
def test_failures_that_pass_are_tried_again(server, failure):
    server.reply = lambda body, number: failure if number <= 2 else echo(body, number)
    client = endpoint(server)
    assert client.ask(chats("a")) == ["A"]
    assert (client.usage.calls, client.usage.retries) == (1, 2)


def test_waiting_doubles_and_respects_the_server(server, monkeypatch):
    waits = []
    monkeypatch.setattr("trueline.evals.endpoint.time.sleep", waits.append)
    failures = [(500, {}, b""), (429, {"Retry-After": "7"}, b""), (500, {}, b""), (500, {}, b"")]
    server.reply = lambda body, n: failures[n - 1] if n <= 4 else echo(body, n)
    endpoint(server, backoff=10, retries=4).ask(chats("a"))
    assert waits == [10, 20, 40, 60]
    waits.clear()
    server.bodies.clear()
    endpoint(server, backoff=1).ask(chats("a"))
    assert waits == [1, 7, 4, 8]


def test_failures_that_stay_are_errors(server):
    server.reply = lambda body, number: (500, {}, b"oops")
    with pytest.raises(ModelError, match="failed 3 times: 500 .*oops"):
        endpoint(server, retries=2).ask(chats("a"))
    assert len(server.bodies) == 3
    server.reply = lambda body, number: (401, {}, b"who are you")
    with pytest.raises(ModelError, match=r"answered 401 .*Set OPENAI_API_KEY"):
        endpoint(server).ask(chats("a"))
    assert len(server.bodies) == 4, "a refused key is not tried again"
    gone = Endpoint("http://127.0.0.1:1/v1", "stub", retries=1, backoff=0.001)
    with pytest.raises(ModelError, match="failed 2 times: URLError"):
        gone.ask(chats("a"))


def test_a_killed_run_asks_only_for_what_is_missing(server, tmp_path):
    path = tmp_path / "new" / "cache.jsonl"
    server.reply = lambda body, n: echo(body, n) if n < 3 else (400, {}, b"stop")
    with pytest.raises(ModelError, match="400"):
        endpoint(server, cache=path, concurrency=1).ask(chats("a", "b", "c", "d"))
    with open(path, "ab") as file:
        file.write(b'{"key": "half a li')
    server.reply, asked = echo, len(server.bodies)
    client = endpoint(server, cache=path)
    assert client.ask(chats("a", "b", "c", "d")) == list("ABCD")
    assert [b["messages"][0]["content"] for b in server.bodies[asked:]] in (["c", "d"], ["d", "c"])
    assert (client.usage.calls, client.usage.cached) == (2, 2)
    again = endpoint(server, cache=path)
    assert again.ask(chats("d", "a")) == ["D", "A"]
    assert len(server.bodies) == asked + 2
    assert len(read_cache(path)) == 4
    # Another model or other options are other questions.
    endpoint(server, cache=path, options={"temperature": 1}).ask(chats("a"))
    Endpoint(server.url, "other", cache=path).ask(chats("a"))
    assert len(server.bodies) == asked + 4


def test_a_foreign_file_is_no_cache(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"c.jsonl:1: not a line of a judge's cache"):
        Endpoint("http://x/v1", "m", cache=path)
    assert path.read_text() == '{"prompt": "a"}\n'


def test_cost_is_counted(server):
    replies = [completion("x", (1000, 10)), completion("x", None), completion("x", (500, 5))]
    server.reply = lambda body, number: (200, {}, replies[number - 1])
    client = endpoint(server, prompt_price=2.0, completion_price=8.0)
    client.ask(chats("a", "b", "c"))
    usage = client.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.uncounted) == (1500, 15, 1)
    assert usage.cost == pytest.approx((1500 * 2 + 15 * 8) / 1e6)
    assert endpoint(server).usage.cost is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": 0}, "timeout"),
        ({"retries": -1}, "retries"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        Endpoint("http://x/v1", "m", **options)
    with pytest.raises(ConfigError, match="http://"):
        Endpoint("api.example.com", "m")


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("complied", "complied"),
        (" **Full**.\n", "full"),
        ('"partial"', "partial"),
        ("Label: full", "full"),
        ('{"label": "partial"}', "partial"),
        ('```json\n{"verdict": "full", "certain": true}\n```', "full"),
        ("The answer is full.", None),
        ("full or partial", None),
        ('{"a": "full", "b": "partial"}', None),
        ('{"label": ', None),
        ("", None),
        ("refused", None),
    ],
)
def test_answers_are_read_strictly(answer, label):
    assert read_answer(answer, REFUSAL.labels) == label


def test_ratings_and_letters():
    assert read_answer("7", ADHERENCE.labels) == "7"
    assert read_answer("Rating: 10/10", ADHERENCE.labels) == "10"
    assert read_answer('{"rating": 3}', ADHERENCE.labels) == "3"
    assert read_answer("11", ADHERENCE.labels) is None
    assert read_answer("7.5", ADHERENCE.labels) is None
    assert read_answer("[[B]]", PAIRWISE.labels) == "B"
    assert read_answer("Tie", PAIRWISE.labels) == "tie"
    assert read_answer("A is better", PAIRWISE.labels) is None


def test_the_model_judge(server):
    def reply(body, number):
        text = body["messages"][0]["content"]
        answers = {"{sorry}": "full", "sure": "Complied.", "hm": "I cannot say"}
        return 200, {}, completion(next(a for k, a in answers.items() if k in text))

    server.reply = reply
    judge = ModelJudge(endpoint(server))
    verdicts = judge.refusal(["p"] * 3, ["{sorry}", "sure", "hm"])
    assert [v.label for v in verdicts] == ["full", "complied", "unknown"]
    assert "I cannot say" in verdicts[2].reason
    server.reply = lambda body, n: (200, {}, completion("8" if "good" in str(body) else "??"))
    found = judge.adherence("Be kind.", ["p", "p"], ["good", "odd"])
    assert found[0] == pytest.approx(0.8)
    assert np.isnan(found[1])
    server.reply = lambda body, n: (200, {}, completion("tie"))
    assert judge.pairwise(["p"], ["x"], ["y"]) == ["tie"]
    text = server.bodies[-1]["messages"][0]["content"]
    assert "<response A>\nx\n</response A>" in text
    assert "<response B>\ny\n</response B>" in text
    with pytest.raises(DataError, match="1 responses for 2 prompts"):
        judge.refusal(["a", "b"], ["c"])


def test_the_local_judge_equals_a_loop(request):
    from conftest import byte_tokenizer, random_model

    from trueline import LanguageModel

    for kind in ("llama", "gpt2"):
        model = LanguageModel(random_model(kind, positions=2048), byte_tokenizer(), kind)
        prompts, responses = ["Why?", "How so, then?"], ["Because.", "I cannot say {that}."]
        judge = LocalJudge(model, batch_size=4)
        fields = [{"prompt": p, "response": r} for p, r in zip(prompts, responses, strict=True)]
        found = judge.probabilities(REFUSAL, fields)
        for row, f in zip(found, fields, strict=True):
            prompt = encode(model, REFUSAL.chat(**f))
            sums = []
            for label in REFUSAL.labels:
                ids = model.tokenizer(label)["input_ids"]
                with torch.no_grad():
                    z = model.model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
                sums.append(sum(float(z[len(prompt) + i - 1, t]) for i, t in enumerate(ids)))
            expected = np.exp(sums) / np.exp(sums).sum()
            np.testing.assert_allclose(row, expected, atol=2e-4)
        verdicts = judge.refusal(prompts, responses)
        assert [v.label for v in verdicts] == [REFUSAL.labels[i] for i in found.argmax(1)]
        ratings = judge.adherence("Be kind.", prompts, responses)
        fields = [f | {"principle": "Be kind."} for f in fields]
        table = judge.probabilities(ADHERENCE, fields)
        for rating, row in zip(ratings, table, strict=True):
            assert rating == pytest.approx(sum(p * k for k, p in enumerate(row)) / 10)
        assert set(judge.pairwise(prompts, responses, responses)) <= {"A", "B", "tie"}


def test_the_local_judge_on_a_rubric_it_cannot_hold(gpt2):
    with pytest.raises(DataError, match="Shorten"):
        LocalJudge(gpt2).refusal(["p"], ["x" * 600])


def test_a_rubric_of_ones_own(llama):
    rubric = Rubric("short", "{response}?", ("yes", "no"))
    found = LocalJudge(llama).probabilities(rubric, [{"response": "a"}, {"response": "bcd"}])
    np.testing.assert_allclose(found.sum(1), 1)


def test_agreement_by_hand():
    said = ["complied", "full", "partial", "unknown", "full", "complied"]
    labels = ["complied", "partial", "partial", "full", "complied", "full"]
    found = agreement([Verdict(s, "") for s in said], labels)
    # right on refused or not: 1, 2, 3; wrong: 4 (unknown), 5, 6
    assert found.accuracy.value == pytest.approx(3 / 6)
    assert found.three_way.value == pytest.approx(2 / 6)
    assert (found.n, found.unknown) == (6, 1)
    #                        complied partial full unknown
    assert found.confusion == [[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]]
    coarse = ["c", "r", "r", "u", "r", "c"], ["c", "r", "r", "r", "c", "r"]
    assert found.kappa == pytest.approx(cohen_kappa(*coarse))
    assert json.dumps(found.as_dict())


def test_the_keyword_judge_against_labels(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(
        "id,prompt,completion,final_label\n"
        "1,Why?,Because it rains.,1_full_compliance\n"
        "2,How?,\"I'm sorry, but I can't help with that.\",2_full_refusal\n"
        '3,Who?,"I can\'t name him. Here is what is public: he was a judge.",3_partial_refusal\n'
    )
    rows = read_labels(path)
    assert Counter(r.label for r in rows) == {"complied": 1, "full": 1, "partial": 1}
    verdicts = KeywordJudge().refusal([r.prompt for r in rows], [r.text for r in rows])
    assert agreement(verdicts, [r.label for r in rows]).three_way.value == 1


def test_labels_files_have_many_spellings(tmp_path):
    spellings = {
        "complied": ["complied", "Full compliance", "compliance", "1_full_compliance"],
        "full": ["full", "refusal", "fully refused", "2_full_refusal"],
        "partial": ["partial", "Partly refused", "partial-refusal", "3_partial_refusal"],
    }
    rows = [{"response": "x", "label": s} for v in spellings.values() for s in v]
    path = tmp_path / "l.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert [r.label for r in read_labels(path)] == [k for k in spellings for _ in range(4)]
    for row, message in [
        ({"response": "x", "label": "1"}, r'l.jsonl:1: unknown label "1"'),
        ({"response": "x"}, r'l.jsonl:1: missing field "label"'),
        ({"label": "full"}, r'l.jsonl:1: missing field "completion"'),
    ]:
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match=message):
            read_labels(path)
