"""Speed on chat models: tokens a second beside transformers, the first token from cold, memory.

Every measurement is a process of its own, one thread. CPU seconds are what is compared; wall
seconds are given for the cold start, where a user waits.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks._real_world import NAMES, Task, World, markdown

TOKENS = 48
COLD_SECONDS, MEMORY = 6.0, 1.3
"""What is wanted: seconds to the first token of `--model smollm2`, and memory over weights."""
PRINCIPLE = "Talk like a pirate."
QUESTION = "How do bees make honey?"
CHILD = """
import json, sys
import torch, transformers
from trueline import load_model
sys.path.insert(0, sys.argv[3])
from transformers import LlamaForCausalLM, Qwen2ForCausalLM
import trueline.engine.decoding
from benchmarks._real_speed import resident, rivals
torch.set_num_threads(1)
before = resident()  # programs are no part of what a model takes
lm = load_model(sys.argv[1])
print(json.dumps(rivals(lm, int(sys.argv[2]), before)))
"""


def resident() -> int:
    """Return the bytes of this process that are its own: not of files that others share."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def tasks(world: World, models: Sequence[str]) -> Iterator[Task]:
    """Yield each model's speed and, of SmolLM2, the cold start."""
    makers: dict[str, Callable[[], Any]] = {"cold": partial(cold, world)}
    makers |= {model: partial(speed, world, model) for model in models}
    for i, (name, make) in enumerate(makers.items()):
        yield Task(20 - i, f"speed, {name}", partial(_is_there, world, name),
                   partial(world.kept, "speed", name, make=make))  # fmt: skip


def _is_there(world: World, name: str) -> bool:
    return world.kept("speed", name) is not None


def speed(world: World, model: str) -> dict[str, Any]:
    """Return what a process of its own measured."""
    count = 8 if world.quick else TOKENS
    root = str(Path(__file__).resolve().parents[1])
    words = [sys.executable, "-c", CHILD, str(world.path(model)), str(count), root]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rivals(lm: Any, count: int, before: int) -> dict[str, Any]:
    """Return (first token, a further token) in CPU seconds of each way, and the memory."""
    import torch

    from trueline import Decoder, LinearAlignment, Plain, SamplingParams
    from trueline.models.prompts import chat_of, encode

    method = LinearAlignment(PRINCIPLE, ratio=1, candidates=0.95)
    branches = [encode(lm, chat) for chat in method.prompts(chat_of(lm, QUESTION))]
    ours: dict[str, Any] = {}
    for name, way in (("ours, plain", Plain()), ("ours, linear-alignment", method)):

        def decode(tokens: int, way: Any = way) -> int:
            sampling = SamplingParams(max_new_tokens=tokens)
            decoder = Decoder(lm)
            done = decoder.complete([decoder.encode(QUESTION, way, sampling)])
            return len(done[0].token_ids)

        ours[name] = first_and_steps(decode, count)
    warm, weights = resident() - before, sum(
        p.numel() * p.element_size() for p in {id(p): p for p in lm.model.parameters()}.values()
    )  # fmt: skip
    ids = [torch.tensor([row]) for row in branches]
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": lm.pad_token_id}
    plain = type(lm.model).from_pretrained(lm.folder, dtype=lm.model.dtype).eval()
    for name, more in (
        ("generate", {}),
        ("generate, guidance_scale", {"guidance_scale": 2.0, "negative_prompt_ids": ids[1]}),
    ):

        def decode_there(tokens: int, more: Any = more) -> int:
            out = plain.generate(ids[0], max_new_tokens=tokens, **options, **more)
            return int(out.shape[1] - ids[0].shape[1])

        ours[name] = first_and_steps(decode_there, count)
    return {"ways": ours, "memory": warm, "weights": weights, "ratio": warm / weights}


def first_and_steps(decode: Any, count: int) -> dict[str, float]:
    """Return CPU seconds to the first token and tokens a second behind it, best of two."""
    best: dict[str, float] = {}
    for _ in range(2):
        started = time.process_time()
        decode(1)
        first = time.process_time() - started
        started = time.process_time()
        made = decode(count)
        rest = (time.process_time() - started - first) / max(made - 1, 1)
        best["first"] = min(first, best.get("first", first))
        best["a_second"] = max(1 / rest, best.get("a_second", 0.0))
    return best


def cold(world: World) -> dict[str, Any]:
    """Return wall and CPU seconds of one word from `trueline generate`, the best of three."""
    words = [sys.executable, "-m", "trueline", "generate", "--model", str(world.path("smollm2"))]
    words += ["--method", "plain", "--max-new-tokens", "1", "--threads", "1", QUESTION]
    runs = []
    for _ in range(1 if world.quick else 3):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(words, check=True, capture_output=True)
        wall = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        runs.append({"wall": wall, "cpu": cpu})
    return {"runs": runs, "wall": min(r["wall"] for r in runs), "cpu": min(r["cpu"] for r in runs)}


def report(world: World, models: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the tables, and the numbers behind them."""
    found = {m: own for m in models if (own := world.kept("speed", m))}
    start = world.kept("speed", "cold")
    parts = []
    if found:
        lines = [
            [NAMES[m], way, f"{x['first']:.2f}", f"{x['a_second']:.1f}",
             f"{x['a_second'] / own['ways']['generate']['a_second']:.2f}"]
            for m, own in found.items() for way, x in own["ways"].items()
        ]  # fmt: skip
        header = ("model", "way", "first token, CPU s", "tokens a CPU second", "to generate")
        parts.append(markdown(header, lines))
        lines = [
            [NAMES[m], f"{own['memory'] / 1e6:.0f}", f"{own['weights'] / 1e6:.0f}",
             f"{own['ratio']:.2f}", "met" if own["ratio"] <= MEMORY else "**missed**"]
            for m, own in found.items()
        ]  # fmt: skip
        header = ("model", "memory of its own, MB", "weights, MB", "ratio", f"at most {MEMORY:g}")
        parts.append(markdown(header, lines))
    if start:
        met = "met" if start["wall"] <= COLD_SECONDS else "**missed**"
        parts.append(
            f"First token of `trueline generate` on SmolLM2-135M from a new process: "
            f"{start['wall']:.1f} s, {start['cpu']:.1f} CPU s (best of {len(start['runs'])}; at "
            f"most {COLD_SECONDS:g} s wanted: {met})."
        )
    numbers = {**found, **({"cold": start} if start else {})}
    return "\n\n".join(parts), numbers
