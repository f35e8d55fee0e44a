"""Distil decoding into weights: five principles, and a safety prompt without its over-refusal.

    python recipes/distil/run.py                            # everything, see README.md
    python recipes/distil/run.py --only pirate --seeds 0
    python recipes/distil/run.py --quick --output /tmp/distil

Each run trains one adapter on the bundled model, measures it on prompts that nothing was trained
or tuned on, and leaves a folder with the adapter and its numbers; a finished one is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from peft import LoraConfig
from tqdm import tqdm
from transformers.trainer_callback import PrinterCallback

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.distil.measure import Probe, Rate, answers, asked, kl, logprobs, pool, rate
from recipes.distil.questions import CHAT, TEST, grammar, principle, questions, requests, training
from trueline import SAFETY_PROMPT, LanguageModel, load_model
from trueline.train.distil.trainer import InverseQConfig, InverseQTrainer

HERE = Path(__file__).parent
OVER_REFUSAL = "over-refusal"
Config = dict[str, Any]
Measured = dict[str, Rate]


def train(rows: list[dict[str, Any]], cfg: Config, seed: int, folder: Path, **teacher: Any) -> Any:
    """Train an adapter on the bundled model and save it; returns the trainer and its seconds."""
    lm = start()
    args = InverseQConfig(
        output_dir=str(folder),
        max_steps=cfg["responses"] // cfg["batch"],
        per_device_train_batch_size=cfg["batch"],
        learning_rate=cfg["learning_rate"],
        lr_scheduler_type=cfg["schedule"],
        warmup_steps=cfg["warmup_steps"],
        max_completion_length=cfg["max_new_tokens"],
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=seed,
        **teacher,
    )
    adapter = LoraConfig(
        r=cfg["rank"],
        lora_alpha=2 * cfg["rank"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = InverseQTrainer(
        lm.model, args, rows, processing_class=lm.tokenizer, peft_config=adapter
    )
    trainer.remove_callback(PrinterCallback)
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.train()
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    trainer.save_model(str(folder / "adapter"))
    return trainer, {name: round(value, 1) for name, value in seconds.items()}


def start() -> LanguageModel:
    """The bundled model, its weights free to change."""
    return load_model("tiny", packed_weights=False, dtype="float32", device="cpu")


def principle_rows(name: str, cfg: Config, seed: int) -> list[dict[str, Any]]:
    """Questions of fact with the principle, and other chat that is to stay as it is."""
    count, text = cfg["responses"], principle(name).text
    kept = round(cfg["keep"] * count)
    rows = [{"prompt": t.user, "principle": text} for t in training("fact", count - kept, seed)]
    for i, kind in enumerate(CHAT):
        share = kept // len(CHAT) + (i < kept % len(CHAT))
        rows += [{"prompt": t.user, "principle": ""} for t in training(kind, share, seed)]
    random.Random(seed).shuffle(rows)
    return rows


def run_principle(name: str, cfg: Config, seed: int, folder: Path) -> dict[str, Any]:
    """Distil one principle; measure the start and the student, both unprompted."""
    probe = Probe(start(), principle(name), cfg["split"], cfg["questions"], seed)
    rows = principle_rows(name, cfg["training"], seed)
    trainer, seconds = train(rows, cfg["training"], seed, folder)
    return {
        "principle": principle(name).text,
        "effect": trainer.effect,
        "seconds": seconds,
        "before": probe(probe.start.model),
        "after": probe(trainer.model),
    }


def measure_refusal(lm: LanguageModel, first: LanguageModel, cfg: Config, seed: int) -> Measured:
    """Refusals with and without the safety prompt, facts under it, and drift without it."""
    pattern, count = grammar().prompts["refusal_pattern"], cfg["over_refusal"]["requests"]
    split = cfg["split"]
    found: Measured = {}
    for kind in ("trigger", "unsafe", "ordinary"):
        texts = requests(kind, split, count, seed)
        for name, system in (("under it", SAFETY_PROMPT), ("without", None)):
            said = _said(lm, texts, system, seed)
            found[f"{kind}, {name}"] = rate([bool(re.search(pattern, s)) for s in said])
    turns = questions(split, count, seed)
    said = _said(lm, [t.user for t in turns], SAFETY_PROMPT, seed)
    facts = [
        bool(re.search(rf"(?i)\b{re.escape(t.fact)}\b", s))
        for t, s in zip(turns, said, strict=True)
    ]
    found["fact, under it"] = rate(facts)
    texts = requests("unsafe", split, count // 4, seed) + requests(
        "ordinary", split, count // 4, seed
    )
    chats = asked([*texts, *requests("small_talk", split, count // 4, seed)])
    kept = answers(first, chats, 0.0, seed)
    pairs = zip(logprobs(first, chats, kept), logprobs(lm, chats, kept), strict=True)
    found["KL without, nats/token"] = rate([float(kl(p, q).mean()) for p, q in pairs])
    return found


def _said(lm: LanguageModel, texts: Sequence[str], system: str | None, seed: int) -> list[str]:
    ids = answers(lm, asked(texts, system), 0.0, seed)
    return lm.tokenizer.batch_decode(ids, skip_special_tokens=True)


def run_over_refusal(name: str, cfg: Config, seed: int, folder: Path) -> dict[str, Any]:
    """Teach the model to answer its safety prompt as Self-CD decodes under it."""
    own = cfg["training"] | cfg["over_refusal"]
    rows = []
    for kind, share in own["kinds"].items():
        rows += [{"prompt": t.user} for t in training(kind, round(share * own["responses"]), seed)]
    random.Random(seed).shuffle(rows)
    before = start()
    options = {"alpha": own["alpha"], "safety_prompt": SAFETY_PROMPT}
    trainer, seconds = train(rows, own, seed, folder, teacher="self-cd", teacher_options=options)
    after = LanguageModel(trainer.model, before.tokenizer, "student")
    return {
        "alpha": own["alpha"],
        "effect": trainer.effect,
        "seconds": seconds,
        "before": measure_refusal(before, before, cfg, seed),
        "after": measure_refusal(after, before, cfg, seed),
    }


def done(folder: Path, cfg: Config, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a run left in `folder`, made now unless it was made under the same settings."""
    path = folder / "result.json"
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["config"] == cfg:
            return record
    record = make() | {"config": cfg}
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
    return record


def summary(records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return means over seeds of everything, before and after, by run."""
    found: dict[str, Any] = {}
    for name, rows in records.items():
        found[name] = {
            when: {m: pool([r[when][m] for r in rows]) for m in rows[0][when]}
            for when in ("before", "after")
        }
        found[name] |= {
            "cpu_seconds": max(r["seconds"]["cpu"] for r in rows),
            "effect": sum(r["effect"] for r in rows) / len(rows),
        }
    return found


def show(value: Rate) -> str:
    """A number as it stands in the README."""
    return f"{value['mean']:.3f} ± {value['se']:.3f}"


def markdown(found: dict[str, Any]) -> str:
    """Return the summary as tables."""
    measures = ["adherence", "adherence_sampled", "fact", "fact_still", "kl_own", "kl_chat", "leak"]
    measures += ["same_chat", "unsafe_refused"]
    lines = []
    principles = {k: v for k, v in found.items() if k != OVER_REFUSAL}
    if principles:
        lines += [f"| | effect | {' | '.join(measures)} | CPU s |"]
        lines += ["|---" * (len(measures) + 3) + "|"]
    for name, row in principles.items():
        for when in ("before", "after"):
            cells = [f"{row['effect']:.2f}", *(show(row[when][m]) for m in measures)]
            seconds = f"{row['cpu_seconds']:.0f}" if when == "after" else ""
            lines.append(f"| {name}, {when} | {' | '.join(cells)} | {seconds} |")
    if OVER_REFUSAL in found:
        row = found[OVER_REFUSAL]
        lines += ["", "| | before | after |", "|---|---|---|"]
        lines += [
            f"| {name} | {show(row['before'][name])} | {show(row['after'][name])} |"
            for name in row["after"]
        ]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, default=HERE / "config.toml")
    add("--output", type=Path, default=Path("runs/distil"), help="runs and summary go here")
    add("--seeds", type=int, nargs="+", help="in place of the config's")
    add("--only", nargs="+", metavar="NAME", help=f"principles, or {OVER_REFUSAL}")
    add("--limit", type=int, help="measure on at most so many prompts")
    add("--max-steps", type=int, help="stop early: a smoke test")
    add("--split", choices=("dev", TEST), default=TEST, help="where to measure; tune on dev")
    add(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="a number of [training] or, written over_refusal.KEY, of that table",
    )
    add("--quick", action="store_true", help="one seed, two steps, eight prompts")
    return parser.parse_args(arguments)


def settings(options: argparse.Namespace) -> Config:
    """Return the configuration with the command line's changes."""
    cfg: Config = tomllib.loads(options.config.read_text(encoding="utf-8"))
    if options.quick:
        options.seeds, options.max_steps, options.limit = cfg["seeds"][:1], 2, 8
    for pair in options.set:
        name, _, value = pair.partition("=")
        table, _, key = name.rpartition(".")
        cfg[table or "training"][key] = tomllib.loads(f"v = {value}")["v"]
    cfg["seeds"] = options.seeds or cfg["seeds"]
    if options.max_steps is not None:
        for table in ("training", "over_refusal"):
            cfg[table]["responses"] = options.max_steps * cfg["training"]["batch"]
    if options.limit is not None:
        cfg["questions"] = min(options.limit, cfg["questions"])
        cfg["over_refusal"]["requests"] = min(options.limit, cfg["over_refusal"]["requests"])
    return cfg | {"split": options.split}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and summarise."""
    options = parse(arguments)
    torch.set_num_threads(1)
    cfg = settings(options)
    names = options.only or [*cfg["principles"], OVER_REFUSAL]
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    runs = [(name, seed) for seed in cfg["seeds"] for name in names]
    bar = tqdm(runs, unit="run", file=sys.stderr)
    # Which runs were asked for is no part of a run.
    own = {k: v for k, v in cfg.items() if k not in ("seeds", "principles")}
    for name, seed in bar:
        bar.set_postfix_str(f"{name}, seed {seed}", refresh=True)
        folder = options.output / f"{name}-{seed}"
        make = run_over_refusal if name == OVER_REFUSAL else run_principle
        records[name].append(done(folder, own, partial(make, name, cfg, seed, folder)))
    found = summary(records)
    report = {"config": cfg, "results": found}
    (options.output / "results.json").write_text(
        json.dumps(report, indent=1) + "\n", encoding="utf-8"
    )
    print(markdown(found))


if __name__ == "__main__":
    main()
