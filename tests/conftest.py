"""Small random models of four classes, a byte tokenizer, and run-time checks of tensor shapes."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import jaxtyping
import pytest
import torch
from beartype import BeartypeConf, beartype
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import trueline.engine.decoding
import trueline.engine.sampling
from trueline import LanguageModel
from trueline.methods import METHODS

torch.set_num_threads(1)
pytest_plugins = ["refusals"]


def check_shapes(function):
    """Return the function with its jaxtyping annotations checked at every call."""
    names = {name: getattr(jaxtyping, name) for name in ("Bool", "Float", "Int")}
    function.__globals__.update(names | {"Tensor": torch.Tensor})
    checker = beartype(conf=BeartypeConf(is_pep484_tower=True))
    return jaxtyping.jaxtyped(typechecker=checker)(function)


for _cls in METHODS.values():
    _cls.combine = check_shapes(_cls.combine)
trueline.engine.decoding.sample = check_shapes(trueline.engine.sampling.sample)

SHARED = Path(__file__).parents[1] / ".." / "shared"

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
)


def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte, and the marks of a chat."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    marks = ["<pad>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    vocab = {token: i for i, token in enumerate([*marks, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|end|>"
    )
    fast.chat_template = template
    return fast


SHAPES: dict[str, dict[str, object]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
    "gemma3_text": {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral": {"num_key_value_heads": 2, "sliding_window": 16},
    "gpt2": {},
}
"""Rotary, rotary with normalised queries, one key head, sliding windows (three), absolute."""


def random_model(kind: str, positions: int = 512, vocab: int = 261) -> PreTrainedModel:
    """A model of this class with random weights, sharp enough that greedy texts differ."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    common = {"vocab_size": vocab, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    if kind == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": positions}
    else:
        shape = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": positions,
        }
    config = AutoConfig.for_model(
        kind,
        **common,
        **shape,
        **SHAPES.get(kind, {"num_key_value_heads": 2}),
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.fixture(scope="session", params=list(SHAPES))
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    """A random model of every class with a chat template."""
    return LanguageModel(random_model(request.param), byte_tokenizer(), request.param)


@pytest.fixture(scope="session")
def llama() -> LanguageModel:
    """A random Llama: rotary positions."""
    return LanguageModel(random_model("llama"), byte_tokenizer(), "llama")


@pytest.fixture(scope="session")
def gpt2() -> LanguageModel:
    """A random GPT-2: absolute positions, which show every mistake in them."""
    return LanguageModel(random_model("gpt2"), byte_tokenizer(), "gpt2")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("real data and models: put them into ../shared, beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once(name, make)`: the folder that `make(folder)` filled, once for all workers.

    Tests read it; one that writes takes a copy.
    """
    base = tmp_path_factory.getbasetemp()
    base = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made-once"
    base.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, mark = base / name, base / f"{name}.made"
        with FileLock(base / f"{name}.lock"):
            if not mark.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                mark.touch()
        return folder

    return made


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Callable[[str, Path, str], Path]:
    """`hub_cache("me/name", folder, commit)`: put files where the hub's client keeps them.

    Returns the folder of that commit, which the name stands for until another is put there.
    """
    cache = tmp_path / "hub-cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def put(name: str, folder: Path, commit: str = "0" * 40) -> Path:
        place = cache / f"models--{name.replace('/', '--')}"
        snapshot = place / "snapshots" / commit
        for each in (place / "blobs", place / "refs", snapshot):
            each.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            blob = place / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copy(path, blob)
            (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
        (place / "refs/main").write_text(commit)
        return snapshot

    return put


def pytest_collection_finish() -> None:
    """Take what was imported out of the collector's sight, which each training runs over all."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter) -> None:
    """Say what did not run, why, and how to have it: a line a reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.write_sep("=", "skipped, and how to have it")
    for reason, count in reasons.most_common():
        how = " (`make install` installs it)" if reason.startswith("could not import") else ""
        terminalreporter.write_line(f"{count:4}  {reason}{how}")
