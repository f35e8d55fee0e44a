"""The requests' side of the engine: who was let in, whom to tell, and what the metrics count.

Everything here happens in the event loop; the engine works elsewhere (`trueline.server.links`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trueline.errors import ModelError, TruelineError
from trueline.server.engine_loop import Add, Drop, News, Order, Told

if TYPE_CHECKING:
    from trueline.engine.protocol import Prompt
    from trueline.server.gauges import Gauges

Hear = Callable[["Told | Exception"], None]
"""Told of each token of a prompt, or why there are no more."""


class Busy(TruelineError):
    """As many requests wait as the server lets wait."""


@dataclass(eq=False)
class Job:
    """A prompt that was handed in."""

    number: int
    prompt: Prompt
    hear: Hear
    left: int
    """Completions that have not ended."""
    born: float = field(default_factory=time.perf_counter)
    told: float | None = None
    """When its last token came."""


class EngineJobs:
    """The prompts that the engine has.

    Args:
        gauges: Told of everything that happens.
        running: Prompts that decode together at most.
        waiting: Prompts that may wait beside them; one more is refused.
    """

    def __init__(self, gauges: Gauges, running: int, waiting: int) -> None:
        self.gauges, self.running, self.waiting = gauges, running, waiting
        self.jobs: dict[int, Job] = {}
        self.order: Callable[[Order], None] | None = None
        """Gives an order to the engine; None while there is none."""
        self.ended: str | None = None
        """Why the engine works no longer."""
        self._numbers = itertools.count()

    @property
    def alive(self) -> bool:
        """Whether the engine works."""
        return self.order is not None and self.ended is None

    def submit(
        self, prompts: Sequence[Prompt], hears: Sequence[Hear], top: int | None, traced: bool
    ) -> list[Job]:
        """Hand in the prompts of one request, all or none.

        Raises:
            Busy: Too many wait.
            ModelError: The engine has ended.
        """
        if not self.alive or self.order is None:
            why = self.ended or "The engine has not begun"
            raise ModelError(f"{why.removesuffix('.')}. Start the server again.")
        here = len(self.jobs)
        if here and here + len(prompts) > self.running + self.waiting:
            raise Busy(f"{max(0, here - self.running)} requests wait already. Try again later.")
        jobs = [
            Job(next(self._numbers), prompt, hear, prompt.sampling.n)
            for prompt, hear in zip(prompts, hears, strict=True)
        ]
        for job in jobs:
            self.jobs[job.number] = job
            self.gauges.prompt_tokens.inc(sum(map(len, job.prompt.branches)))
            self.order(Add(job.number, job.prompt, top, traced))
        return jobs

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Free the rows of jobs at the next step; those that have ended are left alone."""
        for job in jobs:
            if self._forget(job.number) and self.alive and self.order is not None:
                self.order(Drop(job.number))

    def take(self, news: News) -> None:
        """Pass on what a step brought."""
        gauges, now = self.gauges, time.perf_counter()
        gauges.running.set(news.counts.running)
        gauges.waiting.set(news.counts.waiting)
        gauges.rows.set(news.counts.rows)
        gauges.groups.set(news.counts.groups)
        for kl, flipped in news.contrasts:
            gauges.traced.inc()
            gauges.kl.observe(kl)
            gauges.flipped.inc(flipped)
        for told in news.told:
            if (job := self.jobs.get(told.number)) is not None:  # else it was cancelled
                self._pass_on(job, told, now)
        if news.told:
            gauges.tokens.inc(len(news.told))
        for number, error in news.failed:
            self._fail(number, error)
        if news.ended is not None:
            self.ended = news.ended
            for number in list(self.jobs):
                self._fail(number, ModelError(news.ended))

    def _pass_on(self, job: Job, told: Told, now: float) -> None:
        gauges = self.gauges
        if job.told is None:
            gauges.first_token.observe(now - job.born)
        else:
            gauges.between_tokens.observe(now - job.told)
        job.told = now
        if told.finish_reason is not None:
            gauges.finished.labels(gauges.model, told.finish_reason).inc()
            job.left -= 1
            if not job.left:
                gauges.whole.observe(now - job.born)
                del self.jobs[job.number]
        job.hear(told)

    def _fail(self, number: int, error: Exception) -> None:
        job = self._forget(number)
        if job is not None:
            job.hear(error)

    def _forget(self, number: int) -> Job | None:
        job = self.jobs.pop(number, None)
        if job is not None:
            self.gauges.aborted.inc()
        return job
