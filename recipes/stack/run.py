"""Teach the bundled model five skills one after the other, and see what it still can do.

    python recipes/stack/run.py --strategies inc-lora seq-lora replay
    python recipes/stack/run.py --strategies drift --strength 30 --seeds 0 1
    python recipes/stack/run.py --max-steps 2 --questions 4 --output /tmp/x       # smoke test

Skills are ways of answering bound to a subject, and small tasks whose labels a grammar makes. After
each one every skill is measured, on wordings that were not trained on, and with them what the model
could do before: facts, obedience to a principle in its prompt, refusals. No task is named anywhere.
A finished run (strategy, seed) is not run again.
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
from peft import LoraConfig
from transformers import DataCollatorForSeq2Seq
from transformers.trainer_callback import PrinterCallback

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.stack.skills import Probe, grammar_of_tiny, own_dialogues, own_skills, skill
from trueline import LanguageModel, Plain, Request, SamplingParams, generate, load_model
from trueline.errors import ConfigError
from trueline.evals.continual import summary
from trueline.train.adapters.regularisers import Drift, Overlap
from trueline.train.adapters.second_moments import (
    Moments,
    collect_moments,
    load_moments,
    save_moments,
)
from trueline.train.adapters.stack import AdapterStack, adapter_layers, save_adapter
from trueline.train.o_lora import OLoraConfig, OLoraTrainer

HERE = Path(__file__).parent
STRATEGIES = ("seq-lora", "inc-lora", "o-lora", "drift", "drift+before", "replay")
"""`drift+before` also has statistics of dialogues like those that the model was made of."""
PENALISED = ("o-lora", "drift", "drift+before")
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
            gradients=bool(self.choice.get("curvature")),
            generator=torch.Generator().manual_seed(self.seed),
        )

    def past(self) -> dict[str, list[Moments]] | None:
        """Return the moments of everything learned so far, for drift."""
        if not self.strategy.startswith("drift"):
            return None
        found = load_moments(self.folders)
        for name, own in self.before.items():
            found[name] = [own, *found.get(name, [])]
        return found

    def learn(self, place: int, rows: list[Any], max_steps: int) -> None:
        """Train on one skill and keep what the strategy keeps."""
        cfg, stacks = self.cfg, self.strategy not in ("seq-lora", "replay")
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
        if self.strategy == "drift+before" and not place:
            self.before = self.moments(encoded(self.lm, self.own_rows))
        if self.strategy.startswith("drift"):
            terms = [Drift(strength, bool(self.choice.get("curvature")))]
        mixed = rows
        if self.memory:
            half = len(rows) // 2
            mixed = rows[: len(rows) - half] + [self.rng.choice(self.memory) for _ in range(half)]
        collator = DataCollatorForSeq2Seq(self.lm.tokenizer)
        trainer = OLoraTrainer(
            self.model,
            OLoraConfig(
                str(self.work / "trainer"),
                per_device_train_batch_size=cfg["batch"],
                num_train_epochs=1,
                max_steps=max_steps,
                learning_rate=float((cfg | self.choice)["learning_rate"]),
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
            regularisers=terms,
            moments=self.past(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        self.memory += self.rng.sample(rows, min(cfg["replay"], len(rows))) * (
            self.strategy == "replay"
        )
        if stacks:
            folder = self.work / f"skill-{place}"
            save_adapter(self.model, folder)
            if self.strategy.startswith("drift"):
                save_moments(self.moments(rows), folder)
            self.folders.append(folder)

    def as_model(self) -> LanguageModel:
        """Return what was learned, ready to answer."""
        if self.model is None:
            return self.lm
        self.model.eval()
        return LanguageModel(self.model, self.lm.tokenizer)


def go(strategy: str, cfg: Config, choice: Config, seed: int, work: Path, max_steps: int) -> Config:
    """Run one strategy through all skills and return its numbers."""
    began, grammar = time.process_time(), grammar_of_tiny()
    skills = [skill(grammar, t, cfg["rows"], cfg["questions"], seed) for t in cfg["skill"]]
    own = own_skills(grammar, cfg["own"], cfg["questions"], seed)
    rows = own_dialogues(grammar, cfg["own"], 192, seed)
    learner = Learner(strategy, cfg, choice, seed, work, rows)
    untouched = [score(learner.lm, s.probes) for s in skills]
    kept = [{name: score(learner.lm, probes) for name, probes in own.items()}]
    R = []
    for place, each in enumerate(skills):
        learner.learn(place, encoded(learner.lm, each.rows), max_steps)
        lm = learner.as_model()
        R.append([score(lm, s.probes) for s in skills])
        kept.append({name: score(lm, probes) for name, probes in own.items()})
        print(f"{strategy} {seed} after {each.name}: {R[-1]} {kept[-1]}", file=sys.stderr)
    return {
        "strategy": strategy,
        "seed": seed,
        "choice": choice,
        "skills": [s.name for s in skills],
        "n": cfg["questions"],
        "untouched": np.round(untouched, 4).tolist(),
        "R": np.round(R, 4).tolist(),
        "own": [{name: round(v, 4) for name, v in row.items()} for row in kept],
        "measures": {k: round(v, 4) for k, v in summary(R, untouched).items()},
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for and print a table of all results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--output", type=Path, default=HERE.parents[1] / "runs/stack")
    parser.add_argument("--strategies", nargs="+", default=["inc-lora"], choices=STRATEGIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--strength", type=float, help="of o-lora or drift, instead of the chosen")
    parser.add_argument("--curvature", action="store_true", help="weigh drift with gradients")
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--questions", type=int)
    args = parser.parse_args(argv)
    cfg = tomllib.loads(args.config.read_text(encoding="utf-8"))
    if args.questions:
        cfg["questions"] = args.questions
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in args.seeds:
        for strategy in args.strategies:
            path = args.output / f"{strategy}-{seed}.json"
            if not path.exists():
                choice = dict(cfg.get("chosen", {}).get(strategy, {}))
                if args.strength is not None:
                    choice["strength"] = args.strength
                if args.curvature:
                    choice["curvature"] = True
                if strategy in PENALISED and not choice.get("strength"):
                    raise ConfigError(
                        f'Strategy "{strategy}" has no strength, and would be inc-lora. Give '
                        f"--strength, or [chosen.{strategy}] in {args.config.name}."
                    )
                work = args.output / f"work-{strategy}-{seed}"
                shutil.rmtree(work, ignore_errors=True)
                row = go(strategy, cfg, choice, seed, work, args.max_steps)
                path.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
                shutil.rmtree(work, ignore_errors=True)
            found.append(json.loads(path.read_text(encoding="utf-8")))
    print(table(found))


def table(found: Sequence[Config]) -> str:
    """Return strategies by measures and by what the model could do before; means over seeds."""
    measures, own = list(found[0]["measures"]), list(found[0]["own"][0])
    lines = ["| | runs | " + " | ".join([*measures, *own]).replace("_", " ") + " |"]
    lines.append("|---" * (2 + len(measures) + len(own)) + "|")
    before = [np.mean([row["own"][0][name] for row in found]) for name in own]
    lines.append("| before | | " + " | ".join(["" for _ in measures] + [f"{v:.2f}" for v in before])
                 + " |")  # fmt: skip
    for strategy in dict.fromkeys(row["strategy"] for row in found):
        rows = [row for row in found if row["strategy"] == strategy]
        values = [[row["measures"][m] for row in rows] for m in measures]
        values += [[row["own"][-1][name] for row in rows] for name in own]
        lines.append(f"| {strategy} | {len(rows)} | " + " | ".join(map(_mean, values)) + " |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f}"


if __name__ == "__main__":
    main()
