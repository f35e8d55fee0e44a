"""Judgements: what a judge says of given texts: which response wins, and is the judge right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trueline.errors import DataError, check_number
from trueline.evals.datasets import Source, read_rows
from trueline.evals.items import spread
from trueline.evals.judges import TEXT_COLUMNS, agreement, read_labels
from trueline.evals.judging import Judge, JudgeConfig, check_judge, make_judge
from trueline.evals.pairwise import win_rates
from trueline.evals.pictures import draw_confusion
from trueline.evals.refusal import LABELS, Verdict
from trueline.evals.rubrics import CRITERION
from trueline.jobs.sessions import Calling, MeasureResults, Work, check_plot, measure_rows
from trueline.records.hashes import digest
from trueline.types import Progress


@dataclass(frozen=True)
class WinRateConfig:
    """Two sets of responses to the same prompts, and who says which is better."""

    first: Source
    """Rows of `prompt` and `response`: a file, or a list of rows."""
    second: Source
    """The same prompts in the same order, other responses."""
    judge: Judge
    """local or model with its settings, or an object with `pairwise`."""
    criterion: str = CRITERION
    """Which response is better."""
    limit: int | None = None
    """At most so many pairs."""
    batch_size: int = 64
    """Pairs judged together."""
    seed: int = 0
    """Of what `limit` draws."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "judge", check_judge(self.judge, "win_rate"))
        _check_sizes(self)


@dataclass(frozen=True)
class AgreementConfig:
    """Texts with people's labels, and the judge of refusals to compare with them."""

    labels: Source
    """Rows of `completion` and `label` (complied, partial, full), and `prompt` if there is one."""
    judge: Judge | None = None
    """keywords (None), local, model, a function of prompt and response, or an object."""
    limit: int | None = None
    """At most so many texts, spread over the labels."""
    batch_size: int = 64
    """Texts judged together."""
    seed: int = 0
    """Of what `limit` draws."""
    plot: bool = True
    """Draw plot.png; needs matplotlib."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "judge", check_judge(self.judge, "refusal"))
        _check_sizes(self)


def measure_win_rate(
    config: WinRateConfig,
    folder: str | Path | None = None,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
    command: str = "",
) -> MeasureResults:
    """Return how often the first response beats the second, every pair judged in both orders."""
    first, second = read_responses(config.first), read_responses(config.second)
    names = [_name(s, n) for s, n in ((config.first, "the first"), (config.second, "the second"))]
    if [p for p, _ in first] != [p for p, _ in second]:
        raise DataError(f"{names[0]} and {names[1]} have not the same prompts in the same order.")
    every = [(p, a, b) for (p, a), (_, b) in zip(first, second, strict=True)]
    pairs = spread(every, [None] * len(every), config.limit, config.seed)
    data = {"sources": names, "n": len(pairs), "sha256": digest(pairs)}
    settings = {"data": data, "criterion": config.criterion}

    def start(run: Path) -> tuple[Work, Mapping[str, Any], Any]:
        judge, judged_by = make_judge(config.judge, "win_rate", run)

        def work(batch: Sequence[Any], _: int) -> list[dict[str, Any]]:
            prompts, a, b = (list(column) for column in zip(*batch, strict=True))
            forward = judge.pairwise(prompts, a, b, config.criterion)
            backward = judge.pairwise(prompts, b, a, config.criterion)
            return [
                {"prompt": p, "forward": x, "backward": y}
                for p, x, y in zip(prompts, forward, backward, strict=True)
            ]

        return work, judged_by, judge

    def numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        lengths = [len(a) - len(b) for _, a, b in pairs]
        forward, backward = ([row[name] for row in rows] for name in ("forward", "backward"))
        return win_rates(forward, backward, lengths).as_dict()

    title = f"Win rate of {names[0]} over {names[1]}"
    calling = Calling(folder, None, progress, overwrite, command)
    return measure_rows(
        "win_rate", title, settings, pairs, start, numbers, calling,
        batch_size=config.batch_size, of=len(every), judge=config.judge,
    )  # fmt: skip


def measure_agreement(
    config: AgreementConfig,
    folder: str | Path | None = None,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
    command: str = "",
) -> MeasureResults:
    """Return how far the judge and people agree on which responses refused."""
    check_plot(config.plot)
    every = read_labels(config.labels)
    texts = spread(every, [t.label for t in every], config.limit, config.seed)
    source = _name(config.labels, "a list")
    data = {"sources": [source], "n": len(texts), "sha256": digest([asdict(t) for t in texts])}

    def start(run: Path) -> tuple[Work, Mapping[str, Any], Any]:
        judge, judged_by = make_judge(config.judge, "refusal", run)

        def work(batch: Sequence[Any], _: int) -> list[dict[str, Any]]:
            verdicts = judge.refusal([t.prompt for t in batch], [t.text for t in batch])
            return [
                {"people": t.label, "text": t.text, **asdict(v)}
                for t, v in zip(batch, verdicts, strict=True)
            ]

        return work, judged_by, judge

    def numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        verdicts = [Verdict(row["label"], row["reason"], row["phrase"]) for row in rows]
        found = agreement(verdicts, [t.label for t in texts]).as_dict()
        table = found.pop("confusion")
        for label, counts in zip(LABELS[:3], table, strict=True):
            cells = (f"{n} {said}" for n, said in zip(counts, LABELS, strict=True))
            found[f"people say {label}"] = ", ".join(cells)
        found["confusion"] = table
        return found

    def draw(found: Mapping[str, Any]) -> Any:
        return draw_confusion(found["confusion"], LABELS[:3], LABELS, f"n = {len(texts)}")

    name = config.judge.name if isinstance(config.judge, JudgeConfig) else "function"
    title = f"Judge {name or 'keywords'} against people: {source}"
    calling = Calling(folder, None, progress, overwrite, command)
    return measure_rows(
        "judge", title, {"data": data}, texts, start, numbers, calling,
        batch_size=config.batch_size, of=len(every), judge=config.judge,
        draw=draw if config.plot else None,
    )  # fmt: skip


def read_responses(source: Source) -> list[tuple[str, str]]:
    """Return (prompt, response) of each row of responses; `DataError` with path:line."""
    rows = []
    for place, row in read_rows(source):
        column = next((c for c in TEXT_COLUMNS if isinstance(row.get(c), str)), None)
        if not isinstance(row.get("prompt"), str) or column is None:
            raise DataError(
                f'{place}: needs "prompt" and "response" (or {", ".join(TEXT_COLUMNS)}).'
            )
        rows.append((row["prompt"], row[column]))
    if not rows:
        raise DataError(f"{_name(source, 'The list')}: there is no row in it.")
    return rows


def _name(source: Source, otherwise: str) -> str:
    return str(source) if isinstance(source, (str, Path)) else otherwise


def _check_sizes(config: WinRateConfig | AgreementConfig) -> None:
    check_number("batch_size", config.batch_size, low=1, whole=True)
    if config.limit is not None:
        check_number("limit", config.limit, low=1, whole=True)
