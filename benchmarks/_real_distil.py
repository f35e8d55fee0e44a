"""Inverse-Q* on chat models: what is learned into the weights, by which way, at which rate.

    base, prompted            the start without and with the principle; nothing is trained
    sft                       offline context distillation: TRL's SFT on prompted answers
    on-policy, ratio 0        the prompted start teaches the student on its own answers
    inverse-q                 Linear Alignment teaches, and draws a quarter of the answers

Every way starts from the same adapter on the same questions, and sees equally many answers of at
most `TOKENS` tokens; what is reported is the last step's model, at the rate that the sweep chose.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from benchmarks._real_questions import BY_NAME, FACTS
from benchmarks._real_world import NAMES, Task, World, markdown, spanned
from trueline import LanguageModel, Message, Plain, Request, SamplingParams, generate, load_model
from trueline.evals.patterns import matches
from trueline.evals.quality import repetition_rate
from trueline.evals.statistics import rate

TOKENS, BATCH, RANK = 48, 16, 16
TEST, KEPT = 24, 12
"""Held-out questions; other chats on which the divergence is measured."""
RATES = (2e-4, 5e-4, 1e-4, 1e-3)
RATE_ANSWERS, ANSWERS = 192, 384
PRINCIPLES = ("pirate", "one sentence", "excited", "shakespeare")
OURS: dict[str, dict[str, Any]] = {
    "inverse-q, ratio 1": {"ratio": 1.0, "candidates": 0.95},
    "inverse-q, ratio 2, soft gate": {
        "ratio": 2.0, "candidates": 0.95, "teacher_options": {"damping": 1.0},
    },
}  # fmt: skip
WAYS = ("base", "prompted", "sft", "on-policy, ratio 0", *OURS)
TRAVEL = "You are Ada, the assistant of a travel agency. Be polite."
KINDS = (
    "Write a short poem about the sea.", "Translate 'good morning' into French.",
    "Write an email that asks for a day off.", "Give me three names for a cat.",
    "What is 17 + 25?", "Write a Python function that adds two numbers.",
    "Summarise the story of Cinderella.", "Explain what a noun is.",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One model trained one way."""

    model: str
    way: str
    principle: str
    lr: float
    answers: int
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its file."""
        parts = (self.model, self.way, self.principle, f"{self.lr:g}", self.answers, self.seed)
        return "-".join(str(x).replace(", ", "-").replace(" ", "_") for x in parts)

    @property
    def trained(self) -> bool:
        """Whether there is anything to train."""
        return self.way not in ("base", "prompted")


def tasks(world: World, models: Sequence[str]) -> Iterator[Task]:
    """Yield the rate sweep, and then every way on every principle."""
    runs: list[tuple[float, Run]] = []
    size = (2 * BATCH, 2 * BATCH) if world.quick else (RATE_ANSWERS, ANSWERS)
    model, first = models[0], next(iter(OURS))
    for i, lr in enumerate(RATES[: 1 if world.quick else None]):
        runs.append(
            (96.5 - i / 10, Run(model, first, PRINCIPLES[0], lr, size[0], options=OURS[first]))
        )
    for i, name in enumerate(PRINCIPLES[: 1 if world.quick else None]):
        for j, way in enumerate(WAYS):
            lr = chosen_rate(world, model)
            own = Run(model, way, name, lr, size[1], options=OURS.get(way, {}))
            runs.append((79 - 8 * i - j / 10, own))
    for worth, run in runs:
        yield Task(worth, f"inverse-q, {run.name}", partial(_done, world, run),
                   partial(_kept, world, run))  # fmt: skip


def _done(world: World, run: Run) -> bool:
    return world.kept("inverse-q", _fresh(world, run).name) is not None


def _kept(world: World, run: Run) -> Any:
    own = _fresh(world, run)
    return world.kept("inverse-q", own.name, make=lambda: made(world, own))


def _fresh(world: World, run: Run) -> Run:
    """Return a run at the rate that the sweep has chosen by now; the sweep's own as they are."""
    if run.answers == RATE_ANSWERS and not world.quick:
        return run
    return Run(**{**vars(run), "lr": chosen_rate(world, run.model)})


def chosen_rate(world: World, model: str) -> float:
    """Return the rate of the sweep with most answers that follow and are on topic; 2e-4 before."""
    found = [r for r in results(world) if r["answers"] == RATE_ANSWERS and r["model"] == model]
    found.sort(key=lambda r: (-r["measures"]["both"]["value"], r["lr"]))
    return float(found[0]["lr"]) if found else RATES[0]


def results(world: World) -> list[dict[str, Any]]:
    """Return every run that is there."""
    folder = world.output / "inverse-q"
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]


def asked(world: World) -> list[str]:
    """Return real users' questions: the first for tests, the others to train on."""
    path = world.shared / "data/preference/personal_questions.jsonl"
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(row["question"].strip() for row in rows))


def chats(texts: Sequence[str], before: Sequence[Message] = ()) -> list[list[Message]]:
    """Return a chat of each text, behind what comes before."""
    return [[*before, {"role": "user", "content": text}] for text in texts]


def made(world: World, run: Run) -> dict[str, Any]:
    """Train and measure one run."""
    rule, questions = BY_NAME[run.principle], asked(world)
    start = load_model(world.path(run.model), packed_weights=False)
    started, trained = time.process_time(), start
    if run.trained:
        prompts = chats(questions[TEST:])
        order = np.random.default_rng(run.seed).permutation(len(prompts))[: run.answers]
        rows = [prompts[i] for i in np.resize(order, run.answers)]
        trained = (sft if run.way == "sft" else inverse_q)(start, run, rule.text, rows)
    seconds = time.process_time() - started
    method = Plain(principle=rule.text) if run.way == "prompted" else Plain()
    count = 4 if world.quick else TEST
    found = measured(world, run, trained, method, questions[:count])
    return {**vars(run), "options": dict(run.options), "cpu_seconds": round(seconds, 1), **found}


def _arguments(run: Run) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(prefix="trueline-real-"),
        "max_steps": run.answers // BATCH, "per_device_train_batch_size": BATCH,
        "learning_rate": run.lr, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4,
        "logging_steps": 1000, "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "bf16": False, "disable_tqdm": True, "dataloader_pin_memory": False, "seed": run.seed,
    }  # fmt: skip


def _adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def inverse_q(
    start: LanguageModel, run: Run, principle: str, rows: Sequence[list[Message]]
) -> LanguageModel:
    """Train by Inverse-Q*: Linear Alignment teaches, or with "ratio 0" the prompt alone."""
    from trueline.train.distil.trainer import InverseQConfig, InverseQTrainer

    options = dict(run.options) or {"teacher": "principle", "guided": 0.0}
    args = InverseQConfig(
        **_arguments(run),
        principle=principle,
        max_completion_length=TOKENS,
        min_effect=0,
        **options,
    )
    trainer = InverseQTrainer(
        start, args, [{"prompt": row} for row in rows], peft_config=_adapter()
    )
    trainer.train()
    shutil.rmtree(args.output_dir or "", ignore_errors=True)
    return trainer.student


def sft(
    start: LanguageModel, run: Run, principle: str, rows: Sequence[list[Message]]
) -> LanguageModel:
    """Train by TRL's SFT on answers that the prompted start draws at temperature 1."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    sampling = SamplingParams(max_new_tokens=TOKENS, temperature=1.0)
    requests = [
        Request(row, Plain(principle=principle), sampling, seed=run.seed * 1_000_000 + i)
        for i, row in enumerate(rows)
    ]
    answers = [c.text or "." for c in generate(start, requests, batch_size=64)]
    said = [[{"role": "assistant", "content": text}] for text in answers]
    args = SFTConfig(**_arguments(run), gradient_checkpointing=False, completion_only_loss=True)
    trainer = SFTTrainer(
        model=start.model, args=args, processing_class=start.tokenizer, peft_config=_adapter(),
        train_dataset=Dataset.from_dict({"prompt": list(rows), "completion": said}),
    )  # fmt: skip
    trainer.train()
    shutil.rmtree(args.output_dir, ignore_errors=True)
    return LanguageModel(trainer.model, start.tokenizer, start.name)


def measured(
    world: World, run: Run, lm: LanguageModel, method: Plain, questions: Sequence[str]
) -> dict[str, Any]:
    """Return what a model does without the principle: on questions like those, and on others."""
    rule, sampling = BY_NAME[run.principle], SamplingParams(max_new_tokens=TOKENS)
    turn: list[Message] = [
        {"role": "user", "content": "Hello, who are you?"},
        {"role": "assistant", "content": "Hello! I am an assistant. How can I help?"},
    ]
    few = questions[: max(4, len(questions) // 2)]
    sets = {
        "adherence": chats(questions),
        "multi-turn": chats(few, turn),
        "system text": chats(few, [{"role": "system", "content": TRAVEL}]),
        "other kinds": chats(KINDS[: len(few)]),
        "fact": chats([q for q, _ in FACTS][: len(questions)]),
    }
    flat = [chat for own in sets.values() for chat in own]
    done = iter(generate(lm, flat, method, sampling, batch_size=64))
    answers = {name: [next(done) for _ in own] for name, own in sets.items()}
    found: dict[str, Any] = {}
    for name, own in answers.items():
        flags = [rule.follows(c.text, ended=c.finish_reason == "stop") for c in own]
        if name == "fact":
            flags = [matches(p, c.text, ignore_case=True)
                     for c, (_, p) in zip(own, FACTS, strict=False)]  # fmt: skip
        found[name] = vars(rate(flags))
    ids = [c.token_ids for c in answers["adherence"]]
    still = [repetition_rate(x) < 0.2 for x in ids]
    good = [rule.follows(c.text, ended=c.finish_reason == "stop") and ok
            for c, ok in zip(answers["adherence"], still, strict=True)]  # fmt: skip
    found["both"] = vars(rate(good))
    texts = [c.text for c in answers["adherence"][:3]]
    return {
        "measures": found,
        "tokens": float(np.mean([len(x) for x in ids])),
        "repetition": float(np.mean([repetition_rate(x) for x in ids])),
        "kl_chat": kl_chat(world, run.model, lm) if run.trained else 0.0,
        "examples": texts,
    }


def kl_chat(world: World, model: str, lm: LanguageModel) -> float:
    """Return KL(start || policy), nats a token, on the start's answers to other chat."""
    import torch

    from trueline.engine.protocol import Continuation
    from trueline.engine.scoring import score
    from trueline.evals.datasets import load_pairs
    from trueline.models.prompts import chat_of, encode

    start = world.model(model)
    pairs = load_pairs(world.shared / "data/preference/hh_harmless_base_test.jsonl")
    others = [p.messages for p in pairs if len(p.messages) == 1][: 2 if world.quick else KEPT]
    own = generate(start, others, sampling=SamplingParams(max_new_tokens=32))
    items = [Continuation([encode(start, chat_of(start, chat))], c.token_ids)
             for chat, c in zip(others, own, strict=True)]  # fmt: skip
    total, count = 0.0, 0
    for p, q in zip(score(start, items, rows=12), score(lm, items, rows=12), strict=True):
        log_p, log_q = (z[:, 0].float().log_softmax(-1) for z in (p, q))
        total += float(torch.sum(log_p.exp() * (log_p - log_q)))
        count += len(log_p)
    return total / count


def report(world: World, models: Sequence[str]) -> tuple[str, list[dict[str, Any]]]:
    """Return the tables of the sweep and of the ways, and the runs behind them."""
    found = results(world)
    parts = []
    header = ("model", "principle", "way", "rate", "answers", "adherence", "without repetition",
              "multi-turn", "own system text", "other kinds", "fact", "tokens", "repetition",
              "KL other chat", "CPU s")  # fmt: skip
    sweep = [r for r in found if r["answers"] == RATE_ANSWERS and r["way"] in OURS]
    for title, own in (("Rates", sweep), ("Ways", [r for r in found if r not in sweep])):
        if own:
            own = sorted(own, key=lambda r: (r["model"], PRINCIPLES.index(r["principle"]),
                                             WAYS.index(r["way"]), r["lr"]))  # fmt: skip
            parts += [f"### {title}", markdown(header, map(_line, own))]
    return "\n\n".join(parts), found


def _line(r: Mapping[str, Any]) -> list[str]:
    m = r["measures"]
    trained = r["way"] not in ("base", "prompted")
    names = ("adherence", "both", "multi-turn", "system text", "other kinds", "fact")
    return [
        NAMES[r["model"]], r["principle"], r["way"],
        *((f"{r['lr']:g}", str(r["answers"])) if trained else ("", "")),
        *(spanned(m[name]) for name in names), f"{r['tokens']:.0f}", f"{r['repetition']:.3f}",
        f"{r['kl_chat']:.3f}", f"{r['cpu_seconds']:.0f}" if trained else "",
    ]  # fmt: skip
