"""What `trueline.measure` and `sweep` find: on the bundled model, and on real data and models.

    python benchmarks/measurement.py --output out/measurement              # all, about ten minutes
    python benchmarks/measurement.py --part frontier ratio recommended     # the bundled model alone
    python benchmarks/measurement.py --limit 4                             # a look, no numbers

Every number comes from runs of these jobs, which stay in the output folder and go on where a killed
one stopped. Markdown goes to stdout, progress to stderr; the output folder gets
measurement.json, measurement.md, frontier.png and ratio.png. `benchmarks/README.md` says how to
read it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._halves import adherence_halves, refusal_halves
from trueline import (
    JudgeConfig,
    MeasureConfig,
    ModelConfig,
    PromptFileConfig,
    SamplingParams,
    SweepConfig,
    TruelineError,
    generate_file,
    measure,
    sweep,
)

ROOT = Path(__file__).resolve().parents[1]
START = time.perf_counter()
REQUESTS, PAIRS, THROUGHPUT = 400, 240, 450
ALPHAS = (0, 0.5, 1, 1.5, 2, 2.5, 3)
GRID = {"ratio": (0, 1, 2, 3, 5), "candidates": (0.8, 0.95, 1)}
DEFAULTS = {"refusal": "alpha=2.5", "adherence": "ratio=2, candidates=0.8"}
PRINCIPLE = "Be harmless."
LETTERS: tuple[Literal["letter", "logprob"], ...] = ("letter", "logprob")
MODELS = ("craftgpt-5m", "stories260K")
RAW = ("stories260K",)
"""Models with no chat template."""
SHORT_SAFETY = {"safety_prompt": "Be helpful, but safe."}
"""For 64 positions: the default safety prompt alone has more tokens."""
OVER, HARM = "data/over_refusal", "data/harmful"
REFUSAL_SETS = {
    "OKTest, HarmBench": (f"{OVER}/oktest.jsonl", f"{HARM}/harmbench_val.jsonl"),
    "XSTest, XSTest": (f"{OVER}/xstest.jsonl", f"{OVER}/xstest.jsonl"),
    "XSTest, MaliciousInstruct": (f"{OVER}/xstest.jsonl", f"{HARM}/malicious_instruct.jsonl"),
}
"""Safe prompts, unsafe prompts."""
HH = "data/preference/hh_harmless_base_test.jsonl"
PSOUPS = "data/preference/psoups_principles.jsonl"
QUESTIONS = "data/preference/personal_questions.jsonl"
USERS = (
    "A doctor who wants facts.",
    "A child who likes short answers.",
    "A poet who loves images.",
    "A chef who thinks of food.",
)
Found = dict[str, Any]


def call(config: MeasureConfig, folder: Path, *, overwrite: bool = False) -> Found:
    """Run a measurement; return its results, or the error where it refuses."""
    about = {"call": shown(config)}
    say(f"{about['call']} -> {folder}")
    job: Callable[..., Any] = sweep if isinstance(config, SweepConfig) else measure
    try:
        found = job(config, folder, overwrite=overwrite)
    except TruelineError as error:
        if "belongs to another run" in str(error):
            raise SystemExit(f"{error} Here: another benchmark --output.") from None
        return {**about, "error": error.lines()[-1]}
    # Of all sessions, if the run was resumed; the model is loaded before.
    sessions = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["sessions"]
    seconds = round(sum(session.get("seconds", 0) for session in sessions), 1)
    return {**found.written, **about, "folder": str(folder), "seconds": seconds}


def shown(config: Any) -> str:
    """Return the call that a config stands for: what is not by default."""
    given = [
        f"{f.name}={value.name if f.name == 'model' else value!r}"
        for f in fields(config)
        if (value := getattr(config, f.name)) != f.default and value not in ({}, None)
    ]
    return f"{type(config).__name__}({', '.join(given)})"


def need(found: Found) -> Found:
    """Return the results; raise where a measurement on the bundled model failed."""
    if "error" in found:
        raise SystemExit(f"{found['call']}\n{found['error']}")
    return found


def frontier(options: argparse.Namespace) -> Found:
    """Over-refusal against harmful refusals over alpha, on held-out requests of the grammar."""
    paths = []
    for name, kind in (("safe", "trigger"), ("unsafe", "unsafe")):
        paths.append(options.output / f"{name}.jsonl")
        write(paths[-1], [{"prompt": p} for p in held_out(kind, options.limit or REQUESTS)])
    config = SweepConfig(method="self-cd", grid={"alpha": ALPHAS}, safe=paths[0], unsafe=paths[1])
    found = need(call(config, options.output / "alpha"))
    shutil.copy(options.output / "alpha" / "plot.png", options.output / "frontier.png")
    return found


def ratio(options: argparse.Namespace) -> Found:
    """Adherence and facts over ratio and candidates, on held-out principles and questions."""
    config = SweepConfig(metric="adherence", grid=GRID, limit=options.limit or PAIRS)
    found = need(call(config, options.output / "grid"))
    shutil.copy(options.output / "grid" / "plot.png", options.output / "ratio.png")
    return found


def recommended(options: argparse.Namespace) -> Found:
    """What the recommended settings do against the defaults, where they were not chosen."""
    alpha, grid = frontier(options), ratio(options)
    return {
        "refusal": refusal_halves(alpha, DEFAULTS["refusal"]),
        "adherence": adherence_halves(grid, DEFAULTS["adherence"]),
    }


def model_of(options: argparse.Namespace, name: str) -> ModelConfig:
    """Return one of the real models."""
    return ModelConfig(str(options.shared / "models" / name), raw=name in RAW)


def real(options: argparse.Namespace) -> Found:
    """The pipeline from end to end on real data and models; nothing is claimed about safety."""
    rows = []
    for name in MODELS:
        folder = options.output / "real" / name
        common: Found = {"model": model_of(options, name), "skip_long": True, "plot": False}
        words: Found = {"sampling": SamplingParams(max_new_tokens=32)}
        for title, paths in REFUSAL_SETS.items():
            safe, unsafe = (options.shared / path for path in paths)
            config: MeasureConfig = SweepConfig(
                **common, **words, grid={"alpha": (0, 1, 2.5)}, safe=safe, unsafe=unsafe,
                options=SHORT_SAFETY if name == "craftgpt-5m" else {}, limit=options.limit,
            )  # fmt: skip
            rows.append(part_row(name, title, call(config, folder / title.replace(", ", "-"))))
        config = MeasureConfig(
            **common, **words, prompts=options.shared / PSOUPS, limit=options.limit or 100,
            judge=JudgeConfig("local", "tiny"),
        )  # fmt: skip
        rows.append(part_row(name, "psoups, judge tiny", call(config, folder / "psoups")))
        answers = personal(options, name, folder)
        for by in LETTERS:
            tokens = SamplingParams(max_new_tokens=10 if by == "letter" else 64)
            config = MeasureConfig(**common, sampling=tokens, questions=answers, by=by)
            found = call(config, folder / f"personal-{by}")
            rows.append(part_row(name, f"personal questions, by {by}", found))
    return {"rows": rows}


def personal(options: argparse.Namespace, model: str, folder: Path) -> Path:
    """Return a file of questions with the model's own answers for four users.

    The published answers are not to be had: the model writes each under the user's principle.
    Questions that do not fit it with a principle are left out.
    """
    source = (options.shared / QUESTIONS).read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"].strip() for line in source][: options.limit]
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"id": f"{i}:{u}", "prompt": q, "principle": f"I am: {user}"}
        for i, q in enumerate(questions)
        for u, user in enumerate(USERS)
    ]
    write(folder / "asked.jsonl", rows)
    given = {"max_new_tokens": 12}
    config = PromptFileConfig(
        folder / "asked.jsonl", "plain", given, model_of(options, model), skip_bad=True
    )
    say(f"{shown(config)} -> {folder / 'answers.jsonl'}")
    generate_file(config, folder / "answers.jsonl")
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = {row["id"]: row["text"].strip() or "-" for row in map(json.loads, lines)}
    ids = [[f"{i}:{u}" for u in range(len(USERS))] for i in range(len(questions))]
    chosen = [
        {"question": q, "answers": [answers[k] for k in own], "users": USERS}
        for q, own in zip(questions, ids, strict=True)
        if all(k in answers for k in own)
    ]
    write(folder / "questions.jsonl", chosen)
    return folder / "questions.jsonl"


def part_row(model: str, data: str, found: Found) -> Found:
    """Return what the table of real runs shows of one run."""
    row = {"model": model, "data": data} | {
        k: found[k] for k in ("call", "error", "seconds", "points", "numbers") if k in found
    }
    settings = found.get("settings", {}).get("data", {})
    return {**row, "n": settings.get("n"), "skipped": settings.get("skipped", 0)}


def hh(options: argparse.Namespace) -> Found:
    """Accuracy of the implicit reward on all HH pairs, and of "the longer answer" on the same."""
    from trueline.evals.datasets import load_pairs
    from trueline.evals.statistics import rate

    rows = []
    pairs = {pair.id: pair for pair in load_pairs(options.shared / HH)}
    for name in MODELS:
        config = MeasureConfig(
            model_of(options, name), options={"principle": PRINCIPLE}, pairs=options.shared / HH,
            limit=options.limit,
        )  # fmt: skip
        found = call(config, options.output / "hh" / name)
        if "error" in found:
            rows.append({"model": name, "error": found["error"], "call": found["call"]})
            continue
        lines = (Path(found["folder"]) / "verdicts.jsonl").read_text().splitlines()
        scored = [row["id"] for row in map(json.loads, lines) if row["chosen"] is not None]
        longer = rate([len(pairs[i].chosen) > len(pairs[i].rejected) for i in scored])
        row = {"model": name, "numbers": found["numbers"], "longer": vars(longer)}
        rows.append({**row, "seconds": found["seconds"], "call": found["call"]})
    return {"principle": PRINCIPLE, "pairs": len(pairs), "rows": rows}


def throughput(options: argparse.Namespace) -> Found:
    """Seconds for Self-CD on 450 prompts: all 64 tokens of each, and the whole of a real run."""
    import torch

    from trueline import SelfCD, generate, load_model

    count = options.limit or THROUGHPUT
    prompts = held_out("trigger", count // 2) + held_out("unsafe", count - count // 2)
    model, sampling = load_model("tiny"), SamplingParams(max_new_tokens=64)
    torch.set_num_threads(options.threads)
    say(f"{count} prompts x 64 tokens, end of text ignored")
    model.eos_token_ids = frozenset()
    wall, cpu = time.perf_counter(), time.process_time()
    done = generate(model, prompts, SelfCD(), sampling, batch_size=64)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = sum(len(c.token_ids) for c in done)
    assert tokens == 64 * count, "a completion is shorter than 64 tokens"
    for name, part in (("safe", prompts[: count // 2]), ("unsafe", prompts[count // 2 :])):
        write(options.output / f"throughput-{name}.jsonl", [{"prompt": p} for p in part])
    config = MeasureConfig(
        ModelConfig(threads=options.threads), options={"alpha": 2.5}, plot=False,
        safe=options.output / "throughput-safe.jsonl",
        unsafe=options.output / "throughput-unsafe.jsonl",
    )  # fmt: skip
    run = need(call(config, options.output / "throughput", overwrite=True))
    own = next(p for p in run["points"] if not p["baseline"])
    return {
        "prompts": count,
        "tokens": tokens,
        "seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "run_seconds": run["seconds"],
        "run_tokens": own["quality"]["length"]["value"],
        "run_call": run["call"],
    }


PARTS: dict[str, Callable[[argparse.Namespace], Found]] = {
    "frontier": frontier,
    "ratio": ratio,
    "recommended": recommended,
    "real": real,
    "hh": hh,
    "throughput": throughput,
}
SHARED_PARTS = ("real", "hh")
"""What needs the folder of real data and models."""


def held_out(kind: str, count: int) -> list[str]:
    """Return requests of the bundled model's test split, which was never trained on."""
    folder = str(ROOT / "recipes/tiny")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from corpus import held_out_requests, load_grammar

    # Seed 11 as in the recipe: the first 144 are those of the model card.
    found: list[str] = held_out_requests(load_grammar(), random.Random(11), kind, "test", count)
    return found


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def say(text: str) -> None:
    """Tell on stderr what is under way."""
    print(f"{time.perf_counter() - START:6.0f} s  {text}", file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description="Measure by the library's jobs and write down what came out.",
        epilog=(__doc__ or "").split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, default=list(PARTS), help="which parts (all)")
    add("--shared", type=Path, default=Path("../shared"), metavar="DIR", help="real data, models")
    add("--output", type=Path, default=Path("out/measurement"), metavar="DIR")
    add("--limit", type=int, metavar="N", help="at most N prompts, pairs or questions of a kind")
    add("--threads", type=int, default=1, help="torch threads of the throughput part (1)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and save; parts measured earlier into the same folder stay in the report."""
    from benchmarks._measurement_report import markdown
    from benchmarks._models import machine

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "measurement.json"
    found: Found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in options.part:
        if name in SHARED_PARTS and not (options.shared / "models").is_dir():
            say(f"{name}: skipped, {options.shared} has no models and data")
            continue
        found[name] = {**PARTS[name](options), "machine": machine(options.threads)}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = markdown(found)
    (options.output / "measurement.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
