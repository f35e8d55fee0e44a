"""What survives a kill, a full disk, a broken checkpoint and a second writer: a table of it.

    python benchmarks/reliability.py                       # five minutes of one core
    python benchmarks/reliability.py --only kills --kills 100 --seed 1

Every job runs on the bundled model through the command line. An unbroken run of each is the
reference; "equal" means that the files which a job promises have the same bytes (numbers of a clock
left out). Jobs are forked from a process that has loaded the libraries, so that a random moment of
a run is a moment of its work and not of its imports.

    kills         SIGKILL at a random moment of a run, again and again, until it ends by itself
    faults        a full disk, a file size limit, a disk that cannot be written, a link that leads
                  out of the folder, a folder that vanishes; then the same command without the fault
    checkpoints   a file of the last checkpoint cut, emptied or taken away
    writers       the same command, plain and with --overwrite, on a folder that is being written
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks._models import machine
from benchmarks._report import table

CLOCK = ("seconds", "tokens_per_second", "step_time", "train_runtime")
QUESTIONS = ("What is the moon?", "Which animal barks?", "Where do fish live?", "What is snow?")
STREAM = "".join(
    f'[tasks.{name}]\ntrain = "{name}.jsonl"\ntest = "{name}.jsonl"\n'
    for name in ("colour", "size")
)


@dataclass(frozen=True)
class Job:
    """A command that writes into a folder, and what of it must come out the same."""

    argv: tuple[str, ...]
    """DIR stands for the folder."""
    promised: tuple[str, ...]
    """Patterns of the files that the job is for."""
    resume: tuple[str, ...] = ()
    """What the command needs to go on."""
    overwrite: tuple[str, ...] = ("--overwrite",)


JOBS = {
    "generate": Job(
        ("generate", "--input", "prompts.jsonl", "--output", "DIR/out.jsonl", "--batch-size", "2",
         "--max-new-tokens", "32", "--principle", "Talk like a pirate."),
        ("out.jsonl",),
    ),
    "eval": Job(
        ("eval", "refusal", "--alpha", "1,2", "--limit", "12", "--batch-size", "4", "--no-plot",
         "--max-new-tokens", "24", "--output", "DIR"),
        ("responses.jsonl", "verdicts.jsonl", "results.json"),
    ),
    "distil": Job(
        ("distil", "--principle", "Talk like a pirate.", "--prompts", "prompts.jsonl",
         "--steps", "8", "--save-steps", "2", "--batch-size", "4", "--max-new-tokens", "8",
         "--set", "save_total_limit=3", "--output", "DIR"),
        ("adapter_model.safetensors", "log.jsonl"),
        ("--resume",),
    ),
    "stack": Job(
        ("stack", "--tasks", "stream.toml", "--rank", "2", "--batch-size", "4", "--epochs", "3",
         "--save-steps", "4", "--output", "DIR"),
        ("**/adapter_model.safetensors", "R.csv", "log.jsonl"),
        ("--resume",),
    ),
    "export": Job(
        ("export", "--adapters", "stacked", "--form", "merged", "--model", "tiny", "--to", "DIR"),
        ("*.safetensors", "config.json"),
        overwrite=(),
    ),
}  # fmt: skip


class Bench:
    """A folder with the inputs of the jobs, and an unbroken run of each."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.random, self.count = root, random.Random(seed), 0
        os.chdir(root)
        rows = [{"prompt": question} for question in QUESTIONS * 6]
        _write("prompts.jsonl", rows)
        for name, labels in {"colour": ("red", "blue"), "size": ("small", "big")}.items():
            _write(f"{name}.jsonl", [{"sentence": f"a {x} thing {i}", "label": x}
                                     for i in range(8) for x in labels])  # fmt: skip
        Path("stream.toml").write_text(STREAM)
        assert self.run("stack", Path("stacked")) == 0, self.said()
        self.whole: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        for name in JOBS:
            start, folder = time.perf_counter(), Path(f"whole-{name}")
            assert self.run(name, folder) == 0, self.said()
            self.seconds[name] = time.perf_counter() - start
            self.whole[name] = promised(name, folder)

    def fresh(self) -> Path:
        """Return the name of a folder that is not there."""
        self.count += 1
        return Path(f"run-{self.count}")

    def start(self, name: str, folder: Path, *more: str,
              before: Callable[[], object] | None = None) -> int:  # fmt: skip
        """Begin a job in a process of its own and return the process."""
        if name == "generate":
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
        argv = [word.replace("DIR", str(folder)) for word in JOBS[name].argv]
        process = os.fork()
        if process:
            return process
        log = os.open(self.root / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            if before is not None:
                before()
            from trueline.cli import main

            code = main([*argv, *more])
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def run(self, name: str, folder: Path, *more: str,
            before: Callable[[], object] | None = None) -> int:  # fmt: skip
        """Run a job to its end and return its exit code."""
        return ended(self.start(name, folder, *more, before=before))

    def said(self) -> str:
        """Return the last line that the last job printed."""
        lines = (self.root / "said.txt").read_text(errors="replace").replace("\r", "\n").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")

    def traceback(self) -> bool:
        """Return whether the last job ended in one."""
        return "Traceback" in (self.root / "said.txt").read_text(errors="replace")

    def goes_on(self, name: str, folder: Path) -> str:
        """Run the job to its end and return "" if it comes out equal, else what did not."""
        code = self.run(name, folder, *JOBS[name].resume)
        if code and name == "export" and not self.differs(name, folder):
            return ""  # the kill came after the end: a whole export is not written over
        return f"exit {code}: {self.said()}" if code else self.differs(name, folder)

    def differs(self, name: str, folder: Path) -> str:
        """Return which promised files are not those of the unbroken run."""
        found, whole = promised(name, folder), self.whole[name]
        return ", ".join(k for k in {**found, **whole} if found.get(k) != whole.get(k))


def _write(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def ended(process: int) -> int:
    """Wait for a process; its exit code, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def promised(name: str, folder: Path) -> dict[str, Any]:
    """Return what a job wrote: bytes, and of JSON all but what a clock says."""
    found: dict[str, Any] = {}
    for pattern in JOBS[name].promised:
        for path in sorted(folder.glob(pattern)):
            data: Any = path.read_bytes()
            if path.suffix == ".json":
                data = _timeless(json.loads(data))
            elif path.name == "log.jsonl":
                data = [_timeless(json.loads(line)) for line in data.splitlines()]
            found[str(path.relative_to(folder))] = data
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items()
                if k != "command" and not any(word in k for word in CLOCK)}  # fmt: skip
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def kills(bench: Bench, count: int) -> Iterator[tuple[str, str, str]]:
    """Kill each job `count` / 5 times at random moments, and let every run end equal."""
    for name in JOBS:
        left, runs, lost = count // len(JOBS), 0, []
        while left:
            folder = bench.fresh()
            more: tuple[str, ...] = ()
            runs += 1
            for _ in range(min(left, bench.random.randint(1, 3))):
                process = bench.start(name, folder, *more)
                time.sleep(bench.random.uniform(0, bench.seconds[name]))
                os.kill(process, signal.SIGKILL)
                left -= ended(process) == -signal.SIGKILL
                more = JOBS[name].resume
            if wrong := bench.goes_on(name, folder):
                lost.append(wrong)
        told = "; ".join(lost) or f"{runs} of {runs} runs equal, nothing lost"
        yield f"`{name}`", f"{count // len(JOBS)} x SIGKILL", told


@contextlib.contextmanager
def disk(size: str, options: str = "rw") -> Iterator[Path]:
    """Mount a small disk of its own, which needs root."""
    place = Path(tempfile.mkdtemp(prefix="disk-"))
    what = ["mount", "-t", "tmpfs", "-o", f"size={size},{options}", "tmpfs", str(place)]
    subprocess.run(what, check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


def refused(bench: Bench, code: int) -> str:
    """Return how a job ended under a fault: one line is good, a traceback is not."""
    if bench.traceback():
        return f"TRACEBACK ({bench.said()})"
    return "" if code == 2 else f"exit {code}: {bench.said()}"


def faults(bench: Bench) -> Iterator[tuple[str, str, str]]:
    """Break the disk under every job, and go on without the fault."""
    for name in JOBS:
        told = {
            fault: act(bench, name)
            for fault, act in {
                "full disk": full_disk,
                "file size limit": size_limit,
                "read-only disk": read_only,
                "link out of the folder": link_out,
                "folder vanishes": vanishes,
            }.items()
        }
        for fault, wrong in told.items():
            yield f"`{name}`", fault, wrong or "one line, exit 2; then equal"


def full_disk(bench: Bench, name: str) -> str:
    """Let the disk be full after a part of what the job writes."""
    size = sum(p.stat().st_size for p in Path(f"whole-{name}").rglob("*") if p.is_file())
    with disk(f"{max(8192, size // 3 // 4096 * 4096)}") as place:
        wrong = refused(bench, bench.run(name, place / "run"))
        subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
        return wrong or bench.goes_on(name, place / "run")


def size_limit(bench: Bench, name: str) -> str:
    """Let no file grow beyond half of the job's largest."""
    sizes = [p.stat().st_size for p in Path(f"whole-{name}").rglob("*") if p.is_file()]
    most = max(sizes) // 2

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    folder = bench.fresh()
    return refused(bench, bench.run(name, folder, before=limit)) or bench.goes_on(name, folder)


def read_only(bench: Bench, name: str) -> str:
    """Let the disk be read-only."""
    with disk("64m") as place:
        (place / "run").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        wrong = refused(bench, bench.run(name, place / "run"))
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
        return wrong or bench.goes_on(name, place / "run")


def link_out(bench: Bench, name: str) -> str:
    """Put a link to a file elsewhere in the place of the first file that the job writes."""
    target, folder = Path(f"precious-{bench.count}.txt"), bench.fresh()
    target.write_text("precious\n")
    folder.mkdir()
    first = next(p.name for p in sorted(Path(f"whole-{name}").iterdir()) if p.is_file())
    (folder / first).symlink_to(target.resolve())
    wrong = refused(bench, bench.run(name, folder))
    if target.read_text() != "precious\n":
        return "the file behind the link was written"
    (folder / first).unlink()
    return wrong or bench.goes_on(name, folder)


def vanishes(bench: Bench, name: str) -> str:
    """Take the folder away in the middle."""
    folder = bench.fresh()
    process = bench.start(name, folder)
    time.sleep(bench.seconds[name] / 2)
    os.kill(process, signal.SIGSTOP)
    shutil.rmtree(folder, ignore_errors=True)
    os.kill(process, signal.SIGCONT)
    code = ended(process)
    wrong = refused(bench, code) if code else ""
    shutil.rmtree(folder, ignore_errors=True)
    return wrong or bench.goes_on(name, folder)


def checkpoints(bench: Bench) -> Iterator[tuple[str, str, str]]:
    """Break a file of the last checkpoint in six ways."""
    folder = bench.fresh()
    process = bench.start("distil", folder)
    last = folder / "checkpoints/checkpoint-6"
    while not (last / "trainer_state.json").exists():
        time.sleep(0.002)
    os.kill(process, signal.SIGSTOP)
    ways: dict[str, Callable[[Path], object]] = {
        "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "emptied": lambda path: path.write_bytes(b""),
        "taken away": lambda path: path.unlink(),
    }
    broken = [("optimizer.pt", "cut"), ("scheduler.pt", "emptied"), ("rng_state.pth", "cut"),
              ("adapter_model.safetensors", "cut"), ("trainer_state.json", "emptied"),
              ("optimizer.pt", "taken away")]  # fmt: skip
    copies = [(bench.fresh(), *way) for way in broken]
    for copy, _, _ in copies:
        shutil.copytree(folder, copy)
    os.kill(process, signal.SIGKILL)
    ended(process)
    for copy, file, way in copies:
        ways[way](copy / "checkpoints/checkpoint-6" / file)
        wrong = bench.goes_on("distil", copy)
        said = (bench.root / "said.txt").read_text(errors="replace")
        if not wrong and file not in said and file != "trainer_state.json":
            wrong = "equal, but nothing was said"
        yield f"`{file}`", way, wrong or "goes on from the one before, says so; equal"


def writers(bench: Bench) -> Iterator[tuple[str, str, str]]:
    """Start a second process on a folder while the first one, held still, writes to it."""
    for name in JOBS:
        told = []
        for more in {(), JOBS[name].overwrite}:
            folder = bench.fresh()
            first = bench.start(name, folder)
            mark = folder if name == "export" else folder / "manifest.json"
            while not mark.exists() and not (folder / "out.jsonl").exists():
                time.sleep(0.002)
            os.kill(first, signal.SIGSTOP)
            code = bench.run(name, folder, *JOBS[name].resume * (not more), *more)
            told.append(refused(bench, code))
            os.kill(first, signal.SIGCONT)
            if code := ended(first):
                told.append(f"the first ended with exit {code}")
            told.append(bench.differs(name, folder))
        wrong = "; ".join(filter(None, told))
        yield f"`{name}`", "two writers", wrong or "the second refused in one line; the first equal"


def main() -> None:
    """Run all parts and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("kills", "faults", "checkpoints", "writers")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--kills", type=int, default=40, help="in all (40)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--jobs", nargs="+", choices=list(JOBS), default=list(JOBS))
    args = parser.parse_args()

    import torch
    import transformers.trainer  # noqa: F401  (loaded once, before the forks)

    from trueline import load_model

    load_model("tiny")
    torch.set_num_threads(1)
    acts = {"kills": lambda b: kills(b, args.kills), "faults": faults, "checkpoints": checkpoints,
            "writers": writers}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="reliability-") as root:
        bench = Bench(Path(root).resolve(), args.seed)
        for name in set(JOBS) - set(args.jobs):
            del JOBS[name]
        rows = [row for part in args.only for row in acts[part](bench)]
        os.chdir("/")
    print(table(["what", "fault", "outcome"], rows))
    about = machine(1)
    names = ("cpu", "torch", "transformers", "python", "date")
    print("; ".join(f"{name} {about[name]}" for name in names) + f"; seed {args.seed}")
    sys.exit(any("equal" not in row[2] or "but" in row[2] for row in rows))


if __name__ == "__main__":
    main()
