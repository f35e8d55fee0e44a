"""Demonstration: both measurements on a model, as a folder with a report and a figure."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from trueline.engine.decoding import Decoder
from trueline.evals.statistics import Estimate
from trueline.jobs import demo_counts as counts
from trueline.jobs.demo_counts import Adherence, HeldOut, Refusal
from trueline.jobs.demo_figure import draw_demo
from trueline.models.load import LanguageModel
from trueline.models.source import ModelConfig
from trueline.records.hashes import versions
from trueline.records.run_folder import RunFolder
from trueline.records.style import need_matplotlib
from trueline.types import Progress, check_seed

FIGURE = "demo.png"


@dataclass(frozen=True)
class DemoConfig:
    """Who is asked, and how much."""

    limit: int | None = None
    """At most so many answers a row of the report; None is 300 on the bundled model, else 24."""
    seed: int = 0
    """Which pairs and requests are drawn."""
    model: ModelConfig | str = "tiny"
    """The model, or its name. One that was not made for this is asked the same questions and
    requests, under principles that a looser rule can tell."""

    def __post_init__(self) -> None:
        counts.check_limit(self.limit)
        check_seed(self.seed)
        if isinstance(self.model, str):
            object.__setattr__(self, "model", ModelConfig(self.model))
        if self.limit is None and not self.bundled:
            object.__setattr__(self, "limit", counts.LIMIT)

    @property
    def source(self) -> ModelConfig:
        """The model's settings."""
        assert isinstance(self.model, ModelConfig)
        return self.model

    @property
    def bundled(self) -> bool:
        """Whether it is the model that was made for this."""
        return self.source.name == "tiny"


@dataclass(frozen=True)
class DemoResults:
    """What was counted; `folder` holds report.md, results.json and demo.png."""

    folder: Path
    adherence: tuple[Adherence, ...]
    refusal: tuple[Refusal, ...]
    seconds: float
    answers: int
    """How many were decoded."""
    written: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return what results.json holds, with the folder."""
        return {"folder": str(self.folder), **self.written}

    def table(self) -> str:
        """Return the two tables as text for a terminal."""
        return summary(self.adherence, self.refusal)


def demonstrate(
    config: DemoConfig | None = None,
    folder: str | Path = "demo",
    *,
    model: LanguageModel | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> DemoResults:
    """Measure and write the report; about a minute on one core on the bundled model.

    An earlier demonstration in the folder is replaced; a folder with anything else is refused.
    """
    config = config or DemoConfig()
    need_matplotlib()
    held_out = counts.load_held_out(str(resources.files("trueline") / "assets/tiny/held_out.json"))
    if not config.bundled:
        held_out = held_out.for_any_model()
    settings = {
        "model": config.source.name,
        "limit": config.limit,
        "seed": config.seed,
        "decoding": f"greedy, at most {counts.SAMPLING.max_new_tokens} tokens",
        **versions(),
    }
    run = RunFolder(Path(folder).expanduser(), "demo", settings, command=command,
                    overwrite=True)  # fmt: skip
    try:
        start = time.perf_counter()
        decoder = Decoder(model or config.source.load(), batch_size=counts.BATCH)
        run.start()
        total, done = counts.count_requests(held_out, config.limit), 0

        def count(new: int) -> None:
            nonlocal done
            done += new
            if progress is not None:
                progress("answers", done, total)

        count(0)
        asked: Any = {"limit": config.limit, "seed": config.seed, "on_done": count}
        adherence = counts.measure_adherence(decoder, held_out, **asked)
        refusal = counts.measure_refusal(decoder, held_out, **asked)
        seconds = round(time.perf_counter() - start, 1)
        run.write("report.md", render_report(config, held_out, adherence, refusal,
                                             {**settings, "seconds": seconds}))  # fmt: skip
        name = "bundled model" if config.bundled else config.source.name
        run.draw(FIGURE, draw_demo(adherence, refusal, name))
        written = run.finish(_content(config, held_out, adherence, refusal, seconds))
    finally:
        run.close()
    rows = tuple(adherence), tuple(refusal)
    return DemoResults(run.folder, *rows, seconds, total, written)


def _content(
    config: DemoConfig,
    held_out: HeldOut,
    adherence: Sequence[Adherence],
    refusal: Sequence[Refusal],
    seconds: float,
) -> dict[str, Any]:
    """Return every number and every answer."""
    pairs = counts.choose_pairs(held_out, config.limit, config.seed)
    asked = (config.limit, config.seed)
    return {
        "seconds": seconds,
        "pairs": [dataclasses.asdict(p) | dataclasses.asdict(q) for p, q in pairs],
        "safe_triggers": counts.choose_requests(held_out.safe_triggers, *asked),
        "unsafe": counts.choose_requests(held_out.unsafe, *asked),
        "adherence": [dataclasses.asdict(row) for row in adherence],
        "refusal": [dataclasses.asdict(row) for row in refusal],
    }


def render_report(
    config: DemoConfig,
    held_out: HeldOut,
    adherence: Sequence[Adherence],
    refusal: Sequence[Refusal],
    settings: dict[str, Any],
) -> str:
    """Return the report as Markdown."""
    environment = Environment(
        loader=PackageLoader("trueline", "assets"), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"interval": interval, "cell": cell}
    shown = [row for row in adherence if row.ratio in (None, 0.0, 2.0)]
    shown_refusal = [row for row in refusal if row.name in counts.SHOWN_REFUSAL]
    pairs = counts.choose_pairs(held_out, config.limit, config.seed)
    model = None if config.bundled else config.source.name
    asked = (("model", model), ("limit", config.limit), ("seed", config.seed or None))
    return environment.get_template("demo.md.jinja").render(
        options="".join(f" --{name} {value}" for name, value in asked if value is not None),
        seconds=settings["seconds"],
        bundled=config.bundled,
        model=config.source.name,
        figure=FIGURE,
        adherence=adherence,
        refusal=refusal,
        shown=shown,
        shown_refusal=shown_refusal,
        pairs=pairs,
        examples=counts.example_pairs(pairs, shown[1], shown[2]),
        refusal_examples=counts.example_requests(
            held_out, config.limit, config.seed, shown_refusal
        ),
        settings=settings.items(),
    )


def interval(estimate: Estimate) -> str:
    """Return a rate as "55 % [50, 61]"."""
    low, high = 100 * estimate.low, 100 * estimate.high
    return f"{100 * estimate.value:.0f} % [{low:.0f}, {high:.0f}]"


def cell(text: str) -> str:
    """Return text that cannot break out of a cell of a Markdown table."""
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split()) or " "


def summary(adherence: Sequence[Adherence], refusal: Sequence[Refusal]) -> str:
    """Return the two tables for the terminal."""
    width = max(len(name) for rows in (adherence, refusal) for name in (r.name for r in rows))
    lines = [f"{'':{width}}  follows the principle  fact right"]
    for row in adherence:
        lines.append(f"{row.name:{width}}  {interval(row.followed):21}  {interval(row.facts)}")
    lines += ["", f"{'':{width}}  harmless, refused      harmful, refused"]
    for line in refusal:
        rates = f"{interval(line.over_refusal):21}  {interval(line.harmful_refusal)}"
        lines.append(f"{line.name:{width}}  {rates}")
    return "\n".join(lines)
