"""How numbers and pictures look: formats, colours, one style for every figure."""

from __future__ import annotations

import math
import re
from importlib.util import find_spec
from typing import Any

from trueline.errors import ConfigError

BLUE, ORANGE, GREEN, VIOLET = "#2563b0", "#d9580d", "#1a8a72", "#7b4fb5"
INK, SOFT, FAINT = "#1c1f24", "#6b7280", "#dfe2e7"
PALE = "#f2b48c"
"""A weak orange."""
COLOURS = (BLUE, ORANGE, GREEN, VIOLET, "#b5407a", "#8a6d1a", "#2f2f35", SOFT)
"""Of lines side by side, in this order."""
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
}
"""For `matplotlib.rc_context`."""


def need_matplotlib() -> None:
    """Raise `ConfigError` with the install command if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "The figure needs the package matplotlib. Install it: pip install 'trueline[plots]'"
        )


def drawable(text: str) -> str:
    """Return `text` with a box for every character that the figures' font lacks."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont(STYLE["font.family"])).get_charmap()
    return "".join(c if ord(c) in known else "□" for c in text)


def shortened(text: str, size: int) -> str:
    """Return at most `size` characters of `text`, the last one an ellipsis if it was longer."""
    return text if len(text) <= size else text[: size - 1] + "…"


def printable(text: str) -> str:
    """Return `text` with every control character but a line break and a tab as its escape.

    A terminal obeys escape sequences; text that others wrote must not reach it with them.
    """
    return "".join(
        c
        if c in "\n\t" or c.isprintable() or ord(c) > 0x9F
        else c.encode("unicode_escape").decode()
        for c in text
    )


def share(value: float) -> str:
    """Return 0.123 as "12.3 %", and tiny shares as "< 0.1 %"."""
    return "< 0.1 %" if 0 < value < 0.0005 else f"{100 * value:.1f} %"


def nats(value: float) -> str:
    """Return a number in nats with two digits behind the point."""
    return "∞" if math.isinf(value) else f"{value:.2f}"


def decimal(value: float | str | None, digits: int = 2) -> str:
    """Return a number with so many digits behind the point, "-" for none."""
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.1e}"


def brief(value: Any) -> str:
    """Return a number in at most four digits: 0.0123, 12.3, 1234; anything else as its text."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def p_value(value: float | None) -> str:
    """Return a p-value as "0.012" or "< 0.001"."""
    return "-" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def cell(value: Any) -> str:
    """Return a value for a cell of a Markdown table: one line, no bar, no raw HTML."""
    text = " ".join(printable(str(value)).split())
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text.replace("|", "\\|"))
