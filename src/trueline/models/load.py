"""Models: a checkpoint, its tokenizer and adapter as one `LanguageModel`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from trueline.errors import ConfigError, ModelError, check_flag, check_kind
from trueline.models.adapter import BASE, check_adapter, find_adapter, put_adapter
from trueline.models.checkpoint import read_config, read_tokenizer, read_weights
from trueline.models.device import check_dtype, find_device, find_dtype
from trueline.models.hub import LOADING, Place, one_line
from trueline.models.packed import pack_weights
from trueline.models.places import find_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from trueline.types import Progress

ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""What an adapter may be called; PEFT's names of modules take no dots."""


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer: what every other module of Trueline works on.

    Made by `load_model`, or from objects you already have: `LanguageModel(model, tokenizer)`.
    Raises `ModelError` for models that no branched decoding fits (encoder-decoder, recurrent).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str = "model"
    raw: bool = False
    """Send prompts as they are, with no chat template."""
    default_system: bool = True
    """Keep the system text that the template puts in where a chat has none; off, it is empty."""
    adapters: tuple[str, ...] = ()
    """Names of adapters for requests that ask for them; for others they are off."""
    folder: Path | None = field(default=None, repr=False)
    """Where its files are; None on the hub, or where it was made in memory."""
    adapter_folders: dict[str, Path] = field(default_factory=dict, repr=False)
    """Where the files of its adapters are, in the hub's cache too; "default" is `adapter`'s."""
    _default_system: str | None = field(default=None, repr=False)
    _folds_system: bool | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        config = self.model.config
        kind = getattr(config, "model_type", type(self.model).__name__)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f'Model "{self.name}" ({kind}) is an encoder-decoder. Give a causal language model.'
            )
        if odd := _odd_layers(self.model, self.text_config):
            raise ModelError(
                f'Model "{self.name}" ({kind}) has {odd}, which left padding and branches of '
                "unequal length would corrupt. Give a model with full or sliding-window attention."
            )
        self.model.eval()

    @property
    def text_config(self) -> Any:
        """The configuration of the language model itself, also inside a multimodal one."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        """Where the input embeddings live."""
        device: torch.device = self.model.get_input_embeddings().weight.device  # type: ignore[assignment]
        return device

    @property
    def max_positions(self) -> int | None:
        """The most tokens a row may have, prompt and completion; None if there is no limit."""
        config = self.text_config
        for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
            if isinstance(limit := getattr(config, name, None), int) and limit > 0:
                return limit
        return None

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text, from the generation config and the tokenizer."""
        found: set[int] = set()
        generation = getattr(self.model, "generation_config", None)
        for source in (getattr(generation, "eos_token_id", None), self.tokenizer.eos_token_id):
            if source is not None:
                found.update(source if isinstance(source, (list, tuple)) else [source])
        return frozenset(found)

    @property
    def pad_token_id(self) -> int:
        """A token for padded places; it is never attended to."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    @property
    def has_adapter(self) -> bool:
        """Whether a PEFT adapter is active."""
        return hasattr(self.model, "peft_config")

    @property
    def adapter(self) -> str:
        """What PEFT calls the adapter of requests that name none; `BASE` is none at all."""
        return BASE if self._active in self.adapters else self._active

    def adapter_options(self, names: Sequence[str]) -> dict[str, Any]:
        """Return what a forward is to be told so that each row has its adapter on."""
        if set(names) <= {self._active}:
            return {}
        return {"adapter_names": list(names)}

    @property
    def _active(self) -> str:
        """What PEFT calls the adapter that a plain forward runs."""
        if not self.has_adapter:
            return BASE
        active = getattr(self.model, "active_adapter", None)
        return active if isinstance(active, str) else "default"

    @cached_property
    def forward_names(self) -> frozenset[str]:
        """Names of the arguments that the model's forward takes."""
        base: Any = self.model.get_base_model() if self.has_adapter else self.model  # type: ignore[operator]
        return frozenset(inspect.signature(base.forward).parameters)

    @property
    def cache_name(self) -> str:
        """What the model's forward calls its cache."""
        return cache_name(self.forward_names)


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
    progress: Progress | None = None,
) -> LanguageModel:
    """Load a causal language model from a folder, the hub, a GGUF file or the package.

    Args:
        name: A folder, a hub name, a GGUF file, "tiny" (bundled) or "smollm2" (fetched once).
        dtype: "auto" is the checkpoint's own; on a CPU float32 for float16, and for bfloat16 where
            the processor has no such instructions. Or "float32", "bfloat16", "float16".
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
        packed_weights: On a CPU, multiply in the way that is measured to be fastest on this machine
            (`trueline.models.products`), with a second copy of the weights where that pays. None
            makes copies only if they take at most 2 GiB; False leaves all to torch.
        progress: Called as progress("loading NAME", 0 or 1, 1), and while a model is fetched.

    Raises `ConfigError` for an option that is out of range, `ModelError` for a name without a
    model, and for one that cannot be used.
    """
    _check_kinds(revision, raw, trust_remote_code)
    target = _checked(name, dtype, device, device_map, adapter, quantize, chat_template)
    _check_names(adapters)
    tell = progress or LOADING.get() or (lambda *_: None)
    tell(f"loading {name}", 0, 1)
    template = _read_template(chat_template)
    sources = ({} if adapter is None else {"default": adapter}) | dict(adapters or {})
    folders = _adapter_folders(sources)
    place = find_model(name, revision=revision, trust_remote_code=trust_remote_code, progress=tell)
    model, tokenizer = _read(place, target, dtype, device_map, quantize, template)
    for called, folder in folders.items():
        model = put_adapter(model, str(sources[called]), folder, on=str(name), called=called)
    if packed_weights is not False and target.type == "cpu":
        pack_weights(model, force=packed_weights is True)
    tell(f"loading {name}", 1, 1)
    return _check_mixing(LanguageModel(
        model, tokenizer, str(name), raw, default_system=default_system,
        adapters=tuple(adapters or ()), folder=place.folder, adapter_folders=folders,
    ))  # fmt: skip


def _adapter_folders(sources: Mapping[str, str | Path]) -> dict[str, Path]:
    """Return the folders of adapters, each checked, by what they are called."""
    folders = {called: find_adapter(source) for called, source in sources.items()}
    for folder in folders.values():
        check_adapter(folder)
    return folders


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


def _check_kinds(revision: object, raw: object, trust_remote_code: object) -> None:
    check_kind("revision", revision, (str, type(None)), "text")
    check_flag("raw", raw)
    check_flag("trust_remote_code", trust_remote_code)


def _check_names(adapters: object) -> None:
    """Raise `ConfigError` unless these are adapters by name."""
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


def _odd_layers(model: Any, text_config: Any) -> str:
    """Return what kinds of layers a model has besides attention over all or the last tokens."""
    kinds = set(getattr(text_config, "layer_types", None) or ())
    if odd := sorted(kinds - {"full_attention", "sliding_attention"}):
        return f"{', '.join(odd)} layers"
    recurrent = getattr(model, "_is_stateful", False) or "mamba" in text_config.model_type
    return "a recurrent state" if recurrent else ""


def cache_name(forward_names: Collection[str]) -> str:
    """Return what a forward with these arguments calls its cache, and so its outputs do."""
    return "cache" if "cache" in forward_names else "past_key_values"
