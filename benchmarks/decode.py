"""How fast two-branch decoding is, next to transformers and to the papers' released loops.

    python benchmarks/decode.py                                  # all of it, about a quarter hour
    python benchmarks/decode.py --quick                          # a minute: small sizes, one repeat
    python benchmarks/decode.py --models 135M --dtypes bfloat16 --output /tmp/decode
    python benchmarks/decode.py --models 135M --batches --refill 192         # places refilled alone

Markdown goes to stdout, progress to stderr; `--output` also gets decode.json and decode.png.
`benchmarks/README.md` says how to read it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _parts as parts
from benchmarks._baselines import Clock, Contender, Tokens, generate, guidance, ours, two_caches
from benchmarks._models import SHAPES, Rivals, bundled_missing, machine, rivals
from benchmarks._refill import refill
from benchmarks._report import chart, markdown, targets
from trueline import LinearAlignment, Plain, SelfCD

Row = dict[str, Any]
QUESTION, SYSTEM = 48, 40
RATIO, ALPHA = 2.0, 2.5
START = time.perf_counter()
ROWS = (1, 2, 3, 4, 8, 16, 32)


SHORT = ("generate", "guidance_scale", "two caches, mask", "plain, packed", "LA mask, packed")
REFERENCES = {"plain": "generate", "LA": "guidance_scale", "LA mask": "two caches, mask"}
"""Which contender must give the same float32 tokens; Self-CD is compared with its own release."""


@dataclass(frozen=True)
class Size:
    """How much is run at one batch size: enough for a stable minimum, little enough to wait for."""

    new_tokens: int
    """Tokens decoded; results are stated for the full length, as prompt + steps."""
    repeats: int
    names: tuple[str, ...] = SHORT
    """Which contenders run; none stands for all."""


SMALL = {1: Size(40, 3, ()), 8: Size(12, 2), 32: Size(6, 1, SHORT[:1] + SHORT[2:])}
LARGE = {1: Size(24, 2, ()), 8: Size(6, 1), 32: Size(4, 1, SHORT[:1] + SHORT[-1:])}
QUICK = {1: Size(6, 1, ()), 8: Size(3, 1), 32: Size(2, 1, SHORT[:1] + SHORT[2:])}


def contenders(models: Rivals, pairs: list[tuple[list[int], list[int]]]) -> dict[str, Contender]:
    """Return everything that is timed at one batch size, by short name (see `_report.LABELS`)."""
    plain, free = [[q] for _, q in pairs], LinearAlignment("x", ratio=RATIO, candidates=1.0)
    mask = LinearAlignment("x", ratio=RATIO, candidates=0.8)
    system = SYSTEM if len(pairs) > 1 else 0
    found = {
        "generate": generate(models.rival, [q for _, q in pairs]),
        "guidance_scale": guidance(models.rival, pairs, RATIO),
        "two caches, mask": two_caches(models.rival, pairs, RATIO, 0.8),
    }
    for layout, model in (("torch", models.torch), ("packed", models.packed)):
        found |= {
            f"plain, {layout}": ours(model, plain, Plain()),
            f"LA, {layout}": ours(model, pairs, free, system=system),
            f"LA mask, {layout}": ours(model, pairs, mask, system=system),
            f"Self-CD, {layout}": ours(model, pairs, SelfCD(alpha=ALPHA), system=system),
        }
    return found


def make_pairs(vocab: int, batch: int) -> list[tuple[list[int], list[int]]]:
    """Return `batch` questions of random ids, each with and without one system prompt."""
    draw = torch.Generator().manual_seed(batch)
    system = torch.randint(4, vocab, (SYSTEM,), generator=torch.Generator().manual_seed(0)).tolist()
    questions = torch.randint(4, vocab, (batch, QUESTION), generator=draw).tolist()
    return [(system + question, question) for question in questions]


def race(
    runs: dict[str, Contender], new_tokens: int, repeats: int
) -> tuple[dict[str, Row], dict[str, Tokens]]:
    """Run the contenders in turn, `repeats` times; return the least time of each part, and tokens.

    In turn, so that a slower minute of the machine meets all of them.
    """
    spans: dict[str, list[Any]] = {name: [] for name in runs}
    tokens: dict[str, Tokens] = {}
    for _ in range(repeats):
        for name, run in runs.items():
            gc.collect()
            clock = Clock()
            clock.start()
            tokens[name] = run(new_tokens, clock)
            clock.stop()
            spans[name].append(clock.spans())
    rows = {}
    for name, found in spans.items():
        times = torch.tensor(found).amin(0) / torch.tensor([[1.0], [max(new_tokens - 1, 1)]])
        (prompt, prompt_wall), (step, step_wall) = times.tolist()
        rows[name] = {"prompt": prompt, "step": step}
        rows[name] |= {"prompt_wall": prompt_wall, "step_wall": step_wall}
    return rows, tokens


def race_batch(
    models: Rivals, key: Row, options: argparse.Namespace
) -> tuple[list[Row], list[Row]]:
    """Return the rows of one table (model, dtype, batch size), and those of the token checks."""
    batch, length = key["batch"], options.new_tokens
    size = (QUICK if options.quick else LARGE if key["model"] == "0.5B" else SMALL)[batch]
    runs = contenders(models, make_pairs(models.rival.config.vocab_size, batch))
    runs = {name: runs[name] for name in size.names or runs}
    if batch == 1:
        for run in runs.values():
            run(2, Clock())
    new_tokens = min(size.new_tokens, length)
    times, tokens = race(runs, new_tokens, options.repeats or size.repeats)
    unit = "" if options.threads == 1 else "_wall"
    greedy, rows = times["generate"], []
    for name, row in times.items():
        for kind in ("", "_wall"):
            seconds = row[f"prompt{kind}"] + (length - 1) * row[f"step{kind}"]
            row |= {f"seconds{kind}": seconds, f"tokens_per_second{kind}": batch * length / seconds}
        row["ratio"] = greedy[f"seconds{unit}"] / row[f"seconds{unit}"]
        row["step_ratio"] = greedy[f"step{unit}"] / row[f"step{unit}"]
        rows.append(key | {"contender": name, "new_tokens": new_tokens} | row)
    return rows, [key | row for row in check(tokens)]


def check(tokens: dict[str, Tokens]) -> list[Row]:
    """Return which contenders of ours gave the tokens of their reference."""
    rows = []
    for name, found in tokens.items():
        reference = REFERENCES.get(name.split(", ")[0])
        if reference in tokens:
            distinct = len({token for row in found for token in row})
            rows.append({"contender": name, "reference": reference, "distinct": distinct})
            rows[-1]["equal"] = found == tokens[reference]
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all sections and return their rows."""
    found: dict[str, Any] = {"machine": machine(options.threads), "new_tokens": options.new_tokens}
    found |= {"decode": [], "equal": [], "self_cd": [], "products": [], "prefixes": []}
    found["refill"] = []
    for name in options.models:
        if name == "tiny" and (reason := bundled_missing()):
            say(f"tiny: skipped. {reason}")
            continue
        for dtype in options.dtypes:
            one_model(found, name, dtype, options)
            gc.collect()
            save(found, options.output)
    say("arithmetic of the methods")
    vocab = SHAPES["0.5B"]["vocab_size"]
    found["arithmetic"] = {"vocab": vocab, "rows": parts.arithmetic(vocab, options.seconds)}
    for name in options.models:
        for dtype in options.dtypes if name in SHAPES else ():
            say(f"matrix products of {name} {dtype}")
            found["products"] += parts.products(
                name, getattr(torch, dtype), ROWS, options.seconds / 2
            )
    found["targets"] = targets(found)
    return found


def one_model(found: dict[str, Any], name: str, dtype: str, options: argparse.Namespace) -> None:
    """Add to `found` what is measured on one model in one dtype."""
    models = rivals(name, getattr(torch, dtype))
    say(f"{name} {dtype}: {models.packed_modules} packed modules")
    key = {"model": name, "dtype": dtype}
    for batch in options.batches:
        if (name, dtype, batch) == ("0.5B", "float32", 32) and not options.all:
            say("  batch 32 left out: minutes for its prompts alone (--all runs it)")
            continue
        say(f"  batch {batch}")
        rows, checks = race_batch(models, key | {"batch": batch}, options)
        found["decode"] += rows
        found["equal"] += checks if dtype == "float32" else []
    vocab = models.rival.config.vocab_size
    if options.refill:
        say("  places that fill up again")
        rows = refill(models.packed, make_pairs(vocab, 32), options.refill)
        found["refill"] += [key | row for row in rows]
    if (name == "0.5B" and not options.all) or not options.batches:
        return
    say("  the released Self-CD loop")
    samples, length = (3, 24) if options.quick else (6, parts.LENGTH)
    pair = make_pairs(vocab, 1)[0]
    found["self_cd"].append(key | parts.self_cd_release(models, pair, ALPHA, samples, length))
    if dtype == "float32":
        say("  system prefixes")
        pairs = make_pairs(vocab, 8 if options.quick else 32)
        found["prefixes"].append(key | parts.prefixes(models.packed, pairs, SYSTEM, 4))


def save(found: dict[str, Any], folder: Path | None) -> None:
    """Write what is there so far: a run that is cut short keeps its finished models."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "decode.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """Tell on stderr what is under way."""
    print(f"{time.perf_counter() - START:6.0f} s  {text}", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description="Time two-branch decoding against transformers and the released loops.",
        epilog=(__doc__ or "").split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=[*SHAPES, "tiny"], default=["135M", "0.5B", "tiny"])
    add("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["bfloat16", "float32"])
    add("--batches", nargs="*", type=int, choices=[1, 8, 32], default=[1, 8, 32])
    add("--refill", type=int, metavar="N", help="also N requests of unequal length over 32 places")
    add("--new-tokens", type=int, default=64, help="length that results are stated for (64)")
    add("--repeats", type=int, help="runs of each contender; the default depends on the size")
    add("--threads", type=int, default=1, help="torch threads; above 1 ratios are of wall time")
    add("--quick", action="store_true", help="small sizes, one repeat, no claim to precision")
    add("--all", action="store_true", help="also what takes minutes on the 0.5B model")
    add("--output", type=Path, metavar="FOLDER", help="where decode.json and decode.png go")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and save."""
    options = parse(arguments)
    options.seconds = 0.02 if options.quick else 0.2
    torch.set_num_threads(options.threads)
    found = measure(options)
    print(markdown(found))
    save(found, options.output)
    if options.output:
        say(chart(found, options.output / "decode.png"))


if __name__ == "__main__":
    main()
