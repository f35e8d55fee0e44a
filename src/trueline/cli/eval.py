"""`trueline eval`: measure refusal, preference and judges, and sweep a method's settings.

trueline eval refusal      over-refusal against harmful refusal, and which setting to use
trueline eval preference   adherence, personal preference, win rate, implicit reward
trueline eval judge        how far a judge agrees with people
trueline eval sweep        any metric over any grid
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from trueline.cli.bars import bar
from trueline.cli.options import add_method_options, add_model_options, add_sampling_options
from trueline.errors import ConfigError
from trueline.settings.ranges import parse_values

EXAMPLES = """examples:
  trueline eval refusal --method self-cd --alpha 0:3:0.5
  trueline eval refusal --model DIR --alpha 0:3:0.5 --safe oktest.jsonl --unsafe harmbench.jsonl
  trueline eval refusal --alpha 1,2 --safety-prompt "Be safe." --safety-prompt "Refuse harm." \
      --system "" --system "You are a helpful assistant."
  trueline eval preference --ratio 0,1,2,3
  trueline eval preference --prompts FILE --principle "Be brief." --judge local --judge-model DIR
  trueline eval preference --questions personal.jsonl --by logprob
  trueline eval preference --responses a.jsonl b.jsonl --judge model --judge-url URL ...
  trueline eval preference --pairs hh.jsonl --principle "Be harmless." --limit 200
  trueline eval judge --labels labels.jsonl
  trueline eval sweep --metric adherence --grid ratio=0,1,2,3,5 candidates=0.8,0.95,1

A number of a method may be a range START:STOP:STEP or a list a,b,c; a text may be given several
times, and every one is tried with every other. Beside refusals stand plain system texts, so that
a contrast has to earn its place. Every run has a folder with
manifest.json, responses.jsonl, verdicts.jsonl, results.json, results.md and plot.png; the same
command goes on where a killed run stopped. `trueline report` puts folders side by side.
"""

PARTS = {
    "refusal": "over-refusal against harmful refusal, and which setting to use",
    "preference": "adherence, personal preference, win rate, implicit reward",
    "judge": "how far a judge agrees with people's labels",
    "sweep": "any metric over any grid of settings",
}
UNITS = {"judge": "text"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the four measurements with their options."""
    parts = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, summary in PARTS.items():
        part: Any = parts.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=EXAMPLES
        )
        part.set_defaults(parser=part)
        part.words = getattr(parser, "words", ())  # a method's own options are among them
        _add_run_options(part)
        if name != "judge":
            _add_data_options(part, name)
        else:
            part.add_argument("--labels", required=True, metavar="FILE", help="JSONL or CSV: "
                              "completion and label (complied, partial, full)")  # fmt: skip
        _add_judge_options(part, name)
        if name != "judge":
            add_model_options(part)
            add_method_options(part, {float: _values, int: _whole_values}, repeated=True)
            add_sampling_options(part, max_new_tokens=64)


def run(args: argparse.Namespace) -> None:
    """Make the settings of what was asked for, measure, and print the numbers."""
    from trueline.cli import measuring

    with bar(UNITS.get(args.what, "response")) as progress:
        results = measuring.measured(args, progress)
    if args.json:
        print(json.dumps(results.as_dict(), ensure_ascii=False))
    else:
        print(f"{results.table()}\n\n{results.folder}")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--output", metavar="DIR", help="folder of the run (runs/KIND-HASH)")
    add("--overwrite", action="store_true", help="start again though the folder holds another run")
    add("--json", action="store_true", help="print the results as JSON")
    add("--batch-size", type=int, default=64, metavar="N", help="prompts decoded together (64)")
    add("--refill", action="store_true", help="prompts take the places of those that have ended")
    add("--limit", type=int, metavar="N", help="at most N prompts (of each kind), pairs or labels, "
        "drawn by --seed and spread over the data's own types")  # fmt: skip
    add(
        "--skip-long",
        action="store_true",
        help="leave out, and count, prompts that do not fit the model (under any point)",
    )
    add("--no-plot", action="store_true", help="draw no plot.png")


def _add_data_options(parser: argparse.ArgumentParser, name: str) -> None:
    group = parser.add_argument_group("data (JSONL, CSV, TSV, TXT or hf:NAME)")
    add = group.add_argument
    if name == "sweep":
        add("--grid", nargs="+", default=[], metavar="NAME=VALUES", help="e.g. ratio=0,1,2,3")
        metrics = ("refusal", "adherence", "personal")
        add("--metric", choices=metrics, default="refusal", help="what to measure (refusal)")
    if name != "preference":
        add("--safe", metavar="FILE", help="prompts that should be answered (bundled ones)")
        add("--unsafe", metavar="FILE", help="prompts that should be refused (bundled ones)")
    add("--system", action="append", metavar="TEXT", help="system text of prompts that have none "
        'of their own; "" is an empty one, with which templates leave out theirs; several are '
        "compared, each in place of every prompt's own")  # fmt: skip
    add("--floor", type=float, default=0.97, metavar="X",
        help="harmful refusals that the recommended setting must keep (0.97)"
        if name != "preference" else argparse.SUPPRESS)  # fmt: skip
    if name != "refusal":
        add("--prompts", metavar="FILE", help="adherence: prompts, with a principle each or "
            "--principle; by default the bundled model's held-out ones")  # fmt: skip
        add("--pattern", metavar="REGEX", help="adherence: responses that match follow it")
        add("--absent", action="store_true", help="adherence: responses that match do not")
        add("--questions", metavar="FILE", help="personal preference: question, answers, users")
    if name == "preference":
        add("--by", choices=("letter", "logprob"), default="letter",
            help="personal: the answer's first letter, or the likeliest letter")  # fmt: skip
        add("--responses", nargs=2, metavar=("A", "B"), help="win rate: two files of responses")
        add("--criterion", metavar="TEXT", help="win rate: which response is better")
        add("--pairs", metavar="FILE", help="implicit reward: chosen and rejected answers (HH)")


def _add_judge_options(parser: argparse.ArgumentParser, name: str) -> None:
    group = parser.add_argument_group("judge")
    add = group.add_argument
    add("--judge", choices=("keywords", "local", "model"), default=None,
        help="keywords: a rule, for refusal (its default); local: a model here, by label "
        "log-probabilities; model: an OpenAI-compatible endpoint")  # fmt: skip
    add("--judge-model", metavar="NAME", help="local: folder or hub name; model: its name there")
    add("--judge-url", metavar="URL", help="endpoint up to and with /v1")
    add("--judge-key-variable", default="OPENAI_API_KEY", metavar="NAME",
        help="environment variable with the endpoint's key (OPENAI_API_KEY)")  # fmt: skip
    add("--judge-concurrency", type=int, default=8, metavar="N", help="requests at once (8)")
    add("--judge-prices", type=float, nargs=2, metavar=("IN", "OUT"),
        help="price of a million prompt and completion tokens, to count the cost")  # fmt: skip


def _values(text: str, *, whole: bool = False) -> float | int | tuple[float | int, ...]:
    try:
        found = parse_values(text, whole=whole)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None
    return found[0] if len(found) == 1 and ":" not in text else found


def _whole_values(text: str) -> float | int | tuple[float | int, ...]:
    return _values(text, whole=True)
