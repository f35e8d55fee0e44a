"""Rows of prompts to teach on, from a file; checked with nothing heavy loaded."""

from __future__ import annotations

from typing import Any

from trueline.errors import ConfigError, DataError, check_number
from trueline.records.lines import parse, read_content
from trueline.records.prompt_rows import BadRow, BadRowsError, check_row


def read_rows(path: Any, limit: Any = None) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of a file of prompts as a trainer takes them, and its SHA-256.

    Each row has its `line`. A row's `principle` may be "": there the model is to stay as it is.

    Raises:
        BadRowsError: Lines that cannot be used, with all of them.
    """
    if not isinstance(path, str):
        raise ConfigError('`--prompts FILE` is missing: JSONL rows with a "prompt".')
    if limit is not None:
        check_number("limit", limit, low=1, whole=True)
    rows: list[dict[str, Any]] = []
    bad: list[BadRow] = []
    content = read_content(path)
    for line, raw in content.lines:
        if isinstance(limit, int) and len(rows) + len(bad) >= limit:
            break
        try:
            row = parse(raw)
            keep = row.get("principle") == ""
            given = {k: v for k, v in row.items() if k != "principle" or not keep}
            checked = check_row(given, line)
            principle = "" if keep else checked.principle
            rows.append({"prompt": checked.messages, "principle": principle, "line": line})
        except DataError as error:
            bad.append(BadRow(line, str(error), raw.decode("utf-8", errors="replace")))
    if bad:
        raise BadRowsError(path, bad)
    if not rows:
        raise DataError(f"{path}: has no rows.")
    return rows, content.sha256
