"""`trueline completion`: completion of commands, options and choices in bash, zsh and fish.

Generated from the parsers, so it knows what this version knows.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trueline.methods import METHODS

EXAMPLES = """examples:
  source <(trueline completion bash)      # in ~/.bashrc, to have it always
  source <(trueline completion zsh)       # in ~/.zshrc, after compinit
  trueline completion fish > ~/.config/fish/completions/trueline.fish
"""


@dataclass(frozen=True)
class Flag:
    """An option: its spelling, what it is for, what may stand behind it."""

    name: str
    help: str
    choices: tuple[str, ...] = ()
    takes: bool = False
    """Whether a value stands behind it."""


@dataclass(frozen=True)
class Place:
    """A command, or a part of one, with what may follow it."""

    path: tuple[str, ...]
    parts: dict[str, str]
    """Name and summary of what may stand next: commands, parts of a command, choices."""
    flags: tuple[Flag, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("shell", choices=tuple(SHELLS), help="whose completion to print")


def run(args: argparse.Namespace) -> None:
    """Print the script."""
    from trueline.cli import build_parser

    print(SHELLS[args.shell](list(places(build_parser(complete=True)))))


def places(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[Place]:
    """Yield the parser and those below it."""
    below: dict[str, argparse.ArgumentParser] = {}
    parts: dict[str, str] = {}
    flags: list[Flag] = []
    for action in parser._actions:
        choices = tuple(map(str, action.choices or ()))
        if isinstance(action, argparse._SubParsersAction):
            below = dict(action.choices)
            parts |= {a.dest: str(a.help) for a in action._choices_actions}
        elif not action.option_strings:
            parts |= dict.fromkeys(choices, "")
        elif action.help != argparse.SUPPRESS:
            choices = tuple(METHODS) if action.dest == "method" else choices
            text = str(action.help or "").replace("%%", "%")
            for name in action.option_strings:
                if name.startswith("--"):
                    flags.append(Flag(name, text, choices, action.nargs != 0))
    yield Place(path, parts, tuple(flags))
    for name, sub in below.items():
        yield from places(sub, (*path, name))


def bash(found: list[Place]) -> str:
    """Return the script for bash; files are completed where nothing else is known."""

    def offer(words: Sequence[str]) -> str:
        return f'COMPREPLY=($(compgen -W {shlex.quote(" ".join(words))} -- "$cur"))'

    return f"""# completion of trueline for bash
_trueline() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} place= word
    COMPREPLY=()
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case "$place $word" in
            {_pattern(found)}) place="$place $word" ;;
        esac
    done
{_cases(found, offer, ":")}
}}
complete -o bashdefault -o default -F _trueline trueline"""


def zsh(found: list[Place]) -> str:
    """Return the script for zsh."""

    def offer(words: Sequence[str]) -> str:
        return "compadd -- " + " ".join(map(shlex.quote, words))

    return f"""#compdef trueline
_trueline() {{
    local before=${{words[CURRENT-1]}} place= word
    for word in "${{(@)words[2,CURRENT-1]}}"; do
        case "$place $word" in
            {_pattern(found)}) place="$place $word" ;;
        esac
    done
{_cases(found, offer, "_files")}
    _files
}}
compdef _trueline trueline"""


def fish(found: list[Place]) -> str:
    """Return the script for fish."""
    lines = ["# completion of trueline for fish"]
    for place in found:
        first = "__fish_use_subcommand"
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in place.path)
        alone = f"{seen}; and not __fish_seen_subcommand_from {' '.join(place.parts)}"
        for name, text in place.parts.items():
            when = shlex.quote(alone if seen else first)
            lines.append(f"complete -c trueline -f -n {when} -a {name} -d {shlex.quote(text)}")
        for flag in place.flags:
            takes = f"-x -a {shlex.quote(' '.join(flag.choices))} " if flag.choices else ""
            takes = takes or ("-r " if flag.takes else "")
            name, text = flag.name.removeprefix("--"), shlex.quote(flag.help)
            when = shlex.quote(seen or first)
            lines.append(f"complete -c trueline -n {when} -l {name} {takes}-d {text}")
    return "\n".join(lines)


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


def _place(place: Place, *more: str) -> str:
    return shlex.quote("".join(f" {word}" for word in (*place.path, *more)))


def _pattern(found: list[Place]) -> str:
    return "|".join(_place(place) for place in found if place.path)


def _cases(found: list[Place], offer: Callable[[Sequence[str]], str], files: str) -> str:
    """Return what stands behind an option, by its choices, and what else may stand at a place."""
    behind: dict[tuple[str, ...], list[str]] = {}
    for place in found:
        for flag in place.flags:
            if flag.takes:
                behind.setdefault(flag.choices, []).append(_place(place, flag.name))
    lines = ['    case "$place $before" in']
    for choices, names in behind.items():
        action = offer(choices) if choices else files
        lines.append(f"        {'|'.join(names)}) {action}; return ;;")
    lines += ["    esac", '    case "$place" in']
    for place in found:
        words = [*place.parts, *(flag.name for flag in place.flags)]
        lines.append(f"        {_place(place)}) {offer(words)} ;;")
    return "\n".join([*lines, "    esac"])
