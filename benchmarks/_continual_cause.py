"""Why orthogonal rows of A do, or do not, leave an earlier task alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._continual import BATCH, PROMPT, TUNE_ORDERS, TUNE_SEED, Bench, Choice
from benchmarks._report import table
from trueline.train.adapters.second_moments import input_moments
from trueline.train.adapters.stack import AdapterStack
from trueline.train.streams.kinds import by_length, kind_of
from trueline.train.streams.tasks import union_of_labels

HEAD = {
    "rows": "cosine of its rows of A with the first task's",
    "own": "inputs' energy in the first A's rows",
    "seen": "in its own rows",
    "moved": "its change of outputs, to the first adapter's",
}


def cause(bench: Bench, protocol: str, strategy: str, choice: Choice) -> dict[str, float]:
    """Return what each later adapter does on the first task's inputs, over modules and tasks.

    The inputs are what the adapted modules read on the first task's training rows once it has been
    learned; their second moments are F^T F. For a later adapter with rows A_j and dW_j:

        rows    mean |cos| between a row of A_j and a row of A_1
        own     |F P_1|^2 / |F|^2, P_1 the projection on the rows of A_1
        seen    |F P_j|^2 / |F|^2
        moved   |dW_j F^T| / |dW_1 F^T|
    """
    order, tasks = TUNE_ORDERS[0], bench.tasks(TUNE_ORDERS[0])
    folder = bench.work / f"cause-{protocol}-{strategy}"
    shutil.rmtree(folder, ignore_errors=True)
    result = bench.train(protocol, strategy, order, TUNE_SEED, choice, folder, tuning=True)
    first, *later = (AdapterStack.load([path]) for path in result.adapters)
    model, states = bench.factory(tasks)()
    first.merge(model)
    kind = kind_of(model, states, union=union_of_labels(tasks), prompt=PROMPT,
                   train_labels=protocol)  # fmt: skip
    rows = kind.encode(tasks[0], tasks[0].train[: bench.size.rows])
    places = by_length([row["input_ids"] for row in rows], BATCH)
    batches = [kind.collate([rows[i] for i in part]) for part in places]
    fed = [{k: batch[k] for k in ("input_ids", "attention_mask")} for batch in batches]
    factors = input_moments(model, fed, first.modules)
    shutil.rmtree(folder, ignore_errors=True)
    found: dict[str, list[float]] = {name: [] for name in HEAD}
    for name, f in factors.items():
        [one] = first.of(name)
        for stack in later:
            [other] = stack.of(name)
            found["rows"].append(float((unit(one.a) @ unit(other.a).T).abs().mean()))
            found["own"].append(inside(f, one.a))
            found["seen"].append(inside(f, other.a))
            change, before = (part.delta() @ f.T for part in (other, one))
            found["moved"].append(float(change.norm() / before.norm()))
    return {name: float(np.mean(values)) for name, values in found.items()}


def unit(a: Tensor) -> Tensor:
    """Return rows of length one."""
    return torch.nn.functional.normalize(a.float(), dim=1)


def inside(f: Tensor, a: Tensor) -> float:
    """Return the share of the rows of `f`, by energy, that lies in the span of the rows of `a`."""
    q, _ = torch.linalg.qr(a.float().T)
    return float((f @ q).square().sum() / f.square().sum())


def text(found: dict[str, dict[str, float]], settings: Sequence[Any]) -> str:
    """Return strategies by what their later adapters do."""
    lines = [
        [name, choice.text(), *(f"{row[key]:.3f}" for key in HEAD)]
        for (name, row), choice in zip(found.items(), settings, strict=True)
    ]
    return table(["", "setting", *HEAD.values()], lines)
