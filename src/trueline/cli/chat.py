"""`trueline chat`: talk to a model in the terminal and change the method as you go."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trueline.cli.compare import columns, compare, layout
from trueline.cli.options import (
    add_method_options,
    add_model_options,
    add_sampling_options,
    load,
    method_fields,
    method_from,
    parse_weighted,
    sampling_from,
)
from trueline.errors import ConfigError, DataError, TruelineError, suggestion
from trueline.methods import METHODS, make_method
from trueline.records.data import SEEDS
from trueline.types import Message, Method, Request, SamplingParams

if TYPE_CHECKING:
    from trueline.engine.decoding import Decoder

EXAMPLES = """examples:
  trueline chat
  trueline chat --principle "Talk like a pirate." --ratio 2
  printf 'What is the moon?\\n/principle Be brief.\\nAnd the sun?\\n' | trueline chat
"""

HELP = """  /principle TEXT    follow this principle; without TEXT, none
  /ratio X           any option of the method or the sampling works like this one,
  /set OPTION VALUE  or so; without VALUE, back to its default
  /method NAME       change the decoding method
  /system TEXT       your own system message; without TEXT, none
  /compare           the last question: plain, prompted and under the method
  /reset             forget the conversation
  /help, /quit       this list; leave (also Ctrl-D); Ctrl-C stops an answer
  //text             say something that begins with a slash"""
COMMANDS = ("principle", "ratio", "set", "method", "system", "compare", "reset", "help", "quit")
SAMPLING = {
    "max_new_tokens": "int",
    "temperature": "float",
    "top_k": "int",
    "top_p": "float",
    "min_p": "float",
    "repetition_penalty": "float",
}
DEFAULTS = SamplingParams()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--system", metavar="TEXT", help="your own system message")
    add_model_options(parser)
    add_method_options(parser)
    add_sampling_options(parser)


def run(args: argparse.Namespace) -> None:
    """Load the model and talk until the input ends."""
    if args.seed not in SEEDS:
        raise ConfigError(f"`seed` must be a whole number below 2^63, got {args.seed}.")
    if args.n != 1:
        raise ConfigError("A chat has one answer a turn. Leave out `--n`.")
    if args.system is not None and not args.system.strip():
        raise ConfigError("`--system` is empty. Give it some text or leave it out.")
    method, sampling = method_from(args), sampling_from(args)
    options = {k.removeprefix("method_") for k in vars(args) if k.startswith("method_")}
    given = {k: getattr(method, k) for k in options if hasattr(method, k)}

    from trueline.engine.decoding import Decoder

    decoder = Decoder(load(args), share_prefixes=False, keep_turns=True)
    chat = Chat(decoder, method.name, given, sampling, args.system, args.seed)
    if sys.stdin.isatty():
        note(f"{args.model}, {method.name}. /help lists the commands.")
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
            note("\n/quit or Ctrl-D leaves.")
        except EOFError:
            print()
            return


def note(text: str) -> None:
    """Say something that is no answer, on stderr."""
    print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass
class Chat:
    """A conversation and its settings."""

    decoder: Decoder
    method_name: str
    options: dict[str, Any]
    """Fields of methods that were set, also of methods not in use now."""
    sampling: SamplingParams
    system: str | None = None
    seed: int = 0
    turns: list[Message] = dataclasses.field(default_factory=list)

    def handle(self, line: str) -> bool:
        """Do what a line says; return whether to go on. Errors are printed."""
        line = line.strip()
        try:
            if line.startswith("/") and not line.startswith("//"):
                name, _, rest = line[1:].partition(" ")
                return self.command(name, rest.strip())
            if line:
                self.say(line.removeprefix("/"))
        except TruelineError as error:
            note(f"error: {error}")
        except KeyboardInterrupt:
            note("(stopped)")
        return True

    def command(self, name: str, rest: str) -> bool:
        """Run a command; return whether to go on."""
        if name in ("quit", "exit"):
            return False
        if name == "help":
            print(HELP)
        elif name == "reset":
            self.turns.clear()
            note("(a new conversation)")
        elif name == "system":
            self.system = rest or None
        elif name == "method":
            self.use(rest, self.options)
        elif name == "compare":
            self.compare()
        elif name == "set":
            option, _, value = rest.partition(" ")
            self.set(option, value.strip())
        elif name.replace("-", "_") in {*method_fields(), *SAMPLING}:
            self.set(name, rest)
        else:
            hint = suggestion(f"/{name}", [f"/{command}" for command in COMMANDS])
            raise ConfigError(f'Unknown command "/{name}".{hint}')
        return True

    def method(self) -> Method:
        """Return the method with its options."""
        return make_method(self.method_name, self._own(self.method_name, self.options))

    def use(self, name: str, options: dict[str, Any]) -> None:
        """Change the method and its options, if they are good."""
        method = make_method(name, self._own(name, options))
        self.method_name, self.options = name, options
        fields = dataclasses.fields(method)  # type: ignore[arg-type]
        shown = (f"{f.name}={getattr(method, f.name)!r}" for f in fields if f.name in options)
        note(f"({name}: {', '.join(shown) or 'defaults'})")

    def set(self, option: str, text: str) -> None:
        """Set an option of the method or of the sampling; no text is the default."""
        option = option.replace("-", "_")
        known = {name: kind for name, (_, _, kind) in method_fields().items()}
        cls = METHODS[self.method_name]
        if option in SAMPLING and option not in cls.__dataclass_fields__:
            value = parse(option, SAMPLING[option], text) if text else getattr(DEFAULTS, option)
            self.sampling = dataclasses.replace(self.sampling, **{option: value})
            note(f"({option}={value!r})")
            return
        if option not in known:
            hint = suggestion(option, {**known, **SAMPLING})
            raise ConfigError(f'Unknown option "{option}".{hint}')
        options = {k: v for k, v in self.options.items() if k != option}
        name = self.method_name
        if text:
            options[option] = parse(option, known[option], text)
            if name == "plain" and option == "principle":
                name = "linear-alignment"
            elif option not in cls.__dataclass_fields__:
                make_method(name, {option: options[option]})
            if option == "ratio":
                options.pop("epsilon", None)
        elif option == "principle" and name == "linear-alignment":
            name = "plain"
        self.use(name, options)

    def say(self, text: str) -> None:
        """Answer, streaming; the turn is kept if there was an answer."""
        question: Message = {"role": "user", "content": text}
        chat = [*self._system(), *self.turns, question]
        request = Request(chat, self.method(), self.sampling, self.seed + len(self.turns) // 2)
        try:
            prompt = self.decoder.encode(request)
        except DataError as error:
            raise DataError(f"{error} /reset starts a new conversation.") from None
        # A turn holds all earlier ones: no more than two rounds of branches are worth keeping.
        self.decoder.store.size = 2 * len(prompt.branches)
        answer, reason, tokens, stopped = "", None, 0, False
        try:
            for step in self.decoder.run([prompt]):
                print(step.text, end="", flush=True)
                answer, reason, tokens = answer + step.text, step.finish_reason, tokens + 1
        except KeyboardInterrupt:
            stopped = True
        finally:
            print(flush=True)
        if answer.strip():
            self.turns += [question, {"role": "assistant", "content": answer}]
        if stopped:
            note("(stopped)")
        elif reason == "length":
            limit = self.decoder.model.max_positions
            if tokens < self.sampling.max_new_tokens:
                note(f"(the model's {limit} positions are full; /reset starts a new conversation)")
            else:
                note(f"(cut at {tokens} tokens; /set max_new_tokens N changes that)")

    def compare(self) -> None:
        """Answer the last question plain, prompted and under the method."""
        asked = [i for i, turn in enumerate(self.turns) if turn["role"] == "user"]
        if not asked:
            raise ConfigError("There is no question yet. Ask one, then /compare.")
        method, chat = self.method(), [*self._system(), *self.turns[: asked[-1] + 1]]
        columns(method)
        self.decoder.keep_turns = False
        try:
            answers = compare(self.decoder, chat, method, self.sampling, self.seed)
        finally:
            self.decoder.keep_turns = True
        print(layout([(column.title, done.text) for column, done in answers]), flush=True)

    def _system(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []

    @staticmethod
    def _own(name: str, options: dict[str, Any]) -> dict[str, Any]:
        """Return the options that the method has; an unknown method is left to `make_method`."""
        fields = METHODS[name].__dataclass_fields__ if name in METHODS else {}
        return {k: v for k, v in options.items() if k in fields}


def parse(option: str, kind: str, text: str) -> Any:
    """Return the value that the user typed for an option of this kind."""
    words = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
    try:
        if kind == "pairs":
            return tuple(parse_weighted(part) for part in text.split("|"))
        if kind == "bool":
            return words[text]
        return float(text) if kind == "float" else int(text) if kind == "int" else text
    except (ValueError, KeyError):
        names = {"float": "a number", "int": "a whole number", "bool": "on or off"}
        raise ConfigError(f'`{option}` must be {names[kind]}, got "{text}".') from None
