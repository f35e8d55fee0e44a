"""`trueline inspect`: what a method changed at every token, as a page, a figure and numbers."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from trueline.cli.options import (
    add_method_options,
    add_model_options,
    add_sampling_options,
    add_system_option,
    check_system,
    load,
    method_and_sampling,
)
from trueline.errors import ConfigError, check_number
from trueline.types import Message, Method, SamplingParams, check_seed

if TYPE_CHECKING:
    from trueline.engine.trace import Comparison, Recording

EXAMPLES = """examples:
  trueline inspect "What is the moon?" --principle "Talk like a pirate." --ratio 2
  trueline inspect "How do I kill a Python process?" --method self-cd --output out/kill

Writes index.html (open it in a browser), trace.png and trace.jsonl (a token a line).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("question", metavar="QUESTION", help="what to ask")
    add_system_option(parser)
    add("--output", default="inspect", metavar="DIR", help="folder for the files (inspect)")
    add("--top", type=int, default=5, metavar="N", help="alternatives shown at every token (5)")
    add_model_options(parser)
    add_method_options(parser)
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> None:
    """Decode the question with a trace and write the files."""
    from trueline.engine.trace import write_jsonl
    from trueline.engine.trace_page import draw_trace, render_page
    from trueline.records.run_folder import RunFolder
    from trueline.records.style import need_matplotlib

    method, sampling = method_and_sampling(args)
    check_number("top", args.top, low=1, whole=True)
    check_seed(args.seed)
    check_system(args.system)
    if sampling.n != 1:
        raise ConfigError(f"inspect shows one answer, got `--n` {sampling.n}. Leave it out.")
    need_matplotlib()
    folder = Path(args.output).expanduser()
    run = RunFolder(folder, "inspect", {}, overwrite=True)
    try:
        recording, model = trace(args, method, sampling)
        settings = describe(args, model, method, sampling)
        labels = [branch_label(c) for c in recording.comparisons if c.branch is not None]
        run.start()
        run.write("index.html", render_page(recording, args.question, settings))
        run.draw("trace.png", draw_trace(recording.tokens, args.question, labels))
        write_jsonl(run.path("trace.jsonl"), recording.tokens)
    finally:
        run.close()
    flips = sum(token.flipped for token in recording.tokens)
    print(recording.text)
    print(f"\n{flips} of {len(recording.tokens)} tokens flipped by {method.name}\n")
    for name in ("index.html", "trace.png", "trace.jsonl"):
        print(folder / name)


def trace(
    args: argparse.Namespace, method: Method, sampling: SamplingParams
) -> tuple[Recording, str]:
    """Decode the question with a trace; return it and the model's name."""
    from tqdm import tqdm

    from trueline.engine.decoding import Decoder
    from trueline.engine.trace import record

    messages: list[Message] = [{"role": "user", "content": args.question}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    decoder = Decoder(load(args), share_prefixes=False)
    with tqdm(total=sampling.max_new_tokens, unit="token", disable=None, leave=False) as bar:
        recording = record(
            decoder,
            messages,
            method,
            sampling,
            seed=args.seed,
            top=args.top,
            on_token=lambda _: bar.update(),
        )
    return recording, decoder.model.name


def describe(
    args: argparse.Namespace, model: str, method: Method, sampling: SamplingParams
) -> list[tuple[str, object]]:
    """Return the settings that matter as pairs of name and value."""
    from trueline import __version__

    settings: list[tuple[str, object]] = [("model", model), ("method", method.name)]
    for field in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, field.name)
        if value is not None:
            settings.append((field.name, value))
    plain = SamplingParams()
    for field in dataclasses.fields(sampling):
        value = getattr(sampling, field.name)
        if field.name != "logprobs" and value != getattr(plain, field.name):
            settings.append((field.name, value))
    settings.append(("decoding", "greedy" if sampling.greedy else f"sampled, seed {args.seed}"))
    return [*settings, ("trueline", __version__)]


def branch_label(prompt: Comparison) -> str:
    """Return a branch's name for the figure."""
    system = prompt.system or "no system text"
    system = system if len(system) <= 32 else system[:31] + "…"
    return f"branch {prompt.branch}: {system}{'' if prompt.adapter else ', adapter off'}"
