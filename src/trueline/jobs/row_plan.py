"""How the rows of a file of prompts are answered: the settings, and a request for each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.errors import ConfigError, DataError, check_number
from trueline.methods import describe_method, find_method, method_name, resolve, with_options
from trueline.models.source import ModelConfig
from trueline.records.prompt_rows import PromptRow
from trueline.settings.options import REQUIRED, option_defaults
from trueline.types import Message, Method, Request, SamplingParams, check_seed

if TYPE_CHECKING:
    from trueline.engine.decoding import Decoder
    from trueline.engine.protocol import Prompt


@dataclass(frozen=True)
class PromptFileConfig:
    """Which prompts are answered, by what.

    >>> PromptFileConfig("prompts.jsonl", options={"principle": "Be brief.", "temperature": 0.7})
    """

    input: str | Path
    """JSONL file or pipe. A row has `prompt` or `messages`, and may have `id`, `system`,
    `principle` and `seed`."""
    method: Method | str | None = None
    """A method or its name; None is plain decoding, or Linear Alignment where there is a
    principle."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the method and of the sampling, by name."""
    model: ModelConfig | str = "tiny"
    """The model, or its name."""
    system: str | None = None
    """System text of rows that have none of their own; "" is an empty one."""
    seed: int = 0
    """Seed of the first row; each further line's is `n` higher."""
    batch_size: int = 32
    """Rows decoded together."""
    skip_bad: bool = False
    """Put bad rows into `<output>.bad.jsonl` and answer the others."""
    refill: bool = False
    """Let rows take the places of those that have ended, instead of waiting for the whole batch:
    faster where lengths differ, but a resumed run may round otherwise than an unbroken one."""

    def __post_init__(self) -> None:
        if isinstance(self.model, (str, Path)):
            object.__setattr__(self, "model", ModelConfig(str(self.model)))
        if not isinstance(self.model, ModelConfig):
            raise ConfigError(f"`model` must be a name or a ModelConfig, got {self.model!r}.")
        if not isinstance(self.input, (str, Path)):
            raise ConfigError(f"`input` must be a path, got {self.input!r}.")
        check_number("batch_size", self.batch_size, low=1, whole=True)
        check_seed(self.seed)
        if self.system is not None and not isinstance(self.system, str):
            raise ConfigError(f"`system` must be text, got {self.system!r}.")
        if self.system and not self.system.strip():
            raise ConfigError('`system` is only white space. Give it some text, or "" for none.')


@dataclass(frozen=True)
class Plan:
    """How rows are answered."""

    config: PromptFileConfig
    method: Method
    sampling: SamplingParams
    needs_principle: bool
    """Whether each row must bring the principle that the method lacks."""

    @staticmethod
    def of(config: PromptFileConfig, rows: Sequence[PromptRow]) -> Plan:
        """Return what the settings ask for; a principle in a row means what it means in them."""
        options, needed = dict(config.options), False
        if config.method is not None and not isinstance(config.method, str):
            return Plan(config, config.method, SamplingParams(**options), False)
        options |= {"method": config.method} if config.method is not None else {}
        principle = next((row.principle for row in rows if row.principle is not None), None)
        if principle is not None:
            name = options["method"] = method_name({"principle": principle, **options})
            default = option_defaults(find_method(name)).get("principle")
            needed = default is REQUIRED and "principle" not in options
            options |= {"principle": principle} if needed else {}
        return Plan(config, *resolve(options), needed)

    def method_for(self, row: PromptRow) -> Method:
        """Return the method for a row: the run's, with the row's principle if it has one."""
        if row.principle is None:
            if self.needs_principle:
                raise DataError(
                    f'missing field "principle": method "{self.method.name}" needs one.'
                )
            return self.method
        if not hasattr(self.method, "principle"):
            raise DataError(f'has a "principle", but method "{self.method.name}" takes none.')
        return with_options(self.method, principle=row.principle)

    def encode(self, decoder: Decoder, row: PromptRow) -> Prompt:
        """Return a row as the token ids of its branches."""
        seed = self.config.seed + (row.line - 1) * self.sampling.n
        return decoder.encode(
            Request(
                self._messages(row),
                self.method_for(row),
                self.sampling,
                seed if row.seed is None else row.seed,
            )
        )

    def _messages(self, row: PromptRow) -> list[Message]:
        """Return the row's chat, with the run's system message if it has none of its own."""
        if self.config.system is None or row.messages[0]["role"] == "system":
            return row.messages
        return [{"role": "system", "content": self.config.system}, *row.messages]

    def describe(self) -> dict[str, Any]:
        """Return what tells this plan from another."""
        fields = describe_method(self.method)
        if self.needs_principle:
            fields["principle"] = "from the rows"
        return {"method": fields, "sampling": asdict(self.sampling)}
