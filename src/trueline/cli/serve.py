"""`trueline serve`: a model under the methods, behind OpenAI's HTTP interface."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trueline.cli.options import (
    add_method_options,
    add_model_options,
    load,
    method_and_sampling,
)
from trueline.errors import ConfigError

EXAMPLES = """examples:
  trueline serve
  trueline serve --model DIR --port 9000 --presets presets.toml
  trueline serve --method self-cd --alpha 2 --overrides nothing
  trueline serve --model DIR --adapter pirate=out/pirate --adapter formal=out/formal
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{
    "model": "tiny", "messages": [{"role": "user", "content": "What is the moon?"}],
    "alignment": {"method": "linear-alignment", "principle": "Talk like a pirate."}}'

Any OpenAI client works; `alignment` goes through its `extra_body`. presets.toml makes models of
their own, `tiny:pirate`, for clients that cannot send further fields:

  [pirate]
  method = "linear-alignment"
  principle = "Talk like a pirate."

API keys come from a file (--api-keys, one a line) or the environment (TRUELINE_API_KEYS). /metrics
is for Prometheus, /docs describes the interface, /health says whether the engine runs.
"""
LIMITS: tuple[tuple[str, type, str], ...] = (
    ("temperature", float, "for requests that give none (1)"),
    ("max_tokens", int, "new tokens of a request (1024)"),
    ("max_prompt_tokens", int, "tokens of its longest prompt (16384)"),
    ("max_branches", int, "branches times samples of a request (8)"),
    ("max_body", int, "bytes of a body (1048576)"),
    ("max_running", int, "requests decoded together (32)"),
    ("max_waiting", int, "requests that wait; past it clients get 429 (256)"),
    ("timeout", float, "seconds a request may take (600)"),
)
"""Settings of `ServeConfig` that are options of the same name."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the server."""
    group = parser.add_argument_group("server")
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    add("--port", type=int, default=8000, metavar="N", help="port to listen at (8000)")
    add("--name", metavar="NAME", help="what the model is called (the last part of --model)")
    add("--presets", metavar="FILE", help="TOML file with a method each, offered as models")
    add("--api-keys", metavar="FILE", help="file with API keys, one a line")
    add("--overrides", metavar="WHAT", help="what clients may choose: anything (default without "
        "--method), settings, presets (default with --method) or nothing")  # fmt: skip
    add("--cors-origin", action="append", default=[], metavar="ORIGIN",
        help="web origin that may call the server; repeatable (none)")  # fmt: skip
    add("--runs", metavar="DIR", help="folder of runs that the page draws")
    group = parser.add_argument_group("limits")
    for name, kind, text in LIMITS:
        letter = "X" if kind is float else "N"
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=kind, metavar=letter, default=argparse.SUPPRESS, help=text)
    add_model_options(parser, several=True)
    add_method_options(parser)


def run(args: argparse.Namespace) -> None:
    """Check the options, load the model, and serve until stopped."""
    from trueline.server.config import ServeConfig, read_keys, read_presets

    if not 0 <= args.port < 65536:
        raise ConfigError(f"`port` must be a whole number in [0, 65535], got {args.port}.")
    asked = args.method is not None or hasattr(args, "method_principle")
    config = ServeConfig(
        name=args.name or Path(args.model).name or args.model,
        method=method_and_sampling(args)[0] if asked else None,
        presets=read_presets(args.presets) if args.presets else {},
        overrides=args.overrides,
        keys=read_keys(args.api_keys),
        cors_origins=tuple(args.cors_origin),
        runs=args.runs,
        **{name: getattr(args, name) for name, *_ in LIMITS if hasattr(args, name)},
    )
    from trueline.server.listen import listen, reserve

    with reserve(args.host, args.port) as own:
        model = load(args)
        if args.host not in LOOPBACK:
            guard = "keys are asked for" if config.keys else "NO API key is asked for"
            print(f"listening beyond this machine, at {args.host}; {guard}", file=sys.stderr)
        listen(model, config, own)
