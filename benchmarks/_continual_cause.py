"""Why orthogonal rows of A do, or do not, leave an earlier task alone."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks._continual import BATCH, PROMPT, STACKED, TUNE_ORDERS, TUNE_SEED, Bench, Choice
from benchmarks._report import table
from trueline.train.adapters.stack import AdapterStack
from trueline.train.keep.second_moments import input_moments
from trueline.train.tasks.answers import by_length
from trueline.train.tasks.families import family_of
from trueline.train.tasks.task import union_of_labels

DIRECTIONS = 8
STRATEGIES = ("inc-lora", "o-lora", "inf-lora", "drift")
Inputs = tuple[list[dict[str, Tensor]], dict[str, Tensor]]
HEAD = {
    "rows": "its rows with earlier adapters' rows, mean cosine",
    "kept": "earlier inputs' energy in their own adapter's rows",
    "earlier": "its change of outputs on earlier inputs",
    "own": "on its own",
    "ratio": "ratio",
}


def cause(
    bench: Bench, protocol: str, strategy: str, choice: Choice, known: Inputs
) -> dict[str, float]:
    """Return what each adapter does on the inputs of earlier tasks, over modules and pairs i < j.

    F_i^T F_i is the second moment of what an adapted module of the untouched model, with weight W,
    reads on task i's training rows; A_i and dW_i are the adapter of task i.

        rows       mean |cos| between a row of A_j and a row of A_i
        kept       |F_i P_i|^2 / |F_i|^2, P_i the projection on the rows of A_i
        earlier    |dW_j F_i^T| / |W F_i^T|
        own        |dW_j F_j^T| / |W F_j^T|
        ratio      earlier / own
    """
    tasks = bench.tasks(TUNE_ORDERS[0])
    folder = bench.work / f"cause-{protocol}-{strategy}"
    shutil.rmtree(folder, ignore_errors=True)
    result = bench.train(protocol, strategy, TUNE_ORDERS[0], TUNE_SEED, choice, folder, tuning=True)
    stack = AdapterStack.load(result.adapters)
    shutil.rmtree(folder, ignore_errors=True)
    factors, weights = known
    found: dict[str, list[float]] = {name: [] for name in HEAD}
    for name in stack.modules:
        parts, w = stack.of(name), weights[name]
        for j in range(1, len(tasks)):
            own = moved(parts[j].delta(), w, factors[j][name])
            for i in range(j):
                earlier = moved(parts[j].delta(), w, factors[i][name])
                found["rows"].append(float((unit(parts[i].a) @ unit(parts[j].a).T).abs().mean()))
                found["kept"].append(inside(factors[i][name], parts[i].a))
                found["earlier"].append(earlier)
                found["own"].append(own)
                found["ratio"].append(earlier / own)
    return {name: float(np.mean(values)) for name, values in found.items()}


def inputs(bench: Bench, protocol: str) -> Inputs:
    """Return each task's factor F of what the adapted modules read, and the modules' weights."""
    tasks = bench.tasks(TUNE_ORDERS[0])
    model, states = bench.factory(tasks)()
    modules = [name for name, _ in model.named_modules() if name.endswith(STACKED)]
    family = family_of(model, states, union=union_of_labels(tasks), prompt=PROMPT,
                   train_labels=protocol)  # fmt: skip
    factors = []
    for task in tasks:
        rows = family.encode(task, task.train[: bench.size.rows])
        places = by_length([row["input_ids"] for row in rows], BATCH)
        batches = [family.collate([rows[i] for i in part]) for part in places]
        fed = [{k: batch[k] for k in ("input_ids", "attention_mask")} for batch in batches]
        factors.append(input_moments(model, fed, modules))
    return factors, {name: model.get_submodule(name).weight.detach() for name in modules}


def shared(factors: Sequence[dict[str, Tensor]]) -> float:
    """Return the mean share of a task's input energy in another task's leading directions."""
    shares = []
    for one, other in itertools.permutations(factors, 2):
        for name in one:
            lead = torch.linalg.svd(other[name], full_matrices=False).Vh[:DIRECTIONS]
            shares.append(inside(one[name], lead))
    return float(np.mean(shares))


def moved(change: Tensor, weight: Tensor, f: Tensor) -> float:
    """Return how large a change of weights is on inputs with factor `f`, to what is there."""
    return float((change @ f.T).norm() / (weight.float() @ f.T).norm())


def unit(a: Tensor) -> Tensor:
    """Return rows of length one."""
    return torch.nn.functional.normalize(a.float(), dim=1)


def inside(f: Tensor, a: Tensor) -> float:
    """Return the share of the rows of `f`, by energy, that lies in the span of the rows of `a`."""
    q, _ = torch.linalg.qr(a.float().T)
    return float((f @ q).square().sum() / f.square().sum())


def report(bench: Bench, protocol: str, runs: Sequence[tuple[str, Choice]]) -> str:
    """Return a table of what adapters do on earlier inputs, and how much of these tasks share."""
    known = inputs(bench, protocol)
    lines = []
    for strategy, choice in runs:
        row = cause(bench, protocol, strategy, choice, known)
        lines.append([strategy, choice.text(), *(f"{row[key]:.3f}" for key in HEAD)])
    factors, weights = known
    chance = DIRECTIONS / next(iter(weights.values())).shape[1]
    return (
        table(["", "setting", *HEAD.values()], lines)
        + f"\nOf a task's input energy {shared(factors):.0%} lies in the {DIRECTIONS} leading "
        f"directions of another task's, {chance:.0%} in {DIRECTIONS} random ones.\n"
    )
