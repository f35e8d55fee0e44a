"""Checkpoints: configuration, tokenizer and weights through transformers, refused unless whole.

transformers fills what a file lacks with random numbers and says so in its log. Here a missing,
unexpected or misshapen tensor is a `ModelError` that names it, pickled weights are not opened, and
code that comes with a checkpoint runs only where it was asked for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trueline.errors import ModelError, TruelineError
from trueline.models.device import DTYPES
from trueline.models.hub import Place, one_line

HEADS = ("classifier", "score", "classification_head")
"""Names of the head of a sequence classifier."""
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "intermediate_size", "max_position_embeddings")  # fmt: skip
"""Fields of a configuration that count something."""
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "merges.txt", "tekken.json")
LEFT_OVER = re.compile(r"\.attn\.masked_bias")
"""Buffers of old checkpoints that transformers neither uses nor knows any more."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SHOWN = 3
"""So many names of tensors are listed, then how many more there are."""


@dataclass(frozen=True)
class Loaded:
    """A model as the class it was saved from."""

    model: Any
    tokenizer: Any
    """None where the checkpoint has none."""
    head_is_new: bool
    """Whether the classifier's head is in no file: random, by torch's generator."""


def read_config(place: Place) -> Any:
    """Return the configuration; raises `ModelError` for one that describes no model."""
    if place.folder is not None:
        read_object(place.folder / "config.json", place.name)
    config = _from_pretrained("AutoConfig", place, {})
    with reading(place.name):
        for part in (config, config.get_text_config(decoder=True)):
            for name in SIZES:
                value = getattr(part, name, None)
                if value is not None and (type(value) is not int or value < 1):
                    raise ModelError(
                        f'Cannot load "{place.name}": `{name}` in config.json must be a whole '
                        f"number of at least 1, got {value!r}. Its configuration is damaged."
                    )
    return config


def read_tokenizer(place: Place) -> Any:
    """Return the tokenizer; of a folder without one transformers would make up an empty one."""
    folder = place.folder
    if folder is not None and not any(p for name in TOKENIZERS for p in folder.glob(name)):
        raise ModelError(f'Folder "{place.name}" holds no tokenizer: it has no tokenizer.json.')
    return _from_pretrained("AutoTokenizer", place, {})


def read_weights(place: Place, config: Any, kind: str, **options: Any) -> Any:
    """Return a model with all of its weights from files: none missing, left over or misshapen.

    Args:
        place: Where they are.
        config: From `read_config`.
        kind: A class of transformers, e.g. "AutoModelForCausalLM".
        options: For its `from_pretrained`.
    """
    model, _ = _read(place, config, kind, (), options)
    check_finite_weights(place.name, model)
    return model


def check_finite_weights(name: str, model: Any) -> None:
    """Raise `ModelError` if a weight is not finite: attention can swallow that without a trace."""
    import torch

    for key, weight in model.named_parameters():
        if weight.dtype not in DTYPES.values() or weight.is_meta or not weight.numel():
            continue
        # NaN is the least and the greatest wherever there is one.
        if not torch.stack(weight.detach().aminmax()).isfinite().all():
            raise ModelError(
                f'Cannot load "{name}": its weights hold numbers that are not finite (NaN or '
                f'infinity) in "{key}". The checkpoint is damaged, or its training went wrong.'
            )


def load_as_saved(
    place: Place, *, dtype: Any = "auto", head: dict[str, Any] | None = None
) -> Loaded:
    """Return the model as the class it was saved from: causal, encoder-decoder, a classifier.

    `head` are settings of a classifier's own (`num_labels`, or `id2label` and `label2id`); where
    they ask for another number of outputs than the files have, the head alone is new.
    """
    import transformers

    config = read_config(place)
    name = (config.architectures or ["AutoModelForCausalLM"])[0]
    known = getattr(transformers, name, None)
    own = isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)
    if not own:
        name = "AutoModelForCausalLM"
    for key, value in (head or {}).items():
        setattr(config, key, value)
    new = HEADS if head else ()
    model, is_new = _read(place, config, name, new, {"dtype": dtype}, automatic=not own)
    check_finite_weights(place.name, model)
    try:
        tokenizer = read_tokenizer(place)
    except ModelError:
        tokenizer = None
    return Loaded(model, tokenizer, is_new)


def skeleton(place: Place) -> Any:
    """Return the model without its weights: names and shapes alone, at no cost."""
    import torch
    import transformers

    config = read_config(place)
    name = (config.architectures or [""])[0]
    known = getattr(transformers, name, None)
    with torch.device("meta"), quiet(), reading(place.name):
        if isinstance(known, type) and issubclass(known, transformers.PreTrainedModel):
            return known(config)
        kind = transformers.AutoModelForCausalLM
        return kind.from_config(config, trust_remote_code=place.trust_remote_code)


def _read(
    place: Place,
    config: Any,
    kind: str,
    new: tuple[str, ...],
    options: dict[str, Any],
    automatic: bool = True,
) -> tuple[Any, bool]:
    if place.folder is not None:
        _check_files(place, config)
    told = {"config": config, "use_safetensors": True, "output_loading_info": True}
    # Misshapen tensors are left out and reported by name, instead of in a table on the log.
    told |= {"ignore_mismatched_sizes": True} | options
    model, info = _from_pretrained(kind, place, told, automatic)
    found = {
        "lacks": sorted(info["missing_keys"]),
        "has no use for": sorted(k for k in info["unexpected_keys"] if not LEFT_OVER.search(k)),
        "does not fit": sorted(
            f"{key}, {_shape(a)} in the file and {_shape(b)} in the model"
            for key, a, b in info["mismatched_keys"]
        ),
    }
    is_new = False
    for what, names in found.items():
        odd = [n for n in names if not set(n.split(",")[0].split(".")) & set(new)]
        is_new = is_new or len(odd) < len(names)
        if odd:
            raise ModelError(
                f'Cannot load "{place.name}": its file of weights and config.json do not belong '
                f"together. A {type(model).__name__} {what} {listed(odd)}. Give the whole "
                "checkpoint."
            )
    return model, is_new


def listed(names: Iterable[str]) -> str:
    """Return the first few of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f'"{name}"' for name in names[:SHOWN]) + more


def _shape(size: Iterable[int]) -> str:
    return " x ".join(map(str, size)) or "one number"


def _check_files(place: Place, config: Any) -> None:
    """Raise `ModelError` unless the folder's safetensors are whole and can be this model."""
    folder = place.folder
    assert folder is not None
    files = sorted(folder.glob("*.safetensors"))
    if (index := folder / "model.safetensors.index.json").is_file():
        named = read_object(index, place.name).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(f, str) for f in named.values()):
            raise ModelError(f'Cannot load "{place.name}": {index} has no `weight_map`.')
        files = [folder / name for name in sorted(set(named.values()))]
    if not files:
        if pickled := sorted(p.name for pattern in PICKLES for p in folder.glob(pattern)):
            raise ModelError(pickle_refusal(place.name, pickled[0]))
        raise ModelError(f'Folder "{place.name}" holds no weights: it has no model.safetensors.')
    count, widest = 0, 0
    for path in files:
        for shape in tensor_shapes(path).values():
            count, widest = count + 1, max(widest, *shape, 0)
    sizes = config.get_text_config(decoder=True)
    layers = getattr(sizes, "num_hidden_layers", None) or 0
    if layers > count:
        raise ModelError(
            f'Cannot load "{place.name}": config.json names {layers} layers, and its files hold '
            f"{count} tensors in all. The files lack most of the model."
        )
    for name in ("vocab_size", "hidden_size"):
        if (getattr(sizes, name, None) or 0) > widest:
            raise ModelError(
                f'Cannot load "{place.name}": config.json gives `{name}` {getattr(sizes, name)}, '
                f"and no tensor in its files is wider than {widest}. They do not belong together."
            )


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in a safetensors file, from its head alone.

    Raises `ModelError` for a file that is missing, damaged, cut short or empty.
    """
    try:
        with safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f'"{path}" is damaged or cut short: {one_line(error)}. Copy or download it again.'
        ) from None


def pickle_refusal(name: str | Path, file: str) -> str:
    """Return why pickled weights are not read, and the way out."""
    return (
        f'"{name}" keeps its weights in {file}, a pickle, which can run code when it is opened. '
        "Where you trust it, convert it once: load it with torch.load(..., weights_only=True), "
        "write it with safetensors.torch.save_file."
    )


def read_object(path: Path, name: str = "") -> dict[str, Any]:
    """Return the JSON object in a file of a checkpoint; `ModelError` where there is none."""
    name = name or str(path.parent)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f'Cannot load "{name}": {path.name}: {one_line(error)}.') from None
    if not isinstance(content, dict):
        kind = "null" if content is None else f"a {type(content).__name__}"
        raise ModelError(f'Cannot load "{name}": {path.name} must be a JSON object, got {kind}.')
    return content


def _from_pretrained(
    kind: str, place: Place, options: dict[str, Any], automatic: bool = True
) -> Any:
    """Call transformers' loader; turn its errors about the checkpoint into `ModelError`."""
    import transformers

    told = place.options()
    if not automatic:
        del told["trust_remote_code"]  # a class of transformers' own has no other code
    with quiet(), reading(place.name):
        return getattr(transformers, kind).from_pretrained(place.path, **told, **options)


@contextlib.contextmanager
def reading(name: str | Path, what: str = "model") -> Iterator[None]:
    """Turn what transformers, PEFT and tokenizers raise at a file of theirs into `ModelError`."""
    from huggingface_hub.errors import StrictDataclassError
    from jinja2.exceptions import TemplateError

    known = (OSError, ValueError, LookupError, ImportError, TypeError, AttributeError,
             ArithmeticError, RuntimeError, AssertionError, MemoryError, SafetensorError,
             StrictDataclassError, TemplateError)  # fmt: skip
    try:
        yield
    except TruelineError:
        raise
    except BaseException as error:
        # The library `tokenizers` raises Exception itself.
        if not isinstance(error, known) and type(error) is not Exception:
            raise
        raise ModelError(_explained(name, what, error)) from error


def _explained(name: str | Path, what: str, error: BaseException) -> str:
    reason = one_line(error)
    end = "" if reason.endswith(".") else "."
    if what != "model":
        return (
            f'Cannot load {what} "{name}": {reason}{end} Give a whole one of the same base model.'
        )
    if "custom code" in reason or "trust_remote_code" in reason:
        return (
            f'Model "{name}" comes with code of its own, which is not run. Read it, then pass '
            "--trust-remote-code (in Python `trust_remote_code=True`)."
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in reason:
        return f'Cannot load "{name}": the memory of this machine does not hold it. {reason}'
    return (
        f'Cannot load "{name}": {reason}{end} Give "tiny", a model folder, or a hub name that can '
        "be reached."
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the progress bars, advice and reports of transformers and PEFT.

    What they say of missing, left-over and misshapen weights is an error here, and so not lost.
    """
    from transformers.utils import logging as bars

    names = ("transformers", "peft")
    levels = {name: logging.getLogger(name).level for name in names}
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    with warnings.catch_warnings():
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
            for category in (UserWarning, FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=rf"{name}\b")
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            if shown:
                bars.enable_progress_bar()
