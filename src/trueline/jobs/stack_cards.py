"""Model cards of a stream of tasks: of its folder, and of what `trueline export` makes of it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trueline.continual.files import Stream
    from trueline.continual.stream import StreamResult
    from trueline.jobs.exporting import ExportResults
    from trueline.train.adapters.stack import AdapterStack

CLASSES = {
    "causal": ("AutoModelForCausalLM", "text-generation"),
    "seq2seq": ("AutoModelForSeq2SeqLM", None),
    "classifier": ("AutoModelForSequenceClassification", "text-classification"),
}
"""How transformers loads each kind of model, and the hub's word for what it does."""
KINDS = {
    "ForSequenceClassification": "classifier",
    "ForConditionalGeneration": "seq2seq",
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
}
"""Ends of the classes' names."""


def run_card(command: str, stream: Stream, model: str, config: str, result: StreamResult) -> str:
    """Return the README.md of a stream's folder.

    Args:
        command: What was typed.
        stream: The tasks.
        model: The base as it was given.
        config: The settings as TOML.
        result: The scores.
    """
    from trueline.records.cards import model_card
    from trueline.records.manifest import read_json

    folder = result.folder
    about, kept = read_json(folder / "R.json"), read_json(folder / "manifest.json")
    kind, settings = about["kind"], kept["settings"]
    title = stream.title or folder.resolve().name
    words = [w for w in shlex.split(command) if w != "--resume"]
    one_lora = bool(result.adapters)
    use = usage(kind, model, "one" if one_lora else None, labels=about["labels"])
    if one_lora:
        use = f"# first: trueline export --adapters {shlex.quote(str(folder))} --to one\n{use}"
    return model_card(
        title=title,
        summary=f"{model}, trained on {len(result.tasks)} tasks ({', '.join(result.tasks)}) by the "
        f'strategy "{result.strategy}" of trueline train o-lora (O-LoRA: arXiv 2310.14152).',
        front=_front(model, kind, adapter=one_lora, strategy=result.strategy),
        use=use,
        notes=[_leaves(result), "A prompt:", f"```text\n{_example(stream, result)}\n```"],
        recipe={
            "base": f"{model}, hash {settings['model']}, {kind}, float32",
            "strategy": settings["strategy"],
            "tasks": ", ".join(result.tasks),
            "prompt": settings["prompt"],
            "measured on": f"{about['evaluate_on']} rows, scoring {about['scoring']}",
            "seed": about["seed"],
            **kept["facts"]["versions"],
            **_versions(),
        },
        command=shlex.join(words),
        config=config.strip(),
        results=result.measures,
        tables=_tables(stream, result, settings),
        curves=False,
    )


def export_card(
    command: str,
    done: ExportResults,
    stack: AdapterStack,
    model: str | None,
    streams: list[dict[str, Any]],
) -> str:
    """Return the README.md of one plain LoRA, or of merged weights.

    Args:
        command: What was typed.
        done: What was written.
        stack: The adapters in it.
        model: The base, as it was given or as the adapters name it.
        streams: The R.json of each stream that the adapters come from, by `folder`.
    """
    from trueline.evals.tables import markdown_table
    from trueline.records.cards import model_card
    from trueline.records.hashes import versions

    name, merged = done.folder.resolve().name, done.form == "merged"
    kind = kind_of_adapters(stack)
    labels = streams[-1]["labels"] if streams else []
    rows = [
        [str(i), str(a.folder), str(max(a.rank_of(m) for m in a.modules)), a.weights_hash()]
        for i, a in enumerate(stack.adapters, 1)
    ]
    of = f"{done.tasks} adapters" if done.tasks > 1 else "one adapter"
    base = "the base" if model is None else Path(model).name if is_bundled(model) else model
    results = {
        f"{stream['strategy']}, {key.replace('_', ' ')}": value
        for stream in streams
        for key, value in stream["measures"].items()
    }
    return model_card(
        title=name,
        summary=f"{of.capitalize()} on {base}, merged into its weights."
        if merged
        else f"{of.capitalize()} on {base} as one plain LoRA of rank {done.rank}.",
        front=_front(model, kind, adapter=not merged),
        use=usage(
            kind, None if merged else base, name, labels=labels, merged=merged, whole=done.tokenizer
        ),
        notes=[str(done)],
        recipe={
            "base": base,
            **{f"stream {i}": ", ".join(s["tasks"]) for i, s in enumerate(streams, 1)},
            **versions(),
            **_versions(),
        },
        command=command,
        config="",
        results=results,
        tables=markdown_table((["", "adapter", "rank", "SHA-256 of its weights"], rows)),
        curves=False,
    )


def kind_of_adapters(stack: AdapterStack) -> str:
    """Return the kind of model that the adapters were trained on; causal where they do not say."""
    config = stack.adapters[-1].config
    owner = str((config.get("auto_mapping") or {}).get("base_model_class") or "")
    if config.get("task_type") == "SEQ_2_SEQ_LM":
        return "seq2seq"
    return next((kind for end, kind in KINDS.items() if owner.endswith(end)), "causal")


def usage(
    kind: str,
    base: str | None,
    name: str | None,
    *,
    labels: list[str],
    merged: bool = False,
    whole: bool = False,
) -> str:
    """Return Python that loads the result with transformers and PEFT alone.

    Args:
        kind: A key of `CLASSES`.
        base: The base model; not needed for `merged`.
        name: Folder of the adapter or of the merged model; None where a strategy leaves neither.
        labels: Of a classifier.
        merged: Whether the folder holds a whole model.
        whole: Whether it holds the tokenizer.
    """
    cls = CLASSES[kind][0]
    source = json.dumps(name if merged else base)
    lines = [f"from transformers import AutoTokenizer, {cls}"]
    if base is not None and is_bundled(base):
        source = 'str(files("trueline") / "assets/tiny")'
        lines.insert(0, "from importlib.resources import files")
    if not merged and name is not None:
        lines.insert(len(lines) - 1, "from peft import PeftModel")
    head = ""
    if kind == "classifier" and labels and not merged:
        lines += ["", f"labels = {json.dumps(labels, ensure_ascii=False)}"]
        head = ", id2label=dict(enumerate(labels)), ignore_mismatched_sizes=True"
    lines += [
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name) if whole else source})",
        f"model = {cls}.from_pretrained({source}{head})",
    ]
    if not merged and name is not None:
        lines.append(f"model = PeftModel.from_pretrained(model, {json.dumps(name)})")
    return "\n".join(lines)


def is_bundled(model: str) -> bool:
    """Return whether this is the bundled model, by its name or by the folder it lies in."""
    from importlib import resources

    from trueline.models.places import BUNDLED

    assets = Path(str(resources.files("trueline"))) / "assets"
    return model in BUNDLED or any(Path(model) == assets / name for name in BUNDLED)


def _front(model: str | None, kind: str, *, adapter: bool, strategy: str = "") -> dict[str, Any]:
    """Return the metadata of the hub; a folder of this machine is no name there."""
    on_hub = model is not None and model.count("/") == 1 and not Path(model).exists()
    return {
        "base_model": model if on_hub else None,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": CLASSES[kind][1],
        "tags": ["trueline", "continual-learning", *([strategy] if strategy else [])],
    }


def _leaves(result: StreamResult) -> str:
    """Return what the folder holds of the trained weights."""
    if len(result.adapters) > 1:
        return (
            f"Each of the {len(result.adapters)} adapters in `stages/` was trained on top of those "
            "before it: they belong together. `trueline export` makes one plain LoRA of them, with "
            "`--form merged` a model."
        )
    if result.adapters:
        return "One LoRA holds all tasks. `--form merged` makes a model of it."
    if any((result.folder / "stages").glob("*/weights.pt")):
        return (
            "All weights were trained. They are the state of the model, `weights.pt` of the last "
            "stage: `model.load_state_dict(torch.load(FILE, weights_only=True))`."
        )
    return (
        "Each task has an adapter of its own on the untouched base: "
        "`PeftModel.from_pretrained(model, STAGE)` with the `adapter` folder of the task's stage."
    )


def _example(stream: Stream, result: StreamResult) -> str:
    task = stream.tasks[0]
    return stream.prompt.text(task, "SENTENCE")


def _tables(stream: Stream, result: StreamResult, settings: dict[str, Any]) -> str:
    """Return R, its pictures, and the tasks."""
    import math

    from trueline.evals.tables import markdown_table

    def cells(row: Any) -> list[str]:
        return ["" if math.isnan(value) else f"{value:.3f}" for value in row]

    names = result.tasks if len(result.R) == len(result.tasks) else ["all"] * len(result.R)
    scores = [["untouched", *cells(result.untouched)]]
    scores += [[name, *cells(row)] for name, row in zip(names, result.R, strict=True)]
    tasks = [
        [
            t.name,
            str(len(t.train)),
            ", ".join(t.labels),
            t.instruction,
            ", ".join(f"{k} {v}" for k, v in kept["settings"].items() if v is not None),
            kept["data"],
        ]
        for t, kept in zip(stream.tasks, settings["tasks"], strict=True)
    ]
    header = ["task", "training rows", "labels", "instruction", "of its own", "hash"]
    pictures = [
        f"![{words}]({name})"
        for name, words in (("R.png", "R as a heat map"), ("time.png", "Each task over time"))
        if (result.folder / name).exists()
    ]
    return "\n\n".join(
        [
            "Accuracy on each task (columns) after training on each (rows), `R.json`:",
            markdown_table((["after", *result.tasks], scores)),
            *pictures,
            "Loss and penalties of the logged steps are in `log.jsonl`.",
            "## Tasks",
            markdown_table((header, tasks)),
        ]
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"peft": version("peft")}
