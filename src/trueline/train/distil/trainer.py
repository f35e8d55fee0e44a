"""Inverse-Q* as a trainer in TRL's form: the decoder's policy moves into the weights.

    >>> trainer = InverseQTrainer(
    ...     "tiny",
    ...     InverseQConfig("out", principle="Talk like a pirate.", max_steps=50),
    ...     train_dataset=[{"prompt": "What is the moon?"}, ...],
    ...     peft_config=LoraConfig(r=16, target_modules="all-linear"),
    ... )
    >>> trainer.train()
    >>> trainer.save_model("out/adapter")

The student samples its own answers, without the principle; the teacher's branches run on the same
answers in one batch, without gradient; the loss is one of `methods/inverse_q.py`.

What the student never says it cannot learn from its own answers: a word that it draws once in
100,000 tokens stays as unlikely as it was. So the teacher draws a share of the answers, `guided`.
For the losses on sampled tokens that is a regression on other states, with the same fixed point;
it needs no weights. The logged means are of the student's own answers only.

Rows have a `prompt`, a string or a list of messages, and may have a `principle`. As everywhere in
Trueline a string is one user message; with `raw` it is sent as it is.

The reference is the start of the model. Under a PEFT adapter that is the model with its adapter
switched off: no second copy. Full weights have moved away from it, so a frozen copy is kept; to
resume such a run, give the same `model` as at the start.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback
from trl import DistillationTrainer
from trl.trainer.utils import RepeatSampler

from trueline.engine.scoring import forced_logits
from trueline.errors import ConfigError, DataError
from trueline.methods.inverse_q import (
    advantage_loss,
    imitation_loss,
    kl_loss,
    token_logprobs,
    token_reward,
)
from trueline.models.load import BUNDLED, LanguageModel
from trueline.models.packed import merged_products
from trueline.train.distil.config import LOSSES, InverseQConfig
from trueline.train.distil.guided import GuidedAnswers
from trueline.train.distil.held_out import Evaluation
from trueline.train.distil.rows import EpochSampler, dataset_of
from trueline.train.distil.teachers import (
    Lesson,
    make_teacher,
    policies,
    teacher_effect,
    teacher_of,
)
from trueline.types import Method

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LOSSES", "InverseQConfig", "InverseQTrainer"]
MEANS = ("kl_to_teacher", "kl_to_reference", "entropy", "reward")
"""Logged at every step, means over the tokens of the student's own answers, in nats; beside them
`completion_length`, `tokens_per_second` and `guided_share`."""
EFFECT_TOKENS = 32
"""Length of the answers on which a teacher's effect is measured."""


class InverseQTrainer(DistillationTrainer):
    """Train a model on its own answers until it follows the teacher's policy unprompted.

    Args:
        model: A folder, hub name or "tiny", or a model; a PEFT model's base is the reference.
        args: Settings.
        train_dataset: Rows with `prompt` and perhaps `principle`; a list of dicts also serves.
        eval_dataset: Rows on which loss and divergences are measured, by `eval_strategy`.
        processing_class: The tokenizer; the model's own by default.
        callbacks: Of transformers.
        optimizers: Optimizer and scheduler; AdamW and `args.lr_scheduler_type` by default.
        quantization_config: Of bitsandbytes, for a model that is loaded here.
        peft_config: Trains an adapter; without one all weights are trained.
        teacher: A decoding method in place of `args.teacher`, its options and `principle`.
        evaluate: Called with the student before training, every `eval_steps` steps and at the
            end; what it returns is logged as `eval_NAME`. It does not change the training.

    Raises:
        ConfigError: A setting is out of range or contradicts another; a teacher without effect.
        DataError: A row is no prompt, or does not fit the model.
    """

    args: InverseQConfig
    model: Any
    train_dataset: Any
    max_completion_length: int
    _tag_names = ["trueline", "inverse-q"]  # noqa: RUF012
    _name = "Inverse-Q*"
    _paper = {  # noqa: RUF012
        "title": "Inverse-Q*: Token Level Reinforcement Learning for Aligning Large Language "
        "Models Without Preference Data",
        "id": "2408.14874",
    }

    def __init__(
        self,
        model: Any,
        args: InverseQConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        teacher: Method | None = None,
        evaluate: Callable[[LanguageModel], Mapping[str, float]] | None = None,
    ) -> None:
        args = args or InverseQConfig()
        train_dataset = dataset_of(train_dataset, "train_dataset")
        if train_dataset is None:
            raise ConfigError("`train_dataset` is missing. Give rows with a `prompt`.")
        if args.reuse > 1 and isinstance(train_dataset, IterableDataset):
            raise ConfigError("`reuse` above 1 needs a data set with a length. Load it whole.")
        if teacher is None:
            self.teacher = make_teacher(
                args.teacher, args.method_options, principle=args.principle, student=args.student
            )
        else:
            self.teacher = teacher_of(teacher, student=args.student)
        self.teacher.check(train_dataset.column_names)
        if isinstance(model, str) and model in BUNDLED:
            model = str(resources.files("trueline") / "assets" / model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=dataset_of(eval_dataset, "eval_dataset"),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ConfigError("No weight is trainable. Load the adapter with `is_trainable=True`.")
        self._sample_from_everything()
        name = getattr(self.model.config, "_name_or_path", "") or "model"
        self.student = LanguageModel(self.model, self._tokenizer, name, args.raw)
        self.teacher.check_model(self.student)
        self.reference = None if is_peft_model(self.model) else self._frozen_copy()
        self.effect: float | None = None
        """What `check_effect` found, in nats a token."""
        self.over_budget: float | None = None
        """The KL to the reference at which `kl_budget` stopped the training."""
        self._taught: list[int] = []
        self._guided = GuidedAnswers(self)
        self._drawn: list[list[int]] = []
        self._sums: dict[str, Tensor | None] = {"train": None, "eval": None, "step": None}
        self._check_rows(train_dataset)
        if evaluate is not None:
            self.add_callback(Evaluation(self, evaluate))

    # What is sampled, and from which prompt.

    def _tokenize_prompts(self, prompts: list[Lesson]) -> tuple[list[list[int]], None, dict]:
        return [lesson.prompt for lesson in prompts], None, {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        guided = self._guided(inputs)
        self._drawn = [answer for _, answer in guided]
        lessons = [lesson for lesson, _ in guided]
        for row in inputs[len(guided) :]:
            lessons.append(self.teacher.lesson(self.student, row))
            self._check_length(lessons[-1])
        output = super()._generate_and_score_completions([{"prompt": x} for x in lessons])
        own = [i >= len(guided) for i in range(len(inputs))]
        # A batch of guided answers alone is measured too, so that every step has its numbers.
        measured = torch.tensor(own if any(own) else [True] * len(own))
        return {**output, "lessons": lessons, "measured": measured}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **options: Any) -> Any:
        own = prompt_ids[len(self._drawn) :]
        if not own:
            return self._drawn
        with self._fast(self.accelerator.unwrap_model(self.model)):
            return self._drawn + list(super()._generate_single_turn(own, *args, **options))

    def _fast(self, student: Any) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the student samples fastest."""
        mixed = self.args.bf16 or self.args.fp16
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        plain = not self.args.fast_sampling or mixed or sharded or self.use_vllm
        return contextlib.nullcontext() if plain else merged_products(student)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        accumulation, reuse = self.args.gradient_accumulation_steps, self.args.reuse
        if self.model.training:
            if self._buffered_inputs is None and self.state.global_step % reuse:
                raise ConfigError(
                    f"Step {self.state.global_step} came between two uses of the same samples, "
                    f"which no checkpoint holds. Resume from a multiple of `reuse` ({reuse})."
                )
            if self._step % (accumulation * reuse) >= accumulation:
                samples: Any = self._buffered_inputs
                return cast(dict[str, Any], samples[self._step % accumulation])
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        return inputs

    def _get_train_sampler(self, dataset: Any = None) -> RepeatSampler:
        accumulation = self.args.gradient_accumulation_steps
        per_step = self.args.per_device_train_batch_size * self.accelerator.num_processes
        return EpochSampler(
            self,
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=1,
            batch_size=per_step * accumulation,
            repeat_count=accumulation * self.args.reuse,
            shuffle=bool(self.shuffle_dataset),
            seed=self.args.seed,
        )

    def _sample_from_everything(self) -> None:
        """Undo TRL's reading of `top_p` and `top_k`: here they are the method's."""
        whole = {"top_p": 1.0, "top_k": 0}
        self.top_p, self.top_k = 1.0, 0
        self.generation_kwargs.update(whole)
        self.generation_config.update(**whole)
        if self.use_vllm:
            self.vllm_generation.top_p, self.vllm_generation.top_k = 1.0, 0

    # The loss.

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of a batch, and add up what is logged."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        logprobs, sums = self._measured
        sums = self.accelerator.reduce(sums, "sum")
        modes = ["train", "step"] if self.model.training else ["eval"]
        if self.model.training and self.args.reuse > 1:
            inputs.setdefault("old_logprobs", logprobs)
        for mode in modes:
            before = self._sums[mode]
            self._sums[mode] = sums if before is None else before + sums
        return result

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        args, lessons, masks = self.args, inputs["lessons"], inputs["completion_mask"].bool()
        tokens = [ids[mask] for ids, mask in zip(inputs["completion_ids"], masks, strict=True)]
        answers = [ids.tolist() for ids in tokens]
        count = masks.sum() if num_items_in_batch is None else num_items_in_batch
        self.student.model = unwrapped_student
        logits = forced_logits(self.student, [lesson.prompt for lesson in lessons], answers)
        if self.temperature != 1:
            logits = [z / self.temperature for z in logits]
        sampled = args.loss != "kl"
        policy = [token_logprobs(z, y) for z, y in zip(logits, tokens, strict=True) if sampled]
        losses, teacher, reference, sums = [], [], [], torch.zeros(7, device=masks.device)
        with torch.no_grad(), self._start(unwrapped_student) as start:
            for i, z_star, z_s in policies(
                self.teacher,
                start,
                lessons,
                answers,
                temperature=self.temperature,
                floor=args.floor,
                batch_rows=max(len(lessons), 2),
            ):
                teacher.append(token_logprobs(z_star, tokens[i]))
                reference.append(token_logprobs(z_s, tokens[i]))
                if not sampled:
                    with torch.enable_grad():
                        losses.append(kl_loss(logits[i], z_star, top_k=args.top_k, count=count)[0])
                sums[6] += len(tokens[i])
                if inputs["measured"][i]:
                    reward = token_reward(teacher[-1], reference[-1], args.beta).sum()
                    sums[:3] += _divergences(logits[i], z_star, z_s)
                    sums[3:6] += torch.stack([reward, *reward.new_tensor([len(tokens[i]), 1])])
        if sampled:
            loss = self._sampled_loss(policy, teacher, reference, inputs, count)
        else:
            loss = torch.stack(losses).sum()
        self._measured = [logprobs.detach() for logprobs in policy], sums
        return loss, sums[2].clone(), sums[4].clone()

    def _sampled_loss(
        self,
        policy: list[Tensor],
        teacher: list[Tensor],
        reference: list[Tensor],
        inputs: dict[str, Any],
        count: Any,
    ) -> Tensor:
        """Return the loss on the tokens that were drawn, from their log-probabilities by row."""
        function = imitation_loss if self.args.loss == "imitation" else advantage_loss
        old = inputs.get("old_logprobs") if self.model.training else None
        ones = [torch.ones_like(row) for row in policy]
        return function(
            pad_sequence(policy, batch_first=True),
            pad_sequence(teacher, batch_first=True),
            pad_sequence(reference, batch_first=True),
            pad_sequence(ones, batch_first=True),
            beta=self.args.beta,
            old_logprobs=None if old is None else pad_sequence(old, batch_first=True),
            clip=self.args.clip,
            count=count,
        )[0]

    @contextlib.contextmanager
    def _start(self, student: Any) -> Iterator[LanguageModel]:
        """Yield the reference: the frozen copy, or the student with its adapter off."""
        if self.reference is not None:
            yield self.reference
            return
        training = student.training
        student.eval()
        try:
            with student.disable_adapter():
                self.student.model = student
                yield self.student
        finally:
            student.train(training)

    def _frozen_copy(self) -> LanguageModel:
        model = copy.deepcopy(self.model).requires_grad_(False)
        model = self.accelerator.prepare_model(model, evaluation_mode=True)
        return LanguageModel(model, self._tokenizer, self.student.name, self.args.raw)

    # What happens around it.

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, after making sure that the teacher has something to teach; see transformers."""
        self._step, self._buffered_inputs, self.over_budget = 0, None, None
        self._guided = GuidedAnswers(self)
        if not resume_from_checkpoint and self.args.min_effect > 0:
            self.check_effect()
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def check_effect(self) -> float:
        """Return the teacher's effect on the first rows; raise `ConfigError` if it is empty."""
        args, rows = self.args, []
        for row in self.train_dataset:
            if self.teacher.row_method(row) is not None:
                rows.append(row)
            if len(rows) == args.effect_rows:
                break
        with self._start(self.accelerator.unwrap_model(self.model)) as start:
            self.effect = teacher_effect(
                self.teacher,
                start,
                rows,
                temperature=self.temperature,
                floor=args.floor,
                max_new_tokens=min(self.max_completion_length, EFFECT_TOKENS),
                seed=args.seed,
            )
        if not self.effect >= args.min_effect:
            raise ConfigError(
                f"The teacher is empty: on {len(rows)} rows it differs from the reference by "
                f"{self.effect:.2g} nats a token, less than `min_effect` ({args.min_effect:g}). "
                "Word the principle so that the model follows it when asked."
            )
        return self.effect

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """Make one part of a step; stop the training when the step leaves the KL budget."""
        loss: Tensor = super().training_step(*args, **options)
        if self._step % self.args.gradient_accumulation_steps == 0:
            sums, self._sums["step"] = self._sums["step"], None
            if self.args.kl_budget is not None and sums is not None:
                kl = float(sums[1] / sums[4])
                if kl > self.args.kl_budget:
                    self.over_budget = kl
                    self.control.should_training_stop = True
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the means over all tokens since the last log."""
        mode = "train" if self.model.training else "eval"
        metrics, sums = self._metrics[mode], self._sums[mode]
        if sums is not None:
            self._sums[mode] = None
            *totals, tokens, rows, all_tokens = sums.tolist()
            for name, total in zip(MEANS, totals, strict=True):
                metrics[name] = [total / tokens]
            metrics["completion_length"] = [tokens / rows]
            if mode == "train":
                metrics["guided_share"] = [1 - tokens / all_tokens]
                metrics["tokens_per_second"] = [all_tokens / sum(metrics["step_time"])]
        super().log(logs, start_time)

    def _check_rows(self, rows: Any) -> None:
        """Raise for the first row that cannot be used; a stream is checked as it is read."""
        if isinstance(rows, IterableDataset):
            return
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        batch *= self.accelerator.num_processes
        if len(rows) < batch:
            raise ConfigError(
                f"A step takes {batch} prompts, but there are {len(rows)}. Give more, or lower "
                "`per_device_train_batch_size` or `gradient_accumulation_steps`."
            )
        for i, row in enumerate(rows):
            try:
                lesson = self.teacher.lesson(self.student, row)
                self._check_length(lesson)
            except DataError as error:
                raise DataError(f"train_dataset[{i}]: {error}") from None
            if lesson.method is not None:
                self._taught.append(i)
        if not self._taught:
            raise ConfigError(
                "No row of `train_dataset` has a principle, and none is given for all."
            )

    def _check_length(self, lesson: Lesson) -> None:
        limit = self.student.max_positions
        longest = max(map(len, [lesson.prompt, *lesson.branches]))
        if limit is not None and longest + self.max_completion_length > limit:
            raise DataError(
                f"The longest prompt has {longest} tokens; with `max_completion_length` "
                f"{self.max_completion_length} that is more than the model's {limit} positions."
            )


def _divergences(policy: Tensor, teacher: Tensor, reference: Tensor) -> Tensor:
    """Return sums over tokens: KL to the teacher, KL to the reference, entropy."""
    log_p = policy.detach().float().log_softmax(-1)
    p = log_p.exp()
    minus_entropy = torch.linalg.vecdot(p, log_p).sum()
    # KL(p || q) = sum p log p - sum p z_q + lse(z_q)
    kls = [
        minus_entropy - torch.linalg.vecdot(p, z).sum() + z.logsumexp(-1).sum()
        for z in (teacher, reference)
    ]
    return torch.stack([*kls, -minus_entropy])
