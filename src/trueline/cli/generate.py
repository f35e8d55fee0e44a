"""`trueline generate`: answer a question, or a file of them, under a decoding method."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from typing import TYPE_CHECKING, Any

from trueline.cli.options import (
    add_method_options,
    add_model_options,
    add_sampling_options,
    add_system_option,
    check_system,
    given,
    load,
    method_and_sampling,
    model_config,
)
from trueline.errors import ConfigError, DataError
from trueline.methods import describe_method
from trueline.types import Completion, Message, Method, Request, SamplingParams, check_seed

if TYPE_CHECKING:
    from trueline.engine.decoding import Decoder
    from trueline.engine.protocol import Prompt, Step

EXAMPLES = """examples:
  trueline generate "What is the moon?" --principle "Talk like a pirate." --ratio 2
  trueline generate "How do I kill a Python process?" --method self-cd --compare
  echo "What is the moon?" | trueline generate - --json
  trueline generate --input prompts.jsonl --output out.jsonl --method self-cd --batch-size 64

A row of the input has "prompt" (text) or "messages" (a list), and may have "id", "system",
"principle" and "seed"; an output row is the input row with the completion's fields added. The same
command goes on where a killed run stopped. OUTPUT.run.json says what the rows belong to, with
hashes of the weights, the adapter, the chat template and the prompts; another run is refused.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add = parser.add_argument
    add("question", nargs="?", metavar="QUESTION", help="the question; - reads it from stdin")
    add_system_option(parser)
    add("--json", action="store_true", help="print JSON, one object a completion")
    add("--compare", action="store_true", help="plain, principle prompt and method side by side")
    group = parser.add_argument_group("files of prompts")
    add = group.add_argument
    add("--input", metavar="FILE", help="JSONL file of prompts")
    add("--output", metavar="FILE", help="JSONL file for the completions, one row each")
    add("--batch-size", type=int, default=32, metavar="N", help="rows decoded together (32)")
    add("--refill", action="store_true", help="rows take the places of those that have ended")
    add("--skip-bad", action="store_true", help="put bad rows in OUTPUT.bad.jsonl, run the others")
    add("--overwrite", action="store_true", help="start again though the output exists")
    add_model_options(parser)
    add_method_options(parser)
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> int | None:
    """Answer the question, or a file of them."""
    check_seed(args.seed)
    check_system(args.system)
    if args.input is not None:
        if args.question is not None:
            raise ConfigError("Give a question or `--input`, not both.")
        if args.compare:
            raise ConfigError("`--compare` takes one question, not `--input`.")
        return answer_file(args)
    for name in ("output", "skip_bad", "overwrite"):
        if getattr(args, name):
            raise ConfigError(f"`--{name.replace('_', '-')}` goes with `--input FILE`.")
    if args.compare and args.n != 1:
        raise ConfigError("`--compare` shows one answer each. Leave out `--n`.")
    answer(args)
    return None


def answer_file(args: argparse.Namespace) -> int:
    """Answer a file of prompts, and say what was done."""
    from trueline.cli.bars import bar
    from trueline.jobs.prompt_files import PromptFileConfig, generate_file

    if args.output is None:
        raise ConfigError("`--input` needs `--output FILE`, where the completions go.")
    options = given(args)
    config = PromptFileConfig(
        args.input,
        options.pop("method", None),
        options,
        model_config(args),
        args.system,
        args.seed,
        args.batch_size,
        args.skip_bad,
        args.refill,
    )
    rows = 0

    try:
        with bar("row") as show:

            def count(what: str, done: int, total: int) -> None:
                nonlocal rows
                rows = total
                show(what, done, total)

            done = generate_file(config, args.output, overwrite=args.overwrite, progress=count)
    except KeyboardInterrupt:
        if not rows:
            raise
        text = f"interrupted: {lines_in(args.output)} of {rows} rows are in {args.output}; "
        print(f"{text}the same command goes on from there.", file=sys.stderr)
        return 130
    if done.rows:
        rate = f"{done.tokens_per_second:,.0f} tokens/s"
        text = f"{done.rows} rows, {done.tokens:,} tokens in {done.seconds:.1f} s, {rate}"
        text = f"{text} -> {args.output}"
    else:
        text = f"All {done.total} rows are in {args.output} already; nothing to do."
    skipped = f" ({done.bad} bad rows in {args.output}.bad.jsonl)" if done.bad else ""
    print(text + skipped, file=sys.stderr)
    warn(done.warning)
    if args.json:
        print(json.dumps(done.as_dict(), ensure_ascii=False))
    return 0


def lines_in(path: str) -> int:
    """Return how many whole lines a file has."""
    with open(path, "rb") as file:
        return sum(line.endswith(b"\n") for line in file)


def answer(args: argparse.Namespace) -> None:
    """Answer one question."""
    method, sampling = method_and_sampling(args)
    messages: list[Message] = [{"role": "user", "content": question_of(args)}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    if args.compare:
        from trueline.cli.compare import columns

        columns(method)
    from trueline.engine.decoding import Decoder

    decoder = Decoder(load(args), share_prefixes=False)
    if args.compare:
        show_comparison(args, decoder, messages, method, sampling)
        return
    prompt = decoder.encode(Request(messages, method, sampling, args.seed))
    if args.json:
        ids = show_json(args, decoder, prompt)
    elif sampling.n > 1:
        completions = decoder.complete([prompt])
        for i, completion in enumerate(completions):
            print(f"--- sample {i + 1} of {sampling.n}, seed {completion.seed} ---")
            print(completion.text)
        ids = completions[0].token_ids
    else:
        ids = []
        for step in decoder.run([prompt]):
            print(step.text, end="", flush=True)
            ids.append(step.token_id)
        print()
    if len(prompt.branches) > 1:
        from trueline.evals.effects import warning

        warn(warning(decoder, [prompt], [ids]))


def warn(line: str | None) -> None:
    """Say on stderr that a method has little to work with, or works backwards."""
    if line:
        print(f"warning: {line}", file=sys.stderr)


def question_of(args: argparse.Namespace) -> str:
    """Return the question, from stdin if it is "-"."""
    if args.question is None:
        raise ConfigError("Give a question, or `--input FILE` with many. See --help.")
    if args.question != "-":
        text = str(args.question)
    else:
        try:
            text = sys.stdin.read().strip()
        except UnicodeDecodeError as error:
            raise DataError(f"The question on stdin is not UTF-8: {error.reason}.") from None
    if not text.strip():
        raise DataError("The question is empty. Give it some text.")
    return text


def show_json(args: argparse.Namespace, decoder: Decoder, prompt: Prompt) -> list[int]:
    """Print one JSON object for each completion; return the first one's tokens."""
    start, times, tokens = time.perf_counter(), [0.0], 0

    def clock(step: Step) -> None:
        nonlocal tokens
        times[0] = times[0] or time.perf_counter() - start
        tokens += 1

    completions = decoder.complete([prompt], on_step=clock)
    seconds = time.perf_counter() - start
    timings = {
        "prefill": round(times[0], 4),
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
    }
    for completion in completions:
        row = completion_fields(completion, prompt.method, args.model)
        print(json.dumps(row | {"timings": timings}, ensure_ascii=False), flush=True)
    return completions[0].token_ids


def show_comparison(
    args: argparse.Namespace,
    decoder: Decoder,
    messages: list[Message],
    method: Method,
    sampling: SamplingParams,
) -> None:
    """Print plain, prompted and aligned answers, side by side or as one JSON object."""
    from trueline.cli.compare import compare, layout

    answers = compare(decoder, messages, method, sampling, args.seed)
    if args.json:
        rows = {c.key: completion_fields(done, c.method, args.model) for c, done in answers}
        print(json.dumps({"question": messages[-1]["content"], **rows}, ensure_ascii=False))
    else:
        print(layout([(column.title, completion.text) for column, completion in answers]))


def completion_fields(completion: Completion, method: Method, model: str) -> dict[str, Any]:
    """Return a completion as what `--json` prints."""
    fields: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "method": method_fields(method),
        "model": model,
        "seed": completion.seed,
        "prompt_tokens": list(completion.prompt_tokens),
    }
    if completion.logprobs is not None:
        fields["logprobs"] = completion.logprobs
        fields["branch_logprobs"] = completion.branch_logprobs
    return fields


def method_fields(method: Method) -> dict[str, Any]:
    """Return the method's name and fields, as JSON: an infinite norm becomes "inf"."""
    fields = describe_method(method)
    infinite = (k for k, v in fields.items() if isinstance(v, float) and math.isinf(v))
    return fields | dict.fromkeys(infinite, "inf")
