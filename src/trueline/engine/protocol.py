"""What a back end is: requests in, tokens out. `torch_backend` is one; another is one more file.

    encode(request) -> Prompt        token ids of the method's branches
    add(prompt)     -> Ticket        wait for a place
    step()          -> [Step]        a token for every completion under way
    cancel(ticket)                   leave, waiting or under way
    score(continuations)             teacher forcing
    supports(method)                 whether the method can run here

A back end decides by itself what runs together; nobody above it keeps a queue or cuts batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from trueline.methods import Plain
from trueline.types import FinishReason, Method, Request, SamplingParams

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from trueline.models.load import LanguageModel


@dataclass(frozen=True)
class Prompt:
    """An encoded request: what an engine works on."""

    branches: list[list[int]]
    method: Method = field(default_factory=Plain)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    prefixes: tuple[tuple[int, ...], ...] = ()
    """Leading ids of each branch that other requests are likely to share."""
    adapter: str | None = None
    """Name of the adapter; None is the one of requests that name none."""


@dataclass(frozen=True, eq=False)
class Ticket:
    """One request that an engine was given; every step of it carries the same object."""

    number: int
    """Counts up from 0 with every request that the engine was given."""
    prompt: Prompt = field(repr=False)
    record: int = 0
    """Its steps at a multiple of this carry their logits: 1 (or True) is all, 0 is none."""
    text: bool = True
    """Whether its steps carry their text (with stop strings they always do)."""


@dataclass(frozen=True)
class Step:
    """One token of one completion."""

    ticket: Ticket
    """The request it belongs to."""
    sample: int
    """Which of the request's n completions."""
    position: int
    """0 for the first token."""
    token_id: int
    text: str
    """Text that became final with this token; may be empty, or more than this token's."""
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    branch_logprob: float | None = None
    logits: Tensor | None = None
    """Logits of the branches (branch, vocab) after temperature, if recorded."""
    combined: Tensor | None = None
    """Logits (vocab) that the token was drawn from, before top-k, top-p and min-p, if recorded."""


@dataclass(frozen=True)
class Continuation:
    """Tokens to score after the prompts of one or several branches."""

    branches: Sequence[Sequence[int]]
    """Token ids before the tokens, branch by branch."""
    tokens: Sequence[int]
    """At least one."""
    adapters: tuple[bool, ...] | None = None
    """For each branch, whether the model's adapter is on; None leaves it as it is."""
    first: int = 0
    """How many tokens of the same text were scored before these."""


class Backend(Protocol):
    """The engine below `Decoder`."""

    @property
    def model(self) -> LanguageModel:
        """What it decodes on."""

    def encode(self, request: Request) -> Prompt:
        """Return a request, its method and sampling given, as token ids; no compute."""

    def add(self, prompt: Prompt, *, record: int = 0, text: bool = True) -> Ticket:
        """Take a request in; it decodes from one of the next steps on."""

    def step(self) -> list[Step]:
        """Decode one token of every completion under way; nothing where nothing is to be done."""

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request, wherever it is; one that has ended is let be."""

    def score(
        self, items: Sequence[Continuation], *, rows: int = 16
    ) -> Iterator[Float[Tensor, "time branch vocab"]]:
        """Yield the logits that predict each item's tokens, in order."""

    def supports(self, method: Method) -> bool:
        """Return whether the method's branches can run here."""
