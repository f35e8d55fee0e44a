"""Diagnosis: what a model makes of a system text, and what the methods have to work with.

Before anything is swept or trained: how far a principle's prompt moves the model's distribution and
its answers, how often it refuses under the system texts that a user would try first, in which
direction a safety prompt works, and from which settings to go on. A minute, not a measurement: few
prompts, short greedy answers, wide intervals.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trueline.engine.decoding import Decoder
from trueline.engine.protocol import Prompt
from trueline.errors import ConfigError, check_number, check_text
from trueline.evals import effects
from trueline.evals.datasets import Source
from trueline.evals.effects import Effect
from trueline.evals.items import CHECKED, Item, adherence_items, bundled, refusal_items
from trueline.evals.judges import KeywordJudge
from trueline.evals.patterns import check_pattern
from trueline.evals.points import HELPFUL
from trueline.evals.statistics import Estimate, mean, rate
from trueline.jobs.readings import (
    ALPHA,
    STEPS,
    Diagnosis,
    PrincipleReading,
    TextReading,
    direction_of,
    setting_of,
    start_from,
    with_answers,
)
from trueline.methods import LinearAlignment, Plain, SelfCD
from trueline.methods.self_cd import SAFETY_PROMPT
from trueline.models.load import LanguageModel
from trueline.models.prompts import chat_of, default_system, encode
from trueline.models.source import ModelConfig
from trueline.records.hashes import versions
from trueline.records.run_folder import RunFolder
from trueline.types import (
    Completion,
    Message,
    Method,
    Progress,
    Request,
    SamplingParams,
    check_seed,
)

SAMPLING = SamplingParams(max_new_tokens=32)
BATCH = 64
SCORED = 8
"""Answers of each principle or system text on which the branches are compared."""


@dataclass(frozen=True)
class DiagnoseConfig:
    """What is looked at.

    Without principles and requests both parts run, on three principles that a pattern can check and
    the bundled requests; with one of them that part alone.

    >>> DiagnoseConfig("smollm2", principles=("Be brief.",))
    """

    model: ModelConfig | str = "tiny"
    """The model, or its name."""
    principles: tuple[str, ...] = ()
    """System texts to follow; without any, three that a pattern can check."""
    pattern: str | None = None
    """Answers that match it follow the principles given; case does not count. Without one they are
    not judged."""
    prompts: Source | None = None
    """Questions for the principles; by default the bundled ones."""
    safe: Source | None = None
    """Requests that should be answered; by default the bundled ones."""
    unsafe: Source | None = None
    """Requests that should be refused; by default the bundled ones."""
    safety_prompt: str = SAFETY_PROMPT
    """The safety-emphasising system text."""
    limit: int = 16
    """Questions a principle, and requests of each kind, at least 2."""
    seed: int = 0
    """Which prompts are drawn."""

    def __post_init__(self) -> None:
        texts = self.principles
        object.__setattr__(self, "principles", (texts,) if isinstance(texts, str) else tuple(texts))
        for text in self.principles:
            check_text("principles", text, "State in words what the model is to follow.")
        check_text("safety_prompt", self.safety_prompt, "Leave it out for the paper's kind.")
        check_pattern(self.pattern, "`--pattern`")
        if self.pattern is not None and not self.principles:
            raise ConfigError("`--pattern` goes with `--principle`: the others have their own.")
        if (self.safe is None) != (self.unsafe is None):
            raise ConfigError("Give `--safe` and `--unsafe` together.")
        if self.prompts is not None and not self.asks_principles:
            raise ConfigError("`--prompts` goes with `--principle`.")
        check_number("limit", self.limit, low=2, whole=True)
        check_seed(self.seed)

    @property
    def source(self) -> ModelConfig:
        """The model's settings."""
        return ModelConfig(self.model) if isinstance(self.model, str) else self.model

    @property
    def asks_principles(self) -> bool:
        """Whether principles are looked at."""
        return bool(self.principles) or self.safe is None

    @property
    def asks_refusals(self) -> bool:
        """Whether refusals are looked at."""
        return self.safe is not None or not self.principles


def diagnose(
    config: DiagnoseConfig | None = None,
    folder: str | Path | None = None,
    *,
    model: LanguageModel | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    command: str = "",
) -> Diagnosis:
    """Look at what a model makes of system texts; about a minute for a model of 135M on one core.

    Args:
        config: What is looked at.
        folder: For results.json, report.md and answers.jsonl; without one nothing is written.
        model: A model that is loaded already, instead of the config's.
        progress: Told how many answers there are.
        overwrite: Start again though the folder holds another run.
        command: What the user typed, kept in the folder.

    Raises:
        ConfigError, DataError, ModelError: Before anything is decoded, for what cannot be used.

    >>> diagnose(DiagnoseConfig("smollm2")).aligned
    """
    config = config or DiagnoseConfig()
    began = time.perf_counter()
    asked, requests = _asked(config), _requests(config)
    model = model or config.source.load()
    look = _Look(config, model, progress, asked, requests)
    if folder is None:
        return look.diagnosis(began)
    settings = {
        **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)},
        "model": config.source.identity(model),
        **versions(),
    }
    run = RunFolder(
        Path(folder).expanduser(), "diagnosis", settings, command=command, overwrite=overwrite
    )
    try:
        run.start()
        found = replace(look.diagnosis(began), folder=run.folder)
        run.write("answers.jsonl", found.answer_lines())
        run.write("report.md", found.markdown())
        run.finish(found.as_dict())
        return found
    finally:
        run.close()


def _asked(config: DiagnoseConfig) -> dict[str, list[Item]]:
    """Return principle -> its questions, each with the pattern of an answer that follows."""
    if not config.asks_principles:
        return {}
    texts = dict.fromkeys(config.principles, config.pattern) if config.principles else CHECKED
    source = config.prompts
    if source is None:
        source = list(dict.fromkeys(row["question"] for row in bundled()["questions"]))
    limited: Any = {"limit": config.limit, "seed": config.seed}
    return {
        text: adherence_items(source, principle=text, pattern=pattern, **limited)[0]
        for text, pattern in texts.items()
    }


def _requests(config: DiagnoseConfig) -> list[Item]:
    """Return the requests that should be answered, then those that should be refused."""
    if not config.asks_refusals:
        return []
    return refusal_items(config.safe, config.unsafe, config.limit, seed=config.seed)[0]


class _Look:
    """One look at a model: everything that is asked, counted and compared."""

    def __init__(
        self,
        config: DiagnoseConfig,
        model: LanguageModel,
        progress: Progress | None,
        asked: dict[str, list[Item]],
        requests: list[Item],
    ) -> None:
        self.config, self.model, self.progress = config, model, progress
        self.asked, self.requests = asked, requests
        self.decoder = Decoder(model, batch_size=BATCH)
        self.default = default_system(model) if model.default_system else None
        self.rows: list[dict[str, Any]] = []
        self.texts = self._texts()
        self.total = sum(2 * len(items) for items in asked.values())
        self.total += max(map(len, asked.values()), default=0)
        self.total += (len(self.texts) + 1) * len(requests)
        for text, items in asked.items():
            for item in items:
                self.decoder.encode(Request(item.chat, Plain(principle=text)))
        for name in self.texts:
            for item in requests:
                self.decoder.encode(Request(self._under(name, item)))

    def diagnosis(self, began: float) -> Diagnosis:
        """Return what was found; `began` is when the clock was started."""
        principles, aligned = self._principles()
        texts, direction, alpha = self._refusals()
        return Diagnosis(
            model=self.model.name,
            default_system=self.default,
            principles=principles,
            texts=texts,
            aligned=aligned,
            self_cd=direction,
            alpha=alpha,
            seconds=round(time.perf_counter() - began, 1),
            answers=tuple(self.rows),
        )

    # Principles

    def _principles(self) -> tuple[tuple[PrincipleReading, ...], dict[str, Any] | None]:
        """Return what the model makes of each principle, and the setting to start from."""
        if not self.asked:
            return (), None
        questions = list(
            {item.prompt: item for items in self.asked.values() for item in items}.values()
        )
        plain = dict(
            zip((q.prompt for q in questions), self._answers("plain", questions), strict=True)
        )
        readings = []
        for text, items in self.asked.items():
            prompted = self._answers("prompt", items, Plain(principle=text), principle=text)
            effect, costs = self._compared(text, items, prompted)
            answers = {"plain": [plain[item.prompt] for item in items], "prompt": prompted}
            readings.append(
                with_answers(PrincipleReading(text, effect, costs, {}, {}), items, answers)
            )
        step = start_from(readings)
        if step is None:
            return tuple(readings), None
        options = {n: getattr(step, n) for n in ("ratio", "candidates", "gate", "damping")}
        for i, (text, items) in enumerate(self.asked.items()):
            method = LinearAlignment(text, **options)
            aligned = self._answers("aligned", items, method, principle=text)
            readings[i] = with_answers(readings[i], items, {"aligned": aligned})
        return tuple(readings), options

    def _compared(
        self, text: str, items: Sequence[Item], answers: Sequence[Completion]
    ) -> tuple[Effect, dict[str, float]]:
        """Return how far the principle moves the model, and what each step overrules, a token."""
        method = LinearAlignment(text)
        prompts = [self.decoder.encode(Request(item.chat, method)) for item in items[:SCORED]]
        logits = list(
            effects.forced(self.decoder, prompts, [a.token_ids for a in answers[:SCORED]])
        )
        found = effects.effect(logits)
        costs = {
            setting_of(step): sum(effects.overruled(step, z) for z in logits) / found.tokens
            for step in STEPS
        }
        return found, costs

    # Refusals

    def _texts(self) -> tuple[str, ...]:
        """Return the names of the system texts that are tried, what the model has first."""
        if self.default is None:
            return ("none", "helpful", "safety")
        return ("default", "none", "helpful", "safety", "safety alone")

    def _under(self, name: str, item: Item) -> list[Message]:
        """Return a request under the system text called `name`."""
        own = chat_of(self.model, item.chat)
        if name == self.texts[0]:
            return own
        if name == "safety":
            return SelfCD(safety_prompt=self.config.safety_prompt).prompts(own)[0]
        texts = {"none": "", "helpful": HELPFUL, "safety alone": self.config.safety_prompt}
        rest = [message for message in own if message["role"] != "system"]
        return [{"role": "system", "content": texts[name]}, *rest]

    def _refusals(self) -> tuple[tuple[TextReading, ...], Any, float | None]:
        """Return how the model refuses under each text, Self-CD's direction, and its alpha."""
        if not self.requests:
            return (), None, None
        safe = [item for item in self.requests if item.group == "safe"]
        own: Any = None
        readings = []
        for name in self.texts:
            chats = [self._under(name, item) for item in self.requests]
            answers = self._answers(name, self.requests, chats=chats)
            odds = effects.refusal_odds(
                self.decoder, [encode(self.model, self._under(name, item)) for item in safe]
            )
            effect = shift = None
            if own is None:
                own = odds
            else:
                effect, shift = self._moved(chats, answers), mean(odds - own)
            readings.append(TextReading(name, *self._refused(answers), effect, shift))
        direction = direction_of(readings[0], next(r for r in readings if r.name == "safety"))
        if direction != "takes away":
            self._tell(len(self.requests))
            return tuple(readings), direction, None
        method = SelfCD(alpha=ALPHA, safety_prompt=self.config.safety_prompt)
        name = f"Self-CD, alpha {ALPHA:g}"
        answers = self._answers(name, self.requests, method)
        readings.append(TextReading(name, *self._refused(answers)))
        return tuple(readings), direction, ALPHA

    def _moved(self, chats: Sequence[list[Message]], answers: Sequence[Completion]) -> Effect:
        """Return how far a text is from the model's first one, on some of the requests."""
        some = range(0, len(chats), max(1, len(chats) // SCORED))
        pairs = [(chats[i], self._under(self.texts[0], self.requests[i])) for i in some]
        prompts = [Prompt([encode(self.model, chat) for chat in pair]) for pair in pairs]
        return effects.effect(
            effects.forced(self.decoder, prompts, [answers[i].token_ids for i in some])
        )

    def _refused(self, answers: Sequence[Completion]) -> tuple[Estimate, Estimate]:
        """Return over-refusal and refusal of harmful requests, by the rule about words."""
        texts = [answer.text for answer in answers]
        verdicts = KeywordJudge().refusal([item.prompt for item in self.requests], texts)
        flags: dict[str, list[bool]] = {"safe": [], "unsafe": []}
        for item, verdict in zip(self.requests, verdicts, strict=True):
            flags[item.group].append(verdict.refused)
        return rate(flags["safe"]), rate(flags["unsafe"])

    # Both

    def _answers(
        self,
        way: str,
        items: Sequence[Item],
        method: Method | None = None,
        *,
        chats: Sequence[list[Message]] | None = None,
        principle: str | None = None,
    ) -> list[Completion]:
        """Return greedy answers, keep them, and count them."""
        asked = [item.chat for item in items] if chats is None else chats
        prompts = [self.decoder.encode(Request(chat, method, SAMPLING)) for chat in asked]
        done: list[Completion] = []
        self._tell(0)
        for own in self.decoder.each(prompts):
            done += own
            self._tell(1)
        for item, answer in zip(items, done, strict=True):
            said = {"principle": principle} if principle else {"group": item.group}
            self.rows.append({"way": way, **said, "prompt": item.prompt, "text": answer.text})
        return done

    def _tell(self, new: int) -> None:
        self.told = getattr(self, "told", 0) + new
        if self.progress is not None:
            self.progress("answers", self.told, self.total)
