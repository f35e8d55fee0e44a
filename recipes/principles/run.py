"""Principles on top of one another: three bound to an address each, then no over-refusal.

    python recipes/principles/run.py                       # choose strengths, then three seeds
    python recipes/principles/run.py --ways none drift --seeds 0
    python recipes/principles/run.py --quick --output /tmp/principles

Each stage is one call of `trueline.distil` on top of the last one's folder; all measures are taken
after each. A finished stage is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.distil.measure import Rate, pool, rate
from recipes.principles.questions import bound_rows, measures, request_rows, stages
from trueline import SAFETY_PROMPT, DistilConfig, SamplingParams, distil, generate, load_model

HERE = Path(__file__).parent
Config = dict[str, Any]
Record = dict[str, Any]


def config_of(
    cfg: Config,
    index: int,
    keep: tuple[str, Config],
    seed: int,
    before: Path | None,
    prompts: Path,
) -> DistilConfig:
    """Return the settings of a stage."""
    own = {k: v for k, v in cfg["training"].items() if k not in ("responses", "keep")}
    last = cfg["over_refusal"]
    if index == len(cfg["principle"]):
        own |= {"learning_rate": last["learning_rate"], "teacher": "self-cd"}
        own |= {"teacher_options": {"alpha": last["alpha"], "safety_prompt": SAFETY_PROMPT}}
    return DistilConfig.of(
        model="tiny",
        dtype="float32",
        device="cpu",
        threads=1,
        prompts=str(prompts),
        after=None if before is None else str(before),
        keep=keep[0],
        keep_options=keep[1],
        lora={"rank": cfg["rank"]},
        max_steps=cfg["training"]["responses"] // own["per_device_train_batch_size"],
        save_strategy="no",
        seed=seed,
        **own,
    )


def chain(
    cfg: Config, way: str, options: Config, seed: int, split: str, folder: Path
) -> list[dict[str, Rate]]:
    """Return all measures after every stage, run where they are missing."""
    found, before = [], None
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(stages(cfg)):
        here = folder / f"{index + 1}-{name.replace(' ', '-')}"
        path = folder / f"{here.name}.json"
        last = index == len(cfg["principle"])
        rows = request_rows(cfg, seed) if last else bound_rows(cfg["principle"][index], cfg, seed)
        prompts = folder / f"{here.name}.jsonl"
        prompts.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        distil(config_of(cfg, index, (way, options), seed, before, prompts), here)
        if not path.exists():
            path.write_text(json.dumps(asked(cfg, seed, split, here)) + "\n", encoding="utf-8")
        found.append(json.loads(path.read_text(encoding="utf-8")))
        before = here
    return found


def asked(cfg: Config, seed: int, split: str, adapter: Path | None) -> dict[str, Rate]:
    """Return the share of right answers of each measure; of refusals for those named so."""
    model = load_model("tiny", dtype="float32", device="cpu", adapter=adapter)
    sampling = SamplingParams(max_new_tokens=cfg["training"]["max_completion_length"])
    found = {}
    for name, probes in measures(cfg, seed, split).items():
        chats: list[Any] = [
            [*([{"role": "system", "content": p.system}] if p.system else []),
             {"role": "user", "content": p.prompt}]
            for p in probes
        ]  # fmt: skip
        texts = [c.text for c in generate(model, chats, sampling=sampling, batch_size=64)]
        found[name] = rate([p.right(t) for p, t in zip(probes, texts, strict=True)])
    return found


def total(row: dict[str, Rate]) -> float:
    """Return the mean of all measures at the end, over-refusal counted as its absence."""
    values = [1 - v["mean"] if n == "trigger refused" else v["mean"] for n, v in row.items()]
    return sum(values) / len(values)


def best_options(cfg: Config, ways: Sequence[str], output: Path) -> dict[str, Config]:
    """Return each way's options with the best end on development wordings."""
    found = {}
    for way in ways:
        choices = cfg["ways"][way]
        scores = [0.0]
        if len(choices) > 1:
            seed = cfg["tune_seed"]
            folders = [output / f"tune-{way}-{i}" for i in range(len(choices))]
            pairs = zip(choices, folders, strict=True)
            scores = [total(chain(cfg, way, o, seed, "dev", f)[-1]) for o, f in pairs]
        found[way] = choices[scores.index(max(scores))]
    return found


def kept(runs: list[dict[str, Rate]], names: Sequence[str]) -> tuple[float, float]:
    """Return the mean of the principles as each was learned, and at the end."""
    learned = sum(runs[i][name]["mean"] for i, name in enumerate(names)) / len(names)
    return learned, sum(runs[-1][name]["mean"] for name in names) / len(names)


def markdown(cfg: Config, results: Record) -> str:
    """Return the tables: the end of every way, and a way's measures after each stage."""
    names = list(results["before"])
    head = ["", "options", "learned", "kept", *names]
    lines = [head, ["---"] * len(head)]
    lines.append(["before", "", "", "", *(show(results["before"][n]) for n in names)])
    for way, row in results["ways"].items():
        options = ", ".join(f"{k} {v:g}" for k, v in row["options"].items())
        ends = [show(row["after"][-1][n]) for n in names]
        lines.append([way, options, show(row["learned"]), show(row["kept"]), *ends])
    for way, row in results["ways"].items():
        lines += [[], [f"{way}, after", *names], ["---"] * (len(names) + 1)]
        for stage, found in zip(stages(cfg), row["after"], strict=True):
            lines.append([stage, *(show(found[n]) for n in names)])
    return "\n".join("| " + " | ".join(line) + " |" if line else "" for line in lines)


def show(value: Rate) -> str:
    """Return a mean with its standard error over seeds."""
    return f"{value['mean']:.2f} ± {value['se']:.2f}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, default=HERE / "config.toml")
    add("--output", type=Path, default=Path("runs/principles"), help="runs and summary go here")
    add("--seeds", type=int, nargs="+", help="in place of the config's")
    add("--ways", nargs="+", metavar="NAME", help="in place of the config's")
    add("--quick", action="store_true", help="one seed, two steps, four questions, no choosing")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and summarise."""
    options = parse(arguments)
    torch.set_num_threads(1)
    cfg: Config = tomllib.loads(options.config.read_text(encoding="utf-8"))
    if options.quick:
        cfg["questions"], cfg["seeds"] = 4, [0]
        cfg["training"] |= {"responses": 16, "per_device_train_batch_size": 8}
        cfg["ways"] = {way: choices[:1] for way, choices in cfg["ways"].items()}
    ways = options.ways or list(cfg["ways"])
    seeds = options.seeds or cfg["seeds"]
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = best_options(cfg, ways, options.output)
    names = [table["name"] for table in cfg["principle"]]
    results: Record = {"ways": {}}
    bar = tqdm([(way, seed) for way in ways for seed in seeds], unit="chain", file=sys.stderr)
    runs: dict[str, list[list[dict[str, Rate]]]] = {way: [] for way in ways}
    for way, seed in bar:
        folder = options.output / f"{way}-{seed}"
        runs[way].append(chain(cfg, way, chosen[way], seed, "test", folder))
    start = [asked(cfg, seed, "test", None) for seed in seeds]
    results["before"] = {name: pool([s[name] for s in start]) for name in start[0]}
    for way, chains in runs.items():
        pairs = [kept(c, names) for c in chains]
        results["ways"][way] = {
            "options": chosen[way],
            "learned": rate([learned for learned, _ in pairs]),
            "kept": rate([end for _, end in pairs]),
            "after": [
                {name: pool([c[i][name] for c in chains]) for name in chains[0][i]}
                for i in range(len(stages(cfg)))
            ],
        }
    text = json.dumps({"config": cfg, "results": results}, indent=1) + "\n"
    (options.output / "results.json").write_text(text, encoding="utf-8")
    print(markdown(cfg, results))


if __name__ == "__main__":
    main()
