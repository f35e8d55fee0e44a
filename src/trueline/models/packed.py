"""Faster matrix products for a few rows on a CPU, in the modules of a model.

Branched decoding multiplies a few rows, for which torch's own product leaves half of many
processors idle. Each `nn.Linear` here takes the way that was measured to be fastest for its shape
and row count (`trueline.models.products`); `benchmarks/decode.py` measures what comes of it. Packed
weights are a second copy, made when they are first needed. The first one costs little memory where
weights are loaded in the dtype of their file: its pages are the file's, which the system takes back
when it needs them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from trueline.models.products import (
    PACKED,
    RULE,
    TORCH,
    Way,
    fastest,
    pack,
    packed_product,
    transposed_product,
)

MIN_WEIGHTS = {torch.bfloat16: 0, torch.float32: 100_000}
"""Smaller matrices are left to torch: nothing is to be had there."""
MAX_BYTES = 2 << 30
"""By default no more than this is packed of a model."""


def pack_weights(model: nn.Module, *, force: bool = False) -> int:
    """Give every `nn.Linear` of `model` that may gain from it its fastest product; return how many.

    Nothing is packed if the copies could take more than `MAX_BYTES`, unless `force`. Modules that
    do more than a matrix product (quantised, subclassed) are left alone. The weights stay: saving
    works, training uses torch's own product, and weights changed in place are packed anew.
    """
    modules = [m for m in model.modules() if type(m) is nn.Linear and _may_gain(m.weight)]
    may_pack = force or sum(m.weight.nbytes for m in modules) <= MAX_BYTES
    for module in modules:
        module.forward = FastProduct(module, may_pack)  # type: ignore[method-assign,assignment]
    return len(modules)


@contextlib.contextmanager
def merged_products(model: nn.Module) -> Iterator[int]:
    """Run each float32 LoRA layer as one product, as fast as may be; yield how many changed.

    For sampling between two steps of training. The weights themselves are not touched, so they are
    bit for bit the same afterwards. Copies last as long as the context, and are not made if they
    would take more than `MAX_BYTES`. In half precision nothing is merged: rounding would take away
    most of a young adapter.
    """
    layers: list[Any] = [m for m in model.modules() if _mergeable(m)]
    inside = {id(layer.base_layer) for layer in layers}
    linears: list[Any] = [m for m in model.modules() if type(m) is nn.Linear]
    others = [m for m in linears if id(m) not in inside and "forward" not in vars(m)]
    others = [m for m in others if _may_gain(m.weight)]
    weights = [layer.base_layer.weight for layer in layers] + [m.weight for m in others]
    changed: list[Any] = [*layers, *others]
    if sum(w.nbytes for w in weights) > MAX_BYTES:
        changed = []
    try:
        for module in changed:
            module.forward = FastProduct(module) if type(module) is nn.Linear else _merged(module)
        yield len(changed)
    finally:
        for module in changed:
            vars(module).pop("forward", None)


def _mergeable(layer: Any) -> bool:
    """Return whether this is a plain LoRA of PEFT over a float32 `nn.Linear`, switched on."""
    kind = type(layer)
    if kind.__name__ != "Linear" or kind.__module__ != "peft.tuners.lora.layer":
        return False
    own = vars(layer.base_layer).get("forward")
    return (
        type(layer.base_layer) is nn.Linear
        and layer.base_layer.weight.dtype == torch.float32
        and (own is None or isinstance(own, FastProduct))
        and not (layer.merged or layer.disable_adapters or layer.lora_variant)
        and not any(layer.lora_bias.values())
    )


def _merged(layer: Any) -> Any:
    """Return the product of a LoRA layer, its adapter added to a copy of the weights."""
    base = layer.base_layer
    with torch.no_grad():
        weight = base.weight.detach()
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                weight = weight + layer.get_delta_weight(adapter)
    if not _may_gain(weight):
        return lambda x: linear(x, weight, base.bias)
    module = nn.Linear(1, 1, bias=False, device="meta")
    module.weight, module.bias = nn.Parameter(weight, requires_grad=False), base.bias
    return FastProduct(module)


class FastProduct:
    """The forward of one `nn.Linear`, in the way that is fastest for the rows it is given.

    Packed weights are made when they are first needed, and anew when the weights were changed in
    place. Copies and pickles of the module work: they carry the module, not the packed weights.
    """

    def __init__(self, module: nn.Linear, may_pack: bool = True) -> None:
        self.module, self.may_pack = module, may_pack
        self.ways: dict[int, Way] = {}
        """By number of rows, as far as they have come up."""
        self.packed: torch.Tensor | None = None
        self.version = -1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product; torch's own where a gradient is wanted, or dtypes differ."""
        weight, bias = self.module.weight, self.module.bias
        if torch.is_grad_enabled() or x.dtype != weight.dtype or not weight.is_cpu:
            return linear(x, weight, bias)
        rows = x.numel() // weight.shape[1]
        way = self.ways.get(rows) or self._find(rows)
        if way == TORCH:
            return linear(x, weight, bias)
        if way == PACKED:
            return packed_product(x, self._packed(weight), bias)
        return transposed_product(x, weight, bias)

    def _find(self, rows: int) -> Way:
        weight = self.module.weight
        way = fastest(weight, rows, may_pack=self.may_pack) if rows else TORCH
        self.ways[rows] = way
        return way

    def _packed(self, weight: torch.Tensor) -> torch.Tensor:
        # Tensors of inference mode have no version, and no way to train them.
        version = 0 if weight.is_inference() else weight._version
        if self.packed is None or version != self.version:
            self.packed, self.version = pack(weight), version
        return self.packed

    def __deepcopy__(self, memo: dict[int, object]) -> FastProduct:
        return FastProduct(copy.deepcopy(self.module, memo), self.may_pack)

    def __reduce__(self) -> tuple[type[FastProduct], tuple[nn.Linear, bool]]:
        return FastProduct, (self.module, self.may_pack)


def _may_gain(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype in RULE
        and weight.numel() >= MIN_WEIGHTS[weight.dtype]
    )
