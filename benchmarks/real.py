"""Everything on chat models that nobody here made: one table a method.

    python benchmarks/real.py --output out/real                        # goes on where it stopped
    python benchmarks/real.py --part linear-alignment --models smollm2
    python benchmarks/real.py --report --output out/real               # from what is there
    python benchmarks/real.py --quick --output /tmp/real               # a look: a few of all

linear-alignment   principles with rules over ratio, mask and gate; preferences by likelihood
inverse-q          distillation against prompting and SFT, off-distribution, rates
o-lora             the form of the paper on tasks of CL_Benchmark
speed              generate, guidance_scale, ours; first token; memory

Tasks of most worth come first, over all parts; each is kept when it is done, so that a kill costs
one. `../shared/models/fetch` makes the models' folders (`--real-models`). The report goes to
OUTPUT/real.md and real.json. `benchmarks/README.md` says how to read it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._models import machine
from benchmarks._real_world import FOLDERS, NAMES, Task, World, say

ROOT = Path(__file__).resolve().parents[1]
PARTS: dict[str, tuple[str, ...]] = {
    "linear-alignment": ("_real_alignment", "_real_preference"),
    "over-refusal": ("_real_refusal",),
    "inverse-q": ("_real_distil",),
    "o-lora": ("_real_continual",),
    "speed": ("_real_speed",),
}
"""Part -> its modules, each with tasks(world, models) and report(world, models)."""
CACHE = Path("~/.cache/real-models").expanduser()


def modules_of(part: str) -> list[ModuleType]:
    """Return a part's modules."""
    return [importlib.import_module(f"benchmarks.{name}") for name in PARTS[part]]


def make(world: World, parts: Sequence[str], models: Sequence[str], limit: int | None) -> None:
    """Run the tasks that are not done, those of most worth first; the report follows each."""
    modules = [module for part in parts for module in modules_of(part)]
    chosen: list[Task] = [t for module in modules for t in module.tasks(world, models)]
    left = [task for task in sorted(chosen, key=lambda t: -t.worth) if not task.done()][:limit]
    for i, task in enumerate(left):
        say(f"{i + 1}/{len(left)}  {task.name}")
        task.run()
        write(world, models)


def write(world: World, models: Sequence[str]) -> str:
    """Write and return the report of all parts."""
    numbers: dict[str, Any] = {"machine": machine(torch.get_num_threads())}
    sections = ["# Real models", f"`{json.dumps(numbers['machine'])}`"]
    for part in PARTS:
        found = [module.report(world, models) for module in modules_of(part)]
        if any(text for text, _ in found):
            sections += [f"## {part}", *(text for text, _ in found if text)]
            numbers[part] = [own for text, own in found if text]
    report = "\n\n".join(sections) + "\n"
    world.output.mkdir(parents=True, exist_ok=True)
    (world.output / "real.md").write_text(report, encoding="utf-8")
    (world.output / "real.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return report


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description="Measure the methods on real chat models.",
        epilog=(__doc__ or "").split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--part", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    add("--models", nargs="+", choices=list(FOLDERS), default=["smollm2", "qwen"])
    home = Path(os.environ.get("TRUELINE_REAL_MODELS", CACHE))
    add("--real-models", type=Path, default=home, metavar="FOLDER", help="where their folders are")
    add("--shared", type=Path, default=ROOT.parent / "shared", metavar="FOLDER", help="public data")
    add("--limit", type=int, help="run at most so many tasks")
    add("--threads", type=int, default=1, help="torch threads (1)")
    add("--report", action="store_true", help="report on what is there, run nothing")
    add("--quick", action="store_true", help="a few answers of everything: a test, no result")
    add("--output", type=Path, default=Path("out/real"), metavar="FOLDER")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and report on everything."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    missing = [m for m in options.models if not (options.real_models / FOLDERS[m]).is_dir()]
    if missing and not options.report:
        names = ", ".join(NAMES[m] for m in missing)
        raise SystemExit(
            f"{options.real_models} has no {names}. Make it with ../shared/models/fetch."
        )
    world = World(options.output, options.real_models, options.shared, quick=options.quick)
    try:
        if not options.report:
            make(world, options.part, options.models, options.limit)
        print(write(world, options.models))
    finally:
        world.close()


if __name__ == "__main__":
    main()
