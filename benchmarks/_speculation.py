"""Decoding ahead on real chat models: texts that repeat their prompt, and ordinary chat.

Tokens per second of transformers' greedy `generate` on one prompt (1.00), and of our loop on one
and on two branches, without and with prompt lookup; one request at a time, prompts included.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trueline import (
    Decoder,
    LanguageModel,
    LinearAlignment,
    Method,
    Plain,
    SamplingParams,
    load_model,
)
from trueline.models.prompts import encode

Row = dict[str, Any]
TOKENS = 96
PRINCIPLE = "Answer in plain words, and keep to what was asked."
REPORT = (
    "The library opens at nine on weekdays and at ten on Saturdays. It closes at six in the "
    "evening on every day but Thursday, when the reading room stays open until nine. Members may "
    "borrow up to twelve books for four weeks, and may renew each book twice unless another member "
    "has asked for it. A fee of twenty cents a day is due for a book that comes back late."
)
MISSPELT = (
    REPORT.replace("weekdays", "weekdeys").replace("every", "evry").replace("member", "membr")
)
CODE = """def total_price(items, tax_rate, discount):
    total = 0
    for item in items:
        total = total + item.price * item.quantity
    total = total - total * discount
    total = total + total * tax_rate
    return total


def count_items(items):
    count = 0
    for item in items:
        count = count + item.quantity
    return count
"""
TASKS: dict[str, list[str]] = {
    "summarise": [
        f"Summarise this text in two sentences, in its own words:\n\n{REPORT}",
        f"List the facts of this text, one a line:\n\n{REPORT}",
    ],
    "edit": [
        f'Replace every "book" by "record" and return the whole text:\n\n{REPORT}',
        f"Correct the spelling of this text and return all of it:\n\n{MISSPELT}",
    ],
    "code": [
        f"Add type hints to this code and return all of it:\n\n```python\n{CODE}```",
        f"Rename `items` to `basket` everywhere and return the code:\n\n```python\n{CODE}```",
    ],
    "chat": [
        "How do bees make honey?",
        "What should I see in Rome in two days?",
        "Why is the sky blue?",
        "Give me advice for a job interview.",
    ],
}


def speculation(folder: Path, name: str, tokens: int = TOKENS, repeats: int = 2) -> list[Row]:
    """Return tokens a second of each kind of task and way to decode, best of `repeats`."""
    lm = load_model(folder, device="cpu")
    untouched = load_model(folder, device="cpu", packed_weights=False).model
    ahead = dataclasses.replace(lm, speculate="lookup")
    ways: dict[str, Callable[[str], int]] = {"generate": lambda q: _rival(untouched, lm, q, tokens)}
    for model, label in ((lm, ""), (ahead, ", lookup")):
        for method, what in ((Plain(), "plain"), (LinearAlignment(PRINCIPLE, ratio=1), "LA mask")):
            ways[what + label] = _own(model, method, tokens)
    rows = []
    for task, questions in TASKS.items():
        seconds, made = dict.fromkeys(ways, float("inf")), dict[str, int]()
        for _ in range(repeats):
            for way, run in ways.items():
                start = time.process_time()
                made[way] = sum(run(q) for q in questions)
                seconds[way] = min(seconds[way], time.process_time() - start)
        speed = {way: made[way] / seconds[way] for way in ways}
        rows += [
            {
                "model": name, "task": task, "way": way, "tokens": made[way],
                "tokens_per_second": speed[way], "ratio": speed[way] / speed["generate"],
            }
            for way in ways
        ]  # fmt: skip
    return rows


def _own(model: LanguageModel, method: Method, tokens: int) -> Callable[[str], int]:
    def run(question: str) -> int:
        decoder = Decoder(model, share_prefixes=False)
        prompt = decoder.encode(question, method, SamplingParams(max_new_tokens=tokens))
        return len(decoder.complete([prompt])[0].token_ids)

    return run


def _rival(model: Any, lm: LanguageModel, question: str, tokens: int) -> int:
    ids = torch.tensor([encode(lm, [{"role": "user", "content": question}])])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
        repetition_penalty=1.0, pad_token_id=lm.pad_token_id,
    )  # fmt: skip
    return int(out.shape[1] - ids.shape[1])


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown: a line a way, a column a model and task."""
    columns = list(dict.fromkeys((r["model"], r["task"]) for r in rows))
    ratio = {(r["way"], r["model"], r["task"]): r["ratio"] for r in rows}
    lines = ["| | " + " | ".join(f"{m}, {t}" for m, t in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for way in dict.fromkeys(r["way"] for r in rows):
        cells = (f"{ratio[way, m, t]:.2f}" for m, t in columns)
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
