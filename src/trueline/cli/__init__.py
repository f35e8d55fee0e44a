"""The command line: parse, call, print. One module a command, imported when it is asked for.

Errors that Trueline raises on purpose are printed as `error: ...` with exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from trueline.cli.loading import loading
from trueline.errors import ConfigError, TruelineError, suggestion

COMMANDS = {
    "generate": "answer a question, or a file of them, under a decoding method",
    "chat": "talk to a model in the terminal and change the method as you go",
    "inspect": "show token by token what a method changed, as HTML, PNG and JSONL",
    "diagnose": "say what a model makes of a system text, and from which settings to start",
    "methods": "list the decoding methods, their options and papers",
    "demo": "measure principle adherence and over-refusal, on the bundled model or another",
    "eval": "measure refusal, preference and judges, and sweep a method's settings",
    "distil": "move a decoding method's policy into an adapter or the weights",
    "align": "learn principles, measure everything, and say whether to ship the result",
    "stack": "train task after task, each on top of those before, with nothing forgotten",
    "export": "make one plain LoRA, or merged weights, of the adapters of several tasks",
    "serve": "answer OpenAI clients under the methods, over HTTP",
    "report": "put runs of `trueline eval` side by side, as Markdown and HTML",
    "completion": "print the completion of this command line for bash, zsh or fish",
}
"""Name and summary of each command; its module in this package bears its name."""

EXAMPLES = """examples:
  trueline generate "What is the moon?" --method linear-alignment --principle "Talk like a pirate."
  trueline generate --input prompts.jsonl --output out.jsonl --method self-cd
  trueline chat --principle "Answer in one sentence."
  trueline COMMAND --help
"""
LONGEST = 400
"""Characters of a message about what was typed."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `ConfigError`s that suggest the option that was meant."""

    words: Sequence[str] = ()
    """What was typed: a method of the user's own brings options of its own."""

    def __init__(self, **options: object) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def parse_args(self, args=None, namespace=None):
        """Parse, and name the closest option for one that does not exist."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser = getattr(parsed, "parser", self)
            word = unknown[0].split("=")[0]
            known = [o for a in parser._actions for o in a.option_strings if o.startswith("--")]
            hint = suggestion(word, known) if word.startswith("-") else ""
            hint = hint if "Did you mean" in hint else f" See {parser.prog} --help."
            raise ConfigError(f'Unknown argument "{word}".{hint}')
        if hasattr(parsed, "parser"):
            check_paths(parsed)
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        if wrong := re.match(r"argument COMMAND: invalid choice: '([^']*)'", message):
            raise ConfigError(f'Unknown command "{wrong[1]}".{suggestion(wrong[1], COMMANDS)}')
        message = message if len(message) <= LONGEST else f"{message[:LONGEST]}…"
        raise ConfigError(f"{message[0].upper()}{message[1:]}. See {self.prog} --help.")


def check_paths(args: argparse.Namespace) -> None:
    """Raise `ConfigError` for a file or folder with no name, which would be the current folder."""
    for action in args.parser._actions:
        given = getattr(args, action.dest, None)
        if action.metavar in ("FILE", "DIR") and (given == "" or given == [""]):
            raise ConfigError(f"`{action.option_strings[-1]}` is empty. Give a path.")


def build_parser(words: Sequence[str] = (), *, complete: bool = False) -> Parser:
    """Return the parser for what was typed: the options of that command alone, or of all.

    Loads no torch, and of the commands' modules only the one that is needed.
    """
    from trueline import __version__

    parser = Parser(
        prog="trueline",
        description="Align a language model by contrast, with no reward model and no training.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"trueline {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked = next((word for word in words if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        about = f"{summary[0].upper()}{summary[1:]}."
        sub = commands.add_parser(name, help=summary, description=about)
        if complete or name == asked:
            module = importlib.import_module(f"trueline.cli.{name}")
            sub.epilog, sub.words = module.EXAMPLES, words
            try:
                module.add_arguments(sub)
            except argparse.ArgumentError as error:  # two options of one name: a method's and ours
                raise ConfigError(f"The method's {error}. Give that option another name.") from None
            sub.set_defaults(run=module.run, parser=sub)
    return parser


def check_words(words: Sequence[str]) -> None:
    """Raise `ConfigError` for bytes on the command line that are no text."""
    for word in words:
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"The command line has bytes that are no UTF-8: {word!r}.") from None
        if "\0" in word:
            raise ConfigError(f"The command line has a NUL: {word!r}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for an error, 130 for Ctrl-C."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?" and goes on
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        try:
            check_words(words)
            args = build_parser(words).parse_args(words)
            args.typed = shlex.join(["trueline", *words])
            with loading():
                return int(args.run(args) or 0)
        finally:
            sys.stdout.flush()  # here, where a reader that has gone and a full disk are expected
    except TruelineError as error:
        print("\n".join(f"error: {line}" for line in error.lines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        drop_output()  # whoever read it has gone
        return 0
    except OSError as error:  # a full disk, a folder that cannot be written
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or error}", file=sys.stderr)
        drop_output()
        return 2


def drop_output() -> None:
    """Keep Python from complaining at exit of output that cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
