"""What Trueline is compared with: transformers' `generate`, and the papers' released loops.

The released loops are written again here from what they do, on today's transformers, and get every
doubt in their favour: no logging, no tokenising, nothing that a version of theirs might not do.
All contenders decode greedily from the same ids, `new_tokens` tokens, and tell a `Clock` when the
first token is known, so that the prompt and the steps are timed apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from trueline import Decoder, LanguageModel, Method, SamplingParams
from trueline.engine.protocol import Prompt

Tokens = list[list[int]]
Pairs = list[tuple[list[int], list[int]]]
"""For each request the ids with the system prompt and the ids without it."""


@dataclass
class Clock:
    """CPU and wall seconds of one run, cut at its first token."""

    marks: list[tuple[float, float]] = field(default_factory=list)

    def start(self) -> None:
        """Begin a run."""
        self.marks = [self._now()]

    def first(self) -> None:
        """Note the first token; later calls do nothing."""
        if len(self.marks) == 1:
            self.marks.append(self._now())

    def stop(self) -> None:
        """End the run."""
        self.first()
        self.marks.append(self._now())

    def spans(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return (cpu, wall) seconds up to the first token, and after it."""
        a, b, c = self.marks
        return (b[0] - a[0], b[1] - a[1]), (c[0] - b[0], c[1] - b[1])

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.process_time(), time.perf_counter()


Contender = Callable[[int, Clock], Tokens]
"""Decodes `new_tokens` tokens for each request; calls `clock.first()` at the first."""


class _Mark(LogitsProcessor):
    """Tells the clock that the first logits are there; changes nothing."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.clock.first()
        return scores


def generate(model: Any, prompts: Tokens, **options: Any) -> Contender:
    """Return transformers' own greedy `generate` on equally long prompts."""
    ids = torch.tensor(prompts)

    def run(new_tokens: int, clock: Clock) -> Tokens:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([_Mark(clock)]),
            **options,
        )
        return output[:, ids.shape[1] :].tolist()

    return run


def guidance(model: Any, pairs: Pairs, ratio: float) -> Contender:
    """Return `generate(guidance_scale=...)` for z_p + ratio (z_p - z_0).

    Its scale g means z_0 + g (z_p - z_0), so g = ratio + 1.
    """
    plain = torch.tensor([plain for _, plain in pairs])
    return generate(
        model, [p for p, _ in pairs], guidance_scale=ratio + 1, negative_prompt_ids=plain
    )


def two_caches(model: Any, pairs: Pairs, ratio: float, top_p: float = 1.0) -> Contender:
    """Return Linear Alignment's released loop: one forward for each context in turn, two caches."""
    contexts = [torch.tensor([pair[k] for pair in pairs]) for k in (0, 1)]

    @torch.inference_mode()
    def run(new_tokens: int, clock: Clock) -> Tokens:
        ids, caches = contexts, [None, None]
        tokens: list[torch.Tensor] = []
        for _ in range(new_tokens):
            # The release has the head at every prompt position; here it is spared that.
            outputs = [
                model(x, past_key_values=cache, use_cache=True, logits_to_keep=1)
                for x, cache in zip(ids, caches, strict=True)
            ]
            caches = [output.past_key_values for output in outputs]
            z_p, z_0 = (output.logits[:, -1].float() for output in outputs)
            z = z_p * (1 + ratio) - z_0 * ratio
            if top_p < 1:
                z = z.masked_fill(~sorted_nucleus(z_p, top_p), -torch.inf)
            tokens.append(z.argmax(-1))
            clock.first()
            ids = [tokens[-1][:, None]] * 2
        return torch.stack(tokens, 1).tolist()

    return run


def sorted_nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the top-p set as the release finds it: by sorting the vocabulary."""
    probs, index = logits.softmax(-1).sort(-1, descending=True)
    out = probs.cumsum(-1) - probs >= top_p
    out[:, 0] = False
    return ~torch.zeros_like(out).scatter_(-1, index, out)


@torch.inference_mode()
def recomputed_step(
    model: Any, branches: Sequence[list[int]], done: list[int], alpha: float, keep: int
) -> int:
    """Return the next token of Self-CD's released loop: both contexts from their first token on.

    Args:
        model: The model.
        branches: Ids with the safety prompt, ids without it.
        done: Tokens generated so far.
        alpha: Self-CD's strength.
        keep: Positions at which the head is computed: 0 is all, as released; 1 the last alone.
    """
    z_p, z_0 = (
        model(torch.tensor([ids + done]), use_cache=False, logits_to_keep=keep).logits.float()[
            0, -1
        ]
        for ids in branches
    )
    return int((z_p - alpha * (z_p - z_0)).argmax())


def ours(
    model: LanguageModel, prompts: Sequence[Sequence[list[int]]], method: Method, *, system: int = 0
) -> Contender:
    """Return Trueline's loop with a fresh decoder at each run: nothing is left over from the last.

    With `system` > 0 the first so many ids of branch 0 are a system prompt that the requests share,
    as `trueline.generate` finds it for more than one request.
    """

    def run(new_tokens: int, clock: Clock) -> Tokens:
        decoder = Decoder(model, share_prefixes=system > 0)
        return decode(decoder, prompts, method, new_tokens, clock, system=system)

    return run


def decode(
    decoder: Decoder,
    prompts: Sequence[Sequence[list[int]]],
    method: Method,
    new_tokens: int,
    clock: Clock,
    *,
    system: int = 0,
) -> Tokens:
    """Decode `prompts` (ids of each branch) with a decoder that may remember prefixes."""
    sampling = SamplingParams(max_new_tokens=new_tokens)
    encoded = [
        Prompt(list(branches), method, sampling, prefixes=(tuple(branches[0][:system]),))
        for branches in prompts
    ]
    rows: Tokens = [[] for _ in prompts]
    tickets = {decoder.add(prompt, text=False): i for i, prompt in enumerate(encoded)}
    while steps := decoder.step():
        clock.first()
        for step in steps:
            rows[tickets[step.ticket]].append(step.token_id)
    return rows
