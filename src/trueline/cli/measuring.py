"""Measuring: the options of `trueline eval` as the settings of a job, and its results."""

from __future__ import annotations

import argparse
from typing import Any

from trueline.cli.options import base_kind, given, model_config
from trueline.errors import ConfigError
from trueline.evals.judging import JudgeConfig
from trueline.evals.points import parse_grid
from trueline.evals.rubrics import CRITERION
from trueline.jobs.judgements import (
    AgreementConfig,
    WinRateConfig,
    measure_agreement,
    measure_win_rate,
)
from trueline.jobs.measurement import DATA, MeasureConfig, measure
from trueline.jobs.sessions import MeasureResults
from trueline.jobs.sweeps import SweepConfig, sweep
from trueline.methods import find_method, split_options
from trueline.settings.options import options_of
from trueline.types import Progress, SamplingParams


def measured(args: argparse.Namespace, progress: Progress) -> MeasureResults:
    """Measure what the options ask for."""
    call: dict[str, Any] = {
        "progress": progress,
        "overwrite": args.overwrite,
        "command": args.typed,
    }
    if args.what == "judge":
        return measure_agreement(_agreement(args), args.output, **call)
    if args.what == "preference" and args.responses:
        return measure_win_rate(_win_rate(args), args.output, **call)
    values = _values(args)
    if values["metric"] == "implicit_reward" or values["by"] == "logprob":
        if swept := [*values.pop("grid")]:
            raise ConfigError(f"`--{swept[0].replace('_', '-')}` takes one value here.")
        return measure(MeasureConfig(**values), args.output, **call)
    return sweep(SweepConfig(**values, floor=args.floor), args.output, **call)


def metric_of(args: argparse.Namespace) -> str:
    """Return which metric the options ask for."""
    if args.what != "preference":
        return "refusal" if args.what == "refusal" else str(args.metric)
    modes = {"--responses": args.responses, "--pairs": args.pairs, "--questions": args.questions,
             "--prompts": args.prompts}  # fmt: skip
    given = [name for name, value in modes.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"Give one of {' and '.join(given)}, not both.")
    if args.criterion is not None and not (args.responses and args.criterion.strip()):
        raise ConfigError("`--criterion` is a text that goes with `--responses A B`.")
    return "implicit_reward" if args.pairs else "personal" if args.questions else "adherence"


def _values(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a measurement with a model."""
    metric = metric_of(args)
    name = args.method or ("self-cd" if metric == "refusal" else "linear-alignment")
    options, lists, sampling = _method(args, name)
    systems = args.system or [None]
    if len(systems) > 1:
        lists["system"], systems = tuple(systems), [None]
    names = [*(n for data in DATA.values() for n in data), "pattern", "absent"]
    names += ["limit", "skip_long", "batch_size", "refill", "seed"]
    return {
        **{n: getattr(args, n) for n in names if hasattr(args, n)},
        "system": systems[0],
        "model": model_config(args),
        "metric": metric,
        "method": name,
        "options": options,
        "grid": {**parse_grid(getattr(args, "grid", []), name), **lists},
        "sampling": sampling,
        "by": getattr(args, "by", "letter"),
        "judge": _judge(args),
        "plot": not args.no_plot,
    }


def _method(
    args: argparse.Namespace, name: str
) -> tuple[dict[str, Any], dict[str, Any], SamplingParams]:
    """Return the method's options, what has several values, and the sampling."""
    texts = {o.name for o in options_of(find_method(name)) if base_kind(o.kind) is str}
    typed = {
        k: (v[0] if len(v) == 1 else tuple(v)) if k in texts and isinstance(v, list) else v
        for k, v in given(args).items()
    }
    _, options, sampling = split_options({**typed, "method": name})
    lists = {
        k: v
        for k, v in {**options, **sampling}.items()
        if isinstance(v, tuple) and k not in ("principles", "stop")
    }
    rest = {k: v for k, v in sampling.items() if k not in lists}
    return (
        {k: v for k, v in options.items() if k not in lists},
        lists,
        SamplingParams(**rest | {"stop": tuple(args.stop)}),
    )


def _judge(args: argparse.Namespace) -> JudgeConfig:
    return JudgeConfig(
        args.judge,
        args.judge_model,
        args.judge_url,
        args.judge_key_variable,
        args.judge_concurrency,
        None if args.judge_prices is None else tuple(args.judge_prices),
    )


def _agreement(args: argparse.Namespace) -> AgreementConfig:
    return AgreementConfig(
        args.labels, _judge(args), args.limit, args.batch_size, plot=not args.no_plot
    )


def _win_rate(args: argparse.Namespace) -> WinRateConfig:
    metric_of(args)
    first, second = args.responses
    criterion = args.criterion or CRITERION
    return WinRateConfig(
        first, second, _judge(args), criterion, args.limit, args.batch_size, args.seed
    )
