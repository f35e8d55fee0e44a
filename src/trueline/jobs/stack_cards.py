"""Model cards of a stack of adapters: of a stream's folder, and of what is exported of it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trueline.jobs.exporting import ExportResults
    from trueline.jobs.stacking import StackConfig, StackResults
    from trueline.records.run_folder import RunFolder
    from trueline.train.adapters.stack import AdapterStack
    from trueline.train.tasks.stream_files import Stream

CLASSES = {
    "causal": ("AutoModelForCausalLM", "text-generation"),
    "seq2seq": ("AutoModelForSeq2SeqLM", None),
    "classifier": ("AutoModelForSequenceClassification", "text-classification"),
}
"""How transformers loads each family of models, and the hub's word for what it does."""
FAMILIES = {
    "ForSequenceClassification": "classifier",
    "ForConditionalGeneration": "seq2seq",
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
}
"""Ends of the classes' names."""


def run_card(stream: Stream, config: StackConfig, results: StackResults, run: RunFolder) -> str:
    """Return the README.md of a stream's folder.

    Args:
        stream: The tasks.
        config: What was trained, and how.
        results: The scores.
        run: The folder.
    """
    from trueline.records.cards import model_card
    from trueline.records.hashes import versions

    about, settings, folder = results.about, run.settings, results.folder
    family = about["family"]
    words = [w for w in shlex.split(run.command) if w != "--resume"]
    asked = {"prompt": about["asked"], "chat": about["chat"]}
    use = usage(family, config.model, "one", labels=about["labels"], **asked)
    return model_card(
        title=stream.title or folder.resolve().name,
        summary=f"{config.model}, trained on {len(results.tasks)} tasks "
        f"({', '.join(results.tasks)}) one after the other; what came before was kept by "
        f'"{config.keep}".',
        front=_front(config.model, family, adapter=True, keep=config.keep),
        use=f"# first: trueline export --adapters {shlex.quote(str(folder))} --to one\n{use}",
        notes=[_leaves(results)],
        recipe={
            "base": f"{config.model}, hash {settings['model']}, {family}, float32",
            "keep": settings["strategy"],
            "tasks": ", ".join(results.tasks),
            "prompt": settings["prompt"],
            "measured on": f"{about['evaluate_on']} rows, scoring {about['scoring']}",
            "seed": about["seed"],
            **versions(),
            **_versions(),
        },
        command=shlex.join(words),
        config=config.as_toml().strip(),
        results=results.measures,
        tables=_tables(stream, results, settings),
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
    family = family_of_adapters(stack)
    last = streams[-1] if streams else {}
    labels = last.get("labels", [])
    rows = [
        [str(i), str(a.folder), str(max(a.rank_of(m) for m in a.modules)), a.weights_hash()]
        for i, a in enumerate(stack.adapters, 1)
    ]
    of = f"{done.tasks} adapters" if done.tasks > 1 else "one adapter"
    base = "the base" if model is None else Path(model).name if is_bundled(model) else model
    of = f"{of.capitalize()} on {base}"
    recipe = {f"stream {i}": ", ".join(s["tasks"]) for i, s in enumerate(streams, 1)}
    return model_card(
        title=name,
        summary=f"{of}, merged into its weights."
        if merged
        else f"{of} as one plain LoRA of rank {done.rank}.",
        front=_front(model, family, adapter=not merged),
        use=usage(
            family,
            None if merged else base,
            name,
            labels=labels,
            merged=merged,
            whole=done.tokenizer,
            prompt=last.get("asked"),
            chat=bool(last.get("chat")),
        ),
        notes=[str(done)],
        recipe={"base": base, **recipe, **versions(), **_versions()},
        command=command,
        config="",
        results={
            f"{stream['strategy']}, {key.replace('_', ' ')}": value
            for stream in streams
            for key, value in stream["measures"].items()
        },
        tables=markdown_table((["", "adapter", "rank", "SHA-256 of its weights"], rows)),
        curves=False,
    )


def family_of_adapters(stack: AdapterStack) -> str:
    """Return the family of the model that the adapters name; causal where they name none."""
    config = stack.adapters[-1].config
    owner = str((config.get("auto_mapping") or {}).get("base_model_class") or "")
    if config.get("task_type") == "SEQ_2_SEQ_LM":
        return "seq2seq"
    return next((family for end, family in FAMILIES.items() if owner.endswith(end)), "causal")


def usage(
    family: str,
    base: str | None,
    name: str,
    *,
    labels: list[str],
    merged: bool = False,
    whole: bool = False,
    prompt: str | None = None,
    chat: bool = False,
) -> str:
    """Return Python that loads the result with transformers and PEFT alone.

    Args:
        family: A key of `CLASSES`.
        base: The base model; not needed for `merged`.
        name: Folder of the adapter or of the merged model.
        labels: Of a classifier.
        merged: Whether the folder holds a whole model.
        whole: Whether it holds the tokenizer.
        prompt: What it is asked, as in training.
        chat: Whether it was asked in the chat template.
    """
    cls = CLASSES[family][0]
    source = json.dumps(name if merged else base)
    lines = [f"from transformers import AutoTokenizer, {cls}"]
    if base is not None and is_bundled(base):
        source = 'str(files("trueline") / "assets/tiny")'
        lines.insert(0, "from importlib.resources import files")
    if not merged:
        lines.insert(len(lines) - 1, "from peft import PeftModel")
    head = ""
    if family == "classifier" and labels and not merged:
        lines += ["", f"labels = {json.dumps(labels, ensure_ascii=False)}"]
        head = ", id2label=dict(enumerate(labels)), ignore_mismatched_sizes=True"
    lines += [
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name) if whole else source})",
        f"model = {cls}.from_pretrained({source}{head})",
    ]
    if not merged:
        lines.append(f"model = PeftModel.from_pretrained(model, {json.dumps(name)})")
    return "\n".join([*lines, *_asked(family, prompt, chat)])


def _asked(family: str, prompt: str | None, chat: bool) -> list[str]:
    """Return Python that asks the model as it was asked in training."""
    if prompt is None:
        return []
    lines = ["", f"prompt = {json.dumps(prompt, ensure_ascii=False)}"]
    if chat:
        lines += [
            'messages = [{"role": "user", "content": prompt}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        lines += ['inputs = tokenizer(prompt, return_tensors="pt")']
    if family == "classifier":
        return [*lines, "answer = model.config.id2label[int(model(**inputs).logits.argmax())]"]
    lines += ["written = model.generate(**inputs, do_sample=False, max_new_tokens=16)[0]"]
    if family == "causal":
        lines += ['written = written[inputs["input_ids"].shape[1] :]']
    return [*lines, "answer = tokenizer.decode(written, skip_special_tokens=True).strip()"]


def is_bundled(model: str) -> bool:
    """Return whether this is the bundled model, by its name or by the folder it lies in."""
    from importlib import resources

    from trueline.models.places import BUNDLED

    assets = Path(str(resources.files("trueline"))) / "assets"
    return model in BUNDLED or any(Path(model) == assets / name for name in BUNDLED)


def _front(model: str | None, family: str, *, adapter: bool, keep: str = "") -> dict[str, Any]:
    """Return the metadata of the hub; a folder of this machine is no name there."""
    on_hub = model is not None and model.count("/") == 1 and not Path(model).exists()
    return {
        "base_model": model if on_hub else None,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": CLASSES[family][1],
        "tags": ["trueline", "continual-learning", *([keep] if keep else [])],
    }


def _leaves(results: StackResults) -> str:
    """Return what the folder holds of the trained weights."""
    if len(results.adapters) > 1:
        return (
            f"Each of the {len(results.adapters)} adapters in `stages/` was trained on top of "
            "those before it: they belong together. `trueline export` makes one plain LoRA of "
            "them, with `--form merged` a model."
        )
    return "`trueline export` makes one plain LoRA of it, with `--form merged` a model."


def _tables(stream: Stream, results: StackResults, settings: dict[str, Any]) -> str:
    """Return R, its pictures, and the tasks."""
    import math

    from trueline.evals.tables import markdown_table

    scores = [
        [name, *("" if math.isnan(value) else f"{value:.3f}" for value in row)]
        for name, row in results.rows()
    ]
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
        if (results.folder / name).exists()
    ]
    return "\n\n".join(
        [
            "Accuracy on each task (columns) after training on each (rows), `R.json`:",
            markdown_table((["after", *results.tasks], scores)),
            *pictures,
            "Loss and penalties of the logged steps are in `log.jsonl`.",
            "## Tasks",
            markdown_table((header, tasks)),
        ]
    )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"peft": version("peft")}
