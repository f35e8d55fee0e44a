"""Answers of unequal length: a batch that waits for its longest, and places that fill up again.

32 places; answers of 8 to 128 tokens, uniformly; 48 tokens of question
tokens/s with the one admission and with the other, on the same requests
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks._baselines import Pairs
from trueline import Decoder, LanguageModel, LinearAlignment, Plain, Prompt, SamplingParams

Row = dict[str, Any]
PLACES, SHORTEST, LONGEST = 32, 8, 128


def refill(model: LanguageModel, pairs: Pairs, count: int, repeats: int = 2) -> list[Row]:
    """Return tokens/s of `count` requests with either admission, plain and under two branches.

    Two branches get half of the places, so that both run 32 rows. The better of `repeats` counts.
    """
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=draw).tolist()
    rows = []
    for name, method, k in (("plain", Plain(), 1), ("LA mask", LinearAlignment("x"), 2)):
        prompts = [
            Prompt(list(map(list, pairs[i % len(pairs)][2 - k :])), method, SamplingParams(length))
            for i, length in enumerate(lengths)
        ]
        seconds: dict[str, float] = {}
        tokens: dict[str, list[list[int]]] = {}
        for _ in range(repeats):
            for admission in ("when_empty", "each_step"):
                taken, found = _run(model, prompts, admission, PLACES // k)
                seconds[admission] = min(taken, seconds.get(admission, taken))
                tokens[admission] = found
        total = sum(map(len, tokens["when_empty"]))
        same = sum(a == b for a, b in zip(*tokens.values(), strict=True))
        rows.append(
            {
                "method": name,
                "rows": PLACES,
                "requests": count,
                "tokens": total,
                **{f"{a}_tokens_per_second": total / s for a, s in seconds.items()},
                "times": seconds["when_empty"] / seconds["each_step"],
                "same_texts": f"{same} of {count}",
            }
        )
    return rows


def _run(
    model: LanguageModel, prompts: list[Prompt], admission: Any, places: int
) -> tuple[float, list[list[int]]]:
    decoder = Decoder(model, batch_size=places, admission=admission, share_prefixes=False)
    tokens: list[list[int]] = [[] for _ in prompts]
    start = time.process_time()
    tickets = {decoder.add(prompt, text=False): i for i, prompt in enumerate(prompts)}
    while steps := decoder.step():
        for step in steps:
            tokens[tickets[step.ticket]].append(step.token_id)
    return time.process_time() - start, tokens
