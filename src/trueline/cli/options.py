"""Options that several commands share: the model, the method, the sampling."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import TYPE_CHECKING, Any

from trueline.errors import ConfigError
from trueline.methods import METHODS, make_method
from trueline.types import Method, SamplingParams

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel
    from trueline.models.source import ModelConfig


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose and load a model."""
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--model", default="tiny", help='folder, hub name, or "tiny", the bundled one (default)')
    add("--adapter", metavar="DIR", help="folder or hub name of a PEFT adapter")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:0, mps")
    add("--device-map", help='spread over devices, e.g. "auto"; needs accelerate')
    add("--dtype", default="auto", help="auto (default), float32, bfloat16, float16")
    add("--quantize", choices=("4bit", "8bit"), help="needs bitsandbytes")
    add("--chat-template", metavar="FILE", help="Jinja file to use as the chat template")
    add("--raw", action="store_true", help="send the prompt as it is, for base models")
    add("--revision", help="branch, tag or commit on the hub")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--threads", type=int, help="CPU threads; default 1 for small models, else torch's choice")
    add("--no-packed-weights", action="store_true", help="CPU: do not keep a faster weight copy")


def model_config(args: argparse.Namespace) -> ModelConfig:
    """Return the model that the options name."""
    from trueline.models.source import ModelConfig

    names = [
        *("adapter", "device", "device_map", "dtype", "quantize", "chat_template", "raw"),
        *("revision", "trust_remote_code", "threads"),
    ]
    given = {name: getattr(args, name) for name in names}
    return ModelConfig(args.model, **given, packed_weights=not args.no_packed_weights)


def load(args: argparse.Namespace) -> LanguageModel:
    """Load the model that the options name, and set the number of threads."""
    return model_config(args).load()


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """Add `--method` and one option for each field of each method, from the methods themselves."""
    group = parser.add_argument_group("method (see `trueline methods`)")
    group.add_argument("--method", default=None, metavar="NAME", help=", ".join(METHODS))
    for name, (users, doc, kind) in method_fields().items():
        flag = "--" + name.replace("_", "-")
        help_text = f"{doc.replace('%', '%%')} [{', '.join(users)}]"
        extra: dict[str, Any] = {"dest": f"method_{name}", "default": argparse.SUPPRESS}
        if kind == "bool":
            group.add_argument(flag, action="store_true", help=help_text, **extra)
        elif kind == "pairs":
            metavar = "WEIGHT:TEXT"
            group.add_argument(flag, nargs="+", metavar=metavar, help=help_text, **extra)
        else:
            types = {"float": float, "int": int, "str": str}
            metavar = {"float": "X", "int": "N", "str": "TEXT"}[kind]
            group.add_argument(flag, type=types[kind], metavar=metavar, help=help_text, **extra)


def method_fields() -> dict[str, tuple[list[str], str, str]]:
    """Return name -> (methods that have it, first sentence of its docs, kind) for method fields."""
    found: dict[str, tuple[list[str], str, str]] = {}
    for method, cls in METHODS.items():
        docs = field_docs(cls)
        for field in dataclasses.fields(cls):
            kind = str(field.type).split(" |")[0]
            kind = "pairs" if kind.startswith("tuple") else kind
            users = found.setdefault(field.name, ([], docs[field.name].split(". ")[0], kind))[0]
            users.append(method)
    return found


def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, read from its source."""
    import ast
    import inspect
    import textwrap

    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) else ""  # type: ignore[attr-defined]
            docs[node.target.id] = " ".join(str(text).split()).rstrip(".")
    return docs


def method_from(args: argparse.Namespace, default: str = "plain") -> Method:
    """Return the method that the options describe; a principle alone means Linear Alignment."""
    given = {k.removeprefix("method_"): v for k, v in vars(args).items() if k.startswith("method_")}
    name = args.method or ("linear-alignment" if "principle" in given else default)
    if name in METHODS and "top_p" not in METHODS[name].__dataclass_fields__:
        given.pop("top_p", None)
    if "principles" in given:
        given["principles"] = tuple(map(parse_weighted, given["principles"]))
    if {"epsilon", "ratio"} <= given.keys():
        raise ConfigError("Give `--ratio` or `--epsilon`, not both.")
    return make_method(name, given)


def parse_weighted(text: str) -> tuple[str, float]:
    """Return ("Be brief.", 1.5) for "1.5:Be brief."."""
    match = re.match(r"\s*([^:]+):\s*(.+)", text, re.DOTALL)
    try:
        assert match is not None
        return match[2], float(match[1])
    except (AssertionError, ValueError):
        raise ConfigError(
            f'`--principles` takes WEIGHT:TEXT, e.g. "1.5:Be brief.", got "{text}".'
        ) from None


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose tokens and stop; `--top-p` comes with the method options."""
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    defaults = SamplingParams()
    docs = field_docs(SamplingParams)
    for name, kind in (
        ("max_new_tokens", int),
        ("temperature", float),
        ("top_k", int),
        ("min_p", float),
        ("repetition_penalty", float),
        ("n", int),
    ):
        flag, default = "--" + name.replace("_", "-"), getattr(defaults, name)
        text = f"{docs[name]} (default {default:g})"
        add(flag, type=kind, default=default, metavar="X" if kind is float else "N", help=text)
    add("--stop", action="append", default=[], metavar="TEXT", help="end the text here; repeatable")
    add("--logprobs", action="store_true", help=docs["logprobs"])
    add("--seed", type=int, default=0, metavar="N", help="seed of the first row (default 0)")


def sampling_from(args: argparse.Namespace) -> SamplingParams:
    """Return the sampling settings that the options describe."""
    names = ("max_new_tokens", "temperature", "top_k", "min_p", "repetition_penalty", "n")
    given = {name: getattr(args, name) for name in names}
    name = args.method or ("linear-alignment" if hasattr(args, "method_principle") else "plain")
    top_p = getattr(args, "method_top_p", 1.0)
    if name in METHODS and "top_p" in METHODS[name].__dataclass_fields__:
        top_p = 1.0
    return SamplingParams(**given, top_p=top_p, stop=tuple(args.stop), logprobs=args.logprobs)
