"""Teach the bundled model five skills one after the other, and see what it still can do.

    python recipes/stack/run.py                                       # tune, then three seeds
    python recipes/stack/run.py --strategies inc-lora drift --seeds 0
    python recipes/stack/run.py --quick --output /tmp/stack           # two steps of everything

Skills are ways of answering and small tasks, each with a form of address of its own. After each one
every skill is measured on wordings that were not trained on, and with them what the model could do
before: facts, obedience to a principle in its prompt, refusals. Settings are chosen on development
wordings with a seed of their own. A finished run is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from transformers import DataCollatorForSeq2Seq, TrainingArguments
from transformers.trainer_callback import PrinterCallback

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.stack.skills import Probe, grammar_of_tiny, own_dialogues, own_skills, skill
from trueline import LanguageModel, Plain, Request, SamplingParams, generate, load_model
from trueline.evals.transfer import summary
from trueline.train.adapters.export import write_lora
from trueline.train.adapters.stack import AdapterStack, adapter_layers, save_adapter
from trueline.train.chain import Link, chain
from trueline.train.keep.drift import Drift
from trueline.train.keep.o_lora import Overlap
from trueline.train.keep.second_moments import (
    Moments,
    collect_moments,
    load_moments,
    save_moments,
)
from trueline.train.keep.trainer import KeptTrainer

HERE = Path(__file__).parent
STRATEGIES = (
    "seq-lora", "inc-lora", "o-lora", "drift", "drift+before", "replay", "replay+before",
)  # fmt: skip
"""`+before`: also has dialogues like those that the model was made of, `drift` their statistics."""
TUNE_SEED = 100
Config = dict[str, Any]


def score(lm: LanguageModel, probes: Sequence[Probe]) -> float:
    """Return the share of probes whose greedy answer passes."""
    requests = []
    for p in probes:
        head: list[Any] = [{"role": "system", "content": p.system}] if p.system else []
        requests.append(Request([*head, {"role": "user", "content": p.prompt}], method=Plain()))
    done = generate(lm, requests, sampling=SamplingParams(max_new_tokens=40), batch_size=64)
    return sum(p.right(c.text) for p, c in zip(probes, done, strict=True)) / len(probes)


def encoded(lm: LanguageModel, rows: Sequence[tuple[str, str]]) -> list[dict[str, list[int]]]:
    """Return dialogues as ids; the loss is on answers."""
    found = []
    for question, answer in rows:
        chat = [{"role": "user", "content": question}]
        text = lm.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        head = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        tail = lm.tokenizer(answer, add_special_tokens=False)["input_ids"]
        tail = [*tail, lm.tokenizer.eos_token_id]
        found.append({"input_ids": head + tail, "attention_mask": [1] * (len(head) + len(tail)),
                      "labels": [-100] * len(head) + tail})  # fmt: skip
    return found


def start() -> LanguageModel:
    """Return the bundled model, its weights free to change."""
    return load_model("tiny", packed_weights=False, dtype="float32", device="cpu")


class Learner:
    """A strategy on its way through the skills."""

    def __init__(
        self,
        strategy: str,
        cfg: Config,
        choice: Config,
        seed: int,
        work: Path,
        own_rows: list[tuple[str, str]],
    ) -> None:
        self.own_rows = own_rows
        self.strategy, self.cfg, self.choice, self.seed = strategy, cfg, choice, seed
        self.work = work
        self.lm = start()
        self.model: Any = None
        self.folders: list[Path] = []
        self.memory: list[Any] = []
        self.rng = random.Random(seed)
        self.before: dict[str, Moments] = {}

    def moments(self, rows: list[Any]) -> dict[str, Moments]:
        """Return the second moments of what the adapted modules read, from some rows."""
        collate = DataCollatorForSeq2Seq(self.lm.tokenizer)
        some = [collate(rows[i : i + 32]) for i in range(0, min(len(rows), 192), 32)]
        return collect_moments(
            self.model,
            some,
            list(adapter_layers(self.model)),
        )

    def past(self) -> dict[str, list[Moments]] | None:
        """Return the moments of everything learned so far, for drift."""
        if not self.strategy.startswith("drift"):
            return None
        found = load_moments(self.folders)
        for name, own in self.before.items():
            found[name] = [own, *found.get(name, [])]
        return found

    def learn(self, link: Link, rows: list[Any]) -> Any:
        """Train on one skill, keep what the strategy keeps, and return the model."""
        cfg, replays, place = self.cfg, self.strategy.startswith("replay"), link.index
        stacks = self.strategy != "seq-lora" and not replays
        torch.manual_seed(1000 * self.seed + place)
        stack = AdapterStack.load(self.folders if stacks else [])
        if stacks or self.model is None:
            self.model = stack.attach(
                start().model,
                LoraConfig(
                    r=cfg["rank"],
                    lora_alpha=2 * cfg["rank"],
                    target_modules="all-linear",
                    task_type="CAUSAL_LM",
                ),
            )
        strength = float(self.choice.get("strength", 0.0))
        terms: list[Any] = []
        if self.strategy == "o-lora":
            terms = [Overlap(strength, normalize=True)]
        if self.strategy.endswith("+before") and not place:
            own = encoded(self.lm, self.own_rows)
            if replays:
                self.memory = own
            else:
                self.before = self.moments(own)
        if self.strategy.startswith("drift"):
            terms = [Drift(strength)]
        mixed = rows
        if self.memory:
            half = len(rows) // 2
            mixed = rows[: len(rows) - half] + [self.rng.choice(self.memory) for _ in range(half)]
        collator = DataCollatorForSeq2Seq(self.lm.tokenizer)
        trainer = KeptTrainer(
            self.model,
            TrainingArguments(
                str(link.folder / "trainer"),
                per_device_train_batch_size=cfg["batch"],
                num_train_epochs=1,
                learning_rate=float(self.choice["learning_rate"]),
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=3,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                seed=1000 * self.seed + place,
            ),
            collator,
            train_dataset=mixed,
            stack=stack,
            terms=terms,
            moments=self.past(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if replays:
            self.memory += self.rng.sample(rows, min(cfg["replay"], len(rows)))
        if stacks:
            folder = save_adapter(self.model, link.folder / "adapter")
            if self.strategy.startswith("drift"):
                save_moments(self.moments(rows), folder)
            self.folders.append(folder)
        return self.model.eval()


def go(strategy: str, cfg: Config, choice: Config, seed: int, work: Path) -> Config:
    """Run one strategy through all skills and return its numbers; when tuning, only the last."""
    began, grammar, tuning = time.process_time(), grammar_of_tiny(), seed == TUNE_SEED
    split, n = "dev" if tuning else "test", cfg["questions"]
    skills = [skill(grammar, t, cfg["rows"], n, seed, split) for t in cfg["skill"]]
    own = own_skills(grammar, cfg["own"], n, seed, split)
    learner = Learner(
        strategy, cfg, choice, seed, work, own_dialogues(grammar, cfg["own"], 192, seed)
    )

    def train(link: Link) -> Any:
        return learner.learn(link, encoded(learner.lm, skills[link.index].rows))

    def measure(link: Link | None, model: Any, before: Any) -> Config:
        if tuning and link is not None and link.index < link.total - 1:
            return {}
        lm = learner.lm if link is None else LanguageModel(model, learner.lm.tokenizer)
        found = {name: score(lm, probes) for name, probes in own.items()}
        return {"skills": [score(lm, s.probes) for s in skills], "own": found}

    found = chain([s.name for s in skills], work / "stages", train, measure)
    untouched = found[0]["skills"]
    measured = [scores for scores in found[1:] if "skills" in scores]
    R = [scores["skills"] for scores in measured]
    kept = [found[0]["own"], *(scores["own"] for scores in measured)]
    return {
        "strategy": strategy,
        "seed": seed,
        "choice": choice,
        "skills": [s.name for s in skills],
        "n": n,
        "untouched": np.round(untouched, 4).tolist(),
        "R": np.round(R, 4).tolist(),
        "own": [{name: round(v, 4) for name, v in row.items()} for row in kept],
        "overall": round(float(np.mean([*R[-1], *kept[-1].values()])), 4),
        "exported": None if tuning else exported(learner),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def exported(learner: Learner) -> float | None:
    """Return the largest relative difference of logits between the stack and one plain LoRA."""
    if not learner.folders:
        return None
    folder = learner.work / "one"
    write_lora(AdapterStack.load(learner.folders), folder)
    one = PeftModel.from_pretrained(start().model, folder).eval()
    stacked = AdapterStack.load(learner.folders).merge(start().model).eval()
    ids = torch.randint(5, 2000, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (model(ids).logits for model in (one, stacked))
    return float((a - b).abs().max() / b.abs().max())


def done(output: Path, strategy: str, cfg: Config, choice: Config, seed: int) -> Config:
    """Return what a run found, made now unless it was made with these settings."""
    name = "-".join([strategy, str(seed), *(f"{v:g}" for v in choice.values())])
    path = output / f"{name}.json"
    settings = {k: v for k, v in cfg.items() if k != "settings"}
    if path.exists():
        row: Config = json.loads(path.read_text(encoding="utf-8"))
        if row["settings"] == settings:
            return row
    work = output / f"work-{name}"
    shutil.rmtree(work, ignore_errors=True)
    row = go(strategy, cfg, choice, seed, work) | {"settings": settings}
    path.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)
    print(f"{strategy} {choice} seed {seed}: {row['overall']} {row['R'][-1]} {row['own'][-1]}",
          file=sys.stderr)  # fmt: skip
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Choose settings, run what is missing, and print tables of all results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--output", type=Path, default=HERE.parents[1] / "runs/stack")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="32 rows, four questions, one seed")
    args = parser.parse_args(argv)
    cfg = tomllib.loads(args.config.read_text(encoding="utf-8"))
    if args.quick:
        cfg |= {"rows": 32, "questions": 4}
        args.seeds = args.seeds[:1]
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    tuned = {
        s: [done(args.output, s, cfg, c, TUNE_SEED) for c in cfg["settings"][s]]
        for s in args.strategies
    }
    best = {s: max(rows, key=lambda row: row["overall"]) for s, rows in tuned.items()}
    found = [done(args.output, s, cfg, best[s]["choice"], seed)
             for seed in args.seeds for s in args.strategies]  # fmt: skip
    kept = {"tuning": [row for rows in tuned.values() for row in rows], "runs": found}
    for row in [*kept["tuning"], *found]:
        row.pop("settings")
    text = json.dumps(kept, indent=None).replace('{"strategy"', '\n{"strategy"')
    (args.output / "results.json").write_text(text + "\n", encoding="utf-8")
    print(table(found))


def table(found: Sequence[Config]) -> str:
    """Return strategies by what was learned and what is left; means and standard errors."""
    own = list(found[0]["own"][0])
    head = ["", "runs", "setting", "skills, average", "learned", "backward", "own, average", *own]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    before = [np.mean([row["own"][0][name] for row in found]) for name in own]
    cells = ["", "", f"{np.mean([row['untouched'] for row in found]):.2f}", "", "",
             f"{np.mean(before):.2f}", *(f"{v:.2f}" for v in before)]  # fmt: skip
    lines.append("| before | " + " | ".join(cells) + " |")
    for strategy in dict.fromkeys(row["strategy"] for row in found):
        rows = [row for row in found if row["strategy"] == strategy]
        measures = [summary(row["R"], row["untouched"]) for row in rows]
        names = ("average_accuracy", "learning_accuracy", "backward_transfer")
        values = [[m[name] for m in measures] for name in names]
        values.append([float(np.mean(list(row["own"][-1].values()))) for row in rows])
        values += [[row["own"][-1][name] for row in rows] for name in own]
        setting = ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in rows[0]["choice"].items())
        cells = [strategy, str(len(rows)), setting, *map(_mean, values)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f}"


if __name__ == "__main__":
    main()
