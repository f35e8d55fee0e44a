"""Inverse-Q* next to TRL's SFT, DPO, GRPO, RLOO and SDFT: same start, prompts and responses.

    python benchmarks/inverse_q.py --output out/inverse_q            # all, an hour of one core
    python benchmarks/inverse_q.py --parts tune race --seeds 3
    python benchmarks/inverse_q.py --quick --output /tmp/inverse_q   # two steps of everything

tune      learning rates, on development questions; everything else uses what it finds
race      all ways to train from a start that follows the principle now and then
cold      the same from the bundled model, which all but never does
ablation  loss x ratio x mask, and the share of answers that the teacher draws
sdft      Inverse-Q* at ratio 0 and TRL's SDFT: gradients and curves

Every run is a JSON file in OUTPUT/runs; finished ones are not run again. The report goes to
OUTPUT/inverse_q.json, .md and .png. `benchmarks/README.md` says how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from tqdm import tqdm

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import _training_report as report
from benchmarks._jobs import WARM_RESPONSES, Job, effects, same_gradient, warm_start
from benchmarks._models import machine
from benchmarks._training import Setting
from recipes.distil.questions import principle

PARTS = ("tune", "race", "cold", "ablation", "sdft")
LEARNING_RATES: dict[str, tuple[float, ...]] = {
    "inverse-q": (1e-3, 2e-3, 4e-3, 8e-3),
    "inverse-q, on-policy": (1e-3, 2e-3, 4e-3, 8e-3),
    "sft, prompt": (1e-3, 2e-3, 4e-3),
    "sft, linear alignment": (1e-3, 2e-3, 4e-3, 8e-3),
    "dpo, prompt": (2e-4, 5e-4, 1e-3, 2e-3),
    "dpo, linear alignment": (2e-4, 5e-4, 1e-3, 2e-3),
    "grpo": (5e-4, 1e-3, 2e-3),
    "rloo": (5e-4, 1e-3, 2e-3, 4e-3),
    "sdft": (1e-3, 2e-3, 4e-3),
}
"""Three for each, and a fourth where the largest of three was best and the ceiling not reached."""
FACTS = 0.95
"""Facts that a learning rate must keep on development questions; the start knows them all."""
COLD = ("inverse-q", "inverse-q, on-policy", "sft, linear alignment", "grpo", "sdft")
ABLATION = {"loss": ("imitation", "advantage", "kl"), "ratio": (0.0, 1.0, 2.0, 3.0)}
MASKS = (1.0, 0.8)
GUIDED = (0.0, 0.125, 0.25, 0.5)


def jobs(options: argparse.Namespace, rates: dict[str, float]) -> Iterator[Job]:
    """Yield the runs of the chosen parts; `rates` is what tuning found, {} before it."""
    told, size = principle(options.principle), {"responses": options.responses}
    if options.quick:
        size = {"responses": 64, "batch": 32, "points": (), "questions": 4}
    warm = warm_start(options.output, told, 32 if options.quick else WARM_RESPONSES)
    seeds = range(options.seeds)
    if "tune" in options.parts and not rates:
        dev = size | {"responses": min(512, size["responses"]), "split": "dev"}
        dev |= {"points": (128, 256, 384)} if not options.quick else {}
        for way in options.ways:
            choices = LEARNING_RATES[way]
            for lr in choices[: 1 if options.quick else None]:
                yield Job("tune", way, Setting(told, warm, **dev), lr, 0)
        return
    if not rates:
        return
    if "race" in options.parts:
        for seed in seeds:
            for way in options.ways:
                yield Job("race", way, Setting(told, warm, **size), rates[way], seed)
    if "cold" in options.parts:
        for seed in seeds:
            for way in [w for w in COLD if w in options.ways]:
                yield Job("cold", way, Setting(told, "tiny", **_short(size)), rates[way], seed)
    if "ablation" in options.parts:
        yield from _ablation(options, Setting(told, warm, **_short(size)), rates)
        for seed in range(min(2, options.seeds)):
            for share in GUIDED[: 1 if options.quick else None]:
                setting = Setting(told, "tiny", **_short(size))
                yield Job(
                    "guided", "inverse-q", setting, rates["inverse-q"], seed, (("guided", share),)
                )
    if "sdft" in options.parts:
        same = (("ratio", 0.0), ("candidates", 1.0), ("loss", "advantage"), ("guided", 0.0))
        for seed in seeds:
            setting = Setting(told, warm, **_short(size))
            yield Job("sdft", "sdft", setting, rates["sdft"], seed)
            yield Job("sdft", "inverse-q", setting, rates["sdft"], seed, same)


def _short(size: dict[str, Any]) -> dict[str, Any]:
    return size | {"responses": min(512, size["responses"]), "points": (128, 256, 384)}


def _ablation(
    options: argparse.Namespace, setting: Setting, rates: dict[str, float]
) -> Iterator[Job]:
    """Yield loss x ratio x mask, all on-policy, so that the losses see the same samples."""
    few = 1 if options.quick else None
    for seed in range(min(2, options.seeds)):
        for loss in ABLATION["loss"]:
            for ratio in ABLATION["ratio"][:few]:
                for mask in MASKS[:few]:
                    chosen = (
                        ("loss", loss),
                        ("ratio", ratio),
                        ("candidates", mask),
                        ("guided", 0.0),
                    )
                    lr = rates["inverse-q, on-policy"]
                    yield Job("ablation", "inverse-q", setting, lr, seed, chosen)


def best_rates(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the learning rate of each way with the largest area under its development curve.

    The curve is of sampled adherence, so that speed counts. Rates that lose facts in the end are
    out; where all do, the one that keeps most is taken.
    """
    found: dict[str, dict[float, tuple[float, float]]] = {}
    for record in records:
        curve = record["curve"][1:]
        area = sum(p["adherence_sampled"]["mean"] for p in curve) / len(curve)
        fact = min(curve[-1]["fact"]["mean"], FACTS)
        found.setdefault(record["way"], {})[record["lr"]] = (fact, area)
    return {way: max(rates, key=lambda lr: rates[lr]) for way, rates in found.items()}


def make(
    chosen: Sequence[Job], folder: Path, limit: int | None, report: bool = False
) -> list[dict[str, Any]]:
    """Return the records of the runs, made where they are missing unless this is a `report`."""
    if report:
        chosen = [job for job in chosen if (folder / f"{job.name}.json").exists()]
    chosen = chosen[:limit]
    bar = tqdm(chosen, desc="runs", unit="run", file=sys.stderr)
    records = []
    for job in bar:
        bar.set_postfix_str(job.name, refresh=True)
        records.append(job.done(folder))
    return records


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description="Race Inverse-Q* against TRL's trainers.",
        epilog=(__doc__ or "").split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--principle", default="pirate", help="a style of recipes/tiny/styles.toml (pirate)")
    add("--seeds", type=int, default=3, help="runs of each way (3)")
    add("--responses", type=int, default=768, help="sampled responses of a run (768)")
    add("--limit", type=int, help="make at most so many runs of each stage")
    add("--threads", type=int, default=1, help="torch threads (1)")
    add("--ways", nargs="+", choices=list(LEARNING_RATES), default=list(LEARNING_RATES))
    add("--report", action="store_true", help="report on the runs that are there, make none")
    add("--quick", action="store_true", help="two steps of everything: a test, no result")
    add("--output", type=Path, default=Path("out/inverse_q"), metavar="FOLDER")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and report on everything."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    runs = options.output / "runs"
    tuned = make(list(jobs(options, {})), runs, options.limit, options.report)
    path = options.output / "rates.json"
    if tuned:
        path.write_text(json.dumps(best_rates(tuned), indent=1) + "\n", encoding="utf-8")
    if path.exists():
        rates = json.loads(path.read_text(encoding="utf-8"))
    else:
        rates = {way: choices[1] for way, choices in LEARNING_RATES.items()}
    rates = {way: choices[0] for way, choices in LEARNING_RATES.items()} | rates
    records = tuned + make(list(jobs(options, rates)), runs, options.limit, options.report)
    found: dict[str, Any] = {"machine": machine(options.threads), "learning_rates": rates}
    if "sdft" in options.parts:
        told = principle(options.principle)
        setting = Setting(
            told,
            warm_start(options.output, told, 32 if options.quick else WARM_RESPONSES),
            questions=2,
        )
        found["sdft_gradient"] = same_gradient(setting, 0, 2 if options.quick else 16)
        found["effects"] = effects(4 if options.quick else 32)
    found["runs"] = records
    print(report.write(found, options.output, told=options.principle))


if __name__ == "__main__":
    main()
