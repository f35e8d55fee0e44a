"""Preference: does a method give people what they want? (Win rates are in `pairwise`.)

personal preference    four users, four answers, does the method pick the user's own?
                       Gao et al., ICML 2024, arXiv 2401.11458 (Linear Alignment). Differs from the
                       release: our own wording of the question and of the principle; the answer is
                       not begun with "Answer:"; every user of a question is asked, not one of them
adherence              does a response follow the principle, by pattern or by a judge
win rate               pairs of responses in both orders, ties as halves, length-controlled
                       Dubois et al., COLM 2024, arXiv 2404.04475
implicit reward        log-ratio of a method's branches on chosen and rejected answers: a reward
                       model that nobody trained, as in Rafailov et al., arXiv 2305.18290
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trueline.engine.decoding import generate
from trueline.errors import ConfigError, DataError
from trueline.evals.datasets import PersonalQuestion, PreferencePair
from trueline.evals.likelihood import (
    branch_items,
    branch_logprobs,
    label_logprobs,
    response_ids,
)
from trueline.evals.statistics import Estimate, bootstrap_interval, mean, rate
from trueline.methods import Blend
from trueline.types import Message, Method, Request, SamplingParams

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel

LETTERS = "ABCDEFGH"
PERSONAL_SAMPLING = SamplingParams(max_new_tokens=10)
"""Ten tokens, as the paper's code. Greedy, as its scripts are; they have temperature 0.5 beside it,
which narrows the candidates: `mask_temperature=0.5` repeats them."""


def personal_prompt(question: PersonalQuestion) -> str:
    """Return the question with its answers as a choice of letters."""
    options = zip(LETTERS, question.answers, strict=False)
    listed = "\n".join(f"{letter}. {answer.strip()}" for letter, answer in options)
    return (
        f"{question.question.strip()}\n\n{listed}\n\n"
        "Which of these answers suits me best? Answer with its letter."
    )


def personal_chat(question: PersonalQuestion) -> list[Message]:
    """Return the question as a chat, behind its system text if it has one."""
    chat: list[Message] = [{"role": "user", "content": personal_prompt(question)}]
    if question.system is not None:
        chat.insert(0, {"role": "system", "content": question.system})
    return chat


def personal_principle(user: str) -> str:
    """Return the principle that names the user."""
    return f"You are talking to this user: {user.strip()} Give the answer that this user prefers."


def first_letter(text: str, count: int = 4) -> int:
    """Return which option an answer's first letter names, 0 for A; -1 for none of them."""
    match = re.match(r"[\s\"'*(\[]*([A-Za-z])(?![A-Za-z])", text)
    index = LETTERS.find(match[1].upper()) if match else -1
    return index if index < count else -1


def personal_choices(
    model: LanguageModel,
    questions: Sequence[PersonalQuestion],
    method_for: Callable[[str], Method],
    *,
    by: str = "letter",
    sampling: SamplingParams = PERSONAL_SAMPLING,
    batch_size: int = 32,
) -> NDArray[np.int64]:
    """Return which answer the method picks: shape (question, user), -1 where it names none.

    Args:
        model: From `load_model`.
        questions: All with equally many users.
        method_for: Makes the method from a principle that names the user.
        by: "letter" generates and reads the first letter, as the paper; "logprob" takes the letter
            that the method finds likeliest, so that no answer is unreadable.
        sampling: For "letter".
        batch_size: Requests or rows of one batch.

    The right choice is the user's own number: see `personal_accuracy`.
    """
    if by not in ("letter", "logprob"):
        raise ConfigError(f'`by` must be "letter" or "logprob", got "{by}".')
    users = {len(q.users) for q in questions}
    if len(users) != 1:
        raise DataError(f"Questions must have equally many users, got {sorted(users)}.")
    count = users.pop()
    cells = [
        (personal_chat(q), method_for(personal_principle(user)))
        for q in questions
        for user in q.users
    ]
    if by == "letter":
        requests = [Request(chat, method) for chat, method in cells]
        completions = generate(model, requests, sampling=sampling, batch_size=batch_size)
        picks = [first_letter(c.text, count) for c in completions]
    else:
        picks = []
        for chat, method in cells:
            row = label_logprobs(
                model, [chat], LETTERS[:count], method=method, batch_size=batch_size
            )[0]
            picks.append(-1 if np.isnan(row).any() else int(row.argmax()))
    return np.array(picks).reshape(len(questions), count)


def personal_accuracy(choices: ArrayLike) -> Estimate:
    """Return the share of cells (question, user) in which the user's own answer was picked."""
    picked = np.asarray(choices)
    return rate(picked == np.arange(picked.shape[1])[None, :])


def branch_weights(method: Method, branches: int) -> NDArray[np.float64]:
    """Return how much each branch's log-probability counts in the implicit reward; the sum is 0.

    With two branches the first minus the second; for `blend` the principles by their weights
    against the plain prompt, sum_k w_k (log p_k - log p_0).

    Raises:
        ConfigError: The method has one branch: there is nothing to compare with.
    """
    if isinstance(method, Blend):
        weights = np.array([weight for _, weight in method.principles], dtype=float)
        return np.concatenate([[-weights.sum()], weights])
    if branches != 2:
        raise ConfigError(
            f'Method "{method.name}" has {branches} branch{"es" if branches > 1 else ""}; an '
            "implicit reward compares two. Try linear-alignment, contrast, self-cd or blend."
        )
    return np.array([1.0, -1.0])


def implicit_rewards(
    model: LanguageModel,
    method: Method,
    pairs: Sequence[PreferencePair],
    *,
    batch_size: int = 16,
    skip_long: bool = False,
) -> NDArray[np.float64]:
    """Return the implicit reward of every chosen and rejected answer: shape (pair, 2).

        reward(y) = sum_t [ log p(y_t | first branch, y_<t) - log p(y_t | second branch, y_<t) ]

    in nats, the sum over the answer's tokens (end of text not counted), teacher-forced. With
    Linear Alignment's branches it is the reward that the principle implies; for Self-CD it is high
    for what the safety prompt makes likelier.

    Args:
        model: From `load_model`.
        method: Gives the branches; its strength plays no part.
        pairs: From `load_pairs`.
        batch_size: Rows of one forward; a pair has two rows a branch.
        skip_long: Give nan to both answers of a pair that does not fit the model's positions,
            instead of a `DataError`.
    """
    rewards = np.full((len(pairs), 2), np.nan)
    items, used = [], []
    weights = branch_weights(method, len(method.prompts([{"role": "user", "content": "?"}])))
    for i, pair in enumerate(pairs):
        answers = [response_ids(model, pair.messages, t) for t in (pair.chosen, pair.rejected)]
        try:
            items += branch_items(model, method, [pair.messages] * 2, answers)
        except DataError as error:
            if skip_long:
                continue
            raise DataError(f'Pair "{pair.id}": {error}') from None
        used.append(i)
    found = branch_logprobs(model, items, batch_size=batch_size)
    sums = np.array([values.sum(0) for values in found]).reshape(len(used), 2, len(weights))
    rewards[used] = sums @ weights
    return rewards


@dataclass(frozen=True)
class RewardAccuracy:
    """How often the chosen answer has the higher implicit reward; equal rewards count half."""

    accuracy: Estimate
    margin: Estimate
    """Mean of chosen minus rejected, nats."""
    skipped: int
    """Pairs without rewards because they do not fit the model."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON."""
        return asdict(self)


def reward_accuracy(rewards: ArrayLike, *, seed: int = 0) -> RewardAccuracy:
    """Return the accuracy of rewards (pair, 2): chosen first. Wilson interval, bootstrap margin."""
    values = np.asarray(rewards, dtype=float)
    known = values[~np.isnan(values).any(axis=1)]
    if not len(known):
        raise DataError("No pair has rewards. Give pairs that fit the model.")
    margins = known[:, 0] - known[:, 1]
    points = (margins > 0) + 0.5 * (margins == 0)
    accuracy = rate(points > 0.5)
    if (points == 0.5).any():
        low, high = bootstrap_interval(points, seed=seed)
        estimate = mean(points, seed=seed)
        accuracy = Estimate(estimate.value, len(points), low, high, estimate.standard_error)
    return RewardAccuracy(accuracy, mean(margins, seed=seed), len(values) - len(known))
