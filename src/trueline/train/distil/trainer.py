"""Inverse-Q* as a trainer of transformers: the decoder's policy moves into the weights.

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

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from trueline.engine.scoring import forced_logits
from trueline.errors import ConfigError
from trueline.train.distil.config import LOSSES, InverseQConfig
from trueline.train.distil.evaluation import Evaluation
from trueline.train.distil.loss import Sums, part_loss
from trueline.train.distil.policies import policies, teacher_effect, teacher_warning
from trueline.train.distil.rows import StepSampler, dataset_of
from trueline.train.distil.sampling import Answers, Samples
from trueline.train.distil.student import Reference, activation_bytes, evaluating, student_of
from trueline.train.distil.teachers import asked_teacher
from trueline.types import Method

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from torch import Tensor

    from trueline.models.load import LanguageModel

__all__ = ["LOSSES", "InverseQConfig", "InverseQTrainer"]
ACTIVATIONS = 512 << 20
"""Bytes that one forward on a CPU keeps for its backward, about, unless one row alone takes more:
the sum of the gradients is the same, and so is the time, as a few hundred tokens fill the cores."""
EFFECT_TOKENS = 32
"""Length of the answers on which a teacher's effect is measured."""


class InverseQTrainer(Trainer):
    """Train a model on its own answers until it follows the teacher's policy unprompted.

    Args:
        model: A folder, hub name or "tiny", a `LanguageModel`, or a model of transformers; a PEFT
            model's base is the reference.
        args: Settings.
        train_dataset: Rows with `prompt` and perhaps `principle`; a list of dicts also serves.
        eval_dataset: Rows on which loss and divergences are measured, by `eval_strategy`.
        processing_class: The tokenizer, for a model that comes without one.
        callbacks: Of transformers.
        optimizers: Optimizer and scheduler; AdamW and `args.lr_scheduler_type` by default.
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
    loss_is_scaled_for_ga = True
    over_budget: float | None
    """The KL to the reference at which `kl_budget` stopped the training."""
    _samples: list[list[Samples]]
    """Of the update under way, part by part; each cut into what one forward takes."""
    _sums: dict[str, Sums]
    """Since the last log: of "loss", of "eval_loss"."""
    _step: Sums
    """Of the update under way."""
    _left: int
    """Forwards of it that are still to come."""
    _seconds: float
    """Of sampling and learning since the last log."""

    def __init__(
        self,
        model: Any,
        args: InverseQConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        *,
        teacher: Method | None = None,
        evaluate: Callable[[LanguageModel], Mapping[str, float]] | None = None,
    ) -> None:
        args = args or InverseQConfig()
        train_dataset = dataset_of(train_dataset, "train_dataset")
        if train_dataset is None:
            raise ConfigError("`train_dataset` is missing. Give rows with a `prompt`.")
        stream = isinstance(train_dataset, IterableDataset)
        if args.reuse > 1 and stream:
            raise ConfigError("`reuse` above 1 needs a data set with a length. Load it whole.")
        self.teacher = asked_teacher(args, teacher)
        self.teacher.check(train_dataset.column_names)
        self.student = student_of(model, processing_class, peft_config, args)
        if stream:
            args.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]
            if args.shuffle_dataset:
                train_dataset = train_dataset.shuffle(seed=args.seed)
        super().__init__(
            model=self.student.model,
            args=args,
            data_collator=_as_it_is,
            train_dataset=train_dataset,
            eval_dataset=dataset_of(eval_dataset, "eval_dataset"),
            processing_class=self.student.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # The loss is divided by the tokens of the whole update, in every release of transformers.
        self.model_accepts_loss_kwargs = True
        if args.n_gpu > 1:
            raise ConfigError(
                f"{args.n_gpu} graphics cards are visible to one process. Start one for each with "
                "torchrun, or choose one by CUDA_VISIBLE_DEVICES."
            )
        self.teacher.check_model(self.student)
        self.reference = Reference(
            self.student, lambda x: self.accelerator.prepare_model(x, evaluation_mode=True)
        )
        self.effect: float | None = None
        """What `check_effect` found, in nats a token."""
        self.warning: str | None = None
        """Where the teacher's method has little to work with, or works backwards."""
        own = (args, self.teacher, self.student, self.reference)
        self.answers = Answers(*own, self.accelerator)
        self._begin()
        self.answers.source = None if stream else self.answers.taught(train_dataset)
        if evaluate is not None:
            self.evaluate_with(evaluate)

    def evaluate_with(self, evaluate: Callable[[LanguageModel], Mapping[str, float]]) -> None:
        """Measure the student by `evaluate` while it is trained; see the class."""

        def measure() -> Mapping[str, float]:
            with evaluating(self.model), self.answers.fast(self.model):
                return evaluate(self.student)

        self.add_callback(Evaluation(self, measure))

    # What is sampled, and from which prompt.

    def get_train_dataloader(self) -> DataLoader:
        """Return the rows, part after part of each update; see transformers."""
        args = self.args
        if isinstance(self.train_dataset, IterableDataset):
            loader: DataLoader = super().get_train_dataloader()
            return loader
        parts = args.gradient_accumulation_steps * self.accelerator.num_processes
        sampler = StepSampler(
            len(self.train_dataset),
            args.per_device_train_batch_size * parts,
            args.reuse,
            args.seed if args.shuffle_dataset else None,
            lambda: self.state.global_step,
        )
        loader = DataLoader(
            self.train_dataset,
            batch_size=args.per_device_train_batch_size,
            sampler=sampler,
            collate_fn=_as_it_is,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )
        prepared: DataLoader = self.accelerator.prepare(loader)
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the parts of the next update, sampled as one, and the tokens of all processes."""
        parts, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not parts:
            return parts, None
        started, step = time.perf_counter(), self.state.global_step
        if step % self.args.reuse == 0:
            rows = [row for part in parts for row in part]
            batches = ceil(self.state.max_steps / self.args.reuse)
            drawn = self.answers.sample(rows, step // self.args.reuse, batches)
            self._samples = [self._cut(part) for part in drawn.parts(len(parts))]
        elif not self._samples:
            raise ConfigError(
                f"Step {step} came between two uses of the same samples, which no checkpoint "
                f"holds. Resume from a multiple of `reuse` ({self.args.reuse})."
            )
        cuts = [x for part in self._samples for x in part]
        tokens = torch.tensor(sum(x.tokens for x in cuts), device=self.accelerator.device)
        self._step, self._left = Sums(), len(cuts)
        self._seconds += time.perf_counter() - started
        return [{"samples": x} for x in self._samples], self.accelerator.gather(tokens).sum()

    def _cut(self, part: Samples) -> list[Samples]:
        """Return a part as one process on a CPU learns from it: so many rows at a time as fit."""
        if self.accelerator.num_processes > 1 or self.accelerator.device.type != "cpu":
            return [part]
        longest = max(
            len(x.prompt) + len(y) for x, y in zip(part.lessons, part.answers, strict=True)
        )
        return part.rows(max(1, ACTIVATIONS // (longest * activation_bytes(self.student.model))))

    # The loss.

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of a part, and add up what is logged."""
        args, samples, training = self.args, inputs["samples"], self.model.training
        count = samples.tokens
        if num_items_in_batch is not None:
            # Processes are averaged, not added up.
            count = num_items_in_batch / self.accelerator.num_processes
        prompts = [lesson.prompt for lesson in samples.lessons]
        logits = forced_logits(self.student, prompts, samples.answers, forward=model)
        if args.temperature != 1:
            logits = [z / args.temperature for z in logits]
        with self.reference.opened() as start:
            taught = policies(
                self.teacher,
                start,
                samples.lessons,
                samples.answers,
                temperature=args.temperature,
                floor=args.floor,
                batch_rows=max(len(prompts), 2),
            )
            keep = training and args.reuse > 1
            loss, sums = part_loss(samples, logits, taught, args, count, keep=keep)
        self._add(sums, training)
        return (loss, None) if return_outputs else loss

    def _add(self, sums: Sums, training: bool) -> None:
        """Add the sums of a part, of all processes; stop the training beyond the KL budget."""
        sums = sums.reduced(lambda x: self.accelerator.reduce(x, "sum"), self.accelerator.device)
        kind = "loss" if training else "eval_loss"
        self._sums[kind] = self._sums.get(kind, Sums()) + sums
        if not training:
            return
        self._step, self._left = self._step + sums, self._left - 1
        if self.args.kl_budget is not None and self._left == 0:
            kl = float(self._step.kl_to_reference / self._step.tokens)
            if kl > self.args.kl_budget:
                self.over_budget = kl
                self.control.should_training_stop = True

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Make one part of an update, and take its time."""
        started = time.perf_counter()
        losses = [
            super(InverseQTrainer, self).training_step(model, {"samples": cut}, num_items_in_batch)
            for cut in inputs["samples"]
        ]
        self._seconds += time.perf_counter() - started
        return torch.stack(losses).sum()

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Return the loss on answers of the student's own to these rows; see transformers."""
        samples = self.answers.held_out(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, {"samples": samples})
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log the means over all tokens since the last log."""
        for kind, prefix in (("loss", ""), ("eval_loss", "eval_")):
            if kind in logs and (sums := self._sums.pop(kind, None)) is not None:
                means = sums.means()
                if kind == "loss":
                    tokens = float(sums.all_tokens)
                    means["guided_share"] = 1 - float(sums.tokens) / tokens
                    means["tokens_per_second"] = tokens / self._seconds
                    self._seconds = 0.0
                logs |= {prefix + name: value for name, value in means.items()}
        super().log(logs, *args, **options)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: what sampling and the teacher cost is not in the model's formula."""
        return 0

    # What happens around it.

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """Train, after making sure that the teacher has something to teach; see transformers."""
        self._begin()
        if not resume_from_checkpoint and self.args.min_effect > 0:
            self.check_effect()
        return super().train(resume_from_checkpoint, *args, **options)

    def _begin(self) -> None:
        """Forget what an earlier run of this trainer left."""
        self.over_budget, self._samples = None, []
        self.answers.begin()
        self._sums, self._step, self._left, self._seconds = {}, Sums(), 0, 0.0

    def check_effect(self) -> float:
        """Return the teacher's effect on the first rows; raise `ConfigError` if it is empty."""
        args, rows = self.args, []
        for row in self.train_dataset:
            if self.teacher.row_method(row) is not None:
                rows.append(row)
            if len(rows) == args.effect_rows:
                break
        with self.reference.opened() as start:
            self.effect = teacher_effect(
                self.teacher,
                start,
                rows,
                temperature=args.temperature,
                floor=args.floor,
                max_new_tokens=min(args.max_completion_length, EFFECT_TOKENS),
                seed=args.seed,
            )
            self.warning = teacher_warning(self.teacher, start, rows)
        if not self.effect >= args.min_effect:
            raise ConfigError(
                f"The teacher is empty: on {len(rows)} rows it differs from the reference by "
                f"{self.effect:.2g} nats a token, less than `min_effect` ({args.min_effect:g}). "
                "Word the principle so that the model follows it when asked."
            )
        if self.warning is not None:
            logger.warning("warning: %s", self.warning)
        return self.effect


def _as_it_is(rows: list[Any]) -> Any:
    """Collate nothing: rows are sampled from before they are tensors."""
    return rows
