"""Models: a checkpoint, its tokenizer and adapter as one `LanguageModel`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from trueline.errors import ConfigError, ModelError, check_flag, check_kind
from trueline.models.adapter import BASE, check_adapter, find_adapter, put_adapter
from trueline.models.checkpoint import read_config, read_tokenizer, read_weights, skeleton
from trueline.models.device import check_dtype, find_device, find_dtype
from trueline.models.hub import LOADING, Place, one_line
from trueline.models.language import LOOKUP
from trueline.models.language import LanguageModel as LanguageModel
from trueline.models.language import cache_name as cache_name
from trueline.models.packed import pack_weights
from trueline.models.places import find_model
from trueline.models.weightless import Weightless

if TYPE_CHECKING:
    from trueline.types import Progress

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""What an adapter may be called; PEFT's names of modules take no dots."""
ENGINES = ("torch", "vllm")
"""What can decode."""


def load_model(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    adapter: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    quantize: Literal["4bit", "8bit"] | None = None,
    chat_template: str | Path | None = None,
    raw: bool = False,
    default_system: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    packed_weights: bool | None = None,
    engine: str = "torch",
    engine_options: Mapping[str, Any] | None = None,
    speculate: str | Path | LanguageModel | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a causal language model from a folder, the hub, a GGUF file or the package.

    Args:
        name: A folder, a hub name, a GGUF file, "tiny" (bundled) or "smollm2" (fetched once).
        dtype: "auto" (the checkpoint's own, see `find_dtype`), "float32", "bfloat16", "float16".
        device: "auto" (CUDA, then MPS, then CPU), or a torch device. Not with `device_map`.
        device_map: Of transformers, e.g. "auto" for several devices; needs accelerate.
        adapter: Folder or hub name of a PEFT adapter; needs peft.
        adapters: More of them by name, each for the requests that name it (`Request.adapter`).
        quantize: "4bit" or "8bit"; needs bitsandbytes.
        chat_template: A Jinja file that replaces the tokenizer's chat template.
        raw: Send prompts as they are, with no chat template (for base models).
        default_system: See `LanguageModel`.
        revision: A branch, tag or commit on the hub.
        trust_remote_code: Run code that comes with the checkpoint.
        packed_weights: See `trueline.models.packed`; None copies weights of at most 2 GiB.
        engine: "torch", or "vllm", which loads the weights itself and has `engine_options`.
        speculate: "lookup", or a smaller model of the same tokenizer; see `LanguageModel`.
        progress: Called as progress("loading NAME", 0 or 1, 1), and while a model is fetched.

    Raises `ConfigError` for an option out of range, `ModelError` for what is no model.
    """
    _check_kinds(revision, raw, trust_remote_code, adapters, speculate)
    target = _checked(name, dtype, device, device_map, adapter, quantize, chat_template)
    _check_engine(engine, engine_options, device, device_map, quantize, speculate)
    tell = progress or LOADING.get() or (lambda *_: None)
    tell(f"loading {name}", 0, 1)
    template = _read_template(chat_template)
    sources, folders = _adapter_folders(adapter, adapters)
    place = find_model(name, revision=revision, trust_remote_code=trust_remote_code, progress=tell)
    about: dict[str, Any] = {"name": str(name), "raw": raw, "default_system": default_system,
        "adapters": tuple(adapters or ()), "folder": place.folder, "adapter_folders": folders,
    }  # fmt: skip
    if engine != "torch":
        return _outline(place, target, dtype, template, engine, engine_options, about)
    model, tokenizer = _read(place, target, dtype, device_map, quantize, template)
    model = _equip(model, target, sources, folders, packed_weights, on=str(name))
    ahead = _draft(speculate, (dtype, device, packed_weights, trust_remote_code), progress)
    tell(f"loading {name}", 1, 1)
    return _check_mixing(LanguageModel(model, tokenizer, **about, speculate=ahead))


def _adapter_folders(
    one: str | Path | None, named: Mapping[str, str | Path] | None
) -> tuple[dict[str, str], dict[str, Path]]:
    """Return names and folders of adapters, each checked, by what they are called."""
    sources = ({} if one is None else {"default": str(one)}) | {
        called: str(source) for called, source in (named or {}).items()
    }
    folders = {called: find_adapter(source) for called, source in sources.items()}
    for folder in folders.values():
        check_adapter(folder)
    return sources, folders


def _equip(
    model: Any,
    target: torch.device,
    sources: Mapping[str, str],
    folders: Mapping[str, Path],
    packed: bool | None,
    on: str,
) -> Any:
    """Return the model with its adapters, and its fast products on a CPU."""
    for called, folder in folders.items():
        model = put_adapter(model, sources[called], folder, on=on, called=called)
    if packed is not False and target.type == "cpu":
        pack_weights(model, force=packed is True)
    return model


def _draft(speculate: Any, options: Sequence[Any], progress: Progress | None) -> Any:
    """Return how to decode ahead: a draft model loaded if it was given by name."""
    if speculate is None or isinstance(speculate, LanguageModel) or str(speculate) == LOOKUP:
        return speculate
    names = ("dtype", "device", "packed_weights", "trust_remote_code")
    own = dict(zip(names, options, strict=True))
    return load_model(speculate, raw=True, progress=progress, **own)


def _check_mixing(model: LanguageModel) -> LanguageModel:
    """Return it; `ModelError` for adapters of which PEFT cannot run several in one forward."""
    if not model.adapters:
        return model
    names = [BASE, *model.adapters]
    ids = torch.full((len(names), 1), model.pad_token_id, device=model.device)
    try:
        with torch.inference_mode():
            model.model(ids, **model.adapter_options(names))
    except (ValueError, TypeError) as error:
        raise ModelError(
            f'The adapters of model "{model.name}" cannot run side by side: {one_line(error)} Give '
            "plain LoRA adapters."
        ) from None
    return model


def _checked(
    name: object,
    dtype: str,
    device: str,
    device_map: object,
    adapter: object,
    quantize: object,
    chat_template: object,
) -> torch.device:
    """Return the device; raises `ConfigError` for an option that is out of range."""
    check_kind("dtype", dtype, str, "text")
    check_kind("device", device, str, "text")
    check_dtype(dtype)
    for option, value in {"name": name, "adapter": adapter, "chat_template": chat_template}.items():
        if not isinstance(value, (str, Path)) and (value is not None or option == "name"):
            raise ConfigError(f"The model's `{option}` must be a name or a path, got {value!r}.")
    if quantize not in (None, "4bit", "8bit"):
        raise ConfigError(f'`quantize` must be "4bit" or "8bit", got "{quantize}".')
    if device_map is not None and device != "auto":
        raise ConfigError("Give `device` or `device_map`, not both.")
    if adapter is not None:
        need("peft", "adapters", "adapter")
    return find_device(device)


def _check_kinds(
    revision: object, raw: object, trust: object, adapters: object, ahead: object
) -> None:
    """Raise `ConfigError` for options of another kind, and unless adapters come by name."""
    check_kind("speculate", ahead, (str, Path, LanguageModel, type(None)), "a name")
    check_kind("revision", revision, (str, type(None)), "text")
    check_flag("raw", raw)
    check_flag("trust_remote_code", trust)
    if adapters is None:
        return
    check_kind("adapters", adapters, Mapping, "adapters by name")
    for called, source in cast(Mapping[object, object], adapters).items():
        if not isinstance(called, str) or not ADAPTER_NAME.fullmatch(called) or called == "default":
            raise ConfigError(
                f"An adapter's name is letters, digits, dashes and underscores, and not "
                f'"default"; got {called!r}.'
            )
        if not isinstance(source, (str, Path)):
            raise ConfigError(f'Adapter "{called}" must be a name or a path, got {source!r}.')
    if adapters:
        need("peft", "adapters", "adapters")


def _read(
    place: Place,
    target: torch.device,
    dtype: str,
    device_map: Any,
    quantize: str | None,
    template: str | None,
) -> tuple[Any, Any]:
    """Return model and tokenizer, the model where it is to run."""
    config = read_config(place)
    tokenizer = read_tokenizer(place)
    if template is not None:
        tokenizer.chat_template = template
    options: dict[str, Any] = {"dtype": find_dtype(dtype, config, target)}
    if device_map is not None:
        need("accelerate", "device-map", "device_map")
        options["device_map"] = device_map
    if quantize:
        options |= _quantization(quantize, target)
    model = read_weights(place, config, "AutoModelForCausalLM", **options)
    if device_map is None and not quantize:
        model.to(target)
    return model, tokenizer


def _check_engine(engine: object, options: object, *of_torch: object) -> None:
    """Raise `ConfigError` for an engine that does not exist, and for options that are not its."""
    if engine not in ENGINES:
        raise ConfigError(f'Unknown engine "{engine}". Give {" or ".join(ENGINES)}.')
    check_kind("engine_options", options, (Mapping, type(None)), "a mapping from names to values")
    if engine == "torch":
        if options:
            raise ConfigError('`engine_options` are vLLM\'s. Give them with `engine="vllm"`.')
        return
    names = ("device", "device_map", "quantize", "speculate")
    for option, value in zip(names, of_torch, strict=True):
        if value not in (None, "auto"):
            raise ConfigError(
                f"`{option}` is PyTorch's. vLLM has options of its own: --engine-option NAME=VALUE "
                "(`engine_options=`)."
            )


def _outline(
    place: Place,
    target: torch.device,
    dtype: str,
    template: str | None,
    engine: str,
    options: Mapping[str, Any] | None,
    about: Mapping[str, Any],
) -> Weightless:
    """Return the model of an engine that loads the weights itself."""
    from transformers import GenerationConfig

    model, tokenizer = skeleton(place), read_tokenizer(place)
    model.to(find_dtype(dtype, model.config, target))
    if template is not None:
        tokenizer.chat_template = template
    with contextlib.suppress(OSError):  # it has none of its own
        model.generation_config = GenerationConfig.from_pretrained(place.path, **place.options())
    return Weightless(
        model, tokenizer, engine=engine, engine_options=options or {}, path=place.path, **about
    )


def _quantization(quantize: str, target: torch.device) -> dict[str, Any]:
    need("bitsandbytes", "quantize", f"quantize={quantize!r}")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=quantize == "4bit",
        load_in_8bit=quantize == "8bit",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": target}}


def need(package: str, extra: str, option: str) -> None:
    """Raise `ModelError` with the install command if `package` is missing."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ModelError(
            f"`{option}` needs the package {package}. Install it: pip install 'trueline[{extra}]'"
        )


def _read_template(chat_template: str | Path | None) -> str | None:
    if chat_template is None:
        return None
    from jinja2 import Environment
    from jinja2.exceptions import TemplateSyntaxError

    try:
        text = Path(chat_template).expanduser().read_text(encoding="utf-8")
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)
        )
        return text
    except TemplateSyntaxError as error:
        raise ConfigError(f"{chat_template}:{error.lineno}: no chat template: {error}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f'Cannot read chat template "{chat_template}": {error}.') from None
