"""The server, through the official client and over bare HTTP, on the bundled model."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="the server needs: pip install 'trueline[serve]'")
pytest.importorskip("openai", reason="the server's tests need the package openai")

import httpx
import openai
import uvicorn
from processes import Process

from trueline import (
    LinearAlignment,
    Request,
    SamplingParams,
    SelfCD,
    generate,
    load_model,
    make_method,
)
from trueline.engine.torch_backend import TorchBackend
from trueline.errors import ConfigError, DataError
from trueline.methods import METHODS
from trueline.server.app import build_app
from trueline.server.config import Preset, ServeConfig, read_keys, read_presets
from trueline.server.engine_loop import Drop, News, Told
from trueline.server.links import Messages, packed
from trueline.server.pages import describe
from trueline.settings.options import options_of, ranges_of

MOON = [{"role": "user", "content": "What is the moon?"}]
PIRATE = {"method": "linear-alignment", "principle": "Talk like a pirate."}


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", dtype="float32")


@contextlib.contextmanager
def serving(model, config):
    """A server on a free port of the loopback; yields its address and its application."""
    app = build_app(model, config)
    settings = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", app.state.server
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(tiny):
    presets = {"pirate": Preset(LinearAlignment("Talk like a pirate."), {"temperature": 0.0})}
    with serving(tiny, ServeConfig(presets=presets, max_tokens=64)) as (address, inside):
        yield address, inside


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_python_of_the_docs_gets_an_answer(server, tiny, capsys):
    page = (Path(__file__).parents[1] / "docs/serving.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code.replace("http://127.0.0.1:8000", server[0]), {})
    method = LinearAlignment("Talk like a pirate.", ratio=2)
    assert capsys.readouterr().out.strip() == offline(tiny, method)[0].text.strip()


def offline(tiny, method=None, seed=0, **sampling):
    params = SamplingParams(**{"max_new_tokens": 64, "temperature": 0.0} | sampling)
    return generate(tiny, [Request(MOON, method, params, seed)])


def test_the_official_client_gets_what_generate_gives(client, tiny):
    for method, fields in [(None, None), (LinearAlignment("Talk like a pirate."), PIRATE)]:
        for temperature, seed in [(0.0, 0), (0.8, 7)]:
            got = client.chat.completions.create(
                model="tiny", messages=MOON, temperature=temperature, seed=seed, max_tokens=24,
                extra_body={"alignment": fields} if fields else {},
            )  # fmt: skip
            [own] = offline(tiny, method, seed, temperature=temperature, max_new_tokens=24)
            assert got.choices[0].message.content == own.text
            assert got.choices[0].finish_reason == own.finish_reason
            assert got.usage.completion_tokens == len(own.token_ids)
            assert got.usage.branch_prompt_tokens == list(own.prompt_tokens)


def test_streams_say_the_same_piece_by_piece(client, tiny):
    stream = client.chat.completions.create(
        model="tiny", messages=MOON, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"alignment": PIRATE},
    )  # fmt: skip
    chunks = list(stream)
    [own] = offline(tiny, LinearAlignment("Talk like a pirate."))
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == own.text
    assert len(texts) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == own.finish_reason
    assert chunks[-1].usage.completion_tokens == len(own.token_ids)


def test_samples_stops_and_both_names_of_the_limit(client, tiny):
    got = client.chat.completions.create(
        model="tiny", messages=MOON, n=3, seed=5, temperature=1, max_completion_tokens=12
    )
    own = offline(tiny, seed=5, n=3, temperature=1.0, max_new_tokens=12)
    assert [c.message.content for c in got.choices] == [c.text for c in own]
    assert [c.index for c in got.choices] == [0, 1, 2]
    [whole] = offline(tiny)
    word = whole.text.split()[2]
    cut = client.chat.completions.create(model="tiny", messages=MOON, temperature=0, stop=word)
    assert cut.choices[0].message.content == whole.text.split(word)[0]
    assert cut.choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_the_combined_distribution(client, tiny):
    got = client.chat.completions.create(
        model="tiny", messages=MOON, temperature=0, logprobs=True, top_logprobs=3, max_tokens=10,
        extra_body={"alignment": PIRATE},
    )  # fmt: skip
    method = LinearAlignment("Talk like a pirate.")
    [own] = offline(tiny, method, logprobs=True, max_new_tokens=10)
    tokens = got.choices[0].logprobs.content
    assert [t.logprob for t in tokens] == pytest.approx(own.logprobs, abs=1e-4)
    for token in tokens:
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-6)
        assert 1 <= len(token.top_logprobs) <= 3
    plain = client.completions.create(
        model="tiny", prompt="The moon is", temperature=0, logprobs=2, max_tokens=5
    )
    found = plain.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset)
    assert plain.choices[0].text == "".join(found.tokens)[: len(plain.choices[0].text)]


def test_text_completions_take_several_prompts(client, tiny):
    got = client.completions.create(
        model="tiny", prompt=["The moon is", "A cat is"], temperature=0, max_tokens=8
    )
    from dataclasses import replace

    params = SamplingParams(max_new_tokens=8)
    own = generate(replace(tiny, raw=True), ["The moon is", "A cat is"], sampling=params)
    assert [c.text for c in got.choices] == [c.text for c in own]


def test_presets_are_models(client, tiny):
    assert [m.id for m in client.models.list()] == ["tiny", "tiny:pirate"]
    got = client.chat.completions.create(model="tiny:pirate", messages=MOON)
    [own] = offline(tiny, LinearAlignment("Talk like a pirate."))
    assert got.choices[0].message.content == own.text
    again = client.chat.completions.create(
        model="tiny:pirate", messages=MOON, extra_body={"vllm_xargs": {"ratio": 0}}
    )
    [prompted] = offline(tiny, LinearAlignment("Talk like a pirate.", ratio=0))
    assert again.choices[0].message.content == prompted.text


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """Two adapters of the bundled model, in folders."""
    peft, home = pytest.importorskip("peft"), tmp_path_factory.mktemp("adapters")
    found = {}
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(load_model("tiny", dtype="float32").model, config)
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.5)
        model.save_pretrained(home / name)
        found[name] = home / name
    return found


def test_adapters_are_models_and_run_together(adapters):
    """One server, four models, at once: each answer is that of its adapter alone."""
    presets = {"pirate": Preset(LinearAlignment("Talk like a pirate."), {"temperature": 0.0})}
    model = load_model("tiny", dtype="float32", adapters=adapters)
    names, found = ["tiny", "first", "second"], {}
    names += [f"{name}:pirate" for name in names]
    with serving(model, ServeConfig(presets=presets)) as (address, _):
        listed = httpx.get(f"{address}/v1/models").json()["data"]
        assert [m["id"] for m in listed] == names
        assert [m.get("parent") for m in listed] == [None, *["tiny"] * 5]

        def ask(i):
            body = {"model": names[i % 6], "messages": MOON, "temperature": 0, "max_tokens": 20}
            answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
            found[i] = answer.json()["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(18)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wrong = httpx.post(
            f"{address}/v1/chat/completions", json={"model": "frist", "messages": MOON}
        )
        assert wrong.status_code == 404
        assert 'Did you mean "first"?' in wrong.json()["error"]["message"]
    for place, name in enumerate(names[:3]):
        alone = load_model("tiny", dtype="float32", adapter=adapters.get(name))
        for i, method in ((place, None), (place + 3, LinearAlignment("Talk like a pirate."))):
            [own] = offline(alone, method, max_new_tokens=20)
            assert {found[i], found[i + 6], found[i + 12]} == {own.text}
    assert len({found[0], found[1], found[2]}) == 3
    with pytest.raises(ConfigError, match="both called"):
        build_app(model, ServeConfig(name="first"))


def test_parts_of_text_are_joined(client, tiny):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "the moon?"}]
    got = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], temperature=0
    )
    assert got.choices[0].message.content == offline(tiny)[0].text


def test_a_trace_says_what_the_method_changed(client):
    got = client.chat.completions.create(
        model="tiny", messages=MOON, temperature=0, extra_body={"alignment": PIRATE, "trace": True}
    )
    trace = got.choices[0].trace
    assert len(trace) == got.usage.completion_tokens
    assert {len(t["branches"]) for t in trace} == {2}
    assert max(t["branches"][0]["kl"] for t in trace) > 0.1
    assert {a["token_id"] for a in trace[0]["alternatives"]} >= {trace[0]["token_id"]}
    assert "".join(t["text"] for t in trace) == got.choices[0].message.content


def test_many_clients_at_once_get_their_own_texts(server, tiny):
    """Requests of different methods, lengths and seeds join one batch and leave it."""
    methods = [None, PIRATE, {"method": "self-cd", "alpha": 2.0}]
    ours = [None, LinearAlignment("Talk like a pirate."), SelfCD(alpha=2.0)]
    found = {}

    def ask(i):
        body = {"model": "tiny", "messages": MOON, "temperature": 0.9, "seed": i}
        body |= {"max_tokens": 3 + i % 17}
        if methods[i % 3]:
            body["alignment"] = methods[i % 3]
        time.sleep(0.003 * (i % 11))
        answer = httpx.post(f"{server[0]}/v1/chat/completions", json=body, timeout=60)
        found[i] = answer.json()["choices"][0]["message"]["content"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(33)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(33):
        [own] = offline(tiny, ours[i % 3], i, temperature=0.9, max_new_tokens=3 + i % 17)
        assert found[i] == own.text
    assert not server[1].engine.jobs


@pytest.mark.parametrize("seed", range(4))
def test_requests_that_take_free_places_keep_their_branches_together(tiny, seed):
    """Places free up anywhere; the branches of who takes them may lie far apart."""
    methods = [None, LinearAlignment("Talk like a pirate."), SelfCD(alpha=2.0)]
    requests = [
        Request(MOON, methods[i % 3], SamplingParams(3 + i % 17, temperature=0.9), i)
        for i in range(33)
    ]
    alone = [c.token_ids for request in requests for c in generate(tiny, [request])]
    chance, backend = random.Random(seed), TorchBackend(tiny, admission="each_step")
    order = chance.sample(range(33), 33)
    found: dict = {}
    running: dict = {}
    while order or running:
        for _ in range(min(len(order), chance.randint(0, 4))):
            number = order.pop()
            running[backend.add(backend.encode(requests[number]))] = number
        for step in backend.step():
            found.setdefault(running[step.ticket], []).append(step.token_id)
            if step.finish_reason:
                del running[step.ticket]
    assert [found[i] for i in range(33)] == alone


def test_who_goes_away_frees_its_rows(server):
    body = {"model": "tiny", "messages": MOON, "n": 4, "max_tokens": 64, "stream": True}
    body |= {"stop": ["never said"], "alignment": PIRATE, "temperature": 1.5}
    with httpx.stream("POST", f"{server[0]}/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
    until = time.monotonic() + 5
    while server[1].engine.jobs and time.monotonic() < until:
        time.sleep(0.01)
    assert not server[1].engine.jobs
    assert client_metrics(server)["trueline:groups_running"] == 0


def client_metrics(server):
    lines = httpx.get(f"{server[0]}/metrics").text.splitlines()
    found = (re.match(r"([\w:]+)\{[^}]*\} ([\d.e+-]+)$", line) for line in lines)
    return {m[1]: float(m[2]) for m in found if m}


def test_metrics_count_tokens_and_what_the_contrast_did(server, client):
    before = client_metrics(server)
    got = client.chat.completions.create(
        model="tiny", messages=MOON, temperature=0, extra_body={"alignment": PIRATE}
    )
    after = client_metrics(server)
    tokens = after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]
    assert tokens == got.usage.completion_tokens
    assert after["trueline:traced_tokens_total"] > before.get("trueline:traced_tokens_total", 0)
    assert after["vllm:num_requests_waiting"] == 0


WRONG = {
    "no JSON": (b"{", 400, "JSON"),
    "no JSON named": (b"{}", 400, "Content-Type: application/json"),
    "not a table": (b"[1]", 400, "body"),
    "no model": ({"messages": MOON}, 400, "`model` is missing"),
    "no messages": ({"model": "tiny"}, 400, "`messages` is missing"),
    "unknown model": ({"model": "tinny", "messages": MOON}, 404, 'Did you mean "tiny"?'),
    "unknown preset": ({"model": "tiny:pirat", "messages": MOON}, 404, "tiny:pirate"),
    "unknown field": ({"topp": 1}, 400, "Unknown field `topp`"),
    "no messages in it": ({"messages": []}, 400, "no user message"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role"),
    "empty content": ({"messages": [{"role": "user", "content": " "}]}, 400, "empty"),
    "null content": ({"messages": [{"role": "user", "content": None}]}, 400, "content"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        "only parts of text",
    ),
    "surrogate": (
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
        400,
        "surrogate",
    ),
    "late system": ({"messages": [*MOON, {"role": "system", "content": "x"}]}, 400, "first"),
    "temperature": ({"temperature": -1}, 400, "`temperature`"),
    "temperature as text": ({"temperature": "hot"}, 400, "`temperature`"),
    "top_p": ({"top_p": 1.5}, 400, "`top_p` must be"),
    "n of zero": ({"n": 0}, 400, "`n`"),
    "too many": ({"n": 100}, 400, "branches"),
    "too long": ({"max_tokens": 65}, 400, "[1, 64]"),
    "both limits": ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "not both"),
    "stop": ({"stop": [""]}, 400, "`stop`"),
    "stops": ({"stop": list("abcdefghijklmnopqrst")}, 400, "`stop` may hold"),
    "seed": ({"seed": 2**70}, 400, "`seed`"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "`tools` has no counterpart"),
    "penalty": ({"frequency_penalty": 0.5}, 400, "`frequency_penalty` has no counterpart"),
    "format": ({"response_format": {"type": "json_object"}}, 400, "`response_format`"),
    "top without logprobs": ({"top_logprobs": 3}, 400, "needs `logprobs`"),
    "many top": ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    "stream options": ({"stream_options": {"include_usage": True}}, 400, "needs `stream`"),
    "method": ({"alignment": {"method": "linear-aligment"}}, 400, 'mean "linear-alignment"?'),
    "method field": ({"alignment": {"method": "self-cd", "ratio": 1}}, 400, "no option `ratio`"),
    "method value": ({"alignment": {**PIRATE, "ratio": "big"}}, 400, "`ratio`"),
    "empty principle": ({"alignment": {**PIRATE, "principle": ""}}, 400, "`principle` is empty"),
    "both forms": ({"alignment": PIRATE, "vllm_xargs": PIRATE}, 400, "not both"),
    "not a method": ({"alignment": "pirate"}, 400, "alignment"),
    "long prompt": ({"messages": [{"role": "user", "content": "a b " * 4000}]}, 400, "positions"),
    "large body": ({"messages": [{"role": "user", "content": "a" * 2_000_000}]}, 413, "larger"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_bodies_are_answered_clearly(server, case):
    content, status, words = WRONG[case]
    if isinstance(content, dict):
        whole = {"model": "tiny", "messages": MOON} | content
        if case.startswith("no m") and case != "no messages in it":
            whole = content
        content = json.dumps(whole).encode()
    kind = {"Content-Type": "text/plain" if case == "no JSON named" else "application/json"}
    answer = httpx.post(f"{server[0]}/v1/chat/completions", content=content, headers=kind)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert {"message", "type", "param", "code"} == set(error)
    assert server[1].engine.alive


def test_wrong_routes(server):
    assert httpx.get(f"{server[0]}/v1/nowhere").json()["error"]["message"].startswith("GET /v1/now")
    assert httpx.get(f"{server[0]}/v1/chat/completions").status_code == 405
    assert httpx.get(f"{server[0]}/health").status_code == 200
    assert httpx.get(f"{server[0]}/version").json()["version"]
    assert httpx.get(f"{server[0]}/docs").status_code == 200


def test_keys_are_asked_for(tiny):
    with serving(tiny, ServeConfig(keys=("first", "second"))) as (address, _):
        assert httpx.get(f"{address}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first"}):
            answer = httpx.get(f"{address}/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for key in ("first", "second"):
            with openai.OpenAI(base_url=f"{address}/v1", api_key=key) as client:
                assert [m.id for m in client.models.list()] == ["tiny"]


@pytest.mark.parametrize(
    ("overrides", "fields", "words"),
    [
        (None, {"method": "plain"}, "is fixed"),
        (None, {"alpha": 0.0}, "is fixed"),
        ("nothing", {"alpha": 0.0}, "is fixed"),
        ("settings", {"method": "plain"}, "may change its settings only"),
        ("settings", {"alpha": 1.0}, None),
        ("anything", {"method": "plain"}, None),
    ],
)
def test_a_fixed_method_is_not_for_clients(overrides, fields, words):
    from trueline.server.asks import method_for

    config = ServeConfig(method=SelfCD(), overrides=overrides)
    if words is None:
        assert method_for(fields, None, config) != SelfCD()
    else:
        with pytest.raises(ConfigError, match=words):
            method_for(fields, None, config)
    assert method_for(None, None, config) == SelfCD()


def test_a_full_queue_says_when_to_come_again(tiny):
    with serving(tiny, ServeConfig(max_waiting=1, max_running=1)) as (address, inside):
        body = {"model": "tiny", "messages": MOON, "n": 8, "max_tokens": 400, "temperature": 1.9}
        answers = []

        def ask():
            answers.append(httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60))

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        refused = [a for a in answers if a.status_code == 429]
        assert refused
        assert {a.status_code for a in answers} == {200, 429}
        assert all(int(a.headers["Retry-After"]) >= 1 for a in refused)
        assert inside.engine.alive


def test_a_request_may_not_take_for_ever(tiny):
    with serving(tiny, ServeConfig(timeout=0.02)) as (address, inside):
        body = {"model": "tiny", "messages": MOON, "n": 8, "temperature": 1.9}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body)
        assert answer.status_code == 504
        assert "more than 0.02 s" in answer.json()["error"]["message"]
        assert inside.engine.alive


def test_an_engine_that_dies_is_seen(tiny):
    with serving(tiny, ServeConfig()) as (address, inside):

        def breaks():
            raise RuntimeError("out of memory")

        inside.link.backend.step = breaks
        answer = httpx.post(
            f"{address}/v1/chat/completions", json={"model": "tiny", "messages": MOON}
        )
        assert answer.status_code == 503
        assert httpx.get(f"{address}/health").status_code == 503


def test_presets_and_keys_come_from_files(tmp_path, monkeypatch):
    file = tmp_path / "presets.toml"
    file.write_text('[safe]\nmethod = "self-cd"\nalpha = 2\nsampling = { temperature = 0.5 }\n')
    assert read_presets(file) == {"safe": Preset(SelfCD(alpha=2), {"temperature": 0.5})}
    for text, words in [
        ("", "no preset"),
        ("[a b]", "cannot be read"),
        ('["a b"]\nmethod = "plain"', "no preset"),
        ("x = 1", "no preset"),
        ('[x]\nmethod = "selfcd"', "Did you mean"),
        ('[x]\nmethod = "plain"\nsampling = { temp = 1 }', "Unknown in `sampling`: temp"),
        ('[x]\nmethod = "plain"\nsampling = { temperature = -1 }', "`temperature`"),
    ]:
        file.write_text(text)
        with pytest.raises(DataError, match=re.escape(str(file))) as found:
            read_presets(file)
        assert words in str(found.value)
    keys = tmp_path / "keys"
    keys.write_text("# for the team\nabc\n\ndef\n")
    monkeypatch.setenv("TRUELINE_API_KEYS", "ghi,abc")
    assert read_keys(keys) == ("ghi", "abc", "def")
    keys.write_text("\n")
    for path in (keys, tmp_path / "none"):
        with pytest.raises((ConfigError, DataError), match=re.escape(str(path))):
            read_keys(path)


@contextlib.contextmanager
def command(*options):
    """`trueline serve` as processes of its own; yields its address and the engine's process."""
    process = Process("serve", "--threads", 1, *options)
    try:
        yield until(lambda: re.match(r"(\S+)\n", process.said) or process.poll())[1], process
    finally:
        process.kill()
        process.wait()


def until(what, seconds=60):
    """Return what `what()` returns as soon as that is anything."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.01)
    raise AssertionError(what)


def front_of(process):
    """The process that answers HTTP."""
    task = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return int(task.read_text().split()[0])


HOSTILE = "\x1b[31m\x1b]0;owned\x07 <script>alert(1)</script> \u202e {{ 7 * 7 }} %s $(id) \u2028"


def test_the_command_serves_logs_no_text_and_ends_when_told(adapters):
    named = [f"--adapter={name}={folder}" for name, folder in adapters.items()]
    with command("--port", 0, *named) as (address, process):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
            assert [m.id for m in client.models.list()] == ["tiny", "first", "second"]
            got = client.chat.completions.create(
                model="second", messages=[{"role": "user", "content": HOSTILE}], max_tokens=5
            )
        assert got.usage.completion_tokens
        wrong = {"model": HOSTILE, "messages": MOON, HOSTILE: 1}
        for body in (wrong, {"model": HOSTILE, "messages": MOON}):
            answer = httpx.post(f"{address}/v1/chat/completions", json=body)
            assert answer.status_code in (400, 404)
            assert answer.headers["Content-Type"] == "application/json"
            assert "\x1b" not in answer.text
        assert httpx.get(f"{address}/<script>%1b[31m").status_code == 404
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as raw:
            raw.sendall(b"\x1b[31m no http\r\n\r\n")
            assert b"400" in raw.recv(1000)
        body = {"model": "tiny", "messages": MOON, "n": 4, "temperature": 1.5, "stream": True}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            os.kill(process.pid, signal.SIGTERM)
            rest = [line for line in lines if line]  # what runs is finished
        assert sum('"finish_reason":"' in line for line in rest) == 4
        assert rest[-1] == "data: [DONE]"
        assert process.wait() == -signal.SIGTERM
        for mark in ("\x1b", "script", "owned", "moon", "Traceback"):
            assert mark not in process.said


OWN = """
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Cool:
    name = "cool"

    weight: float = 2.0

    def prompts(self, messages):
        return [messages]

    def combine(self, logits):
        if self.weight > 100:
            raise MemoryError
        return logits[:, 0] * self.weight
"""


def test_a_method_of_a_file_crosses_processes_and_an_engine_that_dies_is_seen(tiny, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    with command(
        *("--port", 0, "--dtype", "float32", "--method", f"{file}:Cool", "--weight", 3),
        *("--overrides", "anything"),
    ) as (address, process):
        url = f"{address}/v1/chat/completions"
        body = {"model": "tiny", "messages": MOON, "max_tokens": 16, "temperature": 0.9, "seed": 3}

        def said(**fields):
            more = {"alignment": fields} if fields else {}
            return httpx.post(url, json=body | more, timeout=60)

        for fields, weight in [({}, 3.0), ({"weight": 0.5}, 0.5)]:
            method = make_method(f"{file}:Cool", {"weight": weight})
            [own] = offline(tiny, method, 3, temperature=0.9, max_new_tokens=16)
            assert said(**fields).json()["choices"][0]["message"]["content"] == own.text
        (tmp_path / "other.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        for name in (f"{tmp_path / 'other.py'}:X", f"{file}:Cool", "os:X"):
            refused = said(method=name)
            assert refused.status_code == 400
            assert "Unknown method" in refused.json()["error"]["message"]
        assert not (tmp_path / "ran").exists()  # nothing that a client names is run
        assert said(weight=1e3).status_code == 503
        assert httpx.get(f"{address}/health").status_code == 503
        assert "MemoryError" in said().json()["error"]["message"]
        os.kill(process.pid, signal.SIGINT)
        assert process.wait() == 130


def test_who_asks_a_server_that_is_killed_is_told_and_a_new_one_answers(tmp_path, tiny):
    """kill -9 under load: each client ends with an answer or an error of its connection."""
    keys = tmp_path / "keys"
    keys.write_text("abc\n")
    headers, found = {"Authorization": "Bearer abc"}, []
    body = {"model": "tiny", "messages": MOON, "temperature": 0, "max_tokens": 64}
    body |= {"alignment": PIRATE, "stream": True}
    with command("--port", 0, "--api-keys", keys) as (address, process):
        begun = threading.Barrier(9)

        def ask():
            url, pieces = f"{address}/v1/chat/completions", 0
            try:
                with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answer:
                    for line in answer.iter_lines():
                        if line.startswith("data: {"):
                            json.loads(line[6:])
                            pieces += 1
                            if pieces == 2:
                                begun.wait(60)
                found.append("whole")
            except (httpx.RemoteProtocolError, httpx.ReadError) as error:
                found.append(type(error).__name__)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        begun.wait(60)
        process.kill()
        for thread in threads:
            thread.join(30)
        assert len(found) == 8
        assert "RemoteProtocolError" in found or "ReadError" in found
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")
        port = address.rpartition(":")[2]
    with command("--port", port, "--api-keys", keys, "--dtype", "float32") as (again, process):
        assert again == address
        whole = httpx.post(
            f"{again}/v1/chat/completions", json=body | {"stream": False}, headers=headers
        )
        os.kill(front_of(process), signal.SIGKILL)  # neither goes on without the other
        assert process.wait() == 2
        assert "The process that answers HTTP has ended" in process.said
    [own] = offline(tiny, LinearAlignment("Talk like a pirate."))
    assert whole.json()["choices"][0]["message"]["content"] == own.text


def test_messages_are_whole_however_they_are_cut():
    sent = [Drop(1), News(told=[Told(1, 0, 5, None, "stop")]), Drop(2), "x" * 100_000]
    data, messages = b"".join(map(packed, sent)), Messages()
    for size in (1, 7, 4096, len(data)):
        found = []
        for start in range(0, len(data), size):
            found += messages.feed(data[start : start + size])
        assert found == sent


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"blend"}))
def test_inputs_of_the_page_span_what_a_method_takes(name):
    """Both ends of every slider are taken, and what lies past a bound of the class is not."""
    about, cls = describe(name), METHODS[name]
    given = {"principle": "Be kind."}
    options = {o.name for o in options_of(cls)}
    fields = {f["name"]: f for f in about["fields"]}
    assert set(fields) == {o.name for o in options_of(cls) if o.kind is not bool}
    for field, limits in ranges_of(cls).items():
        own = fields[field]
        held = {k: v for k, v in given.items() if k in options}
        for end in (own["low"], own["high"]):
            cls(**held | {field: int(end) if limits.whole else end})
        for past in (limits.low - 1, limits.high + 1):
            if math.isfinite(past):
                with pytest.raises(ConfigError):
                    cls(**held | {field: past})
        assert own["default"] is None or own["low"] <= own["default"] <= own["high"]
        assert own["doc"]


def test_tokens_are_not_held_back_for_one_another():
    """asyncio turns Nagle's algorithm off only where it sees that the socket speaks TCP."""
    from trueline.server.listen import reserve

    with reserve("127.0.0.1", 0) as own:
        assert own.proto == socket.IPPROTO_TCP
