"""What O-LoRA costs: a training step on T tasks next to plain LoRA's, and what is exported.

    python benchmarks/o_lora_step.py                             # 135M, 16 tasks: ten minutes
    python benchmarks/o_lora_step.py --model nano --rounds 2     # a look

The contenders take their steps in turn, in one process, on batches of one size: plain LoRA on the
base, and on the base with T tasks merged, without and with each penalty. Least CPU seconds of a
step (forward, backward, optimiser), and of the penalty's forward. Then the exported forms read a
prompt. The numeric checks compare penalties with the released loop, and the exported model with
the stack, at T = 1, 2, 8 and 16. Markdown goes to stdout; `--output` also gets o_lora_step.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._models import SHAPES, machine, random_model
from benchmarks._report import table
from trueline.methods.o_lora import norm, overlap
from trueline.train.adapters.export import write_lora, write_merged
from trueline.train.adapters.stack import AdapterStack, adapter_layers, save_adapter
from trueline.train.keep.drift import Drift
from trueline.train.keep.ella import Alignment
from trueline.train.keep.o_lora import Norm, Overlap
from trueline.train.keep.penalty import penalties, prepare
from trueline.train.keep.second_moments import Moments
from trueline.train.keep.terms import Term

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHECKED = (1, 2, 8, 16)
GOAL = 1.05


def main(arguments: list[str] | None = None) -> None:
    """Parse the options, run everything, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="135M", choices=list(SHAPES), help="shape of the random model (135M)")
    add("--tasks", type=int, default=16, help="earlier tasks (16)")
    add("--rank", type=int, default=8, help="rank of each adapter (8)")
    add("--targets", nargs="+", default=LINEAR, help="modules with adapters (all linear ones)")
    add("--batch", type=int, default=4, help="rows of a batch (4)")
    add("--length", type=int, default=64, help="tokens of a row (64)")
    add("--rounds", type=int, default=6, help="steps of each contender (6)")
    add("--device", default="cpu", help="cpu or cuda; on cuda times are wall clock (cpu)")
    add("--threads", type=int, default=1, help="torch threads (1)")
    add("--output", metavar="DIR", help="also write o_lora_step.json there")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = run(args, Path(folder))
    print(markdown(found))
    if args.output:
        Path(args.output).mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1) + "\n"
        (Path(args.output) / "o_lora_step.json").write_text(text)


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return every number."""
    say(f"writing {args.tasks} adapters")
    folders = [random_adapter(args, folder / str(t), t) for t in range(max(args.tasks, *CHECKED))]
    stack = AdapterStack.load(folders[: args.tasks])
    say("timing training steps")
    steps = training(args, stack)
    say("".join(f"  {row['contender']}: {row['ratio']:.3f}\n" for row in steps))
    say("timing inference")
    answers = inference(args, stack, folder)
    say("checking numbers")
    return {
        "machine": machine(args.threads),
        "settings": {k: v for k, v in vars(args).items() if k != "output"},
        "steps": steps,
        "inference": answers,
        "released": released(),
        "stacks": equality(args.model, folders[: max(CHECKED)], folder / "checked"),
    }


def say(text: str) -> None:
    """Print progress."""
    print(text, file=sys.stderr, flush=True)


def config(args: argparse.Namespace) -> LoraConfig:
    """Return the adapter that every contender trains."""
    return LoraConfig(r=args.rank, lora_alpha=4 * args.rank, target_modules=args.targets)


def random_adapter(args: argparse.Namespace, folder: Path, seed: int) -> Path:
    """Write an adapter of the model with weights as large as a trained one's."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        skeleton = random_model(args.model, torch.float32)
    model = get_peft_model(skeleton, config(args))
    for layer in adapter_layers(model).values():
        for part, size in (("lora_A", 0.03), ("lora_B", 0.003)):
            module = getattr(layer, part)["default"]
            module.weight = torch.nn.Parameter(torch.randn(module.weight.shape) * size)
    return save_adapter(model, folder)


# -- training


def training(args: argparse.Namespace, stack: AdapterStack) -> list[dict[str, Any]]:
    """Time a step of each contender, in turn."""
    contenders: dict[str, tuple[AdapterStack, list[Term]]] = {
        "plain LoRA": (AdapterStack(), []),
        f"{len(stack)} tasks, no penalty": (stack, []),
        "O-LoRA, released sums": (stack, [Overlap(0.5), Norm(0.1)]),
        "O-LoRA, normalised": (stack, [Overlap(0.5, normalize=True)]),
        "ELLA": (stack, [Alignment(1.0)]),
        "drift, all directions": (stack, [Drift(1.0)]),
        "drift, 128 directions": (stack, [Drift(1.0, rank=128)]),
    }
    models: dict[int, Any] = {}
    steps: dict[str, Callable[[], tuple[float, float]]] = {}
    for name, (tasks, terms) in contenders.items():
        if len(tasks) not in models:
            base = random_model(args.model, torch.float32)
            torch.manual_seed(99)
            models[len(tasks)] = tasks.attach(base, config(args)).to(args.device).train()
        steps[name] = step(args, models[len(tasks)], tasks, terms)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for round_ in range(args.rounds + 1):
        for name, take in steps.items():
            seconds = take()
            if round_:  # the first warms up
                times[name].append(seconds)
    plain = min(seconds for seconds, _ in times["plain LoRA"])
    return [
        {
            "contender": name,
            "seconds": min(s for s, _ in found),
            "ratio": min(s for s, _ in found) / plain,
            "penalty": min(p for _, p in found),
            "share": min(p for _, p in found) / plain,
        }
        for name, found in times.items()
    ]


def step(
    args: argparse.Namespace, model: Any, stack: AdapterStack, terms: list[Term]
) -> Callable[[], tuple[float, float]]:
    """Return a function that takes a training step: (seconds, those of the penalty's forward)."""
    moments = {
        name: [Moments(torch.randn(64, layer.in_features)) for _ in range(len(stack))]
        for name, layer in adapter_layers(model).items()
    }
    states = prepare(model, stack, terms, moments)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4)
    vocab = model.config.vocab_size
    ids = torch.randint(5, vocab, (args.batch, args.length), device=args.device)

    def take() -> tuple[float, float]:
        start = clock(args)
        loss = model(input_ids=ids, labels=ids).loss
        before = clock(args) if states else 0.0
        for value in penalties(states).values():
            loss = loss + value
        penalty = clock(args) - before if states else 0.0
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return clock(args) - start, penalty

    return take


def clock(args: argparse.Namespace) -> float:
    """Return CPU seconds, or wall seconds once the device is done."""
    if args.device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


# -- inference


def inference(args: argparse.Namespace, stack: AdapterStack, folder: Path) -> list[dict[str, Any]]:
    """Time a forward pass of 16 tokens: base, one LoRA of that rank, and both exported forms."""
    base = random_model(args.model, torch.float32)
    one = write_lora(stack, folder / "one")
    write_merged(stack, folder / "merged", random_model(args.model, torch.float32))
    rank = int(one.rank or 0)
    fresh = get_peft_model(
        random_model(args.model, torch.float32),
        LoraConfig(r=rank, target_modules=args.targets),
    )
    models = {
        "base model": base,
        "exported, merged": type(base).from_pretrained(folder / "merged"),
        f"a LoRA of rank {rank}": fresh,
        "exported, one LoRA": PeftModel.from_pretrained(
            random_model(args.model, torch.float32), str(folder / "one")
        ),
    }
    ids = torch.randint(5, base.config.vocab_size, (1, 16), device=args.device)
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.to(args.device).eval()
    with torch.no_grad():
        for round_ in range(2 * args.rounds + 1):
            for name, model in models.items():
                start = clock(args)
                model(input_ids=ids)
                if round_:
                    times[name].append(clock(args) - start)
    rows: list[dict[str, Any]] = [
        {"model": name, "seconds": min(found)} for name, found in times.items()
    ]
    for row, like in zip(rows, (0, 0, 2, 2), strict=True):
        row["ratio"] = row["seconds"] / rows[like]["seconds"]
    return rows


# -- numbers


def released() -> dict[str, float]:
    """Return the largest relative differences from the released code's loop over parameters."""
    generator = torch.Generator().manual_seed(0)
    named = {}
    for m in range(6):
        for name, shape in (("lora_A", (24, 64)), ("loranew_A", (8, 64)), ("loranew_B", (32, 8))):
            named[f"layer.{m}.{name}.weight"] = torch.randn(*shape, generator=generator)
    orthogonal, l2 = torch.zeros(()), torch.zeros(())
    for name, old in named.items():
        if "lora_A" in name:
            for other, new in named.items():
                if "loranew_A" in other and name.split("lora_A")[0] == other.split("loranew_A")[0]:
                    orthogonal = orthogonal + torch.abs(torch.mm(old, new.T)).sum()
        if "loranew_" in name:
            l2 = l2 + torch.norm(named[name], p=2)
    news, olds, bs = (
        [named[f"layer.{m}.{part}.weight"] for m in range(6)]
        for part in ("loranew_A", "lora_A", "loranew_B")
    )
    ours = torch.stack([overlap(a, past) for a, past in zip(news, olds, strict=True)]).sum()
    norms = torch.stack([norm(a, b) for a, b in zip(news, bs, strict=True)]).sum()
    return {
        "overlap": abs(float(ours / orthogonal) - 1),
        "norm": abs(float(norms / l2) - 1),
    }


def equality(shape: str, folders: list[Path], to: Path) -> list[dict[str, Any]]:
    """Return how far the exported forms are from the adapters added one by one, in logits."""
    model: Any = random_model(shape, torch.float32)
    ids = torch.randint(5, model.config.vocab_size, (1, 24))
    rows = []
    with torch.no_grad():
        start = model(ids).logits
        for tasks, folder in enumerate(folders, 1):
            model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
            if tasks not in CHECKED:
                continue
            expected = model(ids).logits
            size = float(expected.abs().max())
            stack = AdapterStack.load(folders[:tasks])
            exported = write_lora(stack, to / str(tasks))
            base = random_model(shape, torch.float32)
            one = PeftModel.from_pretrained(base, str(exported.folder)).eval()(ids).logits
            merged = stack.merge(random_model(shape, torch.float32))(ids).logits
            rows.append(
                {
                    "tasks": tasks,
                    "rank": exported.rank,
                    "one LoRA": float((one - expected).abs().max()) / size,
                    "merged": float((merged - expected).abs().max()) / size,
                    "change": float((expected - start).abs().max()) / size,
                }
            )
    return rows


def markdown(found: dict[str, Any]) -> str:
    """Return the report."""
    m, s = found["machine"], found["settings"]
    text = f"# O-LoRA's cost\n\n{m['cpu']}; {s['device']}, {m['threads']} threads of {m['cores']} "
    text += f"cores, load {m['load']}; torch {m['torch']}; {m['date']}\n\n"
    text += f"{s['model']} float32, {len(s['targets'])} kinds of modules, rank {s['rank']}, batch "
    text += f"{s['batch']} x {s['length']}; least of {s['rounds']} steps taken in turn.\n\n"
    text += table(
        ["training", "step, s", "ratio", "penalty's forward, ms", "of a plain step"],
        [
            [
                r["contender"],
                f"{r['seconds']:.3f}",
                f"**{r['ratio']:.3f}**",
                f"{1000 * r['penalty']:.1f}",
                f"{r['share']:.1%}",
            ]
            for r in found["steps"]
        ],
    )
    text += "\n" + table(
        ["a forward pass of 16 tokens", "ms", "ratio to its like"],
        [
            [r["model"], f"{1000 * r['seconds']:.1f}", f"**{r['ratio']:.3f}**"]
            for r in found["inference"]
        ],
    )
    text += "\n" + table(
        ["tasks", "rank", "one LoRA", "merged", "the tasks' own change"],
        [
            [r["tasks"], r["rank"], *(f"{r[k]:.1e}" for k in ("one LoRA", "merged", "change"))]
            for r in found["stacks"]
        ],
    )
    text += "\nLargest differences of logits from the adapters added one by one, relative.\n\n"
    r = found["released"]
    text += f"Against the released loop: overlap {r['overlap']:.1e}, norm {r['norm']:.1e}.\n\n"
    worst = max(row["ratio"] for row in found["steps"] if "O-LoRA" in row["contender"])
    met = "pass" if worst <= GOAL else "**fail**"
    return (
        text
        + f"Target: an O-LoRA step at most {GOAL} of plain LoRA's; the dearest {worst:.3f}: {met}."
    )


if __name__ == "__main__":
    main()
