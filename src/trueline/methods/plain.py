"""Plain decoding: the model with one prompt, a principle written into it or not.

The baseline of every other method, and what `transformers.generate` does: one branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from trueline.errors import check_text
from trueline.methods._ops import with_system
from trueline.types import Message

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Plain:
    """Decode from one prompt.

    >>> Plain(principle="Talk like a pirate.")   # the principle prompt alone
    """

    name: ClassVar[str] = "plain"
    paper: ClassVar[str] = "-"
    rest_branch: ClassVar[int] = 0
    base_branches: ClassVar[tuple[int, ...]] = ()
    first_tokens: ClassVar[int | None] = None

    principle: str | None = None
    """Text added to the system message; none leaves the prompt as it is."""

    def __post_init__(self) -> None:
        if self.principle is not None:
            check_text("principle", self.principle, "Give it some text or leave it out.")

    def prompts(self, messages: Sequence[Message]) -> list[list[Message]]:
        """Return the one prompt."""
        return [with_system(messages, self.principle)]

    def combine(self, logits: Float[Tensor, "batch 1 vocab"]) -> Float[Tensor, "batch vocab"]:
        """Return the logits of the one branch."""
        return logits[:, 0]
