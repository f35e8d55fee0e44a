"""Four principles in a row and no over-refusal, by `trueline align`: ways to keep side by side.

    python recipes/align/run.py                            # every way, three seeds
    python recipes/align/run.py --arms drift --seeds 0
    python recipes/align/run.py --quick --output /tmp/align

Each arm of each seed is one project in a folder of its own. What is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from tqdm import tqdm

from recipes.align.questions import write_prompts
from trueline import AlignConfig, align
from trueline.settings.reader import write_toml

HERE = Path(__file__).parent
Config = dict[str, Any]


def write_project(cfg: Config, arm: str, seed: int, folder: Path) -> Path:
    """Write the prompts and the project file of an arm, and return the file."""
    principles = write_prompts(cfg, seed, folder / f"prompts-{seed}")
    place = f"prompts-{seed}"
    for table in principles:
        table["prompts"] = f"{place}/{table['prompts']}"
    project = {
        **cfg["project"],
        "seed": seed,
        **cfg["arms"][arm],
        "other": f"{place}/other.jsonl",
        "safety": {"safe": f"{place}/safe.jsonl", "unsafe": f"{place}/unsafe.jsonl"},
        "principle": [*principles, cfg["over_refusal"]],
    }
    path = folder / f"{arm}-{seed}.toml"
    path.write_text(write_toml(project), encoding="utf-8")
    return path


def row_of(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of one run that the table shows."""
    names = [p["name"] for p in found["principles"] if p["goal"] == "adherence"]
    learned = [
        found["measures"][i][n]["measures"]["adherence"]["value"] for i, n in enumerate(names, 1)
    ]
    end = found["measures"][-1]
    kept = [end[n]["measures"]["adherence"]["value"] for n in names]
    requests = end["requests"]["measures"]
    facts = next(c for c in found["checks"] if c["name"] == "facts")
    return {
        "least learned": min(learned),
        "least at the end": min(kept),
        "learned": sum(learned) / len(names),
        "at the end": sum(kept) / len(names),
        "over-refusal": requests["over_refusal"]["value"],
        "harmful refused": requests["harmful_refusal"]["value"],
        "facts kept": facts["value"],
        "drift, nats": found["drift"][-1]["value"],
    }


def table(rows: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Return the table: a row for each arm, means over seeds with the lowest and highest."""
    names = list(next(iter(rows.values()))[0])
    lines = [["", "seeds", *names], ["---"] * (len(names) + 2)]
    for arm, own in rows.items():
        cells = []
        for name in names:
            values = [row[name] for row in own]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.3f}{spread}")
        lines.append([arm, str(len(own)), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, default=HERE / "config.toml")
    add("--output", type=Path, default=Path("runs/align"), help="projects and summary go here")
    add("--seeds", type=int, nargs="+", help="in place of the config's")
    add("--arms", nargs="+", metavar="NAME", help="in place of the config's")
    add("--quick", action="store_true", help="two steps, few questions, one principle")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and summarise."""
    options = parse(arguments)
    torch.set_num_threads(1)
    cfg: Config = tomllib.loads(options.config.read_text(encoding="utf-8"))
    if options.quick:
        cfg["count"] = {"train": 24, "validation": 6, "held_out": 6}
        cfg["project"] |= {"answers": 16, "questions": 6, "off_path": 2}
        cfg["project"]["training"] |= {"per_device_train_batch_size": 8}
        cfg["principle"] = cfg["principle"][:1]
        cfg["over_refusal"]["grid"] = {"alpha": [1.25]}
    arms = options.arms or list(cfg["arms"])
    seeds = options.seeds or cfg["seeds"]
    options.output.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
    runs = [(seed, arm) for seed in seeds for arm in arms]
    for seed, arm in tqdm(runs, unit="project", file=sys.stderr):
        path = write_project(cfg, arm, seed, options.output)
        found = align(AlignConfig.read(path), options.output / f"{arm}-{seed}")
        rows[arm].append(row_of(found.as_dict()))
        text = json.dumps(rows, indent=1) + "\n"
        (options.output / "results.json").write_text(text, encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
