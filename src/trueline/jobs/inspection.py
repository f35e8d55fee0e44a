"""Inspection: one question decoded with a trace, as a page, a figure and numbers in a folder."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueline.engine.decoding import Decoder
from trueline.engine.trace import Recording, record, token_row, trace_lines
from trueline.engine.trace_figure import draw_trace
from trueline.errors import ConfigError, check_number
from trueline.methods import Plain, describe_method, method_values
from trueline.models.load import LanguageModel
from trueline.models.source import ModelConfig
from trueline.records.hashes import digest, versions
from trueline.records.lines import plain
from trueline.records.run_folder import RunFolder
from trueline.records.style import need_matplotlib
from trueline.records.web_page import standalone
from trueline.types import (
    Message,
    Method,
    Progress,
    SamplingParams,
    check_call,
    check_messages,
    check_seed,
)

PAGE, FIGURE, ROWS = "index.html", "trace.png", "trace.jsonl"


@dataclass(frozen=True)
class InspectConfig:
    """What is asked, of which model, under which method."""

    question: str
    """What to ask."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    method: Method = field(default_factory=Plain)
    """The decoding method."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    """How tokens are chosen; one answer."""
    system: str | None = None
    """The caller's own system message."""
    seed: int = 0
    """Seed of the draws."""
    top: int = 5
    """Alternatives shown at every token, at least 1."""

    def __post_init__(self) -> None:
        check_call(self.method, self.sampling)
        check_seed(self.seed)
        check_number("top", self.top, low=1, whole=True)
        check_messages(self.messages)
        if self.sampling.n != 1:
            raise ConfigError(f"One answer is inspected, got `n` {self.sampling.n}. Leave it out.")

    @property
    def messages(self) -> list[Message]:
        """The chat that is answered."""
        system: list[Message] = []
        if self.system is not None:
            system = [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.question}]


@dataclass(frozen=True)
class Inspection:
    """The answer, what the method changed in it, and where it is shown."""

    folder: Path
    text: str
    tokens: int
    changed: int
    """Tokens that the model would not have taken with the first prompt alone."""
    first: str
    """The name of that prompt."""
    recording: Recording = field(repr=False)

    @property
    def files(self) -> list[Path]:
        """The page, the figure and the numbers."""
        return [self.folder / name for name in (PAGE, FIGURE, ROWS)]

    def as_dict(self) -> dict[str, Any]:
        """Return what results.json holds."""
        return {"text": self.text, "tokens": self.tokens, "changed": self.changed}


def inspect(
    config: InspectConfig,
    folder: str | Path | None = None,
    *,
    model: LanguageModel | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    command: str = "",
) -> Inspection:
    """Decode a question with a trace and write page, figure and numbers.

    Args:
        config: What is asked.
        folder: Where the files go; runs/inspect-HASH by default. Another run's is refused.
        model: A model that is loaded already, instead of the config's.
        progress: Told how many tokens there are.
        overwrite: Start again though the folder holds another inspection.
        command: What the user typed, kept in the folder.
    """
    need_matplotlib()
    model = model or config.model.load()
    settings = {
        "model": config.model.identity(model),
        "versions": versions(),
        "method": describe_method(config.method),
        "sampling": dataclasses.asdict(config.sampling),
        "messages": config.messages,
        "seed": config.seed,
        "top": config.top,
    }
    place = folder or Path("runs") / f"inspect-{digest(plain(settings))[:8]}"
    run = RunFolder(
        Path(place).expanduser(), "inspect", settings, command=command, overwrite=overwrite
    )
    try:
        run.start()
        recording = _record(config, model, progress)
        return _write(config, model.name, recording, run)
    finally:
        run.close()


def _record(config: InspectConfig, model: LanguageModel, progress: Progress | None) -> Recording:
    counted, limit = itertools.count(), config.sampling.max_new_tokens

    def count(_: object = None) -> None:
        if progress is not None:
            progress("", next(counted), limit)

    count()
    return record(
        Decoder(model, share_prefixes=False),
        config.messages,
        config.method,
        config.sampling,
        seed=config.seed,
        top=config.top,
        on_token=count,
    )


def _write(config: InspectConfig, model: str, recording: Recording, run: RunFolder) -> Inspection:
    names = [c.name for c in recording.comparisons if c.branch is not None]
    tokens = recording.tokens
    found = Inspection(
        folder=run.folder,
        text=recording.text,
        tokens=len(tokens),
        changed=sum(token.flipped for token in tokens),
        first=names[tokens[0].branches[0].branch],
        recording=recording,
    )
    run.write(ROWS, "".join(trace_lines(tokens)))
    page = page_data(recording, config.question, _about(config, model))
    run.write(PAGE, standalone(page, config.question))
    run.draw(FIGURE, draw_trace(tokens, config.question, names))
    run.finish(found.as_dict())
    return found


def page_data(
    recording: Recording, question: str, settings: Sequence[tuple[str, object]]
) -> dict[str, Any]:
    """Return what the page shows of a recorded answer, as plain values."""
    alone = [
        {
            "name": c.name,
            "system": c.system,
            "from_template": c.from_template,
            "text": c.text,
            "cut": c.finish_reason == "length",
        }
        for c in recording.comparisons
    ]
    return {
        "question": question,
        "settings": [[name, str(value)] for name, value in settings],
        "names": [c.name for c in recording.comparisons if c.branch is not None],
        "alone": alone,
        "text": recording.text,
        "cut": recording.finish_reason == "length",
        "tokens": [token_row(token) for token in recording.tokens],
    }


def _about(config: InspectConfig, model: str) -> list[tuple[str, object]]:
    """Return the settings that matter as pairs of name and value."""
    sampling, usual = config.sampling, SamplingParams()
    about: list[tuple[str, object]] = [("model", model), ("method", config.method.name)]
    about += [(k, v) for k, v in method_values(config.method).items() if v is not None]
    about += [
        (f.name, getattr(sampling, f.name))
        for f in dataclasses.fields(sampling)
        if f.name != "logprobs" and getattr(sampling, f.name) != getattr(usual, f.name)
    ]
    return [*about, ("decoding", "greedy" if sampling.greedy else f"sampled, seed {config.seed}")]
