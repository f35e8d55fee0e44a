"""What crosses layers: messages, requests, sampling settings, completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypedDict, runtime_checkable

from trueline.errors import ConfigError, DataError, check_flag, check_number

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length"]
Progress = Callable[[str, int, int], None]
"""How a job says how far it is: progress(what, done, total)."""
ROLES = ("system", "user", "assistant")
COLDEST = 1e-6
"""Lower temperatures leave the range of float32 logits."""
MAX_THREADS = 4096
SEEDS = range(-(2**63), 2**63)


class Message(TypedDict):
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


@runtime_checkable
class Method(Protocol):
    """A decoding method: which K prompts to run, and how their logits become one distribution.

    Implementations are frozen dataclasses whose fields are their configuration (see
    `trueline.methods`); nothing needs to inherit from this class. Beside what is listed here a
    method may have

        first_tokens: int | None = None      so many tokens, then one branch goes on alone
        rest_branch: int = 0                 that branch
        base_branches: tuple[int, ...] = ()  branches that run with the model's adapter off
        combine_at(logits, temperature)      in place of `combine`, where what is added to the
                                             logits does not scale with them
        openness(logits, temperature)        share of its step that a gate lets through, for traces
    """

    name: ClassVar[str]

    def prompts(self, messages: Sequence[Message]) -> list[list[Message]]:
        """Return the messages of the K branches."""

    def combine(self, logits: Tensor) -> Tensor:
        """Map logits (batch, branch, vocab), temperature applied, to logits (batch, vocab)."""


def first_tokens(method: Method) -> int | None:
    """Return after how many tokens only one branch goes on; None: all branches to the end."""
    count: int | None = getattr(method, "first_tokens", None)
    return count


def rest_branch(method: Method) -> int:
    """Return the branch that goes on alone after `first_tokens`."""
    return int(getattr(method, "rest_branch", 0))


def base_branches(method: Method) -> tuple[int, ...]:
    """Return the branches that run with the model's adapter switched off."""
    return tuple(getattr(method, "base_branches", ()))


def combine_at(method: Method, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Combine logits (batch, branch, vocab) that were divided by `temperature`."""
    own = getattr(method, "combine_at", None)
    combined: Tensor = method.combine(logits) if own is None else own(logits, temperature)
    return combined


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen from the combined distribution, and when to stop.

    Defaults are greedy. Order: temperature, method, repetition penalty, top-k, top-p, min-p.
    """

    max_new_tokens: int = 128
    """Tokens to generate at most, at least 1."""
    temperature: float = 0.0
    """0 is greedy (methods then see temperature 1); divides the logits before the method. Otherwise
    at least 1e-6."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose mass reaches this; in (0, 1]."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the likeliest; in [0, 1]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens already seen; above 0."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it. One string is one of them."""
    n: int = 1
    """Completions for each request; sample j is drawn with seed + j. 1 where decoding is greedy."""
    logprobs: bool = False
    """Record the chosen token's log-probability before and after the method."""

    def __post_init__(self) -> None:
        check_number("max_new_tokens", self.max_new_tokens, low=1, whole=True)
        check_number("temperature", self.temperature, low=0)
        check_number("top_k", self.top_k, low=0, whole=True)
        check_number("top_p", self.top_p, low=0, high=1, low_open=True)
        check_number("min_p", self.min_p, low=0, high=1)
        check_number("repetition_penalty", self.repetition_penalty, low=0, low_open=True)
        check_number("n", self.n, low=1, whole=True)
        if 0 < self.temperature < COLDEST:
            raise ConfigError(
                f"`temperature` must be 0 (greedy) or at least {COLDEST:g}, "
                f"got {self.temperature!r}."
            )
        if self.n > 1 and self.greedy:
            raise ConfigError(
                f"`n` must be 1 where `temperature` is 0, got {self.n}: greedy completions are all "
                "the same. Give a `temperature`."
            )
        check_flag("logprobs", self.logprobs)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(s, str) and s for s in stop):
            raise ConfigError(f"`stop` must be strings that are not empty, got {self.stop!r}.")
        object.__setattr__(self, "stop", tuple(stop))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0


@dataclass(frozen=True)
class Request:
    """One thing to answer: a prompt, and how to decode it.

    `messages` may be a string (one user message) or a sequence of messages. `method` and
    `sampling` fall back to those of the call.
    """

    messages: str | Sequence[Message]
    method: Method | None = None
    sampling: SamplingParams | None = None
    seed: int = 0
    adapter: str | None = None
    """Name of one of the model's `adapters`; None is the model with none of these."""

    def __post_init__(self) -> None:
        check_call(self.method, self.sampling)
        check_seed(self.seed)


@dataclass(frozen=True)
class Completion:
    """A finished text. `token_ids` includes the end-of-text token if the model gave one."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    seed: int
    prompt_tokens: tuple[int, ...]
    """Prompt length of each branch."""
    logprobs: list[float] | None = None
    """Log-probability of each token under the combined distribution it was drawn from."""
    branch_logprobs: list[float] | None = None
    """The same before the method, under the first branch alone; after the method's `first_tokens`
    under its rest branch, the only one that still runs."""
    trace: list[Any] = field(default_factory=list, repr=False)


def check_seed(seed: object) -> None:
    """Raise `ConfigError` unless the seed is a whole number that fits in 64 bits."""
    if not isinstance(seed, int) or isinstance(seed, bool) or seed not in SEEDS:
        raise ConfigError(f"`seed` must be a whole number below 2^63, got {seed!r}.")


def check_threads(threads: int | None) -> None:
    """Raise `ConfigError` unless it is None or a number of CPU threads."""
    if threads is not None:
        check_number("threads", threads, low=1, high=MAX_THREADS, whole=True)


EMPTY = ("system", "")
"""The one message without text that means something: the template is not to put in its own."""


def check_call(method: object, sampling: object) -> None:
    """Raise `ConfigError` unless these are a decoding method and sampling settings, or None."""
    parts = all(callable(getattr(method, part, None)) for part in ("prompts", "combine"))
    if method is not None and (isinstance(method, type) or not parts):
        raise ConfigError(
            f"`method` must be a decoding method, e.g. SelfCD() or "
            f'make_method("self-cd"), got {method!r}.'
        )
    if sampling is not None and not isinstance(sampling, SamplingParams):
        raise ConfigError(f"`sampling` must be SamplingParams(...), got {sampling!r}.")


def check_messages(messages: str | Sequence[Mapping[str, Any]]) -> list[Message]:
    """Return `messages` as a fresh list of messages; raise `DataError` for what is not a chat."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or isinstance(messages, bytes):
        raise DataError(f"A prompt must be text or a list of messages, got {messages!r}.")
    checked: list[Message] = []
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            got = repr(message)
            got = got if len(got) <= 80 else f"{got[:77]}..."
            raise DataError(f'A message must be {{"role": ..., "content": ...}}, got {got}.')
        if more := [str(key)[:40] for key in message if key not in ("role", "content")]:
            raise DataError(
                f'A message has "role" and "content" alone; this one has also "{more[0]}". Leave '
                "it out."
            )
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise DataError(f'`role` must be one of {", ".join(ROLES)}, got "{str(role)[:40]}".')
        if isinstance(content, (list, Mapping)):
            raise DataError(
                f"The {role} message is a list of content parts. Give it as one text."
                if isinstance(content, list)
                else f"The {role} message must be a text, got an object."
            )
        if not isinstance(content, str) or not (content.strip() or (role, content) == EMPTY):
            raise DataError(f"The {role} message is empty. Give it some text.")
        checked.append({"role": role, "content": content})
    if not any(m["role"] == "user" for m in checked):
        raise DataError("The prompt has no user message. Add one.")
    if any(m["role"] == "system" for m in checked[1:]):
        raise DataError("A system message must come first and only once.")
    return checked
