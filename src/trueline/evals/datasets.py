"""Datasets: prompts, preference pairs and questions from files, the hub and known test sets.

Files are JSONL, CSV or TSV with named columns, or text with one prompt a line. `hf:NAME` or
`hf:NAME:SPLIT` is a Hugging Face data set (hub name or folder) and needs the package `datasets`.
Known sets are recognised by their published columns, or by the name of the file:

    xstest               prompt, type, and label or safe    Röttger et al., NAACL 2024
    oktest               prompt (all safe)                  Shi et al., ACL 2024
    harmbench            Behavior, BehaviorID (all unsafe)  Mazeika et al., ICML 2024
    malicious-instruct   prompt (all unsafe)                Huang et al., ICLR 2024
    hh                   chosen, rejected                   Bai et al., 2022
    personal             question, answers, users           Gao et al., ICML 2024
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trueline.errors import DataError, suggestion
from trueline.models.hub import load_dataset
from trueline.records.lines import read_jsonl, shown
from trueline.types import Message, check_messages

PROMPT_COLUMNS = ("prompt", "Behavior", "question", "instruction", "goal", "text", "input")
ID_COLUMNS = ("id", "BehaviorID", "id_v2", "index")
SAFE_SETS = {"oktest": True, "malicious": False, "harmbench": False, "advbench": False}
"""Sets whose prompts are all safe or all unsafe, by a word of the file's name."""


@dataclass(frozen=True)
class PromptItem:
    """A prompt of a test set."""

    prompt: str
    id: str
    safe: bool | None = None
    """Whether a good model answers it; None if the set does not say."""
    group: str | None = None
    """The set's own kind of prompt, such as XSTest's type."""
    row: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    context: tuple[Message, ...] = ()
    """What comes before the prompt: a system message, earlier turns."""


@dataclass(frozen=True)
class PreferencePair:
    """A chat and two answers, of which people preferred one."""

    messages: list[Message]
    chosen: str
    rejected: str
    id: str


@dataclass(frozen=True)
class PersonalQuestion:
    """A question with one answer for each user."""

    question: str
    answers: tuple[str, ...]
    users: tuple[str, ...]
    """Who prefers which answer, in the same order, in words."""
    id: str
    system: str | None = None


Source = str | Path | Sequence[Any]
"""A path, hf:NAME[:SPLIT], or a list of rows: texts, chats (lists of messages), or objects."""


def read_rows(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for each row of a file, data set or list; place is path:line.

    Raises:
        DataError: The file is missing, empty or broken, or of an unknown kind.
        ConfigError: `hf:` without the package `datasets`.
    """
    if not isinstance(source, (str, Path)):
        for number, row in enumerate(source, 1):
            yield f"row {number}", _listed(row, number)
        return
    if str(source).startswith("hf:"):
        yield from _read_hub(str(source))
        return
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        for line, row in read_jsonl(path):
            yield f"{path}:{line}", row
    elif suffix in (".csv", ".tsv"):
        yield from _read_csv(path, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".txt":
        for line, text in enumerate(_text(path).split("\n"), 1):
            if text.strip():
                yield f"{path}:{line}", {"prompt": text.strip()}
    else:
        raise DataError(
            f'{path}: unknown kind "{suffix}". Give .jsonl, .csv, .tsv or .txt, or hf:NAME.'
        )


def load_prompts(
    source: Source,
    *,
    column: str | None = None,
    safe: bool | None = None,
    system: str | None = None,
) -> list[PromptItem]:
    """Return the prompts of a file, data set or list.

    A row may have `messages` in place of a prompt, and a `system` text.

    Args:
        source: A path, hf:NAME[:SPLIT], or a list.
        column: Which column holds the prompt; by default the first known one of
            prompt, Behavior, question, instruction, goal, text, input.
        safe: Whether the prompts are safe; by default what the rows or the set's name say.
        system: Goes before chats that have no system text of their own.

    Raises:
        DataError: A row without a prompt, with path:line.
    """
    named = source if isinstance(source, (str, Path)) else ""
    stem = Path(str(named)).stem.lower().replace("-", "").replace("_", "")
    of_set = next((value for word, value in SAFE_SETS.items() if word in stem), None)
    items: list[PromptItem] = []
    for number, (place, row) in enumerate(read_rows(source), 1):
        earlier: list[Message] = []
        if column is None and "messages" in row and "prompt" not in row:
            *earlier, last = _chat(place, row["messages"])
            row = {**row, "prompt": last["content"]}
        name = column or _first(PROMPT_COLUMNS, row)
        if name is None or name not in row:
            raise DataError(
                f'{place}: missing field "{column or "prompt"}".{suggestion(column or "", row)}'
            )
        text = _string(place, row, name)
        if row.get("ContextString"):
            text = f"{row['ContextString']}\n\n---\n\n{text}"
        is_safe = safe if safe is not None else _safe(place, row, of_set)
        group = row.get("type") or row.get("category") or row.get("SemanticCategory")
        identity = _first(ID_COLUMNS, row)
        key = str(row[identity]) if identity else str(number)
        context = tuple(_with_system(place, earlier, row, system))
        items.append(PromptItem(text, key, is_safe, str(group) if group else None, row, context))
    return _some(items, source)


def load_pairs(source: Source, *, system: str | None = None) -> list[PreferencePair]:
    """Return preference pairs: HH transcripts, or prompt with chosen and rejected answers.

    Pairs whose chosen or rejected answer is empty cannot be compared and are left out. `system`
    goes before chats that have no system text of their own.

    Raises:
        DataError: A row that is no pair, with path:line.
    """
    pairs = []
    for number, (place, row) in enumerate(read_rows(source), 1):
        chosen, rejected = (_string(place, row, k, empty=True) for k in ("chosen", "rejected"))
        key = str(row.get("id", number))
        if isinstance(row.get("prompt"), str):
            messages: list[Message] = [{"role": "user", "content": row["prompt"]}]
        else:
            try:
                messages, chosen, rejected = split_transcripts(chosen, rejected)
            except DataError as error:
                raise DataError(f"{place}: {error}") from None
        messages = _with_system(place, messages, row, system)
        if chosen.strip() and rejected.strip():
            pairs.append(PreferencePair(messages, chosen, rejected, key))
    return _some(pairs, source)


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def parse_transcript(text: str) -> list[Message]:
    r"""Return the messages of "\n\nHuman: ...\n\nAssistant: ...", with the space around them gone.

    Turns of one speaker in a row are joined by a blank line. The last turn may be empty.

    Raises:
        DataError: No such transcript.
    """
    parts = _TURN.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise DataError(f'no transcript of "\\n\\nHuman: ..." turns, got {text[:60]!r}.')
    messages: list[Message] = []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        role, content = _ROLES[speaker], content.strip()
        if messages and messages[-1]["role"] == role:
            joined = f"{messages[-1]['content']}\n\n{content}".strip()
            messages[-1] = {"role": role, "content": joined}
        else:
            messages.append({"role": role, "content": content})
    return messages


def split_transcripts(chosen: str, rejected: str) -> tuple[list[Message], str, str]:
    """Return (shared chat, chosen answer, rejected answer) of two HH transcripts.

    The shared chat is the turns that both have, up to a user's; what follows are the answers.
    Where they part earlier than in the last answer, the rest of each transcript is its answer.
    """
    a, b = parse_transcript(chosen), parse_transcript(rejected)
    shared = 0
    while shared < min(len(a), len(b)) and a[shared] == b[shared]:
        shared += 1
    while shared and (shared >= min(len(a), len(b)) or a[shared - 1]["role"] != "user"):
        shared -= 1
    if not shared or any(not m["content"] for m in a[:shared]):
        raise DataError("chosen and rejected share no prompt.")
    return a[:shared], _answer(a[shared:]), _answer(b[shared:])


def _answer(messages: Sequence[Message]) -> str:
    """Return the first answer; later turns, if any, as they stood in the transcript."""
    names = {role: name for name, role in _ROLES.items()}
    later = [f"{names[m['role']]}: {m['content']}" for m in messages[1:]]
    return "\n\n".join([messages[0]["content"], *later])


def load_personal(
    source: Source, *, users: Sequence[str] | None = None, system: str | None = None
) -> list[PersonalQuestion]:
    """Return questions with one answer for each user.

    A row has `question` and `answers`, a list or an object user -> answer; `users` is a list of who
    prefers which, unless the answers name them or the argument gives them for all rows.

    Raises:
        DataError: A row without as many answers as users, with path:line.
    """
    questions = []
    for number, (place, row) in enumerate(read_rows(source), 1):
        answers, names = row.get("answers"), row.get("users") or users
        if isinstance(answers, Mapping):
            names, answers = list(answers), list(answers.values())
        if not isinstance(answers, list) or not isinstance(names, (list, tuple)):
            raise DataError(f'{place}: needs "answers" and "users", a list of each.')
        if len(answers) != len(names) or len(answers) < 2:
            raise DataError(f"{place}: {len(answers)} answers for {len(names)} users.")
        key = str(row.get("id", row.get("index", number)))
        question = _string(place, row, "question")
        own = next((m["content"] for m in _with_system(place, [], row, system)), None)
        texts = tuple(map(str, answers)), tuple(map(str, names))
        questions.append(PersonalQuestion(question, *texts, key, own))
    return _some(questions, source)


def _chat(place: str, messages: object) -> list[Message]:
    """Return the messages of a row, of which the last is a user's."""
    if not isinstance(messages, list):
        raise DataError(f'{place}: "messages" must be a list, got {messages!r}.')
    try:
        chat = check_messages(messages)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    if chat[-1]["role"] != "user":
        raise DataError(f"{place}: the last message must be the user's.")
    return chat


def _with_system(
    place: str, messages: Sequence[Message], row: Mapping[str, Any], system: str | None
) -> list[Message]:
    """Return the messages behind the row's own system text, or behind `system`."""
    own = row.get("system")
    if not (own is None or isinstance(own, str)):
        raise DataError(f'{place}: "system" must be some text, got {own!r}.')
    there = bool(messages) and messages[0]["role"] == "system"
    if own and own.strip() and there:
        raise DataError(f'{place}: has "system" and a system message. Keep one.')
    text = own if own and own.strip() else None if there else system
    return [*([] if text is None else [{"role": "system", "content": text}]), *messages]  # type: ignore[list-item]


def _listed(row: Any, number: int) -> dict[str, Any]:
    """Return a row of a list as an object."""
    if isinstance(row, str):
        return {"prompt": row}
    if isinstance(row, Mapping):
        return dict(row)
    if isinstance(row, (list, tuple)):
        return {"messages": list(row)}
    raise DataError(f"row {number}: must be a text, a chat or an object, got {row!r}.")


def _safe(place: str, row: Mapping[str, Any], of_set: bool | None) -> bool | None:
    """Return whether a row's prompt is safe, from `safe`, `label`, or XSTest's type."""
    value = row.get("safe", row.get("label"))
    if value is None or value == "":
        kind = str(row.get("type", ""))
        return False if kind.startswith("contrast_") else of_set
    known = {"true": True, "safe": True, "false": False, "unsafe": False}
    if str(value).lower() in known:
        return known[str(value).lower()]
    if "safe" in row:
        raise DataError(f"{place}: `safe` must be true or false, got {shown(value)}.")
    return of_set


def _read_csv(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = io.StringIO(_text(path), newline="")
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{path}:{reader.line_num}: the row has not as many fields as the header "
                    f"({len(reader.fieldnames or ())})."
                )
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: broken CSV: {error}.") from None


def _read_hub(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of hf:NAME[:SPLIT], `test` if it exists, else the first split."""
    name, _, split = source.removeprefix("hf:").partition(":")
    if not name.strip():
        raise DataError(f'"{source}" names no data set. Give hf:NAME or hf:NAME:SPLIT.')
    loaded = load_dataset(name)
    if isinstance(loaded, Mapping):
        wanted = split or ("test" if "test" in loaded else next(iter(loaded)))
        if wanted not in loaded:
            raise DataError(f'{source}: no split "{wanted}".{suggestion(wanted, list(loaded))}')
        loaded = loaded[wanted]
    for number, row in enumerate(loaded, 1):
        yield f"{source}:{number}", dict(row)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start + 1}.") from None


def _first(names: Sequence[str], row: Mapping[str, Any]) -> str | None:
    return next((name for name in names if row.get(name) not in (None, "")), None)


def _string(place: str, row: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    value = row.get(name)
    if name not in row:
        raise DataError(f'{place}: missing field "{name}".')
    if not isinstance(value, str) or not (empty or value.strip()):
        raise DataError(f'{place}: "{name}" must be some text, got {value!r}.')
    return value


def _some(items: list, source: Source) -> list:
    if not items:
        name = source if isinstance(source, (str, Path)) else "The list"
        raise DataError(f"{name}: there is no row in it.")
    return items
