"""`trueline chat`: talk to a model in the terminal and change the method as you go."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

from trueline.cli.options import (
    add_method_options,
    add_model_options,
    add_sampling_options,
    add_system_option,
    check_system,
    given,
    load,
    method_and_sampling,
)
from trueline.errors import ConfigError, DataError
from trueline.methods import split_options
from trueline.types import check_seed

EXAMPLES = """examples:
  trueline chat
  trueline chat --principle "Talk like a pirate." --ratio 2
  printf 'What is the moon?\\n/principle Be brief.\\nAnd the sun?\\n' | trueline chat
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_system_option(parser)
    add_model_options(parser)
    add_method_options(parser)
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> None:
    """Load the model and talk until the input ends."""
    check_seed(args.seed)
    if args.n != 1:
        raise ConfigError("A chat has one answer a turn. Leave out `--n`.")
    check_system(args.system)
    _, sampling = method_and_sampling(args)
    name, own, _ = split_options(given(args))

    from trueline.cli.conversation import Chat

    chat = Chat.of(load(args), name, own, sampling, args.system, args.seed)
    if sys.stdin.isatty():
        print(f"{args.model}, {name}. /help lists the commands.", file=sys.stderr)
    for line in lines():
        if not chat.handle(line):
            break


def lines() -> Iterator[str]:
    """Yield the lines that the user types or pipes in."""
    if not sys.stdin.isatty():
        try:
            yield from sys.stdin
        except UnicodeDecodeError as error:
            raise DataError(f"The input is not UTF-8: {error.reason}.") from None
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its history and editing)
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves.", file=sys.stderr)
        except EOFError:
            print()
            return
