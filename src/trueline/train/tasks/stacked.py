"""How weights go on from stage to stage: a fresh LoRA on the model with all earlier ones merged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainingArguments, set_seed

from trueline.errors import ConfigError, ModelError
from trueline.models.adapter import WEIGHTS
from trueline.models.checkpoint import HEADS
from trueline.train.adapters.stack import AdapterStack, save_adapter
from trueline.train.chain import Link
from trueline.train.keep.terms import Term
from trueline.train.tasks.families import Row
from trueline.train.tasks.fresh import Fresh
from trueline.train.tasks.stream_config import StreamConfig
from trueline.train.tasks.task_trainer import AdapterTrainer


class Stacked:
    """Makes, trains, saves and makes again the model of each stage.

    Other ways for weights to go on are subclasses.

    Args:
        fresh: Makes the untouched model.
        config: Of the LoRA.
    """

    file = "adapter"
    """Of a stage's weights in its folder."""

    def __init__(self, fresh: Fresh, config: StreamConfig) -> None:
        self.fresh, self.config = fresh, config

    def groups(self, tasks: int) -> list[list[int]]:
        """Return the places of the tasks that each stage trains."""
        return [[j] for j in range(tasks)]

    def measured(self, link: Link, last: int, tasks: int) -> Sequence[int]:
        """Return the places of the tasks measured after a stage, of so many.

        Args:
            link: The stage.
            last: The place of the last task that was trained.
            tasks: How many there are.
        """
        return range(tasks if self.config.evaluate == "all" else last + 1)

    def carried(self, link: Link, tasks: int) -> Sequence[int]:
        """Return the places of the tasks whose scores are those of the stage before."""
        return ()

    def adapters(self, folders: Sequence[Path]) -> tuple[Path, ...]:
        """Return the folders of the adapters that make up the last model, of these stages."""
        return tuple(folder / self.file for folder in folders)

    def start(self, link: Link, rank: int) -> tuple[Any, AdapterStack]:
        """Return the model as a stage starts from it, and the adapters merged into it."""
        model = self.fresh()
        set_seed(link.seed)
        stack = AdapterStack.load(self.merged(link))
        model = stack.attach(model, self._lora(rank, model))
        if not self.config.train_head:
            for name, p in model.named_parameters():
                if ".modules_to_save." in name:
                    p.requires_grad_(False)
        return model, stack

    def merged(self, link: Link) -> list[Path]:
        """Return the adapters that a stage is trained on top of."""
        return [folder / self.file for folder in link.earlier]

    def again(self, link: Link, rank: int) -> Any:
        """Return the model as it was at the end of a stage, from its files."""
        model, _ = Stacked.start(self, link, rank)
        load_adapter(model, link.folder / self.file)
        return model

    def trainer(
        self, model: Any, stack: AdapterStack, terms: list[Term], rows: Sequence[Row],
        arguments: TrainingArguments, **options: Any,
    ) -> Any:  # fmt: skip
        """Return what trains the model on the rows, held back by the terms."""
        return AdapterTrainer(
            model, arguments, train_dataset=rows, stack=stack, terms=terms, **options
        )

    def save(self, model: Any, link: Link) -> None:
        """Write the trained weights so that a kill leaves them whole or not at all."""
        target = link.folder / self.file
        part = target.with_name(f"{target.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        save_adapter(model, part)
        os.replace(part, target)

    def drop(self, link: Link) -> None:
        """Remove what the stages before this one, now done, left and nothing needs any more."""

    def _lora(self, rank: int, model: Any) -> LoraConfig:
        config, targets = self.config, self.config.target_modules
        head = None
        # A head that is in no file of the model must be in the adapter's.
        if config.train_head or getattr(model, "head_is_new", False):
            names = [name for name in HEADS if hasattr(model, name)]
            if not names or not type(model).__name__.endswith("ForSequenceClassification"):
                raise ConfigError("`train_head` is for models that classify by a head.")
            head = names[:1]
        return LoraConfig(
            r=rank,
            # Another rank has the same scale.
            lora_alpha=config.alpha * rank / config.rank,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=list(targets) if isinstance(targets, tuple) else targets,
            modules_to_save=head,
        )


def load_adapter(model: Any, folder: Path) -> None:
    """Put the weights of an adapter's folder into the model's own adapter."""
    found: Any = set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    if found.unexpected_keys:
        raise ModelError(f'Adapter "{folder}" does not fit the model: {found.unexpected_keys[0]}.')
