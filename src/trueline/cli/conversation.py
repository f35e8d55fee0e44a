"""A conversation and its settings: what a line that is typed into `trueline chat` does."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.cli.compare import columns, compare, layout
from trueline.cli.flow import Flow
from trueline.cli.options import base_kind, method_options, parse_weighted
from trueline.engine.decoding import Decoder
from trueline.errors import ConfigError, DataError, TruelineError, suggestion
from trueline.methods import METHODS, describe_method, find_method, make_method
from trueline.settings.options import option_defaults, options_of
from trueline.types import Message, Method, Request, SamplingParams

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel

HELP = """  /principle TEXT    follow this principle; without TEXT, none
  /ratio X           any option of the method or the sampling works like this one,
  /set OPTION VALUE  or so; without VALUE, back to its default
  /method NAME       change the decoding method
  /system TEXT       your own system message; without TEXT, none
  /compare TEXT      plain, prompted and under the method; without TEXT, the last question
  /retry             answer the last question again, with another seed
  /undo              take back the last question and its answer
  /save FILE         write the conversation as a row of JSON
  /reset             forget the conversation
  /help, /quit       this list; leave (also Ctrl-D); Ctrl-C stops an answer
  //text             say something that begins with a slash"""
COMMANDS = tuple(line.split()[0].strip("/,") for line in HELP.splitlines()[:-1])
SAMPLING = {
    option.name: base_kind(option.kind)
    for option in options_of(SamplingParams)
    if option.name not in ("n", "stop", "logprobs")
}
WORDS = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


def note(text: str) -> None:
    """Say something that is no answer, on stderr."""
    print(text, file=sys.stderr, flush=True)


@dataclasses.dataclass
class Chat:
    """A conversation and its settings."""

    decoder: Decoder
    method_name: str
    options: dict[str, Any]
    """Options of methods that were set, also of methods not in use now."""
    sampling: SamplingParams
    system: str | None = None
    seed: int = 0
    turns: list[Message] = dataclasses.field(default_factory=list)
    retries: int = 0

    @classmethod
    def of(cls, model: LanguageModel, *settings: Any) -> Chat:
        """Begin a conversation with a model; what is computed of it is kept from turn to turn."""
        return cls(Decoder(model, share_prefixes=False, keep_turns=True), *settings)

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
        elif name == "set":
            option, _, value = rest.partition(" ")
            self.set(option, value.strip())
        elif name in ("compare", "save"):
            getattr(self, name)(rest)
        elif name in ("retry", "undo"):
            getattr(self, name)()
        elif name.replace("-", "_") in {*self._known(), *SAMPLING}:
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
        own = self._own(name, options)
        method = make_method(name, own)
        self.method_name, self.options = name, options
        shown = (f"{option}={getattr(method, option, value)!r}" for option, value in own.items())
        note(f"({name}: {', '.join(shown) or 'defaults'})")

    def set(self, option: str, text: str) -> None:
        """Set an option of the method or of the sampling; no text is the default."""
        option = option.replace("-", "_")
        known, own = self._known(), option_defaults(find_method(self.method_name))
        if option in SAMPLING and option not in own:
            value = parse(option, SAMPLING[option], text) if text else _default(option)
            self.sampling = dataclasses.replace(self.sampling, **{option: value})
            note(f"({option}={value!r})")
            return
        if option not in known:
            raise ConfigError(
                f'Unknown option "{option}".{suggestion(option, [*known, *SAMPLING])}'
            )
        options = {k: v for k, v in self.options.items() if k != option}
        name = self.method_name
        if text:
            options[option] = parse(option, known[option], text)
            if name == "plain" and option == "principle":
                name = "linear-alignment"
            elif option not in own:
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
        seed = self.seed + len(self.turns) // 2 + self.retries
        try:
            prompt = self.decoder.encode(Request(chat, self.method(), self.sampling, seed))
        except DataError as error:
            raise DataError(f"{error} /reset starts a new conversation.") from None
        answer, reason, tokens, stopped, flow = "", None, 0, False, Flow()
        try:
            for step in self.decoder.run([prompt]):
                flow.write(step.text)
                answer, reason, tokens = answer + step.text, step.finish_reason, tokens + 1
        except KeyboardInterrupt:
            stopped = True
        finally:
            flow.end()
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

    def retry(self) -> None:
        """Answer the last question again, with another seed; no answer changes nothing."""
        question, before = self._last(), list(self.turns)
        self.turns, self.retries = self.turns[:-2], self.retries + 1
        if self.sampling.greedy:
            note("(greedy decoding says the same again; /temperature 0.7 draws another answer)")
        try:
            self.say(question)
        finally:
            if len(self.turns) < len(before):
                self.turns = before

    def undo(self) -> None:
        """Take back the last question and its answer."""
        note(f"(taken back: {self._last()})")
        self.turns = self.turns[:-2]

    def save(self, name: str) -> None:
        """Write the conversation and its settings as one row of JSON into a new file."""
        if not name:
            raise ConfigError("Where to? /save FILE, a file that does not exist yet.")
        path = Path(name).expanduser()
        if path.exists():
            raise ConfigError(f'File "{name}" exists. Give another name.')
        if not path.parent.is_dir():
            raise ConfigError(f'Cannot write "{name}": there is no such folder.')
        self._last()
        row = {
            "messages": [*self._system(), *self.turns],
            "model": self.decoder.model.name,
            "method": describe_method(self.method()),
            "sampling": dataclasses.asdict(self.sampling),
            "seed": self.seed,
        }
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except (OSError, ValueError) as error:
            raise ConfigError(f'Cannot write "{name}": {error}.') from None
        note(f"({len(self.turns) // 2} questions and answers in {name})")

    def compare(self, text: str = "") -> None:
        """Answer a question, or the last one, plain, prompted and under the method."""
        turns: list[Message] = [*self.turns, {"role": "user", "content": text}]
        if not text:
            self._last()
            turns = self.turns[:-1]
        from trueline.engine.decoding import Decoder

        method, chat = self.method(), [*self._system(), *turns]
        columns(method)
        decoder = Decoder(self.decoder.model, share_prefixes=False)
        answers = compare(decoder, chat, method, self.sampling, self.seed)
        print(layout([(column.title, done.text) for column, done in answers]), flush=True)

    def _last(self) -> str:
        if not self.turns:
            raise ConfigError("There is no question yet. Ask one first.")
        return self.turns[-2]["content"]

    def _system(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _known(self) -> dict[str, Any]:
        """Return the options of all methods and of the one in use, with their kinds."""
        found = method_options()
        if self.method_name not in METHODS:
            found |= method_options(self.method_name)
        return {name: next(iter(users.values())).kind for name, users in found.items()}

    @staticmethod
    def _own(name: str, options: dict[str, Any]) -> dict[str, Any]:
        """Return those options that the method has."""
        return {k: v for k, v in options.items() if k in option_defaults(find_method(name))}


def _default(option: str) -> Any:
    return getattr(SamplingParams(), option)


def parse(option: str, annotation: Any, text: str) -> Any:
    """Return the value that the user typed for an option with this annotation."""
    kind = base_kind(annotation)
    if kind is tuple:
        parts = [part.strip() for part in text.split("|")]
        return tuple(map(parse_weighted, parts) if "float" in str(annotation) else parts)
    try:
        return WORDS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError, OverflowError):
        names = {float: "a number", int: "a whole number", bool: "on or off"}
        raise ConfigError(f'`{option}` must be {names.get(kind, kind)}, got "{text}".') from None
