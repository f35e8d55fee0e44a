"""Measurements that decode nothing: win rates, implicit rewards, letters by log-probability, and
how far a judge agrees with people."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trueline.cli.folders import command, finish, model_settings, run_folder
from trueline.cli.options import load, method_and_sampling
from trueline.errors import ConfigError, DataError

Work = Callable[[Sequence[Any], int], Sequence[Mapping[str, Any]]]


def run_preference(args: argparse.Namespace) -> None:
    """Hand over to the win rate, the implicit reward, or letters by log-probability."""
    modes = {"--responses": args.responses, "--pairs": args.pairs, "--questions": args.questions,
             "--prompts": args.prompts}  # fmt: skip
    given = [name for name, value in modes.items() if value]
    if len(given) > 1:
        raise ConfigError(f"Give one of {' and '.join(given)}, not both.")
    swept = [k for k, v in vars(args).items() if k.startswith("method_") and isinstance(v, tuple)]
    if swept:
        raise ConfigError(
            f"`--{swept[0].removeprefix('method_').replace('_', '-')}` takes one number here."
        )
    if args.responses:
        _win_rate(args)
    elif args.pairs:
        _implicit_reward(args)
    elif args.questions:
        _letters(args)
    else:
        raise ConfigError("`--by logprob` goes with `--questions FILE`.")


def _win_rate(args: argparse.Namespace) -> None:
    from trueline.cli.judging import make_judge
    from trueline.evals.pairwise import win_rates
    from trueline.evals.rubrics import CRITERION
    from trueline.records.hashes import digest

    first, second = (read_responses(path)[: args.limit] for path in args.responses)
    if [p for p, _ in first] != [p for p, _ in second]:
        raise DataError(
            f"{args.responses[0]} and {args.responses[1]} have not the same prompts in the same "
            "order."
        )
    pairs = [(p, a, b) for (p, a), (_, b) in zip(first, second, strict=True)]
    criterion = args.criterion or CRITERION
    data = {"sources": args.responses, "n": len(pairs), "sha256": digest(pairs)}
    settings = {"data": data, "criterion": criterion}

    def start(folder: Path) -> tuple[Work, Mapping[str, Any], Any]:
        judge, judged_by = make_judge(args, "win_rate", folder)

        def work(batch: Sequence[Any], _: int) -> list[dict[str, Any]]:
            prompts, a, b = (list(column) for column in zip(*batch, strict=True))
            forward = judge.pairwise(prompts, a, b, criterion)
            backward = judge.pairwise(prompts, b, a, criterion)
            return [
                {"prompt": p, "forward": x, "backward": y}
                for p, x, y in zip(prompts, forward, backward, strict=True)
            ]

        return work, judged_by, judge

    def numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        lengths = [len(a) - len(b) for _, a, b in pairs]
        forward, backward = ([row[name] for row in rows] for name in ("forward", "backward"))
        return win_rates(forward, backward, lengths).as_dict()

    title = f"Win rate of {args.responses[0]} over {args.responses[1]}"
    _run_rows(args, "win_rate", title, settings, pairs, start, numbers)


def _implicit_reward(args: argparse.Namespace) -> None:
    from trueline.evals.datasets import load_pairs
    from trueline.evals.preference import branch_weights, implicit_rewards, reward_accuracy
    from trueline.records.hashes import digest

    method, _ = method_and_sampling(args, "linear-alignment")
    branch_weights(method, len(method.prompts([{"role": "user", "content": "?"}])))
    pairs = load_pairs(args.pairs)[: args.limit]
    model = load(args)
    data = {"sources": [args.pairs], "n": len(pairs), "sha256": digest([asdict(p) for p in pairs])}
    settings = {**model_settings(args, model), "method": method_settings(method), "data": data}

    def work(batch: Sequence[Any], _: int) -> list[dict[str, Any]]:
        rewards = implicit_rewards(model, method, batch, batch_size=16, skip_long=True)
        return [
            {"id": pair.id, "chosen": float(a), "rejected": float(b)}
            for pair, (a, b) in zip(batch, rewards, strict=True)
        ]

    def numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        values = [[math.nan if row[k] is None else row[k] for k in ("chosen", "rejected")]
                  for row in rows]  # fmt: skip
        return reward_accuracy(values).as_dict()

    title = f"Implicit reward: {method.name} on {args.model}"
    _run_rows(args, "implicit_reward", title, settings, pairs, lambda _: (work, {}, None), numbers)


def _letters(args: argparse.Namespace) -> None:
    from trueline.evals.datasets import load_personal
    from trueline.evals.preference import personal_accuracy, personal_choices, personal_principle
    from trueline.methods import METHODS, make_method
    from trueline.records.hashes import digest

    questions = load_personal(args.questions)[: args.limit]
    name = args.method or "linear-alignment"
    given = {k.removeprefix("method_"): v for k, v in vars(args).items() if k.startswith("method_")}
    if name in METHODS and "principle" not in METHODS[name].__dataclass_fields__:
        raise ConfigError(f'Method "{name}" takes no principle, so it knows no user.')
    given.pop("principle", None)

    def method_for(principle: str) -> Any:
        return make_method(name, {**given, "principle": principle})

    shown = method_settings(method_for(personal_principle("...")))
    model, count = load(args), len(questions)
    questions = questions_that_fit(model, questions, method_for, skip=args.skip_long)
    data = {"sources": [args.questions], "n": len(questions), "skipped": count - len(questions)}
    data["sha256"] = digest([asdict(q) for q in questions])
    settings = {**model_settings(args, model), "method": shown, "data": data}

    def work(batch: Sequence[Any], _: int) -> list[dict[str, Any]]:
        choices = personal_choices(model, batch, method_for, by="logprob")
        return [
            {"id": q.id, "choices": row} for q, row in zip(batch, choices.tolist(), strict=True)
        ]

    def numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"accuracy": asdict(personal_accuracy([row["choices"] for row in rows]))}

    title = f"Personal preference: {name} on {args.model}"
    _run_rows(
        args, "personal_logprob", title, settings, questions, lambda _: (work, {}, None), numbers
    )


def run_judge(args: argparse.Namespace) -> None:
    """Measure a refusal judge against human labels."""
    from trueline.cli.judging import make_judge
    from trueline.evals.figures import draw_confusion
    from trueline.evals.judges import agreement, read_labels
    from trueline.evals.refusal import LABELS, Verdict
    from trueline.records.hashes import digest

    texts = read_labels(args.labels)[: args.limit]
    data = {"sources": [args.labels], "n": len(texts), "sha256": digest([asdict(t) for t in texts])}
    settings = {"data": data}

    def start(folder: Path) -> tuple[Work, Mapping[str, Any], Any]:
        judge, judged_by = make_judge(args, "refusal", folder)

        def work(batch: Sequence[Any], _: int) -> list[dict[str, Any]]:
            verdicts = judge.refusal([t.prompt for t in batch], [t.text for t in batch])
            return [
                {"people": t.label, "text": t.text, **asdict(v)}
                for t, v in zip(batch, verdicts, strict=True)
            ]

        return work, judged_by, judge

    def numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        verdicts = [Verdict(row["label"], row["reason"], row["phrase"]) for row in rows]
        found = agreement(verdicts, [t.label for t in texts]).as_dict()
        table = found.pop("confusion")
        for label, counts in zip(LABELS[:3], table, strict=True):
            cells = (f"{n} {said}" for n, said in zip(counts, LABELS, strict=True))
            found[f"people say {label}"] = ", ".join(cells)
        found["confusion"] = table
        return found

    def draw(found: Mapping[str, Any]) -> Any:
        return draw_confusion(found["confusion"], LABELS[:3], LABELS, f"n = {len(texts)}")

    title = f"Judge {args.judge or 'keywords'} against people: {args.labels}"
    _run_rows(args, "judge", title, settings, texts, start, numbers, draw)


def _run_rows(
    args: argparse.Namespace,
    kind: str,
    title: str,
    settings: Mapping[str, Any],
    items: Sequence[Any],
    start: Callable[[Path], tuple[Work, Mapping[str, Any], Any]],
    numbers: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]],
    draw: Callable[[Mapping[str, Any]], Any] | None = None,
) -> None:
    """Compute a row for every item in the run's folder, and the numbers of them all."""
    from tqdm import tqdm

    from trueline.cli.judging import spent
    from trueline.records.hashes import digest, versions
    from trueline.records.run_folder import RunFolder

    settings = {"versions": versions(), **settings}
    folder = run_folder(args, kind, settings)
    run = RunFolder(folder, kind, settings, command=command(args), overwrite=args.overwrite)
    began, judge = time.perf_counter(), None
    try:
        run.start()
        verdicts = run.rows("verdicts.jsonl")
        work, judged_by, judge = start(run.folder)
        key = digest([kind, run.settings, judged_by])
        there, every = verdicts.done(key, len(items)), 0.2 if sys.stderr.isatty() else 30.0
        with tqdm(total=len(items), initial=there, unit="row", mininterval=every,
                  file=sys.stderr) as bar:  # fmt: skip
            rows = verdicts.compute(key, items, args.batch_size, work, bar.update)
        found = numbers(rows)
        results = {"title": title, "metric": kind, "judge": dict(judged_by), "numbers": found}
        results |= spent(judge)[0]
        finish(args, run, results, None if draw is None else lambda: draw(found))
    finally:
        seconds = round(time.perf_counter() - began, 1)
        run.close({"rows": len(items), "seconds": seconds, **spent(judge)[1]})


def questions_that_fit(
    model: Any, questions: Sequence[Any], method_for: Callable[[str], Any], *, skip: bool
) -> list[Any]:
    """Return the questions that fit the model for every user; without `skip` all must."""
    from trueline.evals.likelihood import branch_rows, check_fits, response_ids
    from trueline.evals.preference import LETTERS, personal_principle, personal_prompt

    kept, reason = [], ""
    for q in questions:
        chat: list[Any] = [{"role": "user", "content": personal_prompt(q)}]
        letter = response_ids(model, chat, LETTERS[0])
        try:
            for user in q.users:
                rows = branch_rows(model, method_for(personal_principle(user)), [chat], [letter])
                for prompt, response in zip(rows[0], rows[1], strict=True):
                    check_fits(model, prompt, response)
            kept.append(q)
        except DataError as error:
            reason = str(error)
            if not skip:
                raise DataError(
                    f'Question "{q.id}": {reason} Or --skip-long leaves it out.'
                ) from None
    if not kept:
        raise DataError(f"No question fits the model: {reason}")
    return kept


def method_settings(method: Any) -> dict[str, Any]:
    """Return a method's name and fields."""
    return {"name": method.name, **asdict(method)}


def read_responses(path: str) -> list[tuple[str, str]]:
    """Return (prompt, response) of each row of a file of responses; `DataError` with path:line."""
    from trueline.evals.datasets import read_rows
    from trueline.evals.judges import TEXT_COLUMNS

    rows = []
    for place, row in read_rows(path):
        column = next((c for c in TEXT_COLUMNS if isinstance(row.get(c), str)), None)
        if not isinstance(row.get("prompt"), str) or column is None:
            raise DataError(
                f'{place}: needs "prompt" and "response" (or {", ".join(TEXT_COLUMNS)}).'
            )
        rows.append((row["prompt"], row[column]))
    if not rows:
        raise DataError(f"{path}: there is no row in it.")
    return rows
