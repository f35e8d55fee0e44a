"""Models: load a checkpoint, its tokenizer and adapters. Device and dtype are decided here only."""

from __future__ import annotations

import contextlib
import inspect
import logging
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from trueline.errors import ConfigError, ModelError, suggestion
from trueline.models.packed import pack_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUNDLED = ("tiny",)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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

    @cached_property
    def forward_names(self) -> frozenset[str]:
        """Names of the arguments that the model's forward takes."""
        base: Any = self.model.get_base_model() if self.has_adapter else self.model  # type: ignore[operator]
        return frozenset(inspect.signature(base.forward).parameters)


def load_model(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    adapter: str | Path | None = None,
    quantize: Literal["4bit", "8bit"] | None = None,
    chat_template: str | Path | None = None,
    raw: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    packed_weights: bool | None = None,
) -> LanguageModel:
    """Load a causal language model from a folder, the hub, or the package (`"tiny"`).

    Args:
        name: A folder, a hub name, or "tiny".
        dtype: "auto", "float32", "bfloat16" or "float16". "auto" is the checkpoint's own, but on a
            CPU float16 becomes float32, and bfloat16 becomes float32 where the processor has no
            bfloat16 instructions.
        device: "auto" (CUDA, then MPS, then CPU), or a torch device. Not with `device_map`.
        device_map: Passed to transformers, e.g. "auto" to spread over several devices; needs
            accelerate.
        adapter: Folder or hub name of a PEFT adapter; needs peft.
        quantize: "4bit" or "8bit"; needs bitsandbytes.
        chat_template: A Jinja file that replaces the tokenizer's chat template.
        raw: Send prompts as they are, with no chat template (for base models).
        revision: A branch, tag or commit on the hub.
        trust_remote_code: Run code that comes with the checkpoint.
        packed_weights: On a CPU, keep a second copy of the weights in a layout that multiplies a
            few rows up to twice as fast (`trueline.models.packed`). None does so if the copy takes
            no more than 2 GiB; off leaves torch's own product.

    Raises:
        ConfigError: An option is out of range.
        ModelError: No model at `name`, or one that cannot be used.

    >>> model = load_model("tiny")
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f'Unknown dtype "{dtype}".{suggestion(dtype, ["auto", *DTYPES])}')
    if quantize not in (None, "4bit", "8bit"):
        raise ConfigError(f'`quantize` must be "4bit" or "8bit", got "{quantize}".')
    if device_map is not None and device != "auto":
        raise ConfigError("Give `device` or `device_map`, not both.")
    template = _read_template(chat_template)
    adapter_source = None if adapter is None else _adapter_source(adapter)
    path = _resolve(name)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    if not Path(path).is_dir() and not _hub_resolves():
        # Asked in vain, the hub's client retries for most of a minute.
        hub["local_files_only"] = True
    tokenizer = _from_pretrained("AutoTokenizer", name, path, hub)
    if template is not None:
        tokenizer.chat_template = template
    config = _from_pretrained("AutoConfig", name, path, hub)
    target = _device(device)
    options: dict[str, Any] = {"dtype": _dtype(dtype, config, target)}
    if device_map is not None:
        _need("accelerate", "device-map", "device_map")
        options["device_map"] = device_map
    if quantize:
        options |= _quantization(quantize, target)
    model = _from_pretrained("AutoModelForCausalLM", name, path, hub | {"config": config} | options)
    if device_map is None and not quantize:
        model.to(target)
    if adapter_source is not None:
        model = _with_adapter(model, adapter_source)
    if packed_weights is not False and target.type == "cpu":
        pack_weights(model, force=packed_weights is True)
    return LanguageModel(model, tokenizer, str(name), raw)


def _resolve(name: str | Path) -> str:
    """Return the folder of a bundled model, an existing folder, or the hub name as it is."""
    if str(name) in BUNDLED:
        return str(resources.files("trueline") / "assets" / str(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f'Folder "{name}" holds no model: it has no config.json.')
        return str(path)
    if path.exists() or _looks_local(name):
        raise ModelError(f'No model folder at "{name}". Give a folder with config.json.')
    return str(name)


def _looks_local(name: str | Path) -> bool:
    """Return whether this must be meant as a folder: a hub name is OWNER/NAME or NAME."""
    path = Path(name)
    return path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1


def _hub_resolves() -> bool:
    """Return whether the hub's host has an address; a proxy is trusted to know it."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return False
    return True


def _from_pretrained(kind: str, name: str | Path, path: str, options: dict[str, Any]) -> Any:
    """Call transformers' loader; turn its errors about the checkpoint into `ModelError`."""
    import transformers

    with _quiet():
        try:
            return getattr(transformers, kind).from_pretrained(path, **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f'Cannot load "{name}": {reason} Give "tiny", a model folder, or a hub name that '
                "can be reached."
            ) from error


@contextlib.contextmanager
def _quiet() -> Any:
    """Hold back transformers' progress bars and advice while a checkpoint loads."""
    from transformers.utils import logging as transformers_logging

    level, bars = logging.getLogger("transformers").level, transformers_logging
    shown = bars.is_progress_bar_enabled()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    bars.disable_progress_bar()
    try:
        yield
    finally:
        logging.getLogger("transformers").setLevel(level)
        if shown:
            bars.enable_progress_bar()


def _device(device: str) -> torch.device:
    if device != "auto":
        try:
            target = torch.device(device)
        except RuntimeError:
            raise ConfigError(
                f'Unknown device "{device}". Give auto, cpu, cuda, cuda:0 or mps.'
            ) from None
        available: dict[str, Any] = {
            "cuda": torch.cuda.is_available,
            "mps": torch.backends.mps.is_available,
        }
        if target.type in available and not available[target.type]():
            raise ConfigError(f'Device "{device}" is not available on this machine.')
        return target
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def native_bfloat16() -> bool:
    """Return whether this CPU computes in bfloat16 natively (AVX-512 BF16 or AMX)."""
    probe: Any = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = probe()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _dtype(dtype: str, config: Any, target: torch.device) -> torch.dtype:
    if dtype != "auto":
        return DTYPES[dtype]
    text_config = config.get_text_config(decoder=True)
    own = getattr(text_config, "dtype", None) or getattr(config, "dtype", None) or torch.float32
    if isinstance(own, str):
        own = DTYPES.get(own, torch.float32)
    if target.type != "cpu" or own == torch.float32:
        return own
    return own if own == torch.bfloat16 and native_bfloat16() else torch.float32


def _quantization(quantize: str, target: torch.device) -> dict[str, Any]:
    _need("bitsandbytes", "quantize", f"quantize={quantize!r}")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=quantize == "4bit",
        load_in_8bit=quantize == "8bit",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": target}}


def _adapter_source(adapter: str | Path) -> str:
    """Return the adapter's folder or hub name, before the model is loaded for nothing."""
    _need("peft", "adapters", "adapter")
    path = Path(adapter).expanduser()
    if path.is_dir() and not (path / "adapter_config.json").is_file():
        raise ModelError(f'Folder "{adapter}" holds no adapter: it has no adapter_config.json.')
    if path.is_dir():
        return str(path)
    if _looks_local(adapter):
        raise ModelError(f'No adapter folder at "{adapter}". Give a folder or a hub name.')
    if not _hub_resolves():
        from huggingface_hub import try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(str(adapter), "adapter_config.json"), str):
            raise ModelError(
                f'Cannot load adapter "{adapter}": the hub cannot be reached and its cache on this '
                "machine has no copy. Give a folder."
            )
    return str(adapter)


def _with_adapter(model: Any, source: str) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, source)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f'Cannot load adapter "{source}": {reason}') from error


def _need(package: str, extra: str, option: str) -> None:
    """Raise `ModelError` with the install command if `package` is missing."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ModelError(
            f"`{option}` needs the package {package}. Install it: pip install 'trueline[{extra}]'"
        )


def _read_template(chat_template: str | Path | None) -> str | None:
    if chat_template is None:
        return None
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f'Cannot read chat template "{chat_template}": {error}.') from None


def _odd_layers(model: Any, text_config: Any) -> str:
    """Return what kinds of layers a model has besides attention over all or the last tokens."""
    kinds = set(getattr(text_config, "layer_types", None) or ())
    if odd := sorted(kinds - {"full_attention", "sliding_attention"}):
        return f"{', '.join(odd)} layers"
    recurrent = getattr(model, "_is_stateful", False) or "mamba" in text_config.model_type
    return "a recurrent state" if recurrent else ""
