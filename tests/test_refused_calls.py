"""Arguments that cannot be, in Python: a TruelineError whose one line names them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

import trueline
from trueline import (
    AdaCD,
    Blend,
    Contrast,
    Decoder,
    LinearAlignment,
    Plain,
    Request,
    SamplingParams,
    SelfCD,
    TruelineError,
    generate,
    guided,
    load_model,
    make_method,
)

HUGE = 1e308
TINY = "tiny"


def ask(messages: Any = "Hi", method: Any = None, sampling: Any = None, seed: Any = 0) -> Any:
    """Decode at most two tokens on the bundled model."""
    sampling = SamplingParams(max_new_tokens=2) if sampling is None else sampling
    return generate(load_model(TINY), [Request(messages, method, sampling, seed)])


def encode(request: Any) -> Any:
    return Decoder(load_model(TINY)).encode(request)


USER = {"role": "user", "content": "Hi"}

# What the line must name -> calls that must fail.
CALLS: dict[str, list[Callable[[], Any]]] = {
    "max_new_tokens": [
        lambda: SamplingParams(max_new_tokens=0),
        lambda: SamplingParams(max_new_tokens=1.0),  # type: ignore[arg-type]
        lambda: SamplingParams(max_new_tokens=True),
        lambda: SamplingParams(max_new_tokens=None),  # type: ignore[arg-type]
    ],
    "temperature": [
        lambda: SamplingParams(temperature=math.nan),
        lambda: SamplingParams(temperature="1"),  # type: ignore[arg-type]
        lambda: SamplingParams(temperature=-0.1),
        lambda: SamplingParams(temperature=1e-320),
    ],
    "top_k": [
        lambda: SamplingParams(top_k=-1),
        lambda: SamplingParams(top_k=2.5),  # type: ignore[arg-type]
    ],
    "top_p": [
        lambda: SamplingParams(top_p=0),
        lambda: SamplingParams(top_p=None),  # type: ignore[arg-type]
    ],
    "candidates": [
        lambda: LinearAlignment("X", candidates=0),
        lambda: LinearAlignment("X", candidates="all"),  # type: ignore[arg-type]
        lambda: Blend((("X", 1.0),), candidates=2),
    ],
    "min_p": [
        lambda: SamplingParams(min_p=1.5),
        lambda: SamplingParams(min_p=[0.1]),  # type: ignore[arg-type]
    ],
    "repetition_penalty": [lambda: SamplingParams(repetition_penalty=0)],
    "stop": [
        lambda: SamplingParams(stop=("",)),
        lambda: SamplingParams(stop=(1,)),  # type: ignore[arg-type]
        lambda: SamplingParams(stop=None),  # type: ignore[arg-type]
        lambda: SamplingParams(stop=5),  # type: ignore[arg-type]
    ],
    "`n`": [lambda: SamplingParams(n=0), lambda: SamplingParams(n="2")],  # type: ignore[arg-type]
    "logprobs": [lambda: SamplingParams(logprobs="no")],  # type: ignore[arg-type]
    "ratio": [
        lambda: LinearAlignment("X", ratio=math.nan),
        lambda: LinearAlignment("X", ratio="2"),  # type: ignore[arg-type]
        lambda: LinearAlignment("X", ratio=HUGE),
        lambda: AdaCD(ratio=HUGE),
    ],
    "epsilon": [lambda: LinearAlignment("X", epsilon=-1)],
    "norm": [lambda: LinearAlignment("X", norm=1), lambda: LinearAlignment("X", norm=math.nan)],
    "principle": [
        lambda: LinearAlignment(""),
        lambda: LinearAlignment(5),  # type: ignore[arg-type]
        lambda: LinearAlignment(None),  # type: ignore[arg-type]
        lambda: Plain(principle=" "),
        lambda: Plain(principle=["X"]),  # type: ignore[arg-type]
        lambda: Contrast(principle=b"X"),  # type: ignore[arg-type]
        lambda: Blend(()),
        lambda: Blend("X"),  # type: ignore[arg-type]
        lambda: Blend((("", 1.0),)),
        lambda: Blend((("X",),)),  # type: ignore[arg-type]
        lambda: Blend(5),  # type: ignore[arg-type]
    ],
    "weight": [
        lambda: Blend((("X", math.inf),)),
        lambda: Blend((("X", "1"),)),  # type: ignore[arg-type]
    ],
    "alpha": [
        lambda: SelfCD(alpha=math.inf),
        lambda: SelfCD(alpha=None),  # type: ignore[arg-type]
        lambda: SelfCD(alpha=HUGE),
    ],
    "safety_prompt": [lambda: SelfCD(safety_prompt=""), lambda: SelfCD(safety_prompt=3)],  # type: ignore[arg-type]
    "plausibility": [lambda: SelfCD(plausibility=0), lambda: AdaCD(plausibility=2)],
    "first_tokens": [lambda: SelfCD(first_tokens=0), lambda: AdaCD(first_tokens=1.5)],  # type: ignore[arg-type]
    "threshold": [lambda: AdaCD(threshold=0)],
    "guidance": [lambda: Contrast(guidance=math.nan), lambda: Contrast(guidance=HUGE)],
    "method": [
        lambda: make_method("magic"),
        lambda: make_method(""),
        lambda: make_method(None),  # type: ignore[arg-type]
        lambda: make_method(5),  # type: ignore[arg-type]
        lambda: ask(method="plain"),  # type: ignore[arg-type]
        lambda: ask(method=Plain),  # type: ignore[arg-type]
        lambda: ask(method=5),  # type: ignore[arg-type]
    ],
    "options": [
        lambda: make_method("plain", 5),  # type: ignore[arg-type]
        lambda: make_method("plain", "x"),  # type: ignore[arg-type]
    ],
    "no option": [
        lambda: make_method("plain", {"ratio": 2}),
        lambda: make_method("self-cd", {1: 2}),  # type: ignore[dict-item]
    ],
    "needs": [lambda: make_method("linear-alignment")],
    "sampling": [
        lambda: ask(sampling={"n": 2}),
        lambda: ask(sampling="greedy"),
    ],
    "seed": [
        lambda: ask(seed=1.5),
        lambda: ask(seed="x"),
        lambda: ask(seed=2**64),
        lambda: encode(Request("Hi", seed=None)),  # type: ignore[arg-type]
        lambda: ask(seed=-(2**63) - 1),
    ],
    "batch_size": [
        lambda: generate(load_model(TINY), "Hi", batch_size=0),
        lambda: generate(load_model(TINY), "Hi", batch_size="all"),  # type: ignore[arg-type]
    ],
    "essage": [
        lambda: ask(""),
        lambda: ask([{"role": "user"}]),
        lambda: ask([{**USER, "content": 5}]),
        lambda: ask([{**USER, "content": None}]),
        lambda: ask([{**USER, "content": [{"type": "text", "text": "Hi"}]}]),
        lambda: ask([{**USER, "name": "x" * 1_000_000}]),
        lambda: ask([USER, {"role": "system", "content": "Ho"}]),
        lambda: encode(5),
        lambda: encode(None),
        lambda: encode(Request(5)),  # type: ignore[arg-type]
        lambda: encode(Request([])),
        lambda: encode(Request([5])),  # type: ignore[list-item]
        lambda: encode(Request(None)),  # type: ignore[arg-type]
        lambda: encode(Request({"role": "user", "content": "Hi"})),  # type: ignore[arg-type]
        lambda: guided(Plain(), None, []),  # type: ignore[arg-type]
        lambda: guided(Plain(), None, 5),  # type: ignore[arg-type]
    ],
    "role": [
        lambda: ask([{"role": "bot", "content": "Hi"}]),
        lambda: ask([{"role": 5, "content": "Hi"}]),
    ],
    "surrogate": [lambda: ask("\udcff")],
    "dtype": [
        lambda: load_model(TINY, dtype="float31"),
        lambda: load_model(TINY, dtype=None),  # type: ignore[arg-type]
        lambda: load_model(TINY, dtype=32),  # type: ignore[arg-type]
    ],
    "device": [
        lambda: load_model(TINY, device="gpu"),
        lambda: load_model(TINY, device=None),  # type: ignore[arg-type]
        lambda: load_model(TINY, device=5),  # type: ignore[arg-type]
        lambda: load_model(TINY, device="meta"),
        lambda: load_model(TINY, device_map="nonsense"),
    ],
    "quantize": [lambda: load_model(TINY, quantize="2bit")],  # type: ignore[arg-type]
    "odel": [
        lambda: load_model(""),
        lambda: load_model(None),  # type: ignore[arg-type]
        lambda: load_model(5),  # type: ignore[arg-type]
        lambda: load_model("./nowhere"),
        lambda: load_model("../../.."),
        lambda: load_model("/dev/null"),
        lambda: Decoder("tiny"),  # type: ignore[arg-type]
        lambda: generate("tiny", "Hi"),  # type: ignore[arg-type]
    ],
    "neither a folder": [lambda: load_model("a\0b")],
    "adapter": [
        lambda: load_model(TINY, adapter=""),
        lambda: load_model(TINY, adapter=5),  # type: ignore[arg-type]
        lambda: load_model(TINY, adapter="./nowhere"),
        lambda: load_model(TINY, adapter="adapter"),  # of another model
    ],
    "template": [
        lambda: load_model(TINY, chat_template=5),  # type: ignore[arg-type]
        lambda: load_model(TINY, chat_template="nowhere.jinja"),
        lambda: ask_with_template("recursing.jinja"),
        lambda: ask_with_template("adding.jinja"),
    ],
}  # fmt: skip


def ask_with_template(name: str) -> Any:
    return generate(load_model(TINY, chat_template=name), "Hi")


CASES = [(said, call) for said, calls in CALLS.items() for call in calls]


@pytest.mark.parametrize(
    ("said", "call"), CASES, ids=[f"{said}-{CALLS[said].index(call)}" for said, call in CASES]
)
def test_a_wrong_argument_is_a_trueline_error(world, said, call):
    with pytest.raises(TruelineError) as caught:
        call()
    line = str(caught.value)
    assert line.isprintable()
    assert said in line
    assert len(line) <= 700


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = trueline.no_such_name
