"""The engine in a thread of its own: requests join at the next step and leave when they end.

One thread runs the model. Everything else hands it requests and cancellations under one lock, and
is told of the steps, all of one turn at once. A request that cannot go on is told the error
instead; an error of the engine itself ends every request and the thread, and the server says so in
`/health`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trueline.engine.trace import kl_divergence
from trueline.errors import ModelError, TruelineError

if TYPE_CHECKING:
    from trueline.engine.protocol import Prompt, Step, Ticket
    from trueline.engine.torch_backend import TorchBackend
    from trueline.server.gauges import Gauges

LOG = logging.getLogger(__name__)
TRACED = 16
"""Of a method with several branches, every token at a multiple of this is measured for metrics."""


class Busy(TruelineError):
    """As many requests wait as the server lets wait."""


@dataclass(eq=False)
class Job:
    """A prompt that was handed in, and whom to tell of its steps."""

    prompt: Prompt
    tell: Callable[[Step | Exception], None]
    record: bool
    born: float = field(default_factory=time.perf_counter)
    told: float | None = None
    """When its last step came."""
    ticket: Ticket | None = None
    left: int = 0
    """Completions that have not ended."""


News = tuple[Job, "Step | Exception"]
"""A step of a job, or why there are no more."""


def tell_all(news: list[News]) -> None:
    """Tell each job its news, here and now."""
    for job, own in news:
        job.tell(own)


class EngineThread:
    """Runs a scheduler until it is stopped.

    Args:
        backend: Admits requests at each step.
        gauges: Told of everything that happens.
        max_waiting: Jobs that may wait; one more is refused.
    """

    deliver: Callable[[list[News]], None] = staticmethod(tell_all)
    """Called from the engine's thread with all news of a step at once."""

    def __init__(self, backend: TorchBackend, gauges: Gauges, max_waiting: int) -> None:
        self.backend, self.gauges, self.max_waiting = backend, gauges, max_waiting
        self._changed = threading.Condition()
        self._added: list[Job] = []
        self._cancelled: list[Job] = []
        self._jobs: dict[Ticket | None, Job] = {}
        self._news: list[News] = []
        self._stopping = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="trueline-engine", daemon=True)

    def start(self) -> None:
        """Begin to run."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine runs."""
        return self._thread.is_alive() and self.error is None

    def stop(self) -> None:
        """End after the step under way; what still runs is told so."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(
        self, prompts: list[Prompt], tells: list[Callable[[Any], None]], record: bool
    ) -> list[Job]:
        """Hand in the prompts of one request, all or none.

        Raises:
            Busy: Too many wait.
            ModelError: The engine has ended.
        """
        jobs = [Job(p, tell, record) for p, tell in zip(prompts, tells, strict=True)]
        with self._changed:
            if not self.alive or self._stopping:
                raise ModelError("The engine has ended. Start the server again.")
            waiting = len(self._added) + len(self.backend.scheduler.waiting)
            if waiting and waiting + len(jobs) > self.max_waiting:
                raise Busy(f"{waiting} requests wait already. Try again later.")
            self._added += jobs
            self._changed.notify()
        return jobs

    def cancel(self, jobs: list[Job]) -> None:
        """Free the rows of jobs at the next step; those that have ended are left alone."""
        with self._changed:
            self._cancelled += jobs
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            self._fail(ModelError("The server is shutting down."))
        except BaseException as error:  # whatever it was, every client is told
            self.error = error
            LOG.exception("the engine has ended")
            reason = str(error) if isinstance(error, TruelineError) else type(error).__name__
            self._fail(ModelError(f"The engine has ended: {reason}"))

    def _turn(self) -> bool:
        """Take in what changed, run one step; False when it is time to end."""
        with self._changed:
            while not (self._stopping or self._added or self._cancelled or self._jobs):
                self._changed.wait()
            added, self._added = self._added, []
            cancelled, self._cancelled = self._cancelled, []
            for job in cancelled:
                self._drop(job, added)
            if self._stopping:
                self._added = added
                return False
            for job in added:
                every = 1 if job.record else TRACED if len(job.prompt.branches) > 1 else 0
                job.ticket = self.backend.add(job.prompt, record=every)
                job.left = job.prompt.sampling.n
                self._jobs[job.ticket] = job
                self.gauges.prompt_tokens.inc(sum(map(len, job.prompt.branches)))
        try:
            steps = self.backend.step()
        except TruelineError as error:  # the model's fault: whoever was under way is told
            running = [j for j in self._jobs.values() if j.ticket not in self._waiting]
            for job in running:
                del self._jobs[job.ticket]
                self.gauges.aborted.inc()
                self._news.append((job, error))
            self._deliver()
            return True
        now = time.perf_counter()
        for step in steps:
            self._pass_on(self._jobs[step.ticket], step, now)
        self._deliver()
        self._show()
        return True

    def _deliver(self) -> None:
        if self._news:
            news, self._news = self._news, []
            self.deliver(news)

    @property
    def _waiting(self) -> Any:
        return self.backend.scheduler.waiting

    def _drop(self, job: Job, added: list[Job]) -> None:
        """Forget a job that is not wanted any more, wherever it is."""
        if job in added:
            added.remove(job)
        elif self._jobs.pop(job.ticket, None) is not None:
            assert job.ticket is not None
            self.backend.cancel(job.ticket)
        else:
            return
        self.gauges.aborted.inc()
        self._show()

    def _show(self) -> None:
        gauges, waiting = self.gauges, len(self._waiting)
        gauges.running.set(len(self._jobs) - waiting)
        gauges.waiting.set(waiting)
        gauges.rows.set(len(self.backend.rows) if self._jobs else 0)
        gauges.groups.set(sum(len(j.prompt.branches) > 1 for j in self._jobs.values()))

    def _pass_on(self, job: Job, step: Step, now: float) -> None:
        gauges = self.gauges
        gauges.tokens.inc()
        if job.told is None:
            gauges.first_token.observe(now - job.born)
        else:
            gauges.between_tokens.observe(now - job.told)
        job.told = now
        if step.logits is not None and step.position % TRACED == 0 and len(step.logits) > 1:
            assert step.combined is not None
            p, q = step.combined.log_softmax(-1), step.logits[0].log_softmax(-1)
            gauges.traced.inc()
            gauges.kl.observe(kl_divergence(p, q))
            gauges.flipped.inc(int(q.argmax()) != step.token_id)
        if step.finish_reason is not None:
            gauges.finished.labels(gauges.model, step.finish_reason).inc()
            job.left -= 1
            if not job.left:
                gauges.whole.observe(now - job.born)
                del self._jobs[job.ticket]
        self._news.append((job, step))

    def _fail(self, error: Exception) -> None:
        with self._changed:
            jobs = [*self._added, *self._jobs.values()]
            self._added, self._jobs = [], {}
            self._stopping = True
        for job in jobs:
            self.gauges.aborted.inc()
            self._news.append((job, error))
        self._deliver()
