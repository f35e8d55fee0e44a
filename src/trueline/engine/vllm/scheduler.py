"""vLLM's scheduler, so that the members of a group sample in the same step or not at all.

The rule: a member computes its last pending token only in a step in which every member of its group
has exactly one pending token, and then all of them do. Two things make it hold.

    admission   a group enters as a whole, with places and the blocks of the KV cache that its
                members can come to need (prompt + max_tokens of each) set aside: nobody is ever
                preempted, and nobody waits for what another holds
    order       groups that sample come before prompts that are still computed, so that the budget
                of tokens, which is at least the number of places, holds for all of them

Whatever breaks the rule is an error before the model runs: `GroupError`, never an unguided token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from trueline.engine.vllm.groups import KEY, Plan, Share
from trueline.errors import ConfigError, ModelError


class GroupError(ModelError):
    """A group could not be kept in step."""


class Member(Request):
    """An engine request whose last pending tokens can be held back from a step."""

    held = 0
    """So many of its last tokens are as if they were not there."""
    share: Share | None
    need: int
    """Blocks that it can come to hold."""

    @property
    def num_tokens(self) -> int:
        """Tokens that may be computed."""
        return len(self._all_token_ids) - self.held

    @property
    def num_tokens_with_spec(self) -> int:
        """The same: there are no drafts here."""
        return len(self._all_token_ids) - self.held

    @property
    def pending(self) -> int:
        """Tokens that are not computed yet."""
        return len(self._all_token_ids) + self.num_output_placeholders - self.num_computed_tokens

    @property
    def group(self) -> str:
        """What its group is called."""
        return self.share.plan.group if self.share else self.request_id

    @property
    def position(self) -> int:
        """How many tokens it has sampled, those that are under way included."""
        return self.num_output_tokens + self.num_output_placeholders


class Party:
    """A group in the scheduler."""

    def __init__(self, plan: Plan | None) -> None:
        self.plan = plan
        self.members: dict[int, Member] = {}
        """Branch -> request; of those that have not ended."""
        self.late: list[Member] = []
        """Members of one token, which enter when the others are ready."""
        self.admitted = False

    @property
    def size(self) -> int:
        """How many members it has from the start."""
        return self.plan.branches if self.plan else 1

    @property
    def ready(self) -> bool:
        """Whether each member, but for the late ones, has come to its last token."""
        own = (m for m in self.members.values() if m not in self.late)
        return self.size == 1 or all(m.pending == 1 and m.num_computed_tokens for m in own)


class GroupScheduler(AsyncScheduler):
    """Keeps groups in lock step; engine requests of others count as groups of one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_config(self.vllm_config)
        self.parties: dict[str, Party] = {}
        self.lobby: deque[Party] = deque()
        """Groups that wait to be admitted."""
        self.joining: list[Party] = []
        """Groups that were admitted and do not sample yet."""
        self.held: list[Member] = []
        self.places = self.blocks = 0
        """What is set aside."""
        pool = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
        self.capacity = pool - self.kv_cache_manager.watermark_blocks
        self.split_steps = 0
        """Steps in which a group would have been torn apart; each is an error."""

    def blocks_of(self, tokens: int) -> int:
        """Return how many blocks a request of so many tokens can hold."""
        managers = self.kv_cache_manager.coordinator.single_type_managers
        return sum(-(-tokens // manager.block_size) for manager in managers)

    def check_fits(self, lengths: Iterable[int]) -> None:
        """Raise `ConfigError` for a group that can never enter.

        Args:
            lengths: Prompt and most new tokens of each member.
        """
        needs = [self.blocks_of(length) for length in lengths]
        if len(needs) > self.max_num_running_reqs:
            raise ConfigError(
                f"The method has {len(needs)} branches, and vLLM runs {self.max_num_running_reqs} "
                "sequences. Raise `max_num_seqs`."
            )
        if sum(needs) > self.capacity:
            raise ConfigError(
                f"With its branches and `max_new_tokens` the request can need {sum(needs)} blocks "
                f"of {self.block_size} tokens; vLLM's cache has {self.capacity}. Lower "
                "`max_new_tokens`, or give vLLM more memory (`kv_cache_memory_bytes`)."
            )

    def add_request(self, request: Request) -> None:
        """Take an engine request in; its group waits until all members are there."""
        if request.resumable:
            raise ConfigError("A request whose prompt comes in pieces has no place in a group.")
        request.__class__ = Member
        assert isinstance(request, Member)
        request.share = (request.sampling_params.extra_args or {}).get(KEY)
        most = request.num_prompt_tokens + request.max_tokens
        request.need = self.blocks_of(most)
        if request.share is None:
            self.check_fits([most])
        super().add_request(request)

    def _enqueue_waiting_request(self, request: Request) -> None:
        assert isinstance(request, Member)
        share = request.share
        party = self.parties.setdefault(request.group, Party(share.plan if share else None))
        party.members[share.branch if share else 0] = request
        if len(party.members) == party.size:
            self.lobby.append(party)

    def get_request_counts(self) -> tuple[int, int]:
        """Return how many run and how many wait, in the lobby too."""
        running, _ = super().get_request_counts()
        return running, len(self.requests) - running

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """End requests from outside: with one member its whole group goes."""
        if request_ids is not None:
            ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
            groups = {self.requests[i].group for i in ids if i in self.requests}
            members = [m for name in groups for m in self.parties[name].members.values()]
            request_ids = [m.request_id for m in members]
        return super().finish_requests(request_ids, finished_status)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Plan a step in which each group samples as a whole or not at all."""
        self._admit()
        self._hold()
        output = super().schedule(throttle_prefills)
        if not output.num_scheduled_tokens:
            self._check_moving()
        return output

    def _admit(self) -> None:
        """Let groups enter, in order, while places and blocks last for all they may need."""
        while self.lobby:
            party = self.lobby[0]
            members = list(party.members.values())
            need = sum(m.need for m in members)
            if self.places + len(members) > self.max_num_running_reqs:
                return
            if self.blocks + need > self.capacity:
                return
            self.lobby.popleft()
            self.places += len(members)
            self.blocks += need
            self.joining.append(party)
            party.admitted = True
            # Held back by one, a request of one token would have nothing to compute.
            party.late = [m for m in members if m.num_prompt_tokens == 1 and party.size > 1]
            for member in members:
                if member not in party.late:
                    super()._enqueue_waiting_request(member)

    def _hold(self) -> None:
        """Hold back the last tokens of groups that are not ready; put those that sample first."""
        late: list[Member] = []
        for party in [p for p in self.joining if p.ready]:
            self.joining.remove(party)
            late, party.late = late + party.late, []
        self.held = [m for party in self.joining for m in party.members.values()]
        for member in self.held:
            member.held = 1
        if self.held or late or any(r.is_prefill_chunk for r in self.running):
            # The budget of tokens holds for all that sample, but not for prompts before them.
            self.running.sort(key=lambda r: r.pending > r.held + 1 or r.held > 0)
        for member in reversed(late):
            self.waiting.prepend_request(member)
        if late:
            # They enter behind those that run, so prompts under way leave them the whole budget.
            for request in self.running:
                if request.pending > 1:
                    request.held = request.pending
                    self.held.append(request)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Let go of what was held, and see that no group is torn apart before the model runs."""
        for member in self.held:
            member.held = 0
        self._check_whole(scheduler_output)
        super()._update_after_schedule(scheduler_output)

    def _check_whole(self, output: SchedulerOutput) -> None:
        found: dict[str, list[Member]] = {}
        for name, count in output.num_scheduled_tokens.items():
            member = self.requests[name]
            grouped = member.share is not None and member.share.plan.branches > 1
            if grouped and count == member.pending:
                found.setdefault(member.group, []).append(member)
        for group, members in found.items():
            plan = self.parties[group].plan
            assert plan is not None
            expected = plan.alive(members[0].position)
            if sorted(m.share.branch for m in members if m.share) != expected:
                self.split_steps += 1
                raise GroupError(
                    f"vLLM scheduled {len(members)} of the {len(expected)} branches of a request. "
                    "Nothing was decoded without its method; the engine has ended."
                )

    def _check_moving(self) -> None:
        """Raise where nothing moves any more; with a step under way its end may free something."""
        ours = [m for m in self.requests.values() if m.share is not None]
        idle = not any(r.num_in_flight_tokens for r in self.requests.values())
        if ours and idle and self._pause_state == PauseState.UNPAUSED:
            raise GroupError(f"vLLM's scheduler stands still with {len(ours)} engine requests.")

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        raise GroupError("vLLM would preempt a request, and so leave its group behind.")

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Give back what was set aside for a request that has ended."""
        assert isinstance(request, Member)
        party = self.parties[request.group]
        if party.admitted:
            self.places -= 1
            self.blocks -= request.need
        party.members = {k: m for k, m in party.members.items() if m is not request}
        if not party.members:
            del self.parties[request.group]
            if party in self.joining:
                self.joining.remove(party)
            if party in self.lobby:
                self.lobby.remove(party)
        return super()._free_request(request, *args, **kwargs)


def check_config(config: Any) -> None:
    """Raise `ConfigError` for settings of vLLM under which no group can be kept together."""
    parallel, scheduler = config.parallel_config, config.scheduler_config
    most = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
    reasons = {
        "speculative decoding: a step samples several positions, each from drafts of its own row": (
            config.speculative_config is not None
        ),
        "pipeline parallelism: micro-batches would part a group's rows": (
            parallel.pipeline_parallel_size > 1
        ),
        "data parallelism inside vLLM: it routes each request alone; start one engine a replica": (
            parallel.data_parallel_size > 1
        ),
        "another policy than first come, first served: it orders each request alone": (
            scheduler.policy != "fcfs"
        ),
        "the transfer of keys and values: it lets each request wait alone": (
            config.kv_transfer_config is not None or config.ec_transfer_config is not None
        ),
        "fewer tokens a step than sequences: those that sample must fit in one step": (
            most < scheduler.max_num_seqs
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"A method's branches cannot be kept in step with {reason}.")
