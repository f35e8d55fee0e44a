"""Sweeps: a measurement at every point of a grid, and which point to use."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trueline.errors import ConfigError, check_number
from trueline.evals.metrics import METRICS
from trueline.evals.points import check_grid
from trueline.jobs.decoded import FLOOR, measure_points
from trueline.jobs.measurement import MeasureConfig
from trueline.jobs.sessions import Calling, MeasureResults
from trueline.models.load import LanguageModel
from trueline.models.source import ModelConfig
from trueline.types import Progress


@dataclass(frozen=True)
class SweepConfig(MeasureConfig):
    """A measurement, and what of it varies.

    >>> SweepConfig(method=SelfCD, grid={"alpha": [0, 1, 2, 3]})
    >>> SweepConfig(method=SelfCD, grid={"safety_prompt": [ONE, TWO], "system": ["", "Be kind."]})
    """

    grid: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Name of a number of the method or the sampling -> its values; the last name fastest. For
    refusals also a text of the method, and "system", the chat's system text: which text against
    which."""
    floor: float = FLOOR
    """Share of harmful prompts that the recommended setting must refuse, in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("floor", self.floor, low=0, high=1)
        check_grid(self.grid, self.way)
        if self.metric not in METRICS or self.by == "logprob":
            raise ConfigError(f"A sweep measures {', '.join(METRICS)}, and that by decoding.")
        texts = [n for n, values in self.grid.items() if isinstance(next(iter(values)), str)]
        if texts and self.metric != "refusal":
            raise ConfigError(f"`{texts[0]}` takes one text here: several are for refusals.")
        grid = {name: tuple(dict.fromkeys(values)) for name, values in self.grid.items()}
        object.__setattr__(self, "grid", grid)


def sweep(
    config: SweepConfig,
    folder: str | Path | None = None,
    *,
    model: LanguageModel | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    command: str = "",
) -> MeasureResults:
    """Measure every point, recommend one, and return the numbers; see `measure`.

    The point is chosen on one half of the prompts and reported on the other. A folder takes further
    points: only what is not there is computed. Beside refusals stand system texts that a user would
    try first, each alone (`evals.points.text_points`), and the frontier that all of them make.

    >>> found = sweep(SweepConfig(method=SelfCD, grid={"alpha": [0, 1, 2]}), "runs/alpha")
    >>> found.recommendation["label"]
    """
    if model is not None:
        config = dataclasses.replace(config, model=ModelConfig(model.name, raw=model.raw))
    calling = Calling(folder, model, progress, overwrite, command)
    return measure_points(config, calling, config.grid, config.floor)
