"""Prompts to learn from: rows of any form as a data set, in an order that a resumed run keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from trl.trainer.utils import RepeatSampler

from trueline.errors import DataError

if TYPE_CHECKING:
    from trueline.train.distil.trainer import InverseQTrainer


def _messages(prompt: Any) -> Any:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def dataset_of(rows: Any, name: str) -> Any:
    """Return rows as a data set of the ecosystem, with a `prompt` in each."""
    if isinstance(rows, Sequence) and not isinstance(rows, str):
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping) or "prompt" not in row:
                raise DataError(f'{name}[{i}]: no "prompt" in {row!r:.80}.')
            if not isinstance(row["prompt"], (str, list)):
                raise DataError(f"{name}[{i}]: `prompt` must be text or messages.")
            if not isinstance(row.get("principle"), (str, type(None))):
                raise DataError(f"{name}[{i}]: `principle` must be text, got {row['principle']!r}.")
        # One type a column, and the columns of all rows: `from_list` reads the first row's only.
        chats = any(not isinstance(row["prompt"], str) for row in rows)
        if chats:
            rows = [{**row, "prompt": _messages(row["prompt"])} for row in rows]
        names = dict.fromkeys(name for row in rows for name in row)
        rows = Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    columns = getattr(rows, "column_names", None)
    if isinstance(columns, list) and "prompt" not in columns:
        raise DataError(f'`{name}` has no column "prompt"; it has {", ".join(columns) or "none"}.')
    return rows


class EpochSampler(RepeatSampler):
    """TRL's sampler, its order a function of seed and epoch so that a resumed run goes on in it."""

    def __init__(self, trainer: InverseQTrainer, **options: Any) -> None:
        super().__init__(**options)
        self.trainer = trainer

    def __iter__(self) -> Iterator[int]:
        accumulation = self.trainer.args.gradient_accumulation_steps
        steps = max(len(self) // (self.batch_size * accumulation), 1)
        if self.shuffle:
            epoch = self.trainer.state.global_step // steps
            self.generator.manual_seed((self.seed or 0) + epoch)
        return super().__iter__()
