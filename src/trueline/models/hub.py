"""Where checkpoints come from, and what the hub has: whether it is there is asked in one place.

Asked in vain, the hub's own client retries for half a minute; `reachable` finds out in a moment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trueline.errors import ConfigError, DataError, ModelError
from trueline.types import Progress

LOADING: ContextVar[Progress | None] = ContextVar("LOADING", default=None)
"""Told what is under way while a model loads, unless the caller names a `progress`."""
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
        if is_dir(folder):
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


def is_dir(path: Path) -> bool:
    """Return whether this is a folder; a name that no file can have is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False
