"""Over-refusal on a chat model: system texts, Self-CD, AdaCD and what is fitted, on a frontier.

XSTest is the half on which anything is chosen or fitted; OKTest, MaliciousInstruct and HarmBench
are the half that is reported. Answers are greedy, judged by the `keywords` rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._real_world import NAMES, Task, World, markdown
from benchmarks._refusal_first import GATED, LOOKS, Look, first_odds, gate_label, gates, look_key
from benchmarks._refusal_sets import (
    BATCH,
    BLOCKS,
    MODEL,
    SETS,
    TOKENS,
    Prompt,
    Setting,
    prompts,
    settings,
)
from benchmarks._routes import fitted_score, form_features, ranked, routes
from trueline.engine.decoding import Decoder
from trueline.evals.frontier import Frontier, dominators, frontier
from trueline.evals.refusal import classify
from trueline.evals.statistics import rate
from trueline.methods import Plain
from trueline.records.hashes import digest
from trueline.types import Message, Request, SamplingParams

NEEDED = 97
"""Settings of at least this worth are in every report."""


def key(setting: Setting, block: int) -> str:
    """Return under which key a block's answers are kept."""
    return digest(
        [setting.label, setting.system, vars(setting.method), TOKENS, BATCH, BLOCKS, block]
    )


def gate_key(share: float, block: int) -> str:
    """Return under which key a gate's answers are kept."""
    return digest([gate_label(share), TOKENS, BATCH, BLOCKS, block])


def answer(
    world: World, setting: Setting, block: int, own: str | None = None
) -> list[dict[str, Any]]:
    """Return a row for every answer, decoding those that are missing."""
    asked = prompts(world, block)
    rows = world.rows("over-refusal", MODEL)
    sampling = SamplingParams(max_new_tokens=TOKENS)
    decoder: Decoder | None = None

    def work(batch: Sequence[Prompt], first: int) -> list[dict[str, Any]]:
        nonlocal decoder
        decoder = decoder or Decoder(world.model(MODEL), batch_size=BATCH)
        chats: list[list[Message]] = [
            [{"role": "system", "content": setting.system}, {"role": "user", "content": p.text}]
            for p in batch
        ]
        requests = [Request(chat, setting.method, sampling) for chat in chats]
        texts = decoder.complete([decoder.encode(r) for r in requests])
        return [
            {"setting": setting.label, "set": p.set, "prompt": p.text, "text": c.text}
            for p, c in zip(batch, texts, strict=True)
        ]

    return rows.compute(own or key(setting, block), asked, BATCH, work)


def tasks(world: World, models: Sequence[str]) -> list[Task]:
    """Return what is to be decoded: a fourth of the prompts under all settings, then the next."""
    if MODEL not in models:
        return []
    found = []
    for block in range(1 if world.quick else BLOCKS):
        for s in settings().values():
            wanted = len(prompts(world, block))

            def done(s: Setting = s, block: int = block, wanted: int = wanted) -> bool:
                return world.rows("over-refusal", MODEL).done(key(s, block), wanted) == wanted

            def run(s: Setting = s, block: int = block) -> object:
                return answer(world, s, block)

            name = f"over-refusal: {s.label}, prompts {block + 1}/{BLOCKS}"
            found.append(Task(s.worth - 30 * block, name, done, run))
        for share in GATED:

            def gated(share: float = share, block: int = block, wanted: int = wanted) -> bool:
                rows = world.rows("over-refusal", MODEL)
                return rows.done(gate_key(share, block), wanted) == wanted

            def gate(share: float = share, block: int = block) -> object:
                setting = next(s for s in gates(world, block) if s.label == gate_label(share))
                return answer(world, setting, block, gate_key(share, block))

            name = f"over-refusal: {gate_label(share)}, prompts {block + 1}/{BLOCKS}"
            found.append(Task(96.5 - share - 30 * block, name, gated, gate))
        for look in LOOKS:

            def there(look: Look = look, block: int = block, wanted: int = wanted) -> bool:
                rows = world.rows("over-refusal", f"{MODEL}-first")
                return rows.done(look_key(look, block), wanted) == wanted

            def see(look: Look = look, block: int = block) -> object:
                return first_odds(world, look, block)

            name = f"over-refusal: first token, {look.label}, prompts {block + 1}/{BLOCKS}"
            found.append(Task(91 - 30 * block, name, there, see))
    return found


# The report


def blocks_of(world: World) -> int:
    """Return how many blocks of prompts every single text, AdaCD and look has been asked."""
    needed = [s for s in settings().values() if s.worth >= NEEDED]
    rows, first = world.rows("over-refusal", MODEL), world.rows("over-refusal", f"{MODEL}-first")
    block = 0
    while block < BLOCKS:
        n = len(prompts(world, block))
        if any(rows.done(key(s, block), n) < n for s in needed):
            return block
        if any(first.done(look_key(look, block), n) < n for look in LOOKS):
            return block
        block += 1
    return block


def flags_of(world: World, keys: Sequence[str]) -> list[float | None] | None:
    """Return whether each prompt was refused, None where nobody could say; None if not all are.

    The keys are of the blocks' answers, block by block.
    """
    rows, found = world.rows("over-refusal", MODEL), list[float | None]()
    for block, name in enumerate(keys):
        n = len(prompts(world, block))
        own = rows.rows.get(name, [])
        if len(own) < n:
            return None
        verdicts = [classify(row["text"]) for row in own]
        found += [None if v.label == "unknown" else float(v.refused) for v in verdicts]
    return found


def share(flags: Sequence[float | None], on: NDArray[np.bool_]) -> str:
    """Return a rate in % with its interval."""
    known = [bool(f) for f, o in zip(flags, on, strict=True) if o and f is not None]
    e = rate(known)
    return f"{100 * e.value:.1f} [{100 * e.low:.0f}, {100 * e.high:.0f}]"


def value(flags: Sequence[float | None], on: NDArray[np.bool_]) -> float:
    """Return a rate."""
    known = [f for f, o in zip(flags, on, strict=True) if o and f is not None]
    return sum(known) / len(known) if known else 0.0


def report(world: World, models: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the part's section and numbers, of as many blocks of prompts as are there."""
    blocks = blocks_of(world)
    if MODEL not in models or not blocks:
        return "", {}
    asked = [p for b in range(blocks) for p in prompts(world, b)]
    keys = {s.label: [key(s, b) for b in range(blocks)] for s in settings().values()}
    keys |= {gate_label(share): [gate_key(share, b) for b in range(blocks)] for share in GATED}
    found = {label: flags_of(world, own) for label, own in keys.items()}
    flags = {label: own for label, own in found.items() if own is not None}
    texts = [k for k in flags if k in settings() and isinstance(settings()[k].method, Plain)]
    unsafe = np.array([not p.safe for p in asked])
    fit = np.array([p.set.startswith("XS") for p in asked])
    odds = np.array([
        [row["odds"] for b in range(blocks) for row in first_odds(world, look, b)] for look in LOOKS
    ]).T  # fmt: skip
    score = fitted_score(odds, unsafe, fit)
    routed = routes({k: flags[k] for k in texts}, score, fit)
    floor = value(flags["default text"], fit & unsafe)
    kept = [k for k in routed if value(routed[k], fit & unsafe) >= floor]
    best = min(kept, key=lambda k: value(routed[k], fit & ~unsafe), default=None)
    shown = flags | ({} if best is None else {f"routed: {best}": routed[best]})
    at = {k: (value(f, ~fit & ~unsafe), value(f, ~fit & unsafe)) for k, f in shown.items()}
    sets = {name: np.array([p.set == name for p in asked]) for name in SETS}
    sets["both harmful sets"] = ~fit & unsafe
    contrasts = {k: f for k, f in flags.items() if k not in texts}
    alone = {k: flags[k] for k in texts}
    areas = {"routing": area_of(asked, alone, routed)}
    if contrasts:
        areas["contrasts and gates"] = area_of(asked, alone, contrasts)
    counts = ", ".join(f"{name} {int(on.sum())}" for name, on in sets.items())
    lines = [
        f"{NAMES[MODEL]}, {len(asked)} prompts ({counts}), greedy, {TOKENS} tokens, `keywords`. "
        "Refused, % [95 %]. Dominated: on OKTest and both harmful sets.",
        _rates_table(shown, sets, dominators(at)),
        "First token: share of pairs of an unsafe and a safe prompt in the right order (AUC).",
        _looks_table(odds, score, unsafe, fit),
        "The form of the question alone (first word, length, question mark), fitted on the other "
        f"blocks' labels: {_form_line(world, blocks)}.",
        *(_area_line(name, own) for name, own in areas.items() if own is not None),
    ]
    numbers = {k: a.as_dict() for k, a in areas.items() if a is not None}
    return "\n\n".join(lines), {"prompts": len(asked), "rates": at, **numbers}


def area_of(
    asked: Sequence[Prompt],
    texts: Mapping[str, list[float | None]],
    more: Mapping[str, list[float | None]],
) -> Frontier | None:
    """Return the areas on the test sets of texts, and with more; settings chosen on XSTest."""
    safe = np.array([p.safe for p in asked])
    split = {
        k: ([f[i] for i in np.flatnonzero(safe)], [f[i] for i in np.flatnonzero(~safe)])
        for k, f in {**texts, **more}.items()
    }
    prompts_of = [[p.text for p in asked if p.safe == kind] for kind in (True, False)]
    chosen = {p.text for p in asked if p.set.startswith("XS")}
    return frontier(split, list(texts), *prompts_of, chosen=chosen, samples=1000)


def _rates_table(
    flags: Mapping[str, list[float | None]],
    sets: Mapping[str, NDArray[np.bool_]],
    beaten: Mapping[str, str | None],
) -> str:
    rows = [
        [k, *(share(f, on) for on in sets.values()), beaten[k] or "-"] for k, f in flags.items()
    ]
    return markdown(["setting", *sets, "dominated by"], rows)


def _looks_table(
    odds: NDArray[np.float64],
    score: NDArray[np.float64],
    unsafe: NDArray[np.bool_],
    fit: NDArray[np.bool_],
) -> str:
    columns = {look.label: odds[:, i] for i, look in enumerate(LOOKS)}
    columns["all, fitted on XSTest"] = score
    rows = [
        [label, *(f"{ranked(own, unsafe, on):.3f}" for on in (fit, ~fit))]
        for label, own in columns.items()
    ]
    return markdown(["what is looked at", "XSTest", "OKTest, harmful sets"], rows)


def _form_line(world: World, blocks: int) -> str:
    """Return how far the form of a question tells the sets' labels, on the first block."""
    every = [p for b in range(BLOCKS) for p in prompts(world, b)]
    unsafe = np.array([not p.safe for p in every])
    xstest = np.array([p.set.startswith("XS") for p in every])
    held = np.arange(len(every)) < len(prompts(world, 0))
    score = fitted_score(form_features([p.text for p in every]), unsafe, ~held)
    shown = (f"{ranked(score, unsafe, held & on):.3f}" for on in (xstest, ~xstest))
    return "XSTest {}, other sets {}, first block".format(*shown)


def _area_line(name: str, areas: Frontier) -> str:
    gain = areas.gain
    return (
        f"Area on the test sets, settings chosen on XSTest: texts alone {areas.texts}; with {name} "
        f"{areas.all}; difference {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}], "
        f"p {gain.p_value:.3f}."
    )
