"""`trueline serve`: what it cannot be told is one line, exit 2, before a model is loaded."""

from __future__ import annotations

import socket

import pytest

pytest.importorskip("fastapi", reason="the server needs: pip install 'trueline[serve]'")

SERVE = ("serve", "--port", "0")
OPTIONS: list[tuple[tuple[str, ...], str]] = [
    (("--port", "-1"), "`port`"),
    (("--port", "65536"), "`port`"),
    (("--port", "http"), "--port"),
    (("--host", "nowhere.invalid"), "nowhere.invalid"),
    (("--host", "a" * 300), "Cannot listen"),
    (("--host", "a\0b"), "NUL"),
    (("--host", "\udcff"), "UTF-8"),
    (("--host", "203.0.113.7"), "203.0.113.7"),
    (("--overrides", "everything"), "everything"),
    (("--overrides", "seting"), '"settings"'),
    (("--runs", "nowhere"), "nowhere"),
    (("--runs", "in.jsonl"), "in.jsonl"),
    (("--runs", "a\0b"), "NUL"),
    (("--temperature", "-1"), "`temperature`"),
    (("--temperature", "nan"), "`temperature`"),
    (("--max-tokens", "0"), "`max_tokens`"),
    (("--max-tokens", "1.5"), "--max-tokens"),
    (("--max-prompt-tokens", "0"), "`max_prompt_tokens`"),
    (("--max-branches", "0"), "`max_branches`"),
    (("--max-body", "-1"), "`max_body`"),
    (("--max-running", "0"), "`max_running`"),
    (("--max-waiting", "-1"), "`max_waiting`"),
    (("--timeout", "0"), "`timeout`"),
    (("--timeout", "nan"), "`timeout`"),
    (("--method", "self-cdd"), '"self-cd"'),
    (("--method", "linear-alignment"), "principle"),
    (("--method", "self-cd", "--alpha", "nan"), "alpha"),
    (("--modell", "tiny"), '"--model"'),
    (("--model", "./nowhere"), "./nowhere"),
    (("--model", "m_missing_tensor"), "m_missing_tensor"),
    (("--adapter", "a_nan"), "a_nan"),
    (("--adapter", "distilled/checkpoints"), "distilled/checkpoints"),
    (("--device", "vulkan"), "vulkan"),
    (("--threads", "0"), "threads"),
    (("--presets", "nowhere.toml"), "nowhere.toml"),
    (("--presets", "dirty"), "dirty"),
    (("--presets", "/dev/zero"), "is a device"),
    (("--presets", "a\0b"), "NUL"),
    (("--presets", "broken.toml"), "broken.toml"),
    (("--presets", "latin.toml"), "latin.toml"),
    (("--presets", "utf16.toml"), "utf16.toml: is UTF-16"),
    (("--presets", "unknown.toml"), "no preset"),
    (("--api-keys", "nowhere"), "nowhere"),
    (("--api-keys", "dirty"), "dirty"),
    (("--api-keys", "/dev/zero"), "is a device"),
    (("--api-keys", "a\0b"), "NUL"),
    (("--api-keys", "nothing.txt"), "nothing.txt"),
    (("--api-keys", "latin.jinja"), "latin.jinja"),
    (("--api-keys", "prompts.yaml"), "API key holds blanks"),
]
PRESETS = {
    "": "holds no preset",
    "x = 1": "[x] is no preset",
    '["a b"]\nmethod = "plain"': "no preset",
    "[x]\nmethod = 5": "must be a name",
    '[x]\nmethod = "self-cdd"': '"self-cd"',
    '[x]\nmethod = "linear-alignment"': "principle",
    '[x]\nmethod = "self-cd"\nalpha = "big"': "alpha",
    '[x]\nmethod = "self-cd"\nalpha = nan': "alpha",
    '[x]\nmethod = "plain"\nratio = 2': "ratio",
    '[x]\nmethod = "blend"\nprinciples = [["a"]]': "principles",
    '[x]\nmethod = "plain"\nsampling = 5': "sampling",
    '[x]\nmethod = "plain"\nsampling = { temp = 1 }': "temp",
    '[x]\nmethod = "plain"\nsampling = { temperature = -1 }': "temperature",
    '[x]\nmethod = "plain"\nsampling = { top_k = 1.5 }': "top_k",
    "x = " + "[" * 100_000: "cannot be read",
}


@pytest.mark.parametrize(("more", "said"), OPTIONS, ids=lambda x: repr(x)[-60:])
def test_an_option_that_cannot_be(refuse, more, said):
    refuse((*SERVE, *more), said)


@pytest.mark.parametrize("text", PRESETS, ids=lambda x: repr(x)[:60])
def test_a_file_of_presets_that_cannot_be(refuse, tmp_path, text):
    path = tmp_path / "presets.toml"
    path.write_text(text)
    assert refuse((*SERVE, "--presets", str(path)), PRESETS[text]).count(str(path)) == 1


def test_a_port_in_use_is_said_before_the_model_is_loaded(refuse):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        refuse(("serve", "--port", port, "--model", "m_missing_tensor"), port, "in use")
