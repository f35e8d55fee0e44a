"""Wrong arguments of public functions: an error of ours that says what it got, none of Python's."""

from __future__ import annotations

import pytest

from trueline import (
    AdaCD,
    Blend,
    ConfigError,
    Contrast,
    Decoder,
    LinearAlignment,
    Plain,
    Request,
    SamplingParams,
    SelfCD,
    TruelineError,
    generate,
    load_model,
    make_method,
)
from trueline.types import check_messages

CASES = {
    "no number": (lambda: SamplingParams(max_new_tokens="a"), "got 'a'"),
    "none as a number": (lambda: SamplingParams(temperature=None), "got None"),
    "a flag as a number": (lambda: SamplingParams(top_k=True), "got True"),
    "half a sample": (lambda: SamplingParams(n=1.5), "got 1.5"),
    "stop 5": (lambda: SamplingParams(stop=5), "`stop` must be strings"),
    "stop none": (lambda: SamplingParams(stop=None), "got None"),
    "stop of numbers": (lambda: SamplingParams(stop=[1]), "`stop` must be strings"),
    "stop empty": (lambda: SamplingParams(stop=""), "that are not empty"),
    "next to no temperature": (lambda: SamplingParams(temperature=1e-320), "must be 0 (greedy)"),
    "logprobs as text": (lambda: SamplingParams(logprobs="yes"), "True or False, got 'yes'"),
    "a method by name": (lambda: Request("Hi", "plain"), "got 'plain'"),
    "a class, not a method": (lambda: Request("Hi", SelfCD), "`method` must be a decoding method"),
    "sampling as a dict": (lambda: Request("Hi", None, {"n": 1}), "`sampling` must be Sampling"),
    "seed as text": (lambda: Request("Hi", seed="1"), "`seed` must be a whole number"),
    "seed 1.5": (lambda: Request("Hi", seed=1.5), "got 1.5"),
    "seed too large": (lambda: Request("Hi", seed=2**63), "below 2^63"),
    "no chat": (lambda: check_messages(5), "a list of messages, got 5"),
    "bytes": (lambda: check_messages(b"Hi"), "a list of messages, got b'Hi'"),
    "one message alone": (
        lambda: check_messages({"role": "user", "content": "Hi"}),
        "a list of messages",
    ),
    "no messages": (lambda: check_messages([5]), "A message must be"),
    "content in parts": (
        lambda: check_messages([{"role": "user", "content": [{"type": "text"}]}]),
        "The user message is a list of content parts",
    ),
    "a name": (
        lambda: check_messages([{"role": "user", "content": "Hi", "name": "x" * 10**6}]),
        'this one has also "name"',
    ),
    "principle 5": (lambda: LinearAlignment(5), "`principle` must be text, got 5"),
    "principle none": (lambda: LinearAlignment(None), "must be text, got None"),
    "principle of bytes": (lambda: LinearAlignment(b"x"), "must be text, got b'x'"),
    "principle blank": (lambda: LinearAlignment(" "), "`principle` is empty"),
    "plain 5": (lambda: Plain(5), "`principle` must be text, got 5"),
    "plain empty": (lambda: Plain(""), "`principle` is empty"),
    "ratio as text": (lambda: LinearAlignment("x", ratio="2"), "got '2'"),
    "ratio huge": (lambda: LinearAlignment("x", ratio=1e308), "in [-1e+06, 1e+06]"),
    "alpha huge": (lambda: SelfCD(alpha=-1e308), "in [-1e+06, 1e+06]"),
    "epsilon huge": (lambda: LinearAlignment("x", epsilon=1e308), "in [0, 1e+06]"),
    "guidance huge": (lambda: Contrast(principle="x", guidance=1e7), "in [-1e+06, 1e+06]"),
    "weight huge": (lambda: Blend([("x", 1e7)]), "in [-1e+06, 1e+06]"),
    "safety prompt 5": (lambda: SelfCD(safety_prompt=5), "must be text, got 5"),
    "refusing prompt 5": (lambda: AdaCD(refusing_prompt=5), "must be text, got 5"),
    "negative 5": (lambda: Contrast(negative=5), "must be text, got 5"),
    "base as text": (lambda: Contrast(base="yes"), "`base` must be True or False, got 'yes'"),
    "principles 5": (lambda: Blend(5), "pairs of (text, weight), got 5"),
    "principles as text": (lambda: Blend("ab"), "pairs of (text, weight), got 'ab'"),
    "a principle of 5": (lambda: Blend([(5, 1.0)]), "must be text, got 5"),
    "name 5": (lambda: make_method(5), "must be text, got 5"),
    "options 5": (lambda: make_method("self-cd", 5), "must be a mapping from names"),
    "options without names": (lambda: make_method("self-cd", {1: 2}), "has no option `1`"),
    "model 5": (
        lambda: load_model(5),
        "The model's `name` must be a name or a path, got 5",
    ),
    "model none": (lambda: load_model(None), "got None"),
    "dtype 5": (lambda: load_model("tiny", dtype=5), "`dtype` must be text, got 5"),
    "device 5": (lambda: load_model("tiny", device=5), "`device` must be text, got 5"),
    "adapter 5": (lambda: load_model("tiny", adapter=5), "`adapter` must be"),
    "template 5": (lambda: load_model("tiny", chat_template=5), "`chat_template` must be"),
    "raw as text": (lambda: load_model("tiny", raw="yes"), "`raw` must be True or False"),
    "revision 5": (lambda: load_model("tiny", revision=5), "`revision` must be text, got 5"),
    "a decoder by name": (lambda: Decoder("tiny"), "The model must be a loaded one"),
    "no model": (lambda: generate(None, "Hi"), "from load_model(), got None"),
    "requests 5": (lambda: generate(load_model("tiny"), 5), "`requests` must be a list"),
    "request 5": (lambda: generate(load_model("tiny"), [5]), "`request` must be a Request"),
    "method by name": (lambda: generate(load_model("tiny"), "Hi", "plain"), "got 'plain'"),
    "quantize": (lambda: load_model("tiny", quantize="2bit"), "`quantize` must be"),
}


@pytest.mark.parametrize(("call", "fragment"), CASES.values(), ids=CASES)
def test_the_error_is_ours_and_says_what_it_got(call, fragment):
    with pytest.raises(TruelineError) as caught:
        call()
    assert fragment in str(caught.value)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_strong_but_possible_values_are_let_through():
    assert SelfCD(alpha=-1e6).alpha == -1e6
    assert LinearAlignment("x", ratio=0).ratio == 0
    with pytest.raises(ConfigError):
        SelfCD(alpha=float("nan"))
