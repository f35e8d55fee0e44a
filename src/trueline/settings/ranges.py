"""Ranges: several values of one number, as they are typed.

0:3:0.5    START:STOP:STEP, both ends included
1,2,3      a list
1.5        a single value
"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

from trueline.errors import ConfigError

MOST = 1000
"""Values of a range at most."""


def parse_values(text: str, *, whole: bool = False) -> tuple[float | int, ...]:
    """Return the numbers of START:STOP:STEP (both ends included), a,b,c, or a single number.

    Raises `ConfigError` for anything else.
    """
    form = f"Give a number, START:STOP:STEP or a,b,c, got {text!r}."
    parts = text.split(":")
    try:
        if len(parts) == 1:
            numbers = [Decimal(part.strip()) for part in text.split(",")]
        elif len(parts) == 3:
            start, stop, step = map(Decimal, parts)
            if not step > 0 or stop < start or (stop - start) / step >= MOST:
                raise ConfigError(
                    f"A range needs START <= STOP, STEP above 0 and at most {MOST} values, "
                    f"got {text!r}."
                )
            numbers = [start + i * step for i in range(int((stop - start) / step) + 1)]
        else:
            raise ConfigError(form)
    except InvalidOperation:
        raise ConfigError(form) from None
    if whole and any(n != n.to_integral_value() for n in numbers):
        raise ConfigError(f"Give whole numbers, got {text!r}.")
    return tuple(dict.fromkeys(int(n) if whole else float(n) for n in numbers))
