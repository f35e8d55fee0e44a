"""Measurement: one method on one model by one metric, with the plain model beside it.

refusal           over-refusal of safe prompts against refusals of harmful ones
adherence         how well responses follow a principle, by pattern, judge or function
personal          whether each user gets the answer that they prefer, by letter
implicit_reward   how often the chosen answer of a pair has the higher reward of a principle
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trueline.errors import ConfigError, check_number
from trueline.evals.datasets import Source
from trueline.evals.judging import Judge, check_judge
from trueline.evals.metrics import METRICS
from trueline.evals.patterns import check_pattern
from trueline.evals.points import Way
from trueline.jobs.decoded import measure_points
from trueline.jobs.scored import measure_letters, measure_rewards
from trueline.jobs.sessions import Calling, MeasureResults
from trueline.models.load import LanguageModel
from trueline.models.source import ModelConfig
from trueline.types import Method, Progress, SamplingParams, check_seed

DATA: dict[str, tuple[str, ...]] = {
    "refusal": ("safe", "unsafe"),
    "adherence": ("prompts",),
    "personal": ("questions",),
    "implicit_reward": ("pairs",),
}
"""Metric -> where its prompts come from."""
BUNDLED = ("refusal", "adherence")
"""Metrics for which the bundled model brings prompts that it never saw in training."""


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured, on what, and by whom.

    Data are a path (JSONL, CSV, TSV, TXT), hf:NAME, or a list of texts, chats or rows. A row may
    have a `system` text, `messages` in place of a prompt, and for adherence a `principle` and a
    `pattern` of its own. Without data the bundled model's held-out prompts are used.

    >>> MeasureConfig(method=SelfCD(alpha=1.5))
    >>> MeasureConfig(method=LinearAlignment("Be brief."), prompts=["What is tea?"],
    ...               judge=lambda prompt, response: len(response) < 80)
    """

    model: ModelConfig | str = "tiny"
    """The model, or its name."""
    metric: Literal["refusal", "adherence", "personal", "implicit_reward"] | None = None
    """What is measured; None is what the data are for, and without data what the method is for."""
    method: Method | type[Method] | str | None = None
    """A method, its class or its name; None is Self-CD for refusals, else Linear Alignment."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of a method that is given by class or name."""
    sampling: SamplingParams = SamplingParams(max_new_tokens=64)  # noqa: RUF009 - frozen
    """How tokens are chosen; one completion a prompt."""
    seed: int = 0
    """Of the first prompt's sampling, of what `limit` draws, and of a recommendation's halves."""
    safe: Source | None = None
    """Refusal: prompts that should be answered."""
    unsafe: Source | None = None
    """Refusal: prompts that should be refused."""
    prompts: Source | None = None
    """Adherence: prompts, with a principle each or the method's."""
    questions: Source | None = None
    """Personal: rows of `question`, `answers` and `users`."""
    pairs: Source | None = None
    """Implicit reward: rows of `chosen` and `rejected` answers (HH)."""
    system: str | None = None
    """System text of chats that have none of their own."""
    pattern: str | None = None
    """Adherence: responses that match follow the principle; case does not count."""
    absent: bool = False
    """Adherence: responses that match do not."""
    by: Literal["letter", "logprob"] = "letter"
    """Personal: the answer's first letter, or the likeliest letter."""
    judge: Judge | None = None
    """keywords, local or model with its settings, a function of prompt and response, or an object
    like those of `trueline.evals.judges`; None is the rule about words for refusals, and patterns
    for adherence."""
    limit: int | None = None
    """At most so many prompts of each kind, spread over the kinds of the data set."""
    skip_long: bool = False
    """Leave out, and count, prompts that do not fit the model, instead of an error."""
    batch_size: int = 64
    """Prompts decoded together."""
    baseline: bool = True
    """Measure the plain model too, and compare with it."""
    plot: bool = True
    """Draw plot.png; needs matplotlib."""
    refill: bool = False
    """Let prompts take the places of those that have ended, instead of waiting for the whole batch:
    faster where lengths differ, but a resumed run may round otherwise than an unbroken one."""

    def __post_init__(self) -> None:
        put = object.__setattr__
        if isinstance(self.model, (str, Path)):
            put(self, "model", ModelConfig(str(self.model)))
        if not isinstance(self.model, ModelConfig):
            raise ConfigError(f"`model` must be a name or a ModelConfig, got {self.model!r}.")
        if self.metric is None:
            put(self, "metric", self._meant())
        if self.metric not in DATA:
            raise ConfigError(f'`metric` must be one of {", ".join(DATA)}, got "{self.metric}".')
        self._check_numbers()
        self._check_data()
        judge = None if self.by == "logprob" and self.judge is None else self.judge
        put(self, "judge", check_judge(judge, self.metric))
        check_pattern(self.pattern, "`--pattern`")
        if self.absent and self.pattern is None:
            raise ConfigError("`--absent` turns `--pattern` round, and there is none.")
        if self.by not in ("letter", "logprob"):
            raise ConfigError(f'`by` must be "letter" or "logprob", got "{self.by}".')
        if self.by == "logprob" and self.metric != "personal":
            raise ConfigError("`--by logprob` goes with `--questions FILE`.")

    @property
    def way(self) -> Way:
        """The method with the options that it is given."""
        default = "self-cd" if self.metric in ("refusal", None) else "linear-alignment"
        return Way.of(default if self.method is None else self.method, self.options)

    @property
    def source(self) -> ModelConfig:
        """The model's settings."""
        assert isinstance(self.model, ModelConfig)
        return self.model

    @property
    def sources(self) -> list[str]:
        """Names of what the prompts come from."""
        given = [getattr(self, name) for names in DATA.values() for name in names]
        named = [str(v) if isinstance(v, (str, Path)) else "a list" for v in given if v is not None]
        return named or ["bundled"]

    def _meant(self) -> str:
        """Return the metric that the data, or else the method, are for."""
        for metric, names in DATA.items():
            if any(getattr(self, name) is not None for name in names):
                return metric
        return "refusal" if self.method is None else self.way.goal

    def _check_numbers(self) -> None:
        check_number("batch_size", self.batch_size, low=1, whole=True)
        if self.limit is not None:
            check_number("limit", self.limit, low=1, whole=True)
        check_seed(self.seed)
        if self.sampling.n != 1 or self.sampling.logprobs:
            raise ConfigError(
                "A measurement takes one completion a prompt: no `--n`, no `--logprobs`."
            )
        if self.system is not None and (
            not isinstance(self.system, str) or (self.system and not self.system.strip())
        ):
            raise ConfigError(f'`system` must be some text, or "" for none, got {self.system!r}.')

    def _check_data(self) -> None:
        own = DATA[str(self.metric)]
        for names in DATA.values():
            for name in names:
                if getattr(self, name) is not None and name not in own:
                    raise ConfigError(
                        f"`--{name}` is not for the metric {self.metric}. Leave it out."
                    )
        if all(getattr(self, name) is None for name in own):
            needed = " and ".join(f"--{name} FILE" for name in own)
            if self.metric not in BUNDLED:
                raise ConfigError(f"The metric {self.metric} needs {needed}.")
            if self.source.name != "tiny":
                raise ConfigError(
                    f'Model "{self.source.name}" needs {needed}; the bundled prompts are for model '
                    '"tiny".'
                )


def measure(
    config: MeasureConfig,
    folder: str | Path | None = None,
    *,
    model: LanguageModel | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    command: str = "",
) -> MeasureResults:
    """Measure, and return the numbers; a run that was stopped goes on in its folder.

    Args:
        config: What is measured.
        folder: For responses, verdicts and numbers; by default runs/METRIC-HASH.
        model: One that is loaded already, in place of `config.model`.
        progress: Called as `progress(what, done, total)` for every finished prompt.
        overwrite: Start again though the folder holds another run.
        command: What the user typed, to be kept.

    Raises:
        ConfigError, DataError, ModelError: Before anything is decoded, for what cannot be used.

    >>> measure(MeasureConfig(method=SelfCD()), "runs/x").rates["over_refusal"]
    """
    if model is not None:
        config = dataclasses.replace(config, model=ModelConfig(model.name, raw=model.raw))
    calling = Calling(folder, model, progress, overwrite, command)
    if config.metric == "implicit_reward":
        return measure_rewards(config, calling)
    if config.metric == "personal" and config.by == "logprob":
        return measure_letters(config, calling)
    return measure_points(config, calling)


assert set(METRICS) | {"implicit_reward"} == set(DATA)
