"""vLLM's logits processors: both interfaces, each feeding one `Mixer` with the rows of a step.

GroupProcessor    model runner V1: a row is a request, rows move in a batch that lives on
GroupProcessorV2  model runner V2: rows come with the slots of their requests. Written from the
                  interface of vLLM 0.32; that runner needs Triton and was not run
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from trueline.engine.vllm.groups import KEY, Lot, Mixer, Share

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState


def share_of(params: SamplingParams) -> Share | None:
    """Return what an engine request carries; None for one that is not ours."""
    return (params.extra_args or {}).get(KEY)


def check_params(params: SamplingParams) -> None:
    """Raise `ValueError` for parameters with which a group cannot be kept together."""
    share = share_of(params)
    if share is None:
        return
    if not isinstance(share, Share):
        raise ValueError(f"extra_args[{KEY!r}] is Trueline's own; leave it out.")
    if params.n != 1:
        raise ValueError("n > 1 in one engine request: its samples would share one group.")
    if params.temperature != 0:
        raise ValueError("a temperature of vLLM's own: the group draws its token itself.")


class GroupProcessor(LogitsProcessor):
    """Decodes groups under the model runner V1."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise `ValueError` for parameters that break a group."""
        check_params(sampling_params)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.mixer = Mixer(device)
        self.rows: dict[int, tuple[Share, list[int]]] = {}
        """Row -> share, and the list of its tokens, which grows."""
        self.lots: list[Lot] | None = []

    def is_argmax_invariant(self) -> bool:
        """Return that the likeliest token changes."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow which rows have come, gone and moved."""

        def entry(
            params: SamplingParams, prompt: list[int] | None, tokens: list[int]
        ) -> tuple[Share, list[int]] | None:
            share = share_of(params)
            return None if share is None else (share, tokens)

        if process_dict_updates(self.rows, batch_update, entry):
            self.lots = None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose a token for each group and force it on its rows."""
        if not self.rows:
            return logits
        positions = {row: len(tokens) for row, (_, tokens) in self.rows.items()}
        if self.lots is None:
            shares = {row: share for row, (share, _) in self.rows.items()}
            self.lots = self.mixer.lots(shares, positions)
        self.mixer.mix(logits, self.lots, positions)
        return logits


class GroupProcessorV2(LogitsProcessorV2):
    """Decodes groups under the model runner V2; not run, see the head of this file."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise `ValueError` for parameters that break a group."""
        check_params(sampling_params)

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self.mixer = Mixer(req_states.device)
        self.prompts = req_states.prompt_len
        self.slots: dict[int, Share] = {}
        self._known: tuple[Any, list[Lot]] = (None, [])

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Take note of who has a slot from now on; return whether its logits are ours to change."""
        share = share_of(sampling_params)
        self.slots.pop(req_idx, None)
        if share is not None:
            self.slots[req_idx] = share
        return share is not None

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Choose a token for each group and force it on its rows, one row a request."""
        slots = ctx.idx_mapping_np.tolist()
        lengths = ctx.seq_lens_upper_bound_np.tolist()
        positions, shares = {}, {}
        for row, (slot, length) in enumerate(zip(slots, lengths, strict=False)):
            position = length - int(self.prompts.np[slot])
            if slot in self.slots and position >= 0:  # below it is a chunk of its prompt
                shares[row], positions[row] = self.slots[slot], position
        key = {row: (id(s), s.plan.alive(positions[row])) for row, s in shares.items()}
        if self._known[0] != key:
            self._known = key, self.mixer.lots(shares, positions)
        self.mixer.mix(logits, self._known[1], positions)
        return logits
