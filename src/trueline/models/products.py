"""Which matrix product is fastest for so many rows: measured, and remembered for the machine.

    torch        x W^T as torch computes it, from the weights as they lie in memory
    packed       the same from weights in oneDNN's own blocked layout, a second copy of them
    transposed   (W x^T)^T

Which one wins depends on the processor, the shape, the dtype and the number of rows, and on some
processors by a factor of four. So each case is timed when it first comes up, for a fraction of a
second, and the times are kept in `cache_folder()`. A time that is there stays: a run that goes on
after a kill, and the same run again, multiply as they did. Where nothing can be kept, `RULE` holds
in its place, which depends on no clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from trueline.errors import TruelineError
from trueline.models.device import processor
from trueline.records.disk import cache_folder, make_folder
from trueline.records.lines import append_row

Way = str
TORCH, PACKED, TRANSPOSED = "torch", "packed", "transposed"
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128)
"""Row counts that are timed; others count as the next one above, or the last."""
ROWS_HINT = 8
"""The row count oneDNN lays the weights out for; the layout serves all row counts well."""
MARGIN = 0.95
"""Another product than torch's takes at most this share of its time; the rest is a tie."""
COLD_BYTES = 24 << 20
"""Copies of a small matrix are cycled up to this size, as the layers of a model would be."""
SECONDS, ROUNDS = 0.08, 3
"""How long one case is timed, and how many times at least; the least time of each way counts."""
RULE = {torch.bfloat16: (1, 0), torch.float32: (4, 500_000)}
"""Rows and weights from which the packed product is taken where nothing can be remembered."""

Times = dict[Way, float]
Case = tuple[str, str, int]
"""Dtype, what is multiplied ("out x in"), rows."""


def can_pack(dtype: torch.dtype) -> bool:
    """Return whether this processor and build of torch have a packed product in `dtype`."""
    if dtype not in RULE or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Return the weights (out, in) in oneDNN's layout."""
    with torch.no_grad():
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS_HINT)
        return packed


def packed_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return x W^T + b from packed weights."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def transposed_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Return x W^T + b as (W x^T)^T, in the layout of the plain product."""
    columns = x.reshape(-1, x.shape[-1]).T
    y = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    return y.T.contiguous().view(*x.shape[:-1], weight.shape[0])


def nearest(rows: int) -> int:
    """Return the row count of `ROWS` that stands for this one."""
    return next((known for known in ROWS if known >= rows), ROWS[-1])


def fastest(weight: torch.Tensor, rows: int, *, may_pack: bool = True) -> Way:
    """Return the way to multiply `rows` rows by these weights on this machine."""
    may_pack = may_pack and can_pack(weight.dtype)
    rows = nearest(rows)
    case = (
        str(weight.dtype).removeprefix("torch."),
        f"{weight.shape[0]} x {weight.shape[1]}",
        rows,
    )
    times = machine().times(case, lambda: measure(weight, rows))
    if times is None or TORCH not in times:
        least, size = RULE[weight.dtype]
        return PACKED if may_pack and rows >= least and weight.numel() >= size else TORCH
    ways = [way for way in times if may_pack or way != PACKED]
    best = min(ways, key=times.__getitem__)
    return best if times[best] <= MARGIN * times[TORCH] else TORCH


def machine() -> Machine:
    """Return what is known of this processor with torch's present number of threads."""
    return _machine(cache_folder() / "products.jsonl", torch.get_num_threads())


@lru_cache
def _machine(path: Path, threads: int) -> Machine:
    return Machine(path, threads)


class Machine:
    """The times of products on one processor, as a file has them: the first of each case counts.

    Processes that time the same case at once both add a line, and then both go by the first.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self.path = path
        self.own = {"processor": processor(), "torch": torch.__version__, "threads": threads}
        self.known: dict[Case, Times] = {}
        self.keeps = True
        """Whether the file can be written."""
        self._read()

    def times(self, case: Case, measured: Callable[[], Times]) -> Times | None:
        """Return the seconds of each way, measured now if they are not known; None: not kept."""
        if case not in self.known and self.keeps:
            self._keep(case, measured())
        return self.known.get(case)

    def _keep(self, case: Case, times: Times) -> None:
        dtype, shape, rows = case
        row = self.own | {"dtype": dtype, "shape": shape, "rows": rows, "seconds": times}
        try:
            make_folder(self.path.parent)
            append_row(self.path, row)
        except (OSError, TruelineError):
            self.keeps = False
        self._read()

    def _read(self) -> None:
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError:
            return
        for line in lines:
            try:
                row = json.loads(line)
                if all(row[key] == value for key, value in self.own.items()):
                    case = (row["dtype"], row["shape"], row["rows"])
                    self.known.setdefault(case, {w: float(s) for w, s in row["seconds"].items()})
            except (ValueError, LookupError, TypeError, AttributeError):
                continue  # torn by a kill, or not ours


@torch.inference_mode()
def measure(weight: torch.Tensor, rows: int) -> Times:
    """Return the seconds that each way takes for so many rows, the least of some rounds in turn.

    On one thread processor time counts, which other processes disturb least.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    copies = _cold(weight)
    own = torch.Generator().manual_seed(0)  # the global one is the user's
    x = torch.randn(rows, weight.shape[1], generator=own).to(weight.dtype)
    ways: dict[Way, tuple[Callable[..., Any], Sequence[torch.Tensor]]] = {
        TORCH: (torch.nn.functional.linear, copies),
        TRANSPOSED: (transposed_product, copies),
    }
    if can_pack(weight.dtype):
        ways[PACKED] = (packed_product, [pack(copy) for copy in copies])
    best, end, rounds = dict.fromkeys(ways, float("inf")), time.perf_counter() + SECONDS, 0
    while rounds < ROUNDS or time.perf_counter() < end:
        for way, (product, weights) in ways.items():
            if rounds and best[way] > 3 * best[TORCH]:
                continue
            start = clock()
            for each in weights:
                product(x, each, None)
            best[way] = min(best[way], (clock() - start) / len(weights))
        rounds += 1
    return best


def _cold(weight: torch.Tensor) -> list[torch.Tensor]:
    """Return copies of the weights, more than a core's own caches hold."""
    count = max(1, COLD_BYTES // max(1, weight.nbytes))
    if count == 1:
        return [weight.detach()]
    return [weight.detach().clone() for _ in range(count)]
