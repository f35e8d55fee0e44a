"""Teachers of Inverse-Q*: the policy of any decoding method on the frozen start of the model.

    name               the policy to learn
    principle          the model with the principle in its prompt (context distillation)
    linear-alignment   the Linear Alignment policy, options `ratio`, `candidates`, `gate` and more
    checkpoints        a tuned model over the start: z_t + ratio (z_t - z_S), option `tuned`
    self-cd, ...       any other method of `METHODS`, or one of your own (FILE.py:Class), with its
                       options

What the student is to say depends on its prompt. Taught "plain" it sees a row's own messages and
does unasked what the teacher does when asked: a principle moves into the weights. Taught
"prompted" it sees the messages of the teacher's first branch, and learns to answer that prompt as
the method does: under its safety prompt a student of Self-CD no longer over-refuses.

Each row may name its own `principle`. A row without one is taught the reference itself: how the
student keeps what it does elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.errors import ConfigError, DataError, check_number, suggestion
from trueline.methods import METHODS, find_method, make_method, method_values
from trueline.methods.plain import Plain
from trueline.models.load import LanguageModel, load_model
from trueline.models.prompts import chat_of, encode
from trueline.settings.options import REQUIRED, option_defaults
from trueline.types import Message, Method, base_branches

if TYPE_CHECKING:
    from trueline.train.distil.config import InverseQConfig

TEACHERS = ("principle", "linear-alignment", "checkpoints", *(m for m in METHODS if m != "plain"))
STUDENTS = ("plain", "prompted")


@dataclass(frozen=True)
class Lesson:
    """One row: what the student sees, and the branches of the teacher's policy.

    `method` is None where the teacher is the reference itself.
    """

    prompt: list[int]
    method: Method | None
    branches: list[list[int]]


@dataclass
class Teacher:
    """A decoding method as the policy to learn, its principle chosen by each row."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of the method, `principle` left out."""
    principle: str | None = None
    """For rows that name none."""
    student: str = "plain"
    """Which prompt the student sees; see the module."""
    tuned: LanguageModel | None = None
    """The model of `checkpoints`; all other teachers are the reference's own."""
    cls: type[Any] | None = None
    """The method's class, where its name is none of ours."""
    _methods: dict[str | None, Method] = field(default_factory=dict, repr=False)

    @property
    def takes_principle(self) -> bool:
        """Whether a principle belongs to it."""
        return "principle" in self._defaults

    @property
    def _defaults(self) -> dict[str, Any]:
        return option_defaults(self.cls or find_method(self._method_name))

    @property
    def _method_name(self) -> str:
        return {"principle": "plain", "checkpoints": "contrast"}.get(self.name, self.name)

    def method(self, principle: str | None) -> Method:
        """Return the method with this principle."""
        if principle not in self._methods:
            options = dict(self.options)
            if self.takes_principle and principle is not None:
                options["principle"] = principle
            own = self.cls
            made = make_method(self._method_name, options) if own is None else own(**options)
            self._methods[principle] = made
        return self._methods[principle]

    def row_method(self, row: Mapping[str, Any]) -> Method | None:
        """Return the method that teaches a row; None where the reference does.

        A missing or null `principle` stands for the teacher's own, an empty one for none.
        """
        principle = row.get("principle")
        if principle is not None and not isinstance(principle, str):
            raise DataError(f"`principle` must be text, got {principle!r}.")
        if principle is not None and not principle.strip():
            return None
        if not self.takes_principle:
            if principle is not None:
                raise DataError(
                    f'`principle` is {principle!r}, but teacher "{self.name}" takes none. Leave '
                    'it out, or make it "" where the model is to stay as it is.'
                )
            return self.method(None)
        principle = principle or self.principle
        if principle is None and self._needs_principle:
            return None
        return self.method(principle)

    @property
    def _needs_principle(self) -> bool:
        """Whether it teaches nothing without a principle."""
        return self.name == "principle" or self._defaults.get("principle", "") is REQUIRED

    def student_messages(self, model: LanguageModel, row: Mapping[str, Any]) -> list[Message]:
        """Return what the student sees of a row."""
        messages = chat_of(model, row["prompt"])
        if self.student == "plain":
            return messages
        method = self.row_method(row)
        if method is None and not self._needs_principle:
            # Kept as it is, but under the same prompt as the rows that are taught.
            method = self.method(None)
        return messages if method is None else method.prompts(messages)[0]

    def lesson(self, model: LanguageModel, row: Mapping[str, Any]) -> Lesson:
        """Return a row's prompts as token ids, as a decoder would see them."""
        prompt = encode(model, self.student_messages(model, row))
        method = self.row_method(row)
        if method is None:
            return Lesson(prompt, None, [prompt])
        chats = method.prompts(chat_of(model, row["prompt"]))
        return Lesson(prompt, method, [encode(model, chat) for chat in chats])

    def check(self, columns: Sequence[str] | None) -> None:
        """Raise `ConfigError` if a principle is needed and none can come; None: columns unknown."""
        known = columns is not None and "principle" not in columns
        if self._needs_principle and self.principle is None and known:
            raise ConfigError(
                f'Teacher "{self.name}" needs a principle. Give `principle`, or a column '
                "`principle` in the data."
            )

    def check_model(self, student: LanguageModel) -> None:
        """Bring the tuned model, if there is one, to the student; refuse another vocabulary."""
        if self.tuned is None:
            return
        sizes = [model.text_config.vocab_size for model in (self.tuned, student)]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f'`tuned` is "{self.tuned.name}" with {sizes[0]} tokens in its vocabulary, the '
                f"student has {sizes[1]}. Give a model tuned from the same start."
            )
        self.tuned.model.to(student.device)  # type: ignore[arg-type]
        self.tuned.model.requires_grad_(False)


def make_teacher(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    principle: str | None = None,
    student: str | None = None,
    cls: type[Any] | None = None,
) -> Teacher:
    """Return the teacher called `name`; everything but the rows is checked here.

    Args:
        name: See the module.
        options: Fields of its method; for "checkpoints" `tuned` (folder or hub name of a model,
            or of an adapter for one) and `ratio`.
        principle: For rows that name none.
        student: "plain" or "prompted"; by default prompted for self-cd, plain for all others.
        cls: The method's class, where its name is none of ours.

    Raises:
        ConfigError: A name or option is unknown or out of range.
        ModelError: The tuned model cannot be loaded.
    """
    if cls is None and name not in TEACHERS and ":" not in str(name):
        raise ConfigError(f'Unknown teacher "{name}".{suggestion(name, TEACHERS)}')
    options = dict(options or {})
    student = student or ("prompted" if name == "self-cd" else "plain")
    if student not in STUDENTS:
        raise ConfigError(f'`student` must be "plain" or "prompted", got "{student}".')
    if principle is not None and (not isinstance(principle, str) or not principle.strip()):
        raise ConfigError("`principle` is empty. State in words what the model is to follow.")
    tuned = None
    if name == "checkpoints":
        tuned, options = _checkpoints(options)
    if name == "principle" and options:
        raise ConfigError(
            f'Teacher "principle" has no option `{next(iter(options))}`: it is the prompt alone. '
            'For a ratio or a mask take "linear-alignment".'
        )
    if "principle" in options:
        principle = options.pop("principle")
    teacher = Teacher(name, options, principle, student, tuned, cls)
    if principle is not None and not teacher.takes_principle:
        raise ConfigError(f'Teacher "{name}" takes no `principle`. Leave it out.')
    # A stand-in lets the method check its options before any row is seen.
    method = teacher.method(principle or ("a principle" if teacher._needs_principle else None))
    if base_branches(method) and tuned is None:
        raise ConfigError(
            f'Teacher "{name}" runs a branch without the adapter, but the adapter is what is being '
            'learned. Take "checkpoints" with `tuned`.'
        )
    return teacher


def teacher_of(method: Method, *, student: str | None = None) -> Teacher:
    """Return the teacher of a method that is already made; rows may change its principle."""
    if isinstance(method, Plain):
        return make_teacher("principle", principle=method.principle, student=student)
    own = type(method) if METHODS.get(method.name) is not type(method) else None
    return make_teacher(method.name, method_values(method), student=student, cls=own)


def asked_teacher(args: InverseQConfig, method: Method | None = None) -> Teacher:
    """Return the teacher that a trainer's settings ask for; a method goes before theirs."""
    if method is not None:
        return teacher_of(method, student=args.student)
    return make_teacher(
        args.teacher, args.method_options, principle=args.principle, student=args.student
    )


def _checkpoints(options: dict[str, Any]) -> tuple[LanguageModel, dict[str, Any]]:
    """Load the tuned model; return it with the options of the contrast to the reference."""
    tuned, ratio = options.pop("tuned", None), options.pop("ratio", 0.0)
    if options:
        known = suggestion(next(iter(options)), ("tuned", "ratio"))
        raise ConfigError(f'Teacher "checkpoints" has no option `{next(iter(options))}`.{known}')
    if tuned is None:
        raise ConfigError('Teacher "checkpoints" needs `tuned`: the folder of a tuned model.')
    check_number("ratio", ratio)
    if not isinstance(tuned, LanguageModel):
        base, adapter = _base_and_adapter(tuned)
        tuned = load_model(base, adapter=adapter, packed_weights=False)
    # z_t + ratio (z_t - z_S) is guidance 1 + ratio away from the branch without the tuning
    return tuned, {"base": True, "guidance": 1 + ratio}


def _base_and_adapter(tuned: str | Path) -> tuple[str | Path, str | Path | None]:
    """Return a model's name and None, or for an adapter's folder its base and itself."""
    config = Path(tuned) / "adapter_config.json"
    if not config.is_file():
        return tuned, None
    base = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise ConfigError(f'Adapter "{tuned}" does not name its base. Give a merged model.')
    return base, tuned
