"""Names of models and adapters to places; whether a hub is there is asked in `reachable` alone.

    "tiny"        the bundled model
    a folder      itself
    OWNER/NAME    the hub; its cache on this machine where the hub cannot be reached

Asked in vain, the hub's own client retries for half a minute; `reachable` finds out in a moment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from trueline.errors import ConfigError, DataError, ModelError

BUNDLED = ("tiny",)
"""Models that come with the package."""
PATIENCE = 3.0
"""Seconds that the hub's host has to answer."""


@dataclass(frozen=True)
class Place:
    """Where a checkpoint comes from, and whether its code may run."""

    name: str
    """As it was given."""
    path: str
    """A folder, or a name on the hub."""
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def folder(self) -> Path | None:
        """The folder on this machine; None for a name on the hub."""
        path = Path(self.path)
        return path if path.is_dir() else None

    def options(self) -> dict[str, Any]:
        """Return what every `from_pretrained` of transformers is told: no prompt, no waiting."""
        told: dict[str, Any] = {
            "revision": self.revision,
            # Never None, at which transformers asks on the terminal.
            "trust_remote_code": self.trust_remote_code,
        }
        if self.folder is None and not reachable():
            told["local_files_only"] = True
        return told


def find_model(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> Place:
    """Return where the model of this name is; raises `ModelError` for a folder without one."""
    return Place(str(name), _place(name), revision, trust_remote_code)


def _place(name: str | Path) -> str:
    if bundled := bundled_folder(name):
        return str(bundled)
    path = Path(name).expanduser()
    if _is_dir(path):
        if not (path / "config.json").is_file():
            raise ModelError(f'Folder "{name}" holds no model: it has no config.json.')
        return str(path)
    if looks_local(name) or path.exists():
        raise ModelError(f'No model folder at "{name}". Give a folder with config.json.')
    check_hub_name(name)
    return str(name)


def bundled_folder(name: str | Path) -> Path | None:
    """Return the folder of a model that comes with the package; None for all others."""
    if str(name) not in BUNDLED:
        return None
    return Path(str(resources.files("trueline"))) / "assets" / str(name)


def model_folder(name: str | Path) -> Path | None:
    """Return the folder of a model on this machine, bundled ones too; None for a hub name."""
    folder = bundled_folder(name) or Path(name).expanduser()
    return folder if _is_dir(folder) else None


def looks_local(name: str | Path) -> bool:
    """Return whether this must be meant as a folder: a hub name is OWNER/NAME or NAME."""
    path = Path(name)
    return path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1


def check_hub_name(name: str | Path) -> None:
    """Raise `ConfigError` for what the hub cannot have as a name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(str(name))
    except HFValidationError:
        raise ConfigError(
            f'"{name}" is neither a folder nor a name on the hub (OWNER/NAME). Check its spelling.'
        ) from None


@cache
def reachable() -> bool:
    """Return whether the hub answers, through a proxy if there is one; asked once a process."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=PATIENCE)
    except (httpx.HTTPError, OSError, ValueError):
        return False
    return True


def download_adapter(name: str) -> Path:
    """Return the folder of an adapter on the hub: its configuration and weights, fetched if needed.

    Raises `ModelError` where the hub has none, or cannot be reached and the cache has no copy.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    check_hub_name(name)
    there = reachable()
    wanted = ["adapter_config.json", "adapter_model.*"]
    try:
        folder = snapshot_download(name, allow_patterns=wanted, local_files_only=not there)
    except LocalEntryNotFoundError:
        raise ModelError(
            f'Cannot load adapter "{name}": no folder has this name, the hub cannot be reached and '
            "its cache on this machine has no copy. Give a folder."
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f'Cannot load adapter "{name}": {one_line(error)}') from None
    return Path(folder)


def load_dataset(name: str, config: str | None = None) -> Any:
    """Return a Hugging Face data set: of a folder, one that was saved to disk, or the hub.

    Raises:
        ConfigError: The package `datasets` is missing.
        DataError: No data set has this name, or neither hub nor cache can be had.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            "A Hugging Face data set needs the package datasets. Install it: pip install datasets"
        ) from None
    folder = Path(name).expanduser()
    try:
        if any((folder / f).is_file() for f in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(str(folder))
        if _is_dir(folder):
            return datasets.load_dataset(str(folder), config)
        check_hub_name(name)
        with _offline(datasets.config, not reachable()):
            return datasets.load_dataset(name, config)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(f'Data set "{name}" cannot be loaded: {one_line(error)}') from None


@contextlib.contextmanager
def _offline(config: Any, offline: bool) -> Iterator[None]:
    """Keep `datasets` and the hub's client from trying again and again what cannot be had."""
    from huggingface_hub import constants

    before = config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if offline:
        config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


def one_line(error: BaseException) -> str:
    """Return an error of another library as one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False
