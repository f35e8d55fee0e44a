"""How a running server holds up: throughput, time to the first token and between tokens.

    python benchmarks/serve.py                          # the bundled model; a few minutes
    python benchmarks/serve.py --model DIR --seconds 20
    python benchmarks/serve.py --soak 600               # mixed requests, cancellations, bad bodies

A server of its own is started on the loopback; 1, 8 and 32 clients ask one after the other without
a pause, then as many requests a second as half of that arrive at random (Poisson). The same
requests go through `generate` in this process, and every text is compared. Markdown on stdout,
progress on stderr; `--output FILE` also gets JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx
import torch

from benchmarks._models import machine
from benchmarks._report import table
from trueline import LinearAlignment, Request, SamplingParams, generate, load_model

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


async def ask(client: httpx.AsyncClient, content: dict[str, Any]) -> dict[str, Any]:
    """Ask once; return the text and when its pieces came."""
    began, times, text = time.perf_counter(), [], ""
    async with client.stream("POST", "/v1/chat/completions", json=content) as answer:
        if answer.status_code != 200:
            return {"error": answer.status_code}
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            choice = json.loads(line[6:])["choices"][0]
            text += choice["delta"]["content"]
            times.append(time.perf_counter())
    steps = [b - a for a, b in itertools.pairwise(times)]
    return {"text": text, "first": times[0] - began, "steps": steps, "chunks": len(times)}


async def closed(address: str, name: str, clients: int, seconds: float) -> dict[str, Any]:
    """Let `clients` ask one after the other until the time is up."""
    answers: dict[int, dict[str, Any]] = {}
    numbers = iter(range(10**9))
    async with httpx.AsyncClient(base_url=address, timeout=120) as client:
        began = time.perf_counter()

        async def one() -> None:
            while time.perf_counter() - began < seconds:
                number = next(numbers)
                answers[number] = await ask(client, body(number, name))

        await asyncio.gather(*(one() for _ in range(clients)))
        took = time.perf_counter() - began
    return summary(f"{clients} clients", answers, took)


async def poisson(address: str, name: str, rate: float, seconds: float) -> dict[str, Any]:
    """Let requests arrive at random, `rate` a second."""
    answers: dict[int, dict[str, Any]] = {}
    waits, tasks, number = random.Random(0), [], 0
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
        began = time.perf_counter()

        async def one(number: int) -> None:
            answers[number] = await ask(client, body(number, name))

        while time.perf_counter() - began < seconds:
            tasks.append(asyncio.create_task(one(number)))
            number += 1
            await asyncio.sleep(waits.expovariate(rate))
        await asyncio.gather(*tasks)
        took = time.perf_counter() - began
    return summary(f"Poisson, {rate:.1f} a second", answers, took)


def summary(label: str, answers: dict[int, dict[str, Any]], took: float) -> dict[str, Any]:
    """Return the numbers of a run."""
    fine = {n: a for n, a in answers.items() if "error" not in a}
    firsts = [a["first"] for a in fine.values()]
    steps = [s for a in fine.values() for s in a["steps"]]
    return {
        "label": label,
        "requests": len(answers),
        "lost": len(answers) - len(fine),
        "requests_per_second": len(fine) / took,
        "first_ms": [1000 * quantile(firsts, q) for q in (0.5, 0.99)],
        "step_ms": [1000 * quantile(steps, q) for q in (0.5, 0.99)],
        "texts": {n: a["text"] for n, a in fine.items()},
    }


def quantile(values: list[float], q: float) -> float:
    """Return a quantile of measured values."""
    return statistics.quantiles(values, n=100)[round(100 * q) - 1] if len(values) > 1 else values[0]


def offline(model: str, numbers: list[int], rows: int) -> tuple[dict[int, str], float]:
    """Return the same requests' texts from `generate`, and requests a second."""
    torch.set_num_threads(1)
    loaded = load_model(model)
    params = SamplingParams(max_new_tokens=TOKENS, temperature=0.8)
    fields = {k: v for k, v in METHOD.items() if k != "method"}
    method = LinearAlignment(**fields)  # type: ignore[arg-type]
    requests = [
        Request(ASKED.format(THINGS[n % len(THINGS)]), method, params, seed=n) for n in numbers
    ]
    began = time.perf_counter()
    done = generate(loaded, requests, batch_size=rows, refill=True)
    took = time.perf_counter() - began
    return {n: c.text for n, c in zip(numbers, done, strict=True)}, len(numbers) / took


async def soak(address: str, name: str, pid: int, seconds: float) -> dict[str, Any]:
    """Send mixed requests, cut streams and bad bodies for a while; watch the server's memory."""
    counts = {"asked": 0, "cut": 0, "refused": 0, "errors": 0}
    memory: list[tuple[float, int]] = []
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
                    found = await ask(client, content)
                    counts["errors" if "error" in found else "asked"] += 1

        async def watch() -> None:
            while time.perf_counter() - began < seconds:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                size = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
                memory.append((time.perf_counter() - began, size))
                await asyncio.sleep(1)

        await asyncio.gather(watch(), *(one() for _ in range(12)))
        await asyncio.sleep(1)
        page = (await client.get("/metrics")).text
        healthy = (await client.get("/health")).status_code == 200
    rows = next(
        float(x.split()[-1]) for x in page.splitlines() if x.startswith("trueline:rows_running{")
    )
    warm = [size for when, size in memory if when > seconds / 5]
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
        found["runs"] = load(args.model, args.seconds)
    if args.output:
        for run in found.get("runs", []):
            run.pop("texts", None)
        args.output.write_text(json.dumps(found, indent=1) + "\n")


def load(model: str, seconds: float) -> list[dict[str, Any]]:
    """Measure every load, compare the texts, and print the table."""
    runs = []
    with server(model, max(CLIENTS)) as (address, name, _):
        asyncio.run(closed(address, name, 2, 2))  # warm
        for clients in CLIENTS:
            print(f"{clients} clients", file=sys.stderr)
            runs.append(asyncio.run(closed(address, name, clients, seconds)))
        rate = runs[-1]["requests_per_second"] / 2
        runs.append(asyncio.run(poisson(address, name, rate, seconds)))
    busiest = runs[len(CLIENTS) - 1]
    texts, speed = offline(model, sorted(busiest["texts"]), max(CLIENTS))
    for run in runs:
        run["differ"] = sum(texts.get(n, t) != t for n, t in run["texts"].items())
    rows = [
        [
            run["label"],
            run["requests"],
            run["lost"],
            f"{run['requests_per_second']:.1f}",
            " / ".join(f"{v:.0f}" for v in run["first_ms"]),
            " / ".join(f"{v:.1f}" for v in run["step_ms"]),
            run["differ"],
        ]
        for run in runs
    ]
    head = ["", "requests", "lost", "requests/s", "first token, ms p50 / p99"]
    print(table([*head, "between tokens, ms p50 / p99", "texts unlike `generate`'s"], rows))
    one = runs[0]["requests_per_second"]
    most = busiest["requests_per_second"]
    print(f"`generate`, {max(CLIENTS)} rows, refilled: {speed:.1f} requests/s.")
    print(f"{max(CLIENTS)} clients: {most / one:.1f} of one client, {most / speed:.2f} of that.")
    return runs


if __name__ == "__main__":
    main()
