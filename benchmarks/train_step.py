"""What a training step costs: Inverse-Q* next to TRL's GRPO and SFT, in seconds and memory.

    python benchmarks/train_step.py --output out/train_step      # 50 minutes of one core
    python benchmarks/train_step.py --quick                      # a model of two layers

Equal batch, equal prompt and completion length, the same LoRA, float32, a random model with the
shape of SmolLM-135M; no two prompts of a batch begin alike. Every contender runs in a process of
its own, in turn, `--rounds` times. A process's time is the mean over its steps but the first, from
the end of one to the end of the next, which are a whole cycle of drawing guided answers (every
16 steps here); the table has the least over rounds. Memory is the peak.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from tqdm import tqdm

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._models import SHAPES, machine, random_model
from benchmarks._report import table

CONTENDERS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "inverse-q, linear-alignment": {"teacher": "linear-alignment", "guided": 0.0},
    "inverse-q, linear-alignment, kl": {
        "teacher": "linear-alignment",
        "guided": 0.0,
        "loss": "kl",
    },
    "inverse-q, principle": {"teacher": "principle", "guided": 0.0},
    "inverse-q, linear-alignment, guided": {"teacher": "linear-alignment"},
    "sft": {},
}
"""GRPO without a KL term, as TRL has it by default: no reference is computed at all."""
GOALS = {"time_ratio": 1.0, "memory_ratio": 0.9}
"""At most so much of GRPO's, at the default: a quarter drawn by the teacher."""
DEFAULT = "inverse-q, linear-alignment, guided"
PRINCIPLE = "Talk like a pirate."


def work(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one contender in this process; return its times and peak memory."""
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import TrainerCallback

    from trueline import load_model

    disable_progress_bars()
    torch.set_num_threads(options.threads)
    tokenizer = load_model("tiny", packed_weights=False).tokenizer
    if SHAPES[options.model]["vocab_size"] < len(tokenizer):
        SHAPES[options.model] |= {"vocab_size": len(tokenizer)}
    model = random_model(options.model, torch.float32)
    steps: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.wall, self.cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps.append((time.perf_counter() - self.wall, time.process_time() - self.cpu))
            self.on_train_begin()

    before = _peak()
    count = options.batch * (options.steps + 1)
    texts = [_words(tokenizer, options.prompt, str(i)) for i in range(count)]
    rows: dict[str, list[Any]] = {"prompt": [[{"role": "user", "content": t}] for t in texts]}
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": options.steps + 1,
            "per_device_train_batch_size": options.batch,
            "learning_rate": 1e-5,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        made: dict[str, Any] = {
            "model": model,
            "processing_class": tokenizer,
            "peft_config": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
            "callbacks": [Clock()],
        }
        common |= {} if name == "sft" else {"max_completion_length": options.completion}

        def ranks(completions: list[Any], **_: Any) -> list[float | None]:
            return [float(i) for i in range(len(completions))]

        if name == "sft":
            from trl import SFTConfig, SFTTrainer

            text = _words(tokenizer, options.completion, "one")
            answer = [{"role": "assistant", "content": text}]
            rows["completion"] = [answer] * len(rows["prompt"])
            args = SFTConfig(**common, gradient_checkpointing=False, completion_only_loss=True)
            trainer: Any = SFTTrainer(args=args, train_dataset=Dataset.from_dict(rows), **made)
        elif name == "grpo":
            from trl import GRPOConfig, GRPOTrainer

            grpo = GRPOConfig(
                **common,
                gradient_checkpointing=False,
                num_generations=options.batch,
                # No answer may end early: all have the same length.
                generation_kwargs={"min_new_tokens": options.completion},
            )
            trainer = GRPOTrainer(
                reward_funcs=ranks,
                args=grpo,
                train_dataset=Dataset.from_dict(rows),
                **made,
            )
        else:
            from trueline.train.distil.trainer import InverseQConfig, InverseQTrainer

            ours = InverseQConfig(**common, **CONTENDERS[name], principle=PRINCIPLE, min_effect=0)
            trainer = InverseQTrainer(args=ours, train_dataset=Dataset.from_dict(rows), **made)
            trainer.student.eos_token_ids = frozenset()  # as above
        trainer.train()
    lengths = [
        row.get("completions/mean_length") or row.get("completion_length")
        for row in trainer.state.log_history
    ]
    return {
        "contender": name,
        "wall": statistics.fmean(wall for wall, _ in steps[1:]),
        "cpu": statistics.fmean(cpu for _, cpu in steps[1:]),
        "steps": steps,
        "peak_mb": _peak(),
        "before_mb": before,
        "length": next((n for n in lengths if n is not None), None),
    }


def _words(tokenizer: Any, tokens: int, first: str) -> str:
    """A text of so many tokens."""
    text = first
    while len(tokenizer(text, add_special_tokens=False)["input_ids"]) < tokens:
        text += " one"
    return text


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every contender in processes of their own, in turn; return its best of all rounds."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contenders}
    turns = [name for _ in range(options.rounds) for name in options.contenders]
    for name in tqdm(turns, desc="contenders", unit="run", file=sys.stderr):
        command = [sys.executable, "-W", "ignore", __file__, "--worker", name]
        for key in ("model", "batch", "prompt", "completion", "steps", "threads"):
            command += [f"--{key}", str(getattr(options, key))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
        found[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for name, runs in found.items():
        best = {key: min(run[key] for run in runs) for key in ("wall", "cpu", "peak_mb")}
        rows.append({"contender": name, **best, "length": runs[0]["length"], "runs": runs})
    grpo = next((row for row in rows if row["contender"] == "grpo"), None)
    for row in rows if grpo else []:
        row["time_ratio"] = row["cpu"] / grpo["cpu"]  # type: ignore[index]
        row["memory_ratio"] = row["peak_mb"] / grpo["peak_mb"]  # type: ignore[index]
    return rows


def markdown(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the table and what it says about the goal."""
    m = machine(options.threads)
    text = f"# A training step\n\n{m['cpu']}; {m['threads']} thread, load {m['load']}; "
    text += f"torch {m['torch']}; {m['date']}\n\n{options.model}, batch {options.batch}, prompts "
    text += f"of about {options.prompt} and completions of {options.completion} tokens, LoRA 8.\n\n"
    head = ["", "CPU s", "wall s", "/ GRPO", "peak MB", "/ GRPO", "length"]
    lines = []
    for r in rows:
        ratios = [f"{r[k]:.2f}" if k in r else "-" for k in ("time_ratio", "memory_ratio")]
        lines.append([r["contender"], f"{r['cpu']:.2f}", f"{r['wall']:.2f}", ratios[0]])
        lines[-1] += [f"{r['peak_mb']:.0f}", ratios[1], r["length"] or "-"]
    text += table(head, lines) + "\n"
    for r in rows:
        if r["contender"] == DEFAULT and "time_ratio" in r:
            met = ["met" if r[name] <= goal else "**missed**" for name, goal in GOALS.items()]
            text += f"{DEFAULT}: at most {GOALS['time_ratio']} of GRPO's time {met[0]}, "
            text += f"at most {GOALS['memory_ratio']} of its memory {met[1]}\n"
    return text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        description="Time a training step of Inverse-Q* against TRL's GRPO and SFT.",
        epilog=(__doc__ or "").split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=list(SHAPES), default="135M")
    add("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    add("--batch", type=int, default=4, help="responses of a step (4)")
    add("--prompt", type=int, default=64, help="tokens of a prompt, about (64)")
    add("--completion", type=int, default=64, help="tokens of a completion (64)")
    add("--steps", type=int, default=16, help="timed steps of a process (16)")
    add("--rounds", type=int, default=2, help="processes of each contender (2)")
    add("--threads", type=int, default=1)
    add("--quick", action="store_true", help="two layers, one step: a test, no result")
    add("--output", type=Path, metavar="FOLDER", help="where train_step.json and .md go")
    add("--worker", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.steps, options.rounds, options.completion = "nano", 1, 1, 8
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and save; or be one contender's process."""
    options = parse(arguments)
    if options.worker:
        print(json.dumps(work(options.worker, options)))
        return
    rows = measure(options)
    text = markdown(rows, options)
    print(text)
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine(options.threads), "rows": rows}
        (options.output / "train_step.json").write_text(
            json.dumps(found, indent=1) + "\n", encoding="utf-8"
        )
        (options.output / "train_step.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
