"""How a running server holds up: throughput, time to the first token and between tokens.

    python benchmarks/serve.py                          # the bundled model; a few minutes
    python benchmarks/serve.py --model DIR --seconds 20
    python benchmarks/serve.py --soak 600               # mixed requests, cancellations, bad bodies

A server of its own is started on the loopback; 1, 8 and 32 clients ask one after the other without
a pause, then as many requests a second as half of that arrive at random (Poisson). Then the same
requests go through the engine in this process, as many rows at a time, and every text is compared
with `generate`'s. Markdown on stdout, progress on stderr; `--output FILE` also gets JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
import torch

from benchmarks._clients import closed, poisson, quantile, summary
from benchmarks._models import machine
from benchmarks._report import table
from trueline import LinearAlignment, Request, SamplingParams, generate, load_model
from trueline.engine.decoding import Decoder

TOKENS = 48
METHOD = {"method": "linear-alignment", "principle": "Talk like a pirate.", "ratio": 2.0}
ASKED = "What is the {}?"
THINGS = ("moon", "sun", "sea", "sky", "wind", "rain", "snow", "fire", "tree", "river")
CLIENTS = (1, 8, 32)


def body(number: int, name: str, aligned: bool = True) -> dict[str, Any]:
    """Return the request of that number: drawn with a seed, so that its text is known."""
    question = ASKED.format(THINGS[number % len(THINGS)])
    made: dict[str, Any] = {
        "model": name,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": TOKENS,
        "temperature": 0.8,
        "seed": number,
        "stream": True,
    }
    return made | ({"alignment": METHOD} if aligned else {})


@contextlib.contextmanager
def server(model: str, rows: int) -> Iterator[tuple[str, str, int]]:
    """Start a server; yield its address, the model's name there, and its process id."""
    command = [sys.executable, "-m", "trueline", "serve", "--port", "0", "--model", model]
    command += ["--max-running", str(rows), "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        try:
            name = httpx.get(f"{address}/v1/models").json()["data"][0]["id"]
            yield address, name, process.pid
        finally:
            process.terminate()


def processes(pid: int) -> list[int]:
    """Return a server's processes: the engine's, and the one that answers HTTP."""
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def cpu_seconds(pid: int) -> float:
    """Return what a process has used of the cores."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> int:
    """Return the KiB that a server holds; a page that its processes share counts once."""
    found = 0
    for each in processes(pid):
        lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        found += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return found


def run(label: str, pid: int, way: Any) -> dict[str, Any]:
    """Run a load; return its numbers, with the CPU time that a request took of each process."""
    own, before = time.process_time(), [cpu_seconds(p) for p in processes(pid)]
    replies, took = asyncio.run(way)
    used = [cpu_seconds(p) - b for p, b in zip(processes(pid), before, strict=True)]
    used.append(time.process_time() - own)
    return summary(label, replies, took) | {"cpu_ms": [1000 * u / len(replies) for u in used]}


class Offline:
    """The same requests through the engine, with no server."""

    def __init__(self, model: str) -> None:
        torch.set_num_threads(1)
        self.model = load_model(model)
        fields = {k: v for k, v in METHOD.items() if k != "method"}
        self.method = LinearAlignment(**fields)  # type: ignore[arg-type]
        self.params = SamplingParams(max_new_tokens=TOKENS, temperature=0.8)

    def texts(self, numbers: Sequence[int]) -> dict[int, str]:
        """Return each request's text."""
        done = generate(self.model, self._requests(numbers), batch_size=max(CLIENTS), refill=True)
        return {n: c.text for n, c in zip(numbers, done, strict=True)}

    def speed(self, rows: int, seconds: float) -> tuple[float, float]:
        """Return requests a second with so many rows, and the median milliseconds of a step."""
        decoder = Decoder(self.model, batch_size=rows, admission="each_step")
        numbers, stamps, ended = itertools.count(), [], 0
        began = time.perf_counter()
        left = 0
        while time.perf_counter() - began < seconds:
            while left < 3 * rows:  # the next wait for each place that frees up
                [request] = self._requests([next(numbers)])
                decoder.add(decoder.encode(request), text=False)
                left += 1
            steps = decoder.step()
            stamps.append(time.perf_counter())
            over = sum(step.finish_reason is not None for step in steps)
            left, ended = left - over, ended + over
        spans = [b - a for a, b in itertools.pairwise(stamps)]
        return ended / (stamps[-1] - began), 1000 * quantile(spans, 0.5)

    def _requests(self, numbers: Sequence[int]) -> list[Request]:
        asked = (ASKED.format(THINGS[n % len(THINGS)]) for n in numbers)
        return [
            Request(text, self.method, self.params, seed=n)
            for n, text in zip(numbers, asked, strict=True)
        ]


async def soak(address: str, name: str, pid: int, seconds: float) -> dict[str, Any]:
    """Send mixed requests, cut streams and bad bodies for a while; watch the server's memory."""
    counts = {"asked": 0, "cut": 0, "refused": 0, "errors": 0}
    held: list[tuple[float, int]] = []
    numbers, chance = iter(range(10**9)), random.Random(1)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
        began = time.perf_counter()

        async def one() -> None:
            while time.perf_counter() - began < seconds:
                number, kind = next(numbers), chance.random()
                content = body(number, name, aligned=number % 3 > 0)
                if kind < 0.15:
                    async with client.stream("POST", "/v1/chat/completions", json=content) as a:
                        async for _ in a.aiter_lines():
                            break
                    counts["cut"] += 1
                elif kind < 0.3:
                    wrong = content | {"temperature": -1} if kind < 0.2 else {"model": name}
                    answer = await client.post("/v1/chat/completions", json=wrong)
                    counts["refused" if answer.status_code == 400 else "errors"] += 1
                elif kind < 0.35:  # reads slowly
                    async with client.stream("POST", "/v1/chat/completions", json=content) as a:
                        async for _ in a.aiter_lines():
                            await asyncio.sleep(0.02)
                    counts["asked"] += 1
                else:
                    answer = await client.post("/v1/chat/completions", json=content)
                    whole = answer.status_code == 200 and answer.text.endswith("[DONE]\n\n")
                    counts["asked" if whole else "errors"] += 1

        async def watch() -> None:
            while time.perf_counter() - began < seconds:
                held.append((time.perf_counter() - began, memory(pid)))
                await asyncio.sleep(1)

        await asyncio.gather(watch(), *(one() for _ in range(12)))
        await asyncio.sleep(1)
        page = (await client.get("/metrics")).text
        healthy = (await client.get("/health")).status_code == 200
    rows = next(
        float(x.split()[-1]) for x in page.splitlines() if x.startswith("trueline:rows_running{")
    )
    warm = [size for when, size in held if when > seconds / 5]
    quarter = max(1, len(warm) // 4)
    grown = statistics.median(warm[-quarter:]) / statistics.median(warm[:quarter]) - 1
    return {**counts, "seconds": seconds, "healthy": healthy, "rows_left": rows, "grown": grown}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each run (15)")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, metavar="N")
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="soak instead")
    parser.add_argument("--output", type=Path, help="JSON")
    args = parser.parse_args()
    about = machine(1)
    print(f"# Serving\n\n{about['cpu']}; torch {about['torch']}; {about['date']}; {args.model}\n")
    found: dict[str, Any] = {"machine": about, "model": args.model}
    if args.soak:
        with server(args.model, 32) as (address, name, pid):
            found["soak"] = asyncio.run(soak(address, name, pid, args.soak))
        print(table(list(found["soak"]), [[f"{v:.4g}" for v in found["soak"].values()]]))
    else:
        found["runs"] = load(args.model, args.seconds, sorted(set(args.clients)))
    if args.output:
        for run in found.get("runs", []):
            run.pop("texts", None)
        args.output.write_text(json.dumps(found, indent=1) + "\n")


def load(model: str, seconds: float, clients: Sequence[int]) -> list[dict[str, Any]]:
    """Measure every load and the engine alone, compare the texts, and print the tables."""
    runs = []
    with server(model, max(clients)) as (address, name, pid):
        ask = partial(body, name=name)
        asyncio.run(closed(address, ask, 2, 2))  # warm
        for count in clients:
            print(f"{count} clients", file=sys.stderr)
            label = f"{count} client{'s' if count > 1 else ''}"
            runs.append(run(label, pid, closed(address, ask, count, seconds)))
        rate = runs[-1]["requests_per_second"] / 2
        way = poisson(address, ask, rate, seconds)
        runs.append(run(f"Poisson, {rate:.1f} a second", pid, way))
    print("the engine alone", file=sys.stderr)
    alone = Offline(model)
    alone.speed(max(clients), min(1.0, seconds))  # warm
    for made, count in zip(runs, clients, strict=False):
        made["alone"] = alone.speed(count, seconds)
    texts = alone.texts(sorted({n for made in runs for n in made["texts"]}))
    for made in runs:
        made["differ"] = sum(texts[n] != t for n, t in made["texts"].items())
    report(runs, max(clients))
    return runs


def report(runs: list[dict[str, Any]], most: int) -> None:
    """Print what was measured."""
    head = ["", "requests", "lost", "requests/s", "first token, ms p50 / p99"]
    head += ["between tokens, ms p50 / p99", "texts unlike `generate`'s"]
    rows = [
        [made["label"], made["requests"], made["lost"], f"{made['requests_per_second']:.1f}",
         " / ".join(f"{v:.0f}" for v in made["first_ms"]),
         " / ".join(f"{v:.1f}" for v in made["step_ms"]), made["differ"]]
        for made in runs
    ]  # fmt: skip
    print(table(head, rows))
    head = ["", "requests/s, engine alone", "server of that", "a step alone, ms"]
    head += ["CPU ms a request: engine / HTTP / the clients here"]
    rows = [
        [made["label"], f"{made['alone'][0]:.1f}",
         f"{made['requests_per_second'] / made['alone'][0]:.2f}", f"{made['alone'][1]:.2f}",
         " / ".join(f"{v:.1f}" for v in made["cpu_ms"])]
        for made in runs if "alone" in made
    ]  # fmt: skip
    print(table(head, rows))
    one, all_ = (made["requests_per_second"] for made in (runs[0], runs[-2]))
    print(f"{most} clients: {all_ / one:.1f} times the requests of one.")


if __name__ == "__main__":
    main()
