"""Bring the published test sets into the form that the recipes read.

    python recipes/real/prepare.py sources data

`sources` holds clones of the four repositories that README.md names, as they come. Written are

    safe.jsonl, unsafe.jsonl    XSTest and OKTest: what is to be answered, what is to be refused
    chat.jsonl                  people's first turns of HH helpful-base
    hh.jsonl                    HH harmless-base, test: pairs of dialogues
    cl_benchmark/TASK/          train.jsonl, test.jsonl, labels.json, category.txt
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from trueline.errors import DataError, TruelineError
from trueline.evals.datasets import load_pairs, load_prompts

XSTEST = ("xstest/xstest_prompts.csv", "xstest/xstest_v2_prompts.csv")
OKTEST = ("OverKill/data/OKTest.csv",)
HH = "hh-rlhf/{}-base/test.jsonl.gz"
TASKS = "O-LoRA/CL_Benchmark"
LONGEST = 400
"""Characters of a first turn that is kept: longer ones cost much and say no more."""


def one_of(sources: Path, names: Sequence[str]) -> Path:
    """Return the first of these files that is there."""
    for name in names:
        if (sources / name).is_file():
            return sources / name
    raise DataError(f'"{sources}" has no {names[0]}. Clone what recipes/real/README.md names.')


def write(path: Path, rows: Iterable[Mapping[str, object]]) -> int:
    """Write rows as JSONL, and return how many."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def requests(sources: Path) -> dict[bool, list[dict[str, object]]]:
    """Return harmless (True) and harmful (False) requests, each once, with the set they are of."""
    found: dict[bool, dict[str, dict[str, object]]] = {True: {}, False: {}}
    for name, places in {"xstest": XSTEST, "oktest": OKTEST}.items():
        for item in load_prompts(one_of(sources, places)):
            text = item.prompt.strip()
            if item.safe is not None and text:
                found[item.safe].setdefault(text.lower(), {"prompt": text, "set": name})
    return {safe: list(rows.values()) for safe, rows in found.items()}


def dialogues(sources: Path, kind: str, folder: Path) -> Path:
    """Return the unpacked test file of an HH set."""
    packed = one_of(sources, [HH.format(kind)])
    target = folder / f"{kind}.jsonl"
    target.write_bytes(gzip.decompress(packed.read_bytes()))
    return target


def first_turns(path: Path) -> list[dict[str, str]]:
    """Return what people said first, each once, where it is one line."""
    said = (pair.messages[0]["content"].strip() for pair in load_pairs(path))
    texts = {t.lower(): t for t in said if t and "\n" not in t and len(t) <= LONGEST}
    return [{"prompt": text} for text in texts.values()]


def task(folder: Path, target: Path) -> int:
    """Write one task of CL_Benchmark, and return how many rows it is tested on; 0: none."""
    train = folder / "train.json"
    test = next((folder / n for n in ("test.json", "dev.json") if (folder / n).is_file()), None)
    if not train.is_file() or test is None:
        return 0
    write(target / "train.jsonl", json.loads(train.read_text(encoding="utf-8")))
    count = write(target / "test.jsonl", json.loads(test.read_text(encoding="utf-8")))
    labels = folder / "labels.json"
    if labels.is_file():
        (target / "labels.json").write_text(labels.read_text(encoding="utf-8"), encoding="utf-8")
    (target / "category.txt").write_text(folder.parent.name + "\n", encoding="utf-8")
    return count


def prepare(sources: Path, output: Path) -> list[tuple[str, int]]:
    """Write everything, and return what was written with the number of its rows."""
    by_safety = requests(sources)
    done = [
        ("safe.jsonl", write(output / "safe.jsonl", by_safety[True])),
        ("unsafe.jsonl", write(output / "unsafe.jsonl", by_safety[False])),
    ]
    with tempfile.TemporaryDirectory() as place:
        turns = first_turns(dialogues(sources, "helpful", Path(place)))
        done.append(("chat.jsonl", write(output / "chat.jsonl", turns)))
        rows = dialogues(sources, "harmless", Path(place)).read_text(encoding="utf-8")
    done.append(("hh.jsonl", write(output / "hh.jsonl", map(json.loads, rows.splitlines()))))
    for folder in sorted((sources / TASKS).glob("*/*/")):
        name = f"cl_benchmark/{folder.name}"
        done.append((name, task(folder, output / name)))
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script, and return its exit code."""
    parser = argparse.ArgumentParser(description="Bring published test sets into one form.")
    parser.add_argument("sources", type=Path, help="folder of the clones")
    parser.add_argument("output", type=Path, help="folder to write to")
    args = parser.parse_args(arguments)
    try:
        for name, count in prepare(args.sources, args.output):
            print(f"{name}: {f'{count} rows' if count else 'left out, its files are not there'}")
    except (TruelineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
