"""The parts of a step and of a run, timed by themselves.

Arithmetic of the methods, matrix products of a few rows in three ways, key-value sharing of system
prompts, and the released Self-CD loop, which is too slow to be run in full.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks._baselines import Clock, decode, ours, recomputed_step
from benchmarks._models import SHAPES, Rivals
from trueline import Decoder, LanguageModel, LinearAlignment, Method, Plain, SamplingParams, SelfCD
from trueline.engine.sampling import sample
from trueline.methods._ops import nucleus
from trueline.models.products import can_pack, pack, packed_product, transposed_product

Row = dict[str, Any]
LENGTH = 200
"""Tokens of the long Self-CD run: the release's own default."""
BATCHES = 4
"""Batches that share a system prompt in `prefixes`."""
COLD_BYTES = 64 << 20
"""Copies of a small matrix are cycled up to this size, as a model's own layers would be."""
FLAT, PEAKED = 0.6, 4.5
"""Standard deviations of normal logits: a random model's, and about a trained one's."""


def best_of(run: Callable[[], object], seconds: float, calls: int = 1) -> float:
    """Return the least CPU seconds of one call, over blocks of `calls` for about `seconds`."""
    run()
    best, end = float("inf"), time.process_time() + seconds
    while True:
        start = time.process_time()
        for _ in range(calls):
            run()
        now = time.process_time()
        best = min(best, (now - start) / calls)
        if now > end:
            return best


def self_cd_release(
    models: Rivals, pair: Sequence[list[int]], alpha: float, samples: int, length: int = LENGTH
) -> Row:
    """Time the released Self-CD loop at `samples` places of a run, and ours in full.

    The released step costs more with every token, smoothly; between the places it is interpolated.
    Its token is compared with ours at each place, given the same tokens before it.
    """
    run = ours(models.packed, [pair], SelfCD(alpha=alpha))
    clock = Clock()
    run(2, Clock())
    clock.start()
    tokens = run(length, clock)[0]
    clock.stop()
    (first, _), (rest, _) = clock.spans()
    seconds = first + rest
    places = np.linspace(0, length - 1, samples).round().astype(int)
    times: dict[int, list[float]] = {0: [], 1: []}
    same = 0
    for keep, taken in times.items():
        for place in places:
            start = time.process_time()
            token = recomputed_step(models.rival, pair, tokens[:place], alpha, keep)
            taken.append(time.process_time() - start)
            same += token == tokens[place]
    released, trimmed = (np.interp(range(length), places, times[k]).sum() for k in (0, 1))
    return {
        "tokens": length,
        "ours_seconds": seconds,
        "released_seconds": float(released),
        "trimmed_seconds": float(trimmed),
        "released_times": float(released) / seconds,
        "trimmed_times": float(trimmed) / seconds,
        "places": samples,
        "same_tokens": f"{same} of {2 * samples}",
        "equal": same == 2 * samples,
    }


def arithmetic(vocab: int, seconds: float) -> list[Row]:
    """Time what a method adds to one request's forward: `combine` and the choice of a token."""
    methods: dict[str, Method] = {
        "plain": Plain(),
        "Self-CD": SelfCD(),
        "Self-CD, plausibility": SelfCD(plausibility=0.01),
        "Linear Alignment, no mask": LinearAlignment("x", candidates=1.0),
        "Linear Alignment, candidates 0.8": LinearAlignment("x"),
        "Linear Alignment, closed form": LinearAlignment("x", epsilon=8.0),
    }
    choices = {"greedy": SamplingParams(), "sampled": SamplingParams(temperature=1.0)}
    draws = torch.tensor([0.37], dtype=torch.float64)
    rows: list[Row] = []
    for kind, scale in (("peaked", PEAKED), ("flat", FLAT)):
        generator = torch.Generator().manual_seed(0)
        z_p = torch.randn(1, vocab, generator=generator) * scale
        z = torch.stack([z_p, z_p + torch.randn(1, vocab, generator=generator) * 0.1 * scale], 1)
        size = int(nucleus(z_p, 0.8).sum())
        for name, method in methods.items():
            logits = z[:, :1] if isinstance(method, Plain) else z
            for choice, params in choices.items():
                step = partial(_choose, method, params, logits, draws)
                with torch.inference_mode():
                    taken = best_of(step, seconds)
                row = {"logits": kind, "top_p_set": size, "method": name, "choice": choice}
                rows.append(row | {"seconds": taken})
    return rows


def _choose(method: Method, params: SamplingParams, logits: Tensor, draws: Tensor) -> Tensor:
    return sample(method.combine(logits), params, draws)


def products(name: str, dtype: torch.dtype, row_counts: Sequence[int], seconds: float) -> list[Row]:
    """Time x W^T for a few rows x: torch's own, transposed as (W x^T)^T, packed for oneDNN."""
    shape = SHAPES[name]
    hidden, inner, vocab = (
        shape[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    matrices = {
        "attention": (hidden, hidden),
        "MLP up": (inner, hidden),
        "MLP down": (hidden, inner),
        "head": (vocab, hidden),
    }
    result: list[Row] = []
    for label, (out, inside) in matrices.items():
        count = max(1, COLD_BYTES // (out * inside * dtype.itemsize))
        weights = [torch.randn(out, inside, dtype=dtype) for _ in range(count)]
        packed: list[Any] = []
        if can_pack(dtype):
            packed = [pack(weight) for weight in weights]
        for rows in row_counts:
            x = torch.randn(rows, inside, dtype=dtype)
            with torch.inference_mode():
                taken = _three_ways(x, weights, packed, seconds)
            row = {"model": name, "dtype": str(dtype)[6:], "matrix": label}
            result.append(row | {"shape": f"{out}x{inside}", "rows": rows} | taken)
        del weights, packed
    return result


def _three_ways(
    x: Tensor, weights: list[Tensor], packed: list[Any], seconds: float
) -> dict[str, float]:
    ways: dict[str, Callable[[], object]] = {
        "torch": lambda: [linear(x, w) for w in weights],
        "transposed": lambda: [transposed_product(x, w, None) for w in weights],
    }
    if packed:
        ways["packed"] = lambda: [packed_product(x, w, None) for w in packed]
    return {way: best_of(run, seconds) / len(weights) for way, run in ways.items()}


def prefixes(
    model: LanguageModel, pairs: Sequence[Sequence[list[int]]], system: int, new_tokens: int
) -> Row:
    """Time a run of four batches with the system prompt computed once, and without that."""
    size = len(pairs) // BATCHES
    method = LinearAlignment("x", candidates=1.0)
    spans: dict[bool, Tensor] = {}
    tokens: dict[bool, list[list[int]]] = {}
    for share in (False, True):
        decoder, parts = Decoder(model, share_prefixes=share), []
        tokens[share] = []
        for start in range(0, len(pairs), size):
            clock, part = Clock(), pairs[start : start + size]
            clock.start()
            tokens[share] += decode(decoder, part, method, new_tokens, clock, system=system)
            clock.stop()
            parts.append(clock.spans())
        spans[share] = torch.tensor(parts).sum(0)[:, 0]
    prompt_on, step_on = spans[True].tolist()
    prompt_off, step_off = spans[False].tolist()
    return {
        "requests": len(pairs),
        "batches": BATCHES,
        "new_tokens": new_tokens,
        "prompt_seconds_shared": prompt_on,
        "prompt_seconds_apart": prompt_off,
        "seconds_shared": prompt_on + step_on,
        "seconds_apart": prompt_off + step_off,
        "equal": tokens[True] == tokens[False],
    }
