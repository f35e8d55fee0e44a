"""Judging: a judge from settings, with what tells one judge from another."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.errors import ConfigError
from trueline.evals import language, refusal
from trueline.evals.endpoint import Endpoint, redacted
from trueline.evals.judges import FunctionJudge, KeywordJudge, LocalJudge, ModelJudge
from trueline.evals.rubrics import VERSION
from trueline.models import load
from trueline.models.places import find_model
from trueline.records.hashes import digest, file_hash, model_hash

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel

JUDGES = ("keywords", "local", "model")


@dataclass(frozen=True)
class JudgeConfig:
    """Who says what a response counts as."""

    name: str | None = None
    """keywords: a rule, for refusals, and their default; local: a model here, by the
    log-probabilities of labels; model: an OpenAI-compatible endpoint. None elsewhere means
    patterns."""
    model: str | None = None
    """Folder or hub name of the local judge, or the model's name at the endpoint."""
    url: str | None = None
    """The endpoint, up to and with /v1."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the endpoint's key."""
    concurrency: int = 8
    """Requests under way at once."""
    prices: tuple[float, float] | None = None
    """Price of a million prompt and completion tokens, to count the cost."""

    def __post_init__(self) -> None:
        if self.name not in (None, *JUDGES):
            raise ConfigError(f'`judge` must be one of {", ".join(JUDGES)}, got "{self.name}".')
        if self.name != "model" and self.url:
            raise ConfigError("`--judge-url` goes with `--judge model`.")
        if self.name not in ("local", "model") and self.model:
            raise ConfigError("`--judge-model` goes with `--judge local` or `--judge model`.")
        if self.name == "local" and not self.model:
            raise ConfigError("`--judge local` needs `--judge-model NAME`, a folder or hub name.")
        if self.name == "model" and not (self.url and self.model):
            raise ConfigError("`--judge model` needs `--judge-url URL` and `--judge-model NAME`.")
        if self.name == "model":
            self.endpoint()

    def endpoint(self, cache: Path | None = None) -> Endpoint:
        """Return the endpoint, which checks its settings."""
        prices = self.prices or (None, None)
        return Endpoint(
            str(self.url),
            str(self.model),
            key_variable=self.key_variable,
            cache=cache,
            concurrency=self.concurrency,
            prompt_price=prices[0],
            completion_price=prices[1],
        )


Judge = JudgeConfig | str | Callable[[str, str], Any] | Any
"""A judge by its settings or its name; a function of prompt and response; an object like those of
`trueline.evals.judges`."""


def check_judge(judge: Judge | None, metric: str) -> Judge:
    """Return the judge, a name as its settings; `ConfigError` for one that cannot judge this."""
    config = JudgeConfig(judge) if judge is None or isinstance(judge, str) else judge
    if not isinstance(config, JudgeConfig):
        if not (callable(config) or hasattr(config, needed(metric))):
            raise ConfigError(
                f"`judge` must be a name, a function of prompt and response, or an object with "
                f"`{needed(metric)}`, got {type(config).__name__}."
            )
        return config
    if config.name in (None, "keywords") and metric == "win_rate":
        raise ConfigError("A win rate needs `--judge local` or `--judge model`.")
    if config.name == "keywords" and metric == "adherence":
        raise ConfigError("The metric adherence needs `--judge local` or `--judge model`.")
    if config.name is not None and metric in ("personal", "implicit_reward"):
        raise ConfigError(f"The metric {metric} takes no judge.")
    if config.name == "local" and config.model:
        find_model(config.model)  # before any answer is drawn for it
    return config


def needed(metric: str) -> str:
    """Return the method of a judge that a metric calls."""
    return "pairwise" if metric == "win_rate" else metric


def make_judge(
    judge: Judge, metric: str, folder: Path, model: LanguageModel | None = None
) -> tuple[Any, dict[str, Any]]:
    """Return the judge and its description; no judge where patterns or letters decide.

    Args:
        judge: From `check_judge`.
        metric: What it is to say: refusal, adherence, personal or win_rate.
        folder: Of the run; answers of an endpoint are kept in it.
        model: The run's own model, used again where it is the judge's too.
    """
    if metric == "personal":
        return None, {"name": "first letter"}
    if not isinstance(judge, JudgeConfig):
        function: Any = judge
        found = judge if hasattr(judge, needed(metric)) else FunctionJudge(function)
        return found, _function(judge)
    if judge.name is None and metric == "adherence":
        return None, {"name": "patterns"}
    if judge.name in (None, "keywords"):
        return keywords()
    if judge.name == "local":
        name = str(judge.model)
        own = model is not None and name == model.name and not model.has_adapter
        local = LocalJudge(model if own and model is not None else load.load_model(name))
        about = {"model": name, "hash": model_hash(local.model, name)}
        return local, {"name": "local", "rubric": VERSION, **about}
    endpoint = judge.endpoint(folder / "judge.jsonl")
    about = {"url": redacted(str(judge.url)), "model": str(judge.model)}
    options = {"options": dict(endpoint.options)}
    return ModelJudge(endpoint), {"name": "model", "rubric": VERSION, **about, **options}


def keywords() -> tuple[KeywordJudge, dict[str, Any]]:
    """Return the keyword judge, told by the text of its rule."""
    folder = Path(str(refusal.__file__)).parent
    own = [Path(str(module.__file__)) for module in (refusal, language)]
    files = [*own, *sorted(folder.glob("*_patterns.py"))]
    return KeywordJudge(), {"name": "keywords", "rule": digest([file_hash(f) for f in files])}


def spent(judge: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a judge behind an endpoint cost: for the results, and of this session."""
    endpoint = getattr(judge, "endpoint", None)
    if not isinstance(endpoint, Endpoint):
        return {}, {}
    return {"judge_cost": endpoint.spent()}, {"judge": asdict(endpoint.usage)}


def _function(judge: Any) -> dict[str, Any]:
    """Return what tells a function or an object that judges: its name and its source."""
    own = judge if inspect.isroutine(judge) else type(judge)
    try:
        source = inspect.getsource(own)
    except (OSError, TypeError):
        source = None
    name = f"{own.__module__}.{own.__qualname__}"
    return {"name": "function", "function": name, "source": digest(source)}
