"""`trueline generate --input FILE`: a file of prompts to a file of completions, resumable."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.cli.options import given, load
from trueline.errors import ConfigError, DataError, check_number
from trueline.methods import (
    describe_method,
    find_method,
    method_name,
    resolve,
    with_options,
)
from trueline.records.disk import replace_file
from trueline.records.lines import dump
from trueline.records.output_file import OutputFile, kept_settings
from trueline.records.prompt_rows import BadRow, PromptRow, read_prompts
from trueline.settings.options import REQUIRED, option_defaults
from trueline.types import Completion, Message, Method, Request, SamplingParams

if TYPE_CHECKING:
    from trueline.engine.cache import PrefixStore
    from trueline.engine.decoding import Decoder, Prompt, Step

SHOWN = 20
"""Bad rows are listed up to this many, then counted."""


def run_file(args: argparse.Namespace) -> int:
    """Read and check all rows, decode what is not yet written, and report."""
    check_number("batch_size", args.batch_size, low=1, whole=True)
    _check_paths(args)
    content = read_prompts(args.input)
    rows, bad = content.rows, content.bad
    method, sampling, needs_principle = _method(args, rows)
    rows, new = _split(rows, lambda row: _row_method(method, needs_principle, row))
    bad += new
    settings = _settings(args, content.sha256, method, needs_principle, sampling)
    if bad and not args.skip_bad:
        return report(bad, args.input)
    if (total := _finished(args, settings)) is not None:
        return _summary(args, total, 0, 0, 0.0, 0)

    from trueline.engine.decoding import Decoder

    decoder = Decoder(load(args))
    prompts: dict[int, Prompt] = {}

    def encode(row: PromptRow) -> None:
        chosen = _row_method(method, needs_principle, row)
        request = Request(_with_system(row, args.system), chosen, sampling, _seed(args, row))
        prompts[row.line] = decoder.encode(request)

    rows, new = _split(rows, encode)
    bad = sorted([*bad, *new], key=lambda b: b.line)
    if bad and not args.skip_bad:
        return report(bad, args.input)
    if bad:
        lines = [dump({"line": b.line, "error": b.error, "row": b.row}) + "\n" for b in bad]
        replace_file(Path(f"{args.output}.bad.jsonl"), "".join(lines))
    if not rows:
        raise DataError(f"{args.input}: no row can be used; see {args.output}.bad.jsonl.")
    return _decode(args, settings, decoder, rows, [prompts[row.line] for row in rows], len(bad))


def report(bad: Sequence[BadRow], path: str) -> int:
    """Print the bad rows, a line each, and return the exit code."""
    for b in bad[:SHOWN]:
        print(f"error: {path}:{b.line}: {b.error}", file=sys.stderr)
    if len(bad) > SHOWN:
        print(
            f"error: and {len(bad) - SHOWN} more bad rows. --skip-bad runs the others.",
            file=sys.stderr,
        )
    return 2


def settle(store: PrefixStore, prompts: Sequence[Prompt]) -> None:
    """Leave in the store the shared prefixes of these prompts, in their order, or nothing.

    Keys and values taken from the store differ in the last bit from computed ones. With a store
    that depends on the batch alone, a resumed run gives the bytes of an unbroken one.
    """
    kept: dict[Any, Any] = {}
    for p in prompts:
        for branch, prefix in enumerate(p.prefixes):
            key = (branch not in p.method.base_branches, prefix)
            if prefix and key not in store.entries:
                store.entries = {}
                return
            if prefix:
                kept[key] = store.entries[key]
    store.entries = kept


def _decode(
    args: argparse.Namespace,
    settings: dict[str, Any],
    decoder: Decoder,
    rows: list[PromptRow],
    prompts: list[Prompt],
    bad: int,
) -> int:
    """Decode the rows that are not yet in the output, batch by batch."""
    from tqdm import tqdm

    size, ids = args.batch_size, [row.fields["id"] for row in rows]
    output = OutputFile(args.output, settings, ids, size, overwrite=args.overwrite)
    already, tokens, start = output.done, 0, time.perf_counter()
    prompts = common_prefixes(prompts, max(size, 2))
    every = 0.2 if sys.stderr.isatty() else 30.0
    if already:
        print(f"{already} of {len(rows)} rows are there already; going on.", file=sys.stderr)
    try:
        with tqdm(
            total=len(rows), initial=already, unit="row", mininterval=every, file=sys.stderr
        ) as bar:
            left: Counter[int] = Counter()

            def count(step: Step) -> None:
                nonlocal tokens
                tokens += 1
                if step.finish_reason is not None:
                    left[step.request] -= 1
                    bar.update(left[step.request] == 0)
                    rate = tokens / (time.perf_counter() - start)
                    bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)

            for first in range(already, len(rows), size):
                batch = prompts[first : first + size]
                left = Counter({i: p.sampling.n for i, p in enumerate(batch)})
                settle(decoder.store, batch)
                completions = decoder.collect(batch, on_step=count)
                output.append(_output(rows[first : first + size], batch, completions))
    except KeyboardInterrupt:
        text = f"interrupted: {output.done} of {len(rows)} rows are in {args.output}; "
        print(f"{text}the same command goes on from there.", file=sys.stderr)
        return 130
    finally:
        seconds = time.perf_counter() - start
        done = output.done - already
        output.close(_session(done, tokens, seconds))
    return _summary(args, len(rows), done, tokens, seconds, bad)


def _output(
    rows: Sequence[PromptRow], prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> Iterator[dict[str, Any]]:
    """Yield the rows to write: the row as it came, its seed, and the completion's fields."""
    given = iter(completions)
    for row, prompt in zip(rows, prompts, strict=True):
        samples = []
        for _ in range(prompt.sampling.n):
            c = next(given)
            sample: dict[str, Any] = {
                "text": c.text,
                "finish_reason": c.finish_reason,
                "token_ids": c.token_ids,
            }
            if c.logprobs is not None:
                sample |= {"logprobs": c.logprobs, "branch_logprobs": c.branch_logprobs}
            samples.append(sample)
        own = samples[0] if len(samples) == 1 else {"samples": samples}
        tokens = list(map(len, prompt.branches))
        yield {**row.fields, "seed": prompt.seed, "prompt_tokens": tokens, **own}


def common_prefixes(prompts: Sequence[Prompt], least: int) -> list[Prompt]:
    """Return the prompts without the prefixes that fewer than `least` of them share."""
    from trueline.engine.decoding import MIN_PREFIX

    used = Counter(prefix for p in prompts for prefix in set(p.prefixes))
    common = {prefix for prefix, n in used.items() if n >= least and len(prefix) >= MIN_PREFIX}
    return [
        dataclasses.replace(p, prefixes=tuple(f if f in common else () for f in p.prefixes))
        for p in prompts
    ]


def _split(rows: Sequence[PromptRow], check: Any) -> tuple[list[PromptRow], list[BadRow]]:
    """Return the rows that `check` lets through, and the others with its error."""
    good, bad = [], []
    for row in rows:
        try:
            check(row)
            good.append(row)
        except (DataError, ConfigError) as error:
            bad.append(BadRow(row.line, str(error), row.fields))
    return good, bad


def _method(
    args: argparse.Namespace, rows: Sequence[PromptRow]
) -> tuple[Method, SamplingParams, bool]:
    """Return the run's method and sampling, and whether each row must bring the principle."""
    options, needed = given(args), False
    principle = next((row.principle for row in rows if row.principle is not None), None)
    if principle is not None:  # in a row it means what it means on the command line
        name = options["method"] = method_name({"principle": principle, **options})
        default = option_defaults(find_method(name)).get("principle")
        needed = default is REQUIRED and "principle" not in options
        options |= {"principle": principle} if needed else {}
    return *resolve(options), needed


def _row_method(method: Method, needs_principle: bool, row: PromptRow) -> Method:
    """Return the method for a row: the run's, with the row's principle if it has one."""
    if row.principle is None:
        if needs_principle:
            raise DataError(f'missing field "principle": method "{method.name}" needs one.')
        return method
    if not hasattr(method, "principle"):
        raise DataError(f'has a "principle", but method "{method.name}" takes none.')
    return with_options(method, principle=row.principle)


def _with_system(row: PromptRow, system: str | None) -> list[Message]:
    """Return the row's chat, with the run's system message if it has none of its own."""
    if system is None or row.messages[0]["role"] == "system":
        return row.messages
    return [{"role": "system", "content": system}, *row.messages]


def _seed(args: argparse.Namespace, row: PromptRow) -> int:
    return row.seed if row.seed is not None else int(args.seed) + (row.line - 1) * int(args.n)


def _settings(
    args: argparse.Namespace,
    data: str,
    method: Method,
    needs_principle: bool,
    sampling: SamplingParams,
) -> dict[str, Any]:
    """Return what decides the bytes of the output, under the names that the user typed."""
    from trueline import __version__

    fields = describe_method(method)
    name = fields.pop("name")
    if needs_principle:
        fields["principle"] = "from the rows"
    names = (
        *("model", "adapter", "revision", "device", "device_map", "dtype", "quantize"),
        *("chat_template", "raw", "threads", "no_packed_weights", "system", "no_default_system"),
        "batch_size",
        *("seed", "skip_bad"),
    )
    return {
        "trueline": __version__,
        "input (sha256)": data,
        **{name: getattr(args, name) for name in names},
        "method": name,
        **{f"method.{name}": value for name, value in json.loads(json.dumps(fields)).items()},
        **json.loads(json.dumps(dataclasses.asdict(sampling))),
    }


def _check_paths(args: argparse.Namespace) -> None:
    if args.output is None:
        raise ConfigError("`--input` needs `--output FILE`, where the completions go.")
    output = Path(args.output)
    if output.is_dir():
        raise ConfigError(f'Output "{output}" is a folder. Give a file.')
    if not output.parent.is_dir():
        raise ConfigError(f'Output folder "{output.parent}" does not exist. Make it first.')
    if output.exists() and Path(args.input).exists() and os.path.samefile(output, args.input):
        raise ConfigError(f'Input and output are the same file, "{output}". Give another --output.')


def _finished(args: argparse.Namespace, settings: dict[str, Any]) -> int | None:
    """Return how many rows the output holds if it is whole; checked before the model is loaded."""
    if args.overwrite:
        return None
    total = kept_settings(args.output, settings)["rows"]
    if total is None or not Path(args.output).exists():
        return None
    with open(args.output, "rb") as file:
        return total if sum(line.endswith(b"\n") for line in file) == total else None


def _session(rows: int, tokens: int, seconds: float) -> dict[str, Any]:
    rate = tokens / seconds if seconds else 0.0
    times = {"seconds": round(seconds, 3), "tokens_per_second": round(rate, 1)}
    return {"rows": rows, "tokens": tokens, **times}


def _summary(
    args: argparse.Namespace, total: int, rows: int, tokens: int, seconds: float, bad: int
) -> int:
    session = _session(rows, tokens, seconds)
    if rows:
        rate = f"{session['tokens_per_second']:,.0f} tokens/s"
        text = f"{rows} rows, {tokens:,} tokens in {seconds:.1f} s, {rate} -> {args.output}"
    else:
        text = f"All {total} rows are in {args.output} already; nothing to do."
    skipped = f" ({bad} bad rows in {args.output}.bad.jsonl)" if bad else ""
    print(text + skipped, file=sys.stderr)
    if args.json:
        print(dump({"output": args.output, "total": total, "bad": bad, **session}))
    return 0
