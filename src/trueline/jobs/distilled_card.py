"""What is written of a distilled model at the end: its numbers, curves and card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trueline.jobs.distil_config import DistilConfig
from trueline.records.cards import model_card
from trueline.records.run_folder import RunFolder
from trueline.settings.reader import write_toml
from trueline.train.card import rank_note
from trueline.train.curves import draw_curves
from trueline.train.progress import LOG

PANELS = {
    "loss": "loss",
    "kl_to_teacher": "KL to the teacher (nats a token)",
    "kl_to_reference": "KL to the start (nats a token)",
    "reward": "reward (mean of a token)",
    "entropy": "entropy (nats)",
    "completion_length": "response length (tokens)",
    "adherence": "principle followed",
    "over_refusal": "harmless requests refused",
    "harmful_refusal": "harmful requests refused",
    "tokens_per_second": "tokens per second",
}
"""What curves.png shows, of that which was logged."""
FACTS = {
    "effect": "teacher's effect at the start, nats a token",
    "warning": "warning",
    "over_budget": "stopped by kl_budget, at a KL to the start of",
}
LAST = 10
"""The results are means over so many logged steps at the end."""


def write_card(
    config: DistilConfig, values: Mapping[str, Any], folder: RunFolder, rows: int
) -> None:
    """Sum up the log, draw it, and write the card and the results."""
    log = [row for _, _, row in folder.lines(LOG).rows()]
    results = summary(log, folder.facts)
    name = folder.folder.resolve().name
    what = "all weights" if config.full else "a merged LoRA" if config.merge else "a LoRA"
    if config.after:
        what = f"a LoRA, with the {len(folder.settings['after'])} before it"
    taught = values.get("principle") or "the principles of its prompts"
    base = folder.settings["base"]
    note = use_note(config, folder.folder)
    card = model_card(
        title=name,
        summary=f"{config.model} ({what}), trained by Inverse-Q* (arXiv 2408.14874) to answer as "
        f'the decoding method "{values.get("teacher")}" does for: {taught}',
        front={
            "base_model": config.model if "/" in config.model else None,
            "library_name": "transformers" if config.full or config.merge else "peft",
            "pipeline_tag": "text-generation",
            "tags": ["trueline", "inverse-q"],
        },
        use=usage(name, config),
        notes=[note] if note else [],
        recipe={
            "base": f"{base['name']}, hash {base['hash']}, {base['dtype']} on {base['device']}",
            "prompts": f"{rows} rows, SHA-256 {folder.settings['data']['hash'][:16]}",
            "seed": values["seed"],
            **folder.settings["versions"],
        },
        command=folder.command,
        config=write_toml(values).strip(),
        results=results,
    )
    if (figure := draw_curves(log, PANELS, name)) is not None:
        folder.draw("curves.png", figure)
    folder.write("README.md", card)
    folder.finish(results)


def summary(log: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """Return the run's numbers: means over the last logged steps, and the last evaluation."""
    steps = [row for row in log if "loss" in row]
    found: dict[str, Any] = {
        "steps": log[-1]["step"],
        "seconds": round(log[-1]["seconds"], 1),
    }
    for name, words in FACTS.items():
        if name in facts:
            found[words] = facts[name]
    for name in PANELS:
        values = [row[name] for row in steps[-LAST:] if row.get(name) is not None]
        if values:
            found[f"{name}, mean of the last {len(values)} logged"] = sum(values) / len(values)
    for name in PANELS:
        held_out = [row[f"eval_{name}"] for row in log if row.get(f"eval_{name}") is not None]
        if held_out:
            found[f"{name}, held-out, at the start"] = held_out[0]
            found[f"{name}, held-out, at the end"] = held_out[-1]
    return found


def use_note(config: DistilConfig, folder: Path) -> str:
    """Return what vLLM has to be told; empty for whole weights."""
    if config.full or config.merge:
        return ""
    found = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return rank_note(int(found["r"]))


def usage(name: str, config: DistilConfig) -> str:
    """Return Python that loads the result with transformers and PEFT alone."""

    base = (
        f'"{config.model}"' if config.model != "tiny" else 'str(files("trueline") / "assets/tiny")'
    )
    whole = config.full or config.merge
    lines = [
        *(
            ["from importlib.resources import files"]
            if config.model == "tiny" and not whole
            else []
        ),
        *(["from peft import PeftModel"] if not whole else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ]
    if whole:
        lines.append(f'model = AutoModelForCausalLM.from_pretrained("{name}")')
    else:
        lines += [
            f"model = AutoModelForCausalLM.from_pretrained({base})",
            f'model = PeftModel.from_pretrained(model, "{name}")',
        ]
    return "\n".join(lines)
