"""What a card says of a LoRA's rank."""

from __future__ import annotations

from trueline.models.adapter import VLLM_RANKS


def rank_note(rank: int) -> str:
    """Return what vLLM has to be told to serve a LoRA of this rank."""
    fitting = next((r for r in VLLM_RANKS if r >= rank), None)
    if fitting is None:
        return f"vLLM serves ranks up to {VLLM_RANKS[-1]}, and this LoRA has {rank}: merge it."
    return f"vLLM: --enable-lora --max-lora-rank {fitting} --lora-modules NAME=FOLDER"
