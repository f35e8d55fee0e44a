"""What tells files, models and settings apart: short hashes of their content."""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.errors import DataError

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel

WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model")
"""Files of a model's folder that decide what it says."""


def digest(content: Any) -> str:
    """Return a short hash of anything that JSON can hold; the order of keys plays no part."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file; `DataError` where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None


def folder_hash(folder: str | Path) -> str:
    """Return one hash of the files in a model's or adapter's folder."""
    paths = sorted({p for pattern in WEIGHTS for p in Path(folder).glob(pattern)})
    return digest([[p.name, file_hash(p)] for p in paths if p.name != "held_out.json"])


def model_folder(name: str) -> Path | None:
    """Return the folder of a model's files; None for a name on the hub."""
    bundled = Path(str(resources.files("trueline"))) / "assets" / name
    if Path(name).name == name and (bundled / "config.json").is_file():
        return bundled
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else None


def model_hash(model: LanguageModel, folder: str | Path | None = None) -> str:
    """Return what tells the weights: a hash of the folder's files, or the hub's commit.

    Where there is neither (a model made in memory) it is a hash of the parameters.
    """
    if folder is not None and Path(folder).is_dir():
        return folder_hash(folder)
    if commit := getattr(model.model.config, "_commit_hash", None):
        return f"commit {commit}"
    total = hashlib.sha256()
    for name, tensor in sorted(model.model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().float().cpu().numpy().tobytes())
    return total.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions that a number may depend on."""
    import torch
    import transformers

    from trueline import __version__

    return {
        "trueline": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
