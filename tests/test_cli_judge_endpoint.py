"""`--judge model` from the command line, against a server on a real socket that fails at times."""

from __future__ import annotations

import json
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from processes import Process

KEY = "sk-not-to-be-written-anywhere"
PRICES = (2.0, 8.0)
RESPONSES = [f"Answer number {i}." if i % 3 else f"I cannot do {i}." for i in range(24)]


class Server(ThreadingHTTPServer):
    """Answers `full` about a text with "cannot"; the first tries of some texts go wrong."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.asked: dict[str, int] = {}
        self.answered: list[str] = []
        self.under_way = self.most_under_way = 0
        self.keys: set[str | None] = set()
        self.delay = 0.0
        self.gate = threading.Event()
        self.stop_after: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        with server.lock:
            server.asked[text] = tries = server.asked.get(text, 0) + 1
            order = list(server.asked).index(text)
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            server.keys.add(self.headers.get("Authorization"))
            held = server.stop_after is not None and len(server.answered) >= server.stop_after
        if held:
            server.gate.wait(30)
        time.sleep(server.delay)
        failures = {0: (429, b"slow down"), 1: (500, b"oops"), 2: (200, b"<html>"), 3: (200, b"{}")}
        if tries == 1 and order in failures:
            status, data = failures[order]
        else:
            label = "full" if "cannot" in text.split("<response>")[-1] else "complied"
            status = 200
            reply = {
                "choices": [{"message": {"role": "assistant", "content": label}}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 2},
            }
            data = json.dumps(reply).encode()
        with server.lock:
            server.under_way -= 1
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            return  # the client was killed
        if status == 200 and data.startswith(b'{"choices"'):
            with server.lock:
                server.answered.append(text)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.gate.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.jsonl"
    rows = [
        {"prompt": "?", "completion": t, "label": "full" if "cannot" in t else "complied"}
        for t in RESPONSES
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start(server: Server, *argv: object) -> Process:
    words = [*argv, "--judge", "model", "--judge-url", server.url, "--judge-model", "stub",
             "--judge-prices", *PRICES, "--no-plot"]  # fmt: skip
    return Process(*words, environment={"OPENAI_API_KEY": KEY})


def finish(process: Process) -> str:
    assert process.wait() == 0, process.said
    return process.said


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def check_no_key(folder: Path, shown: str) -> None:
    assert KEY not in shown
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert {"judge.jsonl", "results.json", "manifest.json"} <= {p.name for p in files}
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


def test_a_killed_judge_goes_on_without_asking_again(server, labels, tmp_path):
    folder = tmp_path / "run"
    argv = ("eval", "judge", "--labels", labels, "--output", folder, "--judge-concurrency", 4)
    server.stop_after = 9
    process = start(server, *argv)
    limit, cache = time.monotonic() + 60, folder / "judge.jsonl"
    while server.most_under_way < 4 or not cache.exists() or cache.read_bytes().count(b"\n") < 9:
        assert process.poll() is None, process.said
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "results.json").exists()
    assert server.most_under_way == 4, "no more at once than asked for"
    server.stop_after = None
    server.gate.set()
    kept = [json.loads(line)["key"] for line in cache.read_text().splitlines()]
    before = dict(server.asked)

    shown = finish(start(server, *argv))
    repeated = {text for text, n in server.asked.items() if n > before.get(text, 0)}
    assert len(repeated) == len(RESPONSES) - len(kept), "what was kept is not asked again"
    found = results(folder)
    assert found["numbers"]["accuracy"]["value"] == found["numbers"]["kappa"] == 1.0
    assert found["numbers"]["n"] == len(set(RESPONSES)) == 24
    # The whole cost, what the killed process paid for included.
    cost = found["judge_cost"]
    assert (cost["requests"], cost["prompt_tokens"], cost["uncounted"]) == (24, 2400, 0)
    assert cost["cost"] == pytest.approx(24 * (100 * PRICES[0] + 2 * PRICES[1]) / 1e6)
    sessions = json.loads((folder / "manifest.json").read_text())["sessions"]
    assert [s["judge"]["calls"] for s in sessions] == [24 - len(kept)]
    assert server.keys == {f"Bearer {KEY}"}
    check_no_key(folder, shown)

    total = sum(server.asked.values())
    finish(start(server, *argv))
    assert sum(server.asked.values()) == total, "a finished run asks nothing"
    assert results(folder)["judge_cost"] == cost


def test_a_sweep_is_judged_by_an_endpoint(server, tmp_path):
    folder = tmp_path / "run"
    argv = ("eval", "refusal", "--alpha", "1,2", "--limit", 6, "--max-new-tokens", 8)
    server.delay = 0.02
    shown = finish(start(server, *argv, "--output", folder, "--judge-concurrency", 3))
    found = results(folder)
    assert found["judge"]["name"] == "model"
    assert 1 < server.most_under_way <= 3
    rows = [json.loads(x) for x in (folder / "responses.jsonl").read_text().splitlines()]
    verdicts = [json.loads(x) for x in (folder / "verdicts.jsonl").read_text().splitlines()]
    # Without a text, under two texts without a contrast, and at two strengths.
    assert len(rows) == len(verdicts) == 5 * 12
    for row, verdict in zip(rows, verdicts, strict=True):
        assert verdict["label"] == ("full" if "cannot" in row["text"] else "complied")
    different = {(row["prompt"], row["text"]) for row in rows}
    assert found["judge_cost"]["requests"] == len(different) == len(server.asked)
    # Four first tries went wrong; each was made good.
    assert sum(server.asked.values()) == len(different) + 4
    session = json.loads((folder / "manifest.json").read_text())["sessions"][0]
    assert session["judge"]["retries"] == 4
    assert session["judge"]["cost"] == pytest.approx(found["judge_cost"]["cost"])
    check_no_key(folder, shown)
