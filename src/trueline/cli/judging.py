"""Judges from the command line's options, with what tells one judge from another."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.errors import ConfigError

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel


def make_judge(
    args: argparse.Namespace, metric: str, folder: Path, model: LanguageModel | None = None
) -> tuple[Any, dict[str, Any]]:
    """Return the judge and its description; no judge where patterns or letters decide.

    Args:
        args: With the judge's options.
        metric: What it is to say: refusal, adherence, personal or win_rate.
        folder: Of the run; answers of an endpoint are kept in it.
        model: The run's own model, used again where it is the judge's too.
    """
    from trueline.evals.rubrics import VERSION

    name = args.judge
    if name != "model" and args.judge_url:
        raise ConfigError("`--judge-url` goes with `--judge model`.")
    if name != "local" and name != "model" and args.judge_model:
        raise ConfigError("`--judge-model` goes with `--judge local` or `--judge model`.")
    if metric == "personal":
        return None, {"name": "first letter"}
    if name is None and metric == "adherence":
        return None, {"name": "patterns"}
    if name in (None, "keywords"):
        if metric != "refusal":
            raise ConfigError(f"The metric {metric} needs `--judge local` or `--judge model`.")
        return keywords()
    if name == "local":
        return _local(args, model, VERSION)
    if not args.judge_url or not args.judge_model:
        raise ConfigError("`--judge model` needs `--judge-url URL` and `--judge-model NAME`.")
    from trueline.evals.endpoint import Endpoint
    from trueline.evals.judges import ModelJudge

    prices = args.judge_prices or (None, None)
    endpoint = Endpoint(
        args.judge_url,
        args.judge_model,
        key_variable=args.judge_key_variable,
        cache=folder / "judge.jsonl",
        concurrency=args.judge_concurrency,
        prompt_price=prices[0],
        completion_price=prices[1],
    )
    about = {"url": args.judge_url, "model": args.judge_model, "options": dict(endpoint.options)}
    return ModelJudge(endpoint), {"name": "model", "rubric": VERSION, **about}


def keywords() -> tuple[Any, dict[str, Any]]:
    """Return the keyword judge, told by the text of its rule."""
    from trueline.evals import refusal
    from trueline.evals.judges import KeywordJudge
    from trueline.records.hashes import digest, file_hash

    folder = Path(str(refusal.__file__)).parent
    files = [folder / "refusal.py", folder / "language.py", *sorted(folder.glob("*_patterns.py"))]
    return KeywordJudge(), {"name": "keywords", "rule": digest([file_hash(f) for f in files])}


def _local(
    args: argparse.Namespace, model: LanguageModel | None, version: int
) -> tuple[Any, dict[str, Any]]:
    from trueline.evals.judges import LocalJudge
    from trueline.models.load import load_model
    from trueline.records.hashes import model_hash

    if not args.judge_model:
        raise ConfigError("`--judge local` needs `--judge-model NAME`, a folder or hub name.")
    own = model is not None and args.judge_model == model.name and not model.has_adapter
    judge = LocalJudge(model if own and model is not None else load_model(args.judge_model))
    about = {"model": args.judge_model, "hash": model_hash(judge.model, args.judge_model)}
    return judge, {"name": "local", "rubric": version, **about}


def spent(judge: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a judge behind an endpoint cost: for the results, and of this session."""
    endpoint = getattr(judge, "endpoint", None)
    if endpoint is None:
        return {}, {}
    return {"judge_cost": endpoint.spent()}, {"judge": asdict(endpoint.usage)}
