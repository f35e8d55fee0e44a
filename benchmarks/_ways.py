"""The ways to train that are compared: Inverse-Q* and TRL's own trainers, one function each.

Each takes a run and its own options, and trains with the run's arguments, adapter and prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset

from benchmarks._training import GROUP, Run
from recipes.distil.measure import NEW_TOKENS
from trueline import LinearAlignment, Message, Method, Plain


def inverse_q(run: Run, **options: Any) -> None:
    """Inverse-Q*: Linear Alignment on the frozen start teaches; `options` are of its config."""
    from trueline.train.distil.trainer import InverseQConfig, InverseQTrainer

    rows = [{"prompt": p} for p in run.prompts(run.setting.responses)]
    args = InverseQConfig(
        **run.arguments(),
        principle=run.setting.principle.text,
        max_completion_length=NEW_TOKENS,
        **options,
    )
    run.train(_made(InverseQTrainer, run, args, rows))


def sft(run: Run, method: Callable[[str], Method]) -> None:
    """TRL's SFT on responses sampled beforehand under `method`: context distillation."""
    from trl import SFTConfig, SFTTrainer

    prompts = run.prompts(run.setting.responses)
    texts = run.sample(prompts, method(run.setting.principle.text))
    args = SFTConfig(**run.arguments(), gradient_checkpointing=False, completion_only_loss=True)
    run.train(_made(SFTTrainer, run, args, _rows(prompts, completion=_said(texts))))


def dpo(run: Run, method: Callable[[str], Method], beta: float = 0.1) -> None:
    """TRL's DPO on pairs from opposing prompts: chosen under the principle, rejected without it.

    A pair takes two responses, so there are half as many prompts.
    """
    from trl import DPOConfig, DPOTrainer

    prompts = run.prompts(run.setting.responses // 2)
    chosen = run.sample(prompts, method(run.setting.principle.text))
    rejected = run.sample(prompts, Plain(), salt=1)
    data = _rows(prompts, chosen=_said(chosen), rejected=_said(rejected))
    pairs = run.setting.batch // 2
    args = DPOConfig(
        **run.arguments(per_device_train_batch_size=pairs), gradient_checkpointing=False, beta=beta
    )
    run.train(_made(DPOTrainer, run, args, data))


def grpo(run: Run, beta: float = 0.0) -> None:
    """TRL's GRPO with the rule as reward: an oracle that distillation does not need."""
    from trl import GRPOConfig, GRPOTrainer

    _reinforce(run, GRPOTrainer, GRPOConfig(**_group_arguments(run), beta=beta))


def rloo(run: Run, beta: float = 0.05) -> None:
    """TRL's RLOO with the rule as reward, at TRL's own KL coefficient."""
    from trl import RLOOConfig, RLOOTrainer

    _reinforce(run, RLOOTrainer, RLOOConfig(**_group_arguments(run), beta=beta))


def _group_arguments(run: Run) -> dict[str, Any]:
    own = {"num_generations": GROUP, "max_completion_length": NEW_TOKENS, "temperature": 1.0}
    return run.arguments(gradient_checkpointing=False, **own)


def _reinforce(run: Run, trainer: Any, args: Any) -> None:
    def rule(completions: list[list[Message]], **_: Any) -> list[float]:
        return [float(run.probe.follows(c[0]["content"])) for c in completions]

    data = _rows(run.prompts(run.setting.responses // GROUP))
    run.train(_made(trainer, run, args, data, reward_funcs=rule))


def sdft(run: Run) -> None:
    """TRL's experimental SDFT: the prompted start teaches the plain student (ratio 0).

    TRL puts the context into the user's turn; here the principle goes where it goes for every
    other way, into the system message. Loss and sampling are TRL's.
    """
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    from trl.experimental.sdft.sdft_trainer import DemonstrationTeacherContextBuilder

    class SystemContext(DemonstrationTeacherContextBuilder):
        def _compose_teacher_prompt(self, prompt: Any, privileged_context: Any) -> Any:
            return [{"role": "system", "content": privileged_context}, *prompt]

    prompts = run.prompts(run.setting.responses)
    data = _rows(prompts, privileged_context=[run.setting.principle.text] * len(prompts))
    args = SDFTConfig(
        **run.arguments(),
        gradient_checkpointing=False,
        distillation_mode="sampled_token",
        distillation_alpha=1.0,
        teacher_model_kind="base",
        num_generations=1,
        max_completion_length=NEW_TOKENS,
        temperature=1.0,
    )
    trainer = _made(SDFTTrainer, run, args, data)
    trainer.teacher_context_builder = SystemContext(trainer)
    run.train(trainer)


def prompted(text: str) -> Method:
    return Plain(principle=text)


def aligned(text: str) -> Method:
    return LinearAlignment(principle=text)


WAYS: dict[str, Callable[..., None]] = {
    "inverse-q": inverse_q,
    "inverse-q, on-policy": lambda run, **o: inverse_q(run, **{"guided": 0.0} | o),
    "sft, prompt": lambda run: sft(run, prompted),
    "sft, linear alignment": lambda run: sft(run, aligned),
    "dpo, prompt": lambda run: dpo(run, prompted),
    "dpo, linear alignment": lambda run: dpo(run, aligned),
    "grpo": grpo,
    "rloo": rloo,
    "sdft": sdft,
}
"""What follows the comma of SFT and DPO is what their principled responses were sampled under."""


def _rows(prompts: Sequence[Any], **columns: Sequence[Any]) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts), **columns})


def _said(texts: Sequence[str]) -> list[list[Message]]:
    return [[{"role": "assistant", "content": text or "."}] for text in texts]


def _made(trainer: Any, run: Run, args: Any, data: Any, **more: Any) -> Any:
    return trainer(
        model=run.lm.model,
        args=args,
        train_dataset=data,
        processing_class=run.lm.tokenizer,
        peft_config=run.adapter(),
        **more,
    )
