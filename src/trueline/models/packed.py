"""Faster matrix products for a few rows on a CPU: weights packed once for oneDNN.

torch multiplies with the weights as they lie in memory, which for bfloat16, and for four and more
float32 rows, leaves half of the processor idle. Branched decoding has exactly such a few rows. The
same product from weights in oneDNN's own blocked layout is up to twice as fast
(`benchmarks/decode.py` measures it), at the price of a second copy of the weights.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

ROWS_HINT = 8
"""The row count oneDNN lays the weights out for; the layout serves all row counts well."""
MIN_ROWS = {torch.bfloat16: 1, torch.float32: 4}
"""Fewer rows are faster with torch's own product."""
MIN_WEIGHTS = {torch.bfloat16: 0, torch.float32: 500_000}
"""Smaller matrices are faster with torch's own product."""
MAX_BYTES = 2 << 30
"""By default a model is packed only if the copies take no more than this."""


def can_pack(dtype: torch.dtype) -> bool:
    """Return whether this processor and build of torch have a packed product in `dtype`."""
    if dtype not in MIN_ROWS or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack_weights(model: nn.Module, *, force: bool = False) -> int:
    """Give every `nn.Linear` of `model` that gains from it a packed product; return how many.

    Nothing is packed if the copies would take more than `MAX_BYTES`, unless `force`. Modules that
    do more than a matrix product (quantised, subclassed) are left alone. The weights stay: saving
    works, training uses torch's own product, and weights changed in place are packed anew.
    """
    modules = [m for m in model.modules() if type(m) is nn.Linear and _gains(m.weight)]
    if not force and sum(m.weight.nbytes for m in modules) > MAX_BYTES:
        return 0
    for module in modules:
        module.forward = PackedProduct(module)  # type: ignore[method-assign,assignment]
    return len(modules)


@contextlib.contextmanager
def merged_products(model: nn.Module, rows: int | None = None) -> Iterator[int]:
    """Run each float32 LoRA layer as one product and pack what gains; yield how many changed.

    `rows` is how many will be decoded together: for so few that torch's own product is faster
    nothing is packed.

    For sampling between two steps of training. The weights themselves are not touched, so they are
    bit for bit the same afterwards. Copies last as long as the context, and are not made if they
    would take more than `MAX_BYTES`. In half precision nothing is merged: rounding would take away
    most of a young adapter.
    """
    layers: list[Any] = [m for m in model.modules() if _mergeable(m)]
    inside = {id(layer.base_layer) for layer in layers}
    linear: list[Any] = [m for m in model.modules() if type(m) is nn.Linear]
    others = [m for m in linear if id(m) not in inside and "forward" not in vars(m)]
    few = rows is not None and rows < MIN_ROWS[torch.float32]
    others = [m for m in others if _gains(m.weight) and not few]
    weights = [layer.base_layer.weight for layer in layers] + [m.weight for m in others]
    changed: list[Any] = [*layers, *others]
    if sum(w.nbytes for w in weights) > MAX_BYTES:
        changed = []
    try:
        for module in changed:
            packed = type(module) is nn.Linear
            module.forward = PackedProduct(module) if packed else _merged(module, few)
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
        and (own is None or isinstance(own, PackedProduct))
        and not (layer.merged or layer.disable_adapters or layer.lora_variant)
        and not any(layer.lora_bias.values())
    )


def _merged(layer: Any, few: bool) -> Any:
    """Return the product of a LoRA layer, its adapter added to a copy of the weights."""
    base = layer.base_layer
    with torch.no_grad():
        weight = base.weight.detach()
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                weight = weight + layer.get_delta_weight(adapter)
    if few or not _gains(weight):
        return lambda x: nn.functional.linear(x, weight, base.bias)
    module = nn.Linear(1, 1, bias=False, device="meta")
    module.weight, module.bias = nn.Parameter(weight, requires_grad=False), base.bias
    return PackedProduct(module)


class PackedProduct:
    """The forward of one `nn.Linear`, from weights that are packed when they are first needed.

    Weights changed in place since are packed again. Copies and pickles of the module work: they
    carry the module, not the packed weights.
    """

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self.packed: torch.Tensor | None = None
        self.version = -1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product, packed where that is faster and no gradient is wanted."""
        weight, bias = self.module.weight, self.module.bias
        few = x.numel() < MIN_ROWS.get(weight.dtype, 1 << 30) * x.shape[-1]
        if few or torch.is_grad_enabled() or x.dtype != weight.dtype or not weight.is_cpu:
            return nn.functional.linear(x, weight, bias)
        # Tensors of inference mode have no version, and no way to train them.
        version = 0 if weight.is_inference() else weight._version
        if self.packed is None or version != self.version:
            self.packed, self.version = _pack(weight), version
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")

    def __deepcopy__(self, memo: dict[int, object]) -> PackedProduct:
        return PackedProduct(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> tuple[type[PackedProduct], tuple[nn.Linear]]:
        return PackedProduct, (self.module,)


def _pack(weight: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS_HINT)


def _gains(weight: torch.Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and can_pack(weight.dtype)
        and weight.numel() >= MIN_WEIGHTS[weight.dtype]
    )
