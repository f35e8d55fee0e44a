"""Model cards: the README.md of trained weights, with the metadata that the hub reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def model_card(
    *,
    title: str,
    summary: str,
    front: Mapping[str, Any],
    use: str,
    recipe: Mapping[str, Any],
    config: str,
    results: Mapping[str, Any],
    command: str,
    notes: Sequence[str] = (),
    tables: str = "",
    curves: bool = True,
) -> str:
    """Return the README.md of trained weights.

    Args:
        title: Name of the model.
        summary: What it is, in a sentence or two.
        front: Metadata of the hub: base_model, library_name, tags ...
        use: Python that loads it with no Trueline.
        recipe: What it was made from and how: base and its hash, data, versions, seed.
        config: The settings as TOML; empty where the command says all.
        results: Numbers at the end.
        command: What was typed.
        notes: Sentences on use and limits.
        tables: Markdown that follows the results.
        curves: Whether curves.png is there.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("trueline", "assets"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = _cell
    return environment.get_template("card.md.jinja").render(
        title=title, summary=summary, use=use, recipe=recipe, config=config, results=results,
        command=command, notes=notes, tables=tables, curves=curves,
        front=metadata(front),
    )  # fmt: skip


def metadata(front: Mapping[str, Any]) -> str:
    """Return the head of a card as YAML; the hub's own words, those without a value left out."""
    from huggingface_hub import ModelCardData

    return str(ModelCardData(**{k: v for k, v in front.items() if v}).to_yaml()).strip()


def _cell(value: Any) -> str:
    """Return a value for a cell of a Markdown table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join(text.split()).replace("|", "\\|")
