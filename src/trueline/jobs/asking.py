"""Asking: what a state of the model answers to sets of prompts, judged, each answer kept.

A state is the untouched model or the model after a principle, told by a hash of all that led to it.
An answer is decoded and judged once for a state, a prompt set and a judge; what a kill cut short is
decoded again in the same batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from trueline.engine.decoding import Decoder
from trueline.engine.protocol import Continuation
from trueline.evals import metrics
from trueline.evals.effects import Effect, effect, forced
from trueline.evals.items import Item, told
from trueline.evals.likelihood import branch_kl
from trueline.evals.points import Point, Way, baseline_point
from trueline.evals.quality import repetition_rate
from trueline.evals.statistics import Estimate, mean
from trueline.methods import LinearAlignment
from trueline.models.prompts import chat_of, encode
from trueline.records.hashes import digest
from trueline.records.run_folder import RunFolder
from trueline.types import Progress, Request, SamplingParams

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel

LOOPING = 0.5
"""An answer repeats itself if more than this share of its 4-grams occurred in it before."""
EFFECT_ROWS = 16
"""Answers on which the effect of a principle's prompt is measured."""
Values = Sequence[float | None]


@dataclass(frozen=True)
class Suite:
    """Prompts that are asked and judged together."""

    name: str
    metric: str
    """adherence or refusal."""
    items: tuple[Item, ...]
    judge: Any = None
    """One of `trueline.evals.judges`; None uses the items' patterns."""
    judged_by: Mapping[str, Any] = field(default_factory=dict)
    """What tells the judge."""

    @property
    def key(self) -> str:
        """What tells the prompts from others, however they are judged."""
        return digest([item.chat for item in self.items])

    @property
    def judged(self) -> str:
        """What tells how they are judged."""
        about = [told(item) for item in self.items]
        return digest([self.metric, about, dict(self.judged_by)])


@dataclass(frozen=True)
class Answers:
    """What a state answered to a suite."""

    suite: Suite
    rows: Sequence[Mapping[str, Any]]
    verdicts: Sequence[Mapping[str, Any]]

    def values(self, name: str) -> list[float | None]:
        """Return a measure's value for each prompt; None where it has none."""
        if name == "format":
            return [float(well_formed(row)) for row in self.rows]
        if name == "ended":
            return [float(row["finish_reason"] == "stop") for row in self.rows]
        return [v.get(name) for v in self.verdicts]

    def numbers(self) -> dict[str, Any]:
        """Return every measure as plain values: an estimate each, and what the texts are like."""
        found = metrics.summarise(self.suite.metric, self.rows, self.verdicts)
        for name in ("format", "ended"):
            found["measures"][name] = estimated(self.values(name))
        return found

    def parts(self, sizes: Mapping[str, int]) -> dict[str, Answers]:
        """Return the answers cut into parts of these sizes, by name."""
        found, first = {}, 0
        for name, size in sizes.items():
            cut = slice(first, first + size)
            suite = replace(self.suite, items=self.suite.items[cut])
            found[name] = Answers(suite, self.rows[cut], self.verdicts[cut])
            first += size
        return found

    @property
    def texts(self) -> dict[str, str]:
        """Prompt -> answer."""
        return {i.prompt: r["text"] for i, r in zip(self.suite.items, self.rows, strict=True)}


def estimated(values: Values) -> dict[str, Any]:
    """Return a measure as `metrics.summarise` has it."""
    known = [v for v in values if v is not None]
    found = vars(metrics.estimate(known)) if known else dict.fromkeys(
        Estimate.__dataclass_fields__) | {"n": 0}  # fmt: skip
    unknown = len(values) - len(known)
    return {**found, "unknown": unknown, "outcomes": metrics.write_outcomes(values)}


def well_formed(row: Mapping[str, Any]) -> bool:
    """Return whether an answer is some text with no mark of a chat that does not run in circles."""
    text, tokens = row["text"], row["token_ids"]
    marks = any(mark in text for mark in ("<|", "|>", "[INST]", "<start_of_turn>", "\ufffd"))
    return bool(text.strip()) and not marks and repetition_rate(tokens) <= LOOPING


class Asking:
    """Asks suites of states, in one run's folder.

    Args:
        run: Whose `responses.jsonl` and `verdicts.jsonl` grow.
        sampling: Of every answer.
        batch_size: Prompts decoded together.
        seed: Of the first prompt's sampling.
        progress: Told of every finished answer.
    """

    def __init__(
        self,
        run: RunFolder,
        sampling: SamplingParams,
        batch_size: int,
        seed: int,
        progress: Progress | None,
    ) -> None:
        self.responses, self.verdicts = run.rows("responses.jsonl"), run.rows("verdicts.jsonl")
        self.sampling, self.batch_size, self.seed = sampling, batch_size, seed
        self.progress = progress

    def point(self, prompted: bool, principle: str | None = None) -> Point:
        """Return plain decoding, with a principle in its prompt or without."""
        if not prompted:
            return baseline_point(self.sampling)
        return Point("prompted", Way("plain", {"principle": principle}), self.sampling)

    def key(self, state: str, suite: Suite, prompted: bool = False) -> str:
        """Return what tells the answers of a state to a suite."""
        principle = suite.items[0].principle if suite.items and prompted else None
        about = self.point(prompted, principle).describe()
        return digest([state, suite.key, about, self.batch_size, self.seed])

    def missing(self, state: str, suite: Suite, prompted: bool = False) -> int:
        """Return how many answers are not there yet."""
        total = len(suite.items)
        return total - self.responses.done(self.key(state, suite, prompted), total)

    def ask(
        self, lm: LanguageModel, state: str, suite: Suite, prompted: bool = False, what: str = ""
    ) -> Answers:
        """Return the answers of a state, decoding and judging those that are missing."""
        key, done = self.key(state, suite, prompted), 0
        total = len(suite.items)
        done = total - self.missing(state, suite, prompted)
        label = what or suite.name
        if done < total and self.progress is not None:
            self.progress(label, done, total)

        def count(new: int) -> None:
            nonlocal done
            done += new
            if self.progress is not None:
                self.progress(label, done, total)

        principle = suite.items[0].principle if prompted and suite.items else None
        rows = metrics.respond(
            Decoder(lm, batch_size=self.batch_size), self.responses, key,
            self.point(prompted, principle), suite.items,
            batch_size=self.batch_size, seed=self.seed, on_done=count,
        )  # fmt: skip
        texts = [row["text"] for row in rows]

        def work(batch: Sequence[Item], first: int) -> list[dict[str, Any]]:
            own = texts[first : first + len(batch)]
            return metrics.judge_responses(suite.metric, batch, own, suite.judge)

        named = digest([key, suite.judged])
        verdicts = self.verdicts.compute(named, suite.items, self.batch_size, work)
        return Answers(suite, rows, verdicts)


def prompt_effect(lm: LanguageModel, answers: Answers) -> Effect:
    """Return how far a principle's prompt moves the model on its plain answers, a token."""
    decoder, some = Decoder(lm), list(zip(answers.suite.items, answers.rows, strict=True))
    some = some[:EFFECT_ROWS]
    prompts = [
        decoder.encode(Request(item.chat, LinearAlignment(str(item.principle)), SamplingParams()))
        for item, _ in some
    ]
    return effect(forced(decoder, prompts, [row["token_ids"] for _, row in some]))


def drift_from_start(lm: LanguageModel, answers: Answers) -> Estimate:
    """Return KL(untouched || this state) on the untouched model's answers, nats a token.

    Args:
        lm: The state, its adapter on; none is the untouched model, whose drift is 0.
        answers: Of the untouched model.
    """
    if not lm.has_adapter:
        return mean([0.0] * max(1, len(answers.rows)))
    items = []
    for item, row in zip(answers.suite.items, answers.rows, strict=True):
        prompt = encode(lm, chat_of(lm, item.chat))
        items.append(Continuation([prompt, prompt], row["token_ids"], (False, True)))
    return _mean(branch_kl(lm, items))


def _mean(found: Sequence[Any]) -> Estimate:
    """Return the mean over answers of their means over tokens."""
    return mean([float(values.mean()) for values in found])
