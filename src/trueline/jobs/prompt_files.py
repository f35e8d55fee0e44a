"""Files of prompts: a row of completions for each, batch by batch, resumable.

    generate_file(PromptFileConfig("prompts.jsonl", "self-cd"), "out.jsonl")

Beside the output lies `<output>.run.json`, which says what the rows belong to: the settings, and
hashes of the weights, the adapter, the chat template and the bytes of the prompts. The same call
again goes on where a killed one stopped; any other is refused.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.engine.decoding import Decoder
from trueline.engine.scheduler import Admission
from trueline.errors import ConfigError, DataError
from trueline.evals.effects import warning
from trueline.jobs.row_plan import Plan, PromptFileConfig
from trueline.models.adapter import adapter_settings
from trueline.models.source import ModelConfig
from trueline.records.disk import check_regular, replace_file
from trueline.records.hashes import (
    file_hash,
    folder_hash,
    model_folder,
    model_hash,
    versions,
)
from trueline.records.lines import LineFile, dump
from trueline.records.output_file import OutputFile, kept_settings, sidecar_of
from trueline.records.prompt_rows import BadRow, BadRowsError, PromptRow, read_prompts
from trueline.types import Completion, Progress

if TYPE_CHECKING:
    from trueline.engine.protocol import Prompt, Step
    from trueline.models.load import LanguageModel


COUNTED = ("rows", "tokens", "seconds", "tokens_per_second")
"""What is kept of each session."""


@dataclass(frozen=True)
class FileResults:
    """What a call did."""

    output: str
    total: int
    """Rows of the output."""
    rows: int
    """Rows that this call decoded; 0 where all were there."""
    tokens: int
    seconds: float
    bad: int
    """Rows in `<output>.bad.jsonl`."""
    warning: str | None = None
    """Where the method has little to work with on this model, or works backwards, seen on the first
    rows of this call; see `evals.effects`."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all completions over the seconds of this call."""
        return round(self.tokens / self.seconds, 1) if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {
            "output": self.output,
            "total": self.total,
            "bad": self.bad,
            "rows": self.rows,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": self.tokens_per_second,
            **({"warning": self.warning} if self.warning else {}),
        }


def generate_file(
    config: PromptFileConfig,
    output: str | Path,
    *,
    overwrite: bool = False,
    model: LanguageModel | None = None,
    progress: Progress | None = None,
) -> FileResults:
    """Answer every prompt of a file that the output does not answer yet.

    Args:
        config: Which prompts, and by what.
        output: JSONL file; a row is the input's with the completion's fields added.
        overwrite: Start again though the output exists.
        model: Instead of the one that the config names, already loaded.
        progress: Called with the rows that are done.

    Raises:
        ConfigError: An option, or the output is another run's.
        BadRowsError: Rows cannot be used, and `skip_bad` is off.
        DataError: The file cannot be used.
        ModelError: The model does not fit.
    """
    assert isinstance(config.model, ModelConfig)
    check_paths(config.input, output)
    content = read_prompts(config.input)
    plan = Plan.of(config, content.rows)
    rows, bad = _split(content.rows, plan.method_for)
    _refuse(config, [*content.bad, *bad])
    about = _files(config.model)
    if model is not None or about["weights"] is None:
        model = model or config.model.load()
        about["weights"] = model_hash(model)
    settings = _settings(config, plan, content.sha256, about)
    if not overwrite and (total := _finished(output, settings, content.rows)) is not None:
        return FileResults(str(output), total, 0, 0, 0.0, 0)
    model = model or config.model.load()
    about["adapter"] = adapter_settings(config.model.adapter, model.adapter_folders.get("default"))
    settings = _settings(config, plan, content.sha256, about)
    admission: Admission = "each_step" if config.refill else "when_empty"
    decoder = Decoder(model, batch_size=config.batch_size, admission=admission)
    rows, prompts, more = _encoded(plan, decoder, rows)
    bad = sorted([*content.bad, *bad, *more], key=lambda b: b.line)
    _refuse(config, bad)
    if not rows:
        raise DataError(f"{config.input}: no row can be used. {bad[0].error}")
    ids = [row.fields["id"] for row in rows]
    file = OutputFile(output, settings, ids, config.batch_size, overwrite=overwrite)
    run = _Run(decoder, file, rows, prompts, progress)
    try:
        if bad:
            lines = [dump({"line": b.line, "error": b.error, "row": b.row}) + "\n" for b in bad]
            replace_file(bad_file_of(output), "".join(lines))
        run.decode(config.batch_size)
    finally:
        new = file.done - run.already
        counts = (len(rows), new, run.tokens, run.seconds, len(bad))
        done = FileResults(str(output), *counts, run.warning)
        file.close({name: done.as_dict()[name] for name in COUNTED})
    return done


def bad_file_of(output: str | Path) -> Path:
    """Return where the rows that cannot be used go."""
    return Path(f"{output}.bad.jsonl")


def check_paths(given: str | Path, output: str | Path) -> None:
    """Raise `ConfigError` for an output that cannot be one, or that would replace the input."""
    path = Path(output)
    if path.is_dir():
        raise ConfigError(f'Output "{path}" is a folder. Give a file.')
    if not path.parent.is_dir():
        raise ConfigError(f'Output folder "{path.parent}" does not exist. Make it first.')
    for own in (path, sidecar_of(path), bad_file_of(path)):
        check_regular(own)
        if own.exists() and Path(given).exists() and os.path.samefile(own, given):
            if own == path:
                raise ConfigError(
                    f'Input and output are the same file, "{path}". Give another --output.'
                )
            raise ConfigError(f'The input, "{own}", belongs to this output. Give another --output.')
    if bad_file_of(path).exists() and not sidecar_of(path).exists():
        raise ConfigError(f'"{bad_file_of(path)}" exists, and is no run\'s. Give another --output.')


class _Run:
    """The decoding of what is not yet in the output."""

    def __init__(
        self,
        decoder: Decoder,
        file: OutputFile,
        rows: Sequence[PromptRow],
        prompts: Sequence[Prompt],
        progress: Progress | None,
    ) -> None:
        self.decoder, self.file, self.progress = decoder, file, progress
        self.rows, self.prompts = rows, prompts
        self.already, self.tokens, self.start = file.done, 0, time.perf_counter()
        self.warning: str | None = None
        self._took = 0.0

    def decode(self, size: int) -> None:
        """Decode and append, `size` rows at a time."""
        self._tell(self.already)
        answers = self.decoder.each(self.prompts[self.already :], on_step=self._count)
        while self.file.done < len(self.rows):
            first, batch = self.file.done, []
            for place, own in zip(range(first, first + size), answers, strict=False):
                batch.append(_output(self.rows[place], self.prompts[place], own))
                self._tell(place + 1)
            self.file.append(batch)
            if first == self.already:
                self._watch(self.prompts[first : first + size], batch)

    def _watch(self, prompts: Sequence[Prompt], rows: Sequence[Mapping[str, Any]]) -> None:
        """See on the first rows whether the method has something to work with."""
        start = time.perf_counter()
        answers = [(row.get("samples") or [row])[0]["token_ids"] for row in rows]
        self.warning = warning(self.decoder, prompts[: len(answers)], answers)
        self._took = time.perf_counter() - start

    @property
    def seconds(self) -> float:
        """Since the first row, without the look at the method."""
        return time.perf_counter() - self.start - self._took

    def _count(self, step: Step) -> None:
        self.tokens += 1

    def _tell(self, done: int) -> None:
        if self.progress is not None:
            rate = self.tokens / self.seconds
            what = f"{rate:,.0f} tokens/s" if self.tokens else "decoding"
            self.progress(what, done, len(self.rows))


def _output(row: PromptRow, prompt: Prompt, completions: Sequence[Completion]) -> dict[str, Any]:
    """Return the row to write: the row as it came, its seed, and the completions' fields."""
    samples = []
    for c in completions:
        sample: dict[str, Any] = {
            "text": c.text,
            "finish_reason": c.finish_reason,
            "token_ids": c.token_ids,
        }
        if c.logprobs is not None:
            sample |= {"logprobs": c.logprobs, "branch_logprobs": c.branch_logprobs}
        samples.append(sample)
    own = samples[0] if len(samples) == 1 else {"samples": samples}
    tokens = list(map(len, prompt.branches))
    return {**row.fields, "seed": prompt.seed, "prompt_tokens": tokens, **own}


def _split(
    rows: Sequence[PromptRow], check: Callable[[PromptRow], object]
) -> tuple[list[PromptRow], list[BadRow]]:
    """Return the rows that `check` lets through, and the others with its error."""
    good, bad = [], []
    for row in rows:
        try:
            check(row)
            good.append(row)
        except (DataError, ConfigError) as error:
            bad.append(BadRow(row.line, str(error), row.fields))
    return good, bad


def _encoded(
    plan: Plan, decoder: Decoder, rows: Sequence[PromptRow]
) -> tuple[list[PromptRow], list[Prompt], list[BadRow]]:
    """Return the rows that fit the model, their token ids, and the others."""
    prompts: dict[int, Prompt] = {}
    good, bad = _split(rows, lambda row: prompts.update({row.line: plan.encode(decoder, row)}))
    return good, [prompts[row.line] for row in good], bad


def _refuse(config: PromptFileConfig, bad: Sequence[BadRow]) -> None:
    if bad and not config.skip_bad:
        raise BadRowsError(str(config.input), sorted(bad, key=lambda b: b.line))


def _files(model: ModelConfig) -> dict[str, Any]:
    """Return the hashes of the model's files that can be had without loading it."""
    folder = model_folder(model.name)
    template = None if model.chat_template is None else file_hash(model.chat_template)
    return {
        "weights": None if folder is None else folder_hash(folder),
        "adapter": adapter_settings(model.adapter),
        "chat_template": template,
    }


def _settings(
    config: PromptFileConfig, plan: Plan, data: str, files: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what decides the bytes of the output."""
    found = {
        "trueline": versions()["trueline"],
        "input": {"sha256": data},
        "model": {**asdict(config.model), **files},  # type: ignore[arg-type]
        **plan.describe(),
        "system": config.system,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "refill": config.refill,
        "skip_bad": config.skip_bad,
    }
    kept: dict[str, Any] = json.loads(json.dumps(found))
    return kept


def _finished(
    output: str | Path, settings: Mapping[str, Any], rows: Sequence[PromptRow]
) -> int | None:
    """Return how many rows the output holds if it is whole; checked before the model is loaded.

    Raises `DataError` for a row that is not of these prompts, in their order.
    """
    total = kept_settings(output, settings)["rows"]
    if not isinstance(total, int) or not Path(output).exists():
        return None
    file = LineFile(Path(output))
    ids, count = iter([row.fields["id"] for row in rows]), 0
    try:
        for count, _, row in file.rows():
            if count > total or "id" not in row or row["id"] not in ids:
                raise file.foreign(count)
    finally:
        file.close()
    return total if count == total else None
