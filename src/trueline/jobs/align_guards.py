"""Guards of a project: what would make its numbers worthless, each looked at and told as a number.

Of the data, before anything is decoded (an error):
    shared      prompts to learn from that stand among the held-out ones, too
    cut         prompts that, under their principle, leave no room for an answer
    template    prompts of which the student would see other tokens than its teacher

Of a principle, after the model was measured as it is (the principle is not trained, and the verdict
says why):
    effect      nats a token by which its prompt moves the model; nothing to learn where it is none
    direction   answers that follow it, with the prompt less without; backwards below 0
    judge       verdicts that the judge changes when it is asked again
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trueline.errors import DataError
from trueline.evals.effects import FAINT
from trueline.evals.judges import ModelJudge
from trueline.evals.judging import JudgeConfig
from trueline.evals.metrics import judge_responses
from trueline.evals.statistics import paired_difference
from trueline.jobs.asking import Answers, prompt_effect
from trueline.jobs.project_prompts import ProjectPrompts, shared
from trueline.jobs.projects import AlignConfig
from trueline.methods import Plain
from trueline.models.prompts import chat_of, encode
from trueline.types import Message

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel

MOST_CHANGED = 0.1
"""Share of its verdicts that a judge may change."""
ASKED_AGAIN = 32
"""Answers that a judge is asked about twice."""


@dataclass(frozen=True)
class Guard:
    """One thing that was looked at."""

    name: str
    principle: str | None
    value: float
    limit: str
    """What it may be, in words."""
    passed: bool
    says: str
    """What it means, in a sentence."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def data_guards(
    config: AlignConfig, prompts: ProjectPrompts, lm: LanguageModel, new_tokens: int
) -> list[Guard]:
    """Return what was found of the data.

    Raises:
        DataError: Prompts are shared, cut, or rendered otherwise for the teacher.
    """
    again = shared(prompts.sets.values())
    if again:
        raise DataError(
            f"{len(again)} held-out prompts are also trained on or chosen from, the first: "
            f'"{again[0][:80]}". Leave them out of one side.'
        )
    found = [Guard("shared", None, 0, "0", True, "No held-out prompt is learned from.")]
    for principle in config.principles:
        own = prompts.principles.get(principle.title)
        if own is None:
            continue
        rows = [*(own.train or ()), *own.validation, *own.held_out]
        chats: list[list[Message]] = [
            [*row.get("context", ()), {"role": "user", "content": row["prompt"]}] for row in rows
        ]
        cut = [chat for chat in chats if not _fits(lm, chat, principle.text, new_tokens)]
        if cut:
            raise DataError(
                f'Principle "{principle.title}": {len(cut)} of {len(rows)} prompts leave no room '
                f"for {new_tokens} tokens in the {lm.max_positions} of the model, the first: "
                f'"{cut[0][-1]["content"][:60]}". Shorten them, or `max_new_tokens`.'
            )
        odd = [chat for chat in chats if not _same_template(lm, chat, principle.text)]
        if odd:
            raise DataError(
                f'Principle "{principle.title}": in {len(odd)} of {len(rows)} prompts the chat '
                "template writes the user's text otherwise under a system message, the first: "
                f'"{odd[0][-1]["content"][:60]}". Give another --chat-template.'
            )
        n = len(rows)
        found.append(Guard("cut", principle.title, 0, "0", True, f"0 of {n} prompts are cut."))
        says = f"The teacher sees the user's text as the student does in all {n}."
        found.append(Guard("template", principle.title, 0, "0", True, says))
    return found


def principle_guards(
    lm: LanguageModel, plain: Answers, prompted: Answers, judge: Any
) -> list[Guard]:
    """Return what was found of a principle's prompt and its judge, on validation prompts."""
    name = str(plain.suite.name)
    effect = prompt_effect(lm, plain)
    pairs = [
        (a, b)
        for a, b in zip(prompted.values("adherence"), plain.values("adherence"), strict=True)
        if a is not None and b is not None
    ]
    says = f"The prompt moves the model by {effect.nats:.3g} nats a token, and its likeliest token "
    says += f"in {100 * effect.flips:.1f} % of {effect.tokens}."
    passed = effect.nats >= FAINT
    found = [Guard("effect", name, effect.nats, f">= {FAINT:g}", passed, says)]
    if pairs:
        moved = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
        found.append(
            Guard("direction", name, moved.value, "not below 0", moved.high >= 0,
                  f"With the prompt {100 * moved.value:+.1f} points of answers follow "
                  f"[{100 * moved.low:+.1f}, {100 * moved.high:+.1f}].")
        )  # fmt: skip
    changed = changed_verdicts(prompted, judge)
    found.append(
        Guard("judge", name, changed, f"<= {MOST_CHANGED:g}", changed <= MOST_CHANGED,
              f"Asked again, the judge changes {100 * changed:.1f} % of its verdicts.")
    )  # fmt: skip
    return found


def changed_verdicts(answers: Answers, judge: Any) -> float:
    """Return the share of verdicts that differ when the same answers come in reverse order.

    An endpoint is asked anew, past the answers that are kept of it. A pattern changes none.
    """
    suite = answers.suite
    if suite.judge is None:
        return 0.0
    again = suite.judge
    if isinstance(judge, JudgeConfig) and judge.name == "model":
        again = ModelJudge(judge.endpoint())
    n = min(ASKED_AGAIN, len(suite.items))
    items = suite.items[:n][::-1]
    texts = [row["text"] for row in answers.rows[:n]][::-1]
    second = judge_responses(suite.metric, items, texts, again)[::-1]
    first = [v.get("adherence") for v in answers.verdicts[:n]]
    different = [_apart(a, b.get("adherence")) for a, b in zip(first, second, strict=True)]
    return sum(different) / n if n else 0.0


def failed(guards: Sequence[Guard], principle: str) -> list[Guard]:
    """Return the guards of a principle that did not pass."""
    return [g for g in guards if g.principle == principle and not g.passed]


def _apart(first: Any, second: Any) -> bool:
    """Return whether two grades of one answer fall on different sides, or one cannot be read."""
    if first is None or second is None:
        return (first is None) != (second is None)
    return (float(first) >= 0.5) != (float(second) >= 0.5)


def _fits(lm: LanguageModel, chat: list[Message], text: str | None, new_tokens: int) -> bool:
    limit = lm.max_positions
    branch = Plain(text).prompts(chat_of(lm, chat))[0]
    return limit is None or len(encode(lm, branch)) + new_tokens <= limit


def _same_template(lm: LanguageModel, chat: list[Message], text: str | None) -> bool:
    """Return whether what follows the system message is the same tokens under the principle."""
    own = chat_of(lm, chat)
    student, teacher = encode(lm, own), encode(lm, Plain(text).prompts(own)[0])
    # What a chat of one other word shares with this one at its end is no user's text.
    other = "?" if own[-1]["content"] != "?" else "!"
    rest = encode(lm, [*own[:-1], {"role": "user", "content": other}])
    tail = 0
    while tail < min(len(rest), len(student)) and rest[-1 - tail] == student[-1 - tail]:
        tail += 1
    text_ids = lm.tokenizer(own[-1]["content"], add_special_tokens=False, verbose=False)
    # Its first token may be joined to what stands before it.
    length = len(text_ids["input_ids"]) + tail - 1
    return student[-length:] == teacher[-length:]
