"""The scheduler: which requests wait, which are under way, and when one more may begin.

when_empty   a batch is filled when nothing is under way: what a request computes depends on
             its batch alone, to the last bit
each_step    requests begin at the next step that has room for all that wait, or for an eighth
             of the places: joining costs about the same for one as for several. So while half of
             the places are taken, fewer than that are held back, `PATIENCE` steps at most
"""

from __future__ import annotations

from collections import deque
from typing import Literal

from trueline.engine.protocol import Prompt, Ticket
from trueline.errors import ConfigError, check_number

PATIENCE = 3
"""Steps that a few requests are held back while half of the places or more are taken."""
SOON = 8
"""Steps after a request came that the next is still looked for."""
Admission = Literal["when_empty", "each_step"]
ADMISSIONS = ("when_empty", "each_step")


class Scheduler:
    """Keeps the queue and counts the places."""

    def __init__(self, batch_size: int = 32, admission: Admission = "when_empty") -> None:
        """Make an empty scheduler, for `batch_size` requests under way at most."""
        check_number("batch_size", batch_size, low=1, whole=True)
        if admission not in ADMISSIONS:
            raise ConfigError(
                f'`admission` must be "when_empty" or "each_step", got {admission!r}.'
            )
        self.batch_size, self.admission = batch_size, admission
        self.waiting: deque[Ticket] = deque()
        self.running: set[Ticket] = set()
        self._count = 0
        self._held = 0
        """Steps that those who wait were held back."""
        self._quiet = SOON
        """Steps since a request came."""

    def add(self, prompt: Prompt, record: int, text: bool) -> Ticket:
        """Put a request at the end of the queue."""
        ticket = Ticket(self._count, prompt, record, text)
        self._count += 1
        self._quiet = 0
        self.waiting.append(ticket)
        return ticket

    def admit(self) -> list[Ticket]:
        """Return the requests that begin now, in the order they came; asked once a step."""
        self._quiet += 1
        free = self.batch_size - len(self.running)
        if self.running:
            several = max(1, self.batch_size // 8)
            if self.admission == "when_empty" or free < min(len(self.waiting), several):
                return []
            if len(self.waiting) < several and 2 * len(self.running) >= self.batch_size:
                # They would hold up many: more may come, and join for the same price.
                self._held += bool(self.waiting)
                if self._held <= PATIENCE:
                    return []
        self._held = 0
        begun = [self.waiting.popleft() for _ in range(min(free, len(self.waiting)))]
        self.running.update(begun)
        return begun

    def end(self, ticket: Ticket) -> None:
        """Take out a request that has ended or is not wanted any more."""
        if ticket in self.running:
            self.running.remove(ticket)
        elif ticket in self.waiting:
            self.waiting.remove(ticket)

    @property
    def refills(self) -> bool:
        """Whether places that free up are soon taken: requests wait, or have come of late."""
        return self.admission == "each_step" and (bool(self.waiting) or self._quiet < SOON)
