"""Settings: what a TOML file and the command line may say, and that nothing is lost on the way."""

from __future__ import annotations

import dataclasses
import tomllib
from enum import Enum
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trueline.errors import ConfigError, DataError
from trueline.settings.reader import (
    Word,
    assignments,
    build,
    check,
    explain,
    merge,
    read_toml,
    resolved,
    write_toml,
)


class Schedule(Enum):
    LINEAR = "linear"
    COSINE = "cosine"


@dataclasses.dataclass
class Lora:
    rank: int = 8
    """How many directions."""
    modules: list[str] | str = "all-linear"
    alpha: float | None = None


@dataclasses.dataclass
class Config:
    output: str
    """Where it goes."""
    steps: int = 10
    learning_rate: float = dataclasses.field(default=1e-4, metadata={"help": "Step size."})
    loss: Literal["kl", "imitation"] = "kl"
    schedule: Schedule | str = "linear"
    report_to: str | list[str] | None = None
    limit: int | None = 5
    resume: bool | str = False
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    pair: tuple[str, float] = ("a", 1.0)
    lora: Lora = dataclasses.field(default_factory=Lora)
    extra: Any = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("steps must be\n at least 1")


BOTH = [Config]


def one(name: str, value: object) -> object:
    return check({name: value}, BOTH, "test")[name]


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("steps", "20", 20),
        ("steps", "1e3", 1000),
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", "3", 3.0),
        ("output", "5", "5"),
        ("output", "a/b c", "a/b c"),
        ("output", "1\nsteps = 2", "1\nsteps = 2"),
        ("loss", "imitation", "imitation"),
        ("schedule", "cosine", "cosine"),
        ("report_to", "none", "none"),
        ("report_to", '["a", "b"]', ["a", "b"]),
        ("limit", "none", None),
        ("limit", "7", 7),
        ("resume", "true", True),
        ("resume", "checkpoint-3", "checkpoint-3"),
        ("weights", "{a = 1, b = 0.5}", {"a": 1.0, "b": 0.5}),
        ("pair", '["x", 2]', ("x", 2.0)),
        ("extra", "[1, 2]", [1, 2]),
    ],
)
def test_what_is_typed_takes_the_type_of_its_field(name, typed, value):
    found = one(name, Word(typed))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("steps", 1.5, "a whole number, got 1.5"),
        ("steps", True, "a whole number, got true"),
        ("steps", "20", 'a whole number, got "20"'),
        ("learning_rate", "1e-4", 'a number, got "1e-4"'),
        ("learning_rate", Word("fast"), 'a number, got "fast"'),
        ("output", 5, "text, got 5"),
        ("loss", "lk", 'one of "kl", "imitation", got "lk"'),
        ("loss", 1, 'one of "kl", "imitation", got 1'),
        ("schedule", "cosinus", 'one of "linear", "cosine", got "cosinus"'),
        ("limit", "five", 'a whole number or none, got "five"'),
        ("weights", {"a": "x"}, 'a table, got {"a": "x"}'),
        ("pair", ["a"], 'a list, got ["a"]'),
        ("lora", 3, "a table, got 3"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name, value, wanted):
    with pytest.raises(ConfigError) as error:
        one(name, value)
    assert str(error.value) == f"`{name}` must be {wanted} (test)."


def test_unknown_names_get_the_closest_known_one():
    with pytest.raises(ConfigError, match=r'"learning_rte" \(a.toml\). Did you mean "learning_'):
        check({"learning_rte": 1}, BOTH, "a.toml")
    with pytest.raises(ConfigError, match=r'"lora.rnak" \(test\). Did you mean "rank"'):
        check({"lora": {"rnak": 1}}, BOTH, "test")
    with pytest.raises(ConfigError, match="Known: output, steps"):
        check({"zzz": 1}, BOTH, "test")


def test_dashes_stand_for_underscores():
    assert check({"learning-rate": 1}, BOTH, "test") == {"learning_rate": 1.0}
    assert assignments(["learning-rate=1"]) == {"learning_rate": "1"}


def test_assignments_reach_into_tables():
    found = check(assignments(["lora.rank=4", "lora.alpha=8", "steps=2"]), BOTH, "--set")
    assert found == {"lora": {"rank": 4, "alpha": 8.0}, "steps": 2}
    for pair in ("steps", "=3", "lora.=3"):
        with pytest.raises(ConfigError, match="takes NAME=VALUE"):
            assignments([pair])
    with pytest.raises(ConfigError, match="has a value of its own"):
        assignments(["lora=3", "lora.rank=4"])


def test_the_command_line_wins_over_the_file_and_tables_keep_the_rest(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('output = "a"\nsteps = 3\n[lora]\nrank = 2\nmodules = ["q", "v"]\n')
    file = check(read_toml(path), BOTH, str(path))
    typed = check(assignments(["steps=4", "lora.rank=16"]), BOTH, "--set")
    config = build(Config, merge(file, typed))
    assert config == Config("a", 4, lora=Lora(16, ["q", "v"]))


def test_several_classes_share_a_file():
    @dataclasses.dataclass
    class Job:
        model: str = "tiny"

    values = check({"model": "x", "output": "o"}, [Job, Config], "test")
    assert build(Job, values) == Job("x")
    assert build(Config, values) == Config("o")


def test_what_a_class_checks_itself_becomes_a_config_error():
    with pytest.raises(ConfigError, match="^steps must be at least 1$"):
        build(Config, {"output": "o", "steps": 0})
    with pytest.raises(ConfigError, match="`output` is missing"):
        build(Config, {})


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (b"a = 1\nb = = 2\n", r"run.toml:2: broken TOML at column 5: Invalid value"),
        (b'a = """x\n\n', r"run.toml:2: broken TOML: "),
        (b"a = 1\na = 2\n", r"run.toml:2: broken TOML.*overwrite"),
        (b"a = '\xff'", r"run.toml: not UTF-8 at byte 6"),
        ("a = 1".encode("utf-16"), r"run.toml: is UTF-16"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, text, wanted):
    (tmp_path / "run.toml").write_bytes(text)
    with pytest.raises(DataError, match=wanted):
        read_toml(tmp_path / "run.toml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="none.toml: cannot be read: No such file"):
        read_toml(tmp_path / "none.toml")


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(TEXTS, VALUES, max_size=6))
def test_whatever_is_written_is_read_back(values):
    assert tomllib.loads(write_toml(values)) == values


def test_a_byte_order_mark_is_taken(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfa = 1\n")
    assert read_toml(tmp_path / "run.toml") == {"a": 1}


def test_a_path_with_a_nul_is_refused(tmp_path):
    with pytest.raises(DataError, match="no path can hold a NUL"):
        read_toml("a\0b.toml")


def test_none_is_left_out_or_spelt():
    assert write_toml({"a": None, "b": [1, None], "c": {"d": None}}) == "b = [\n    1,\n]\n\n[c]\n"
    # None is not the default of `limit`, and is that of `report_to`
    whole = resolved({"output": "o", "limit": None, "report_to": None}, BOTH)
    assert whole["limit"] == "none"
    assert whole["report_to"] is None
    back = build(Config, check(tomllib.loads(write_toml(whole)), BOTH, "test"))
    assert back == Config("o", limit=None)


@given(
    st.builds(
        Config,
        output=TEXTS,
        steps=st.integers(1, 10**6),
        learning_rate=st.floats(allow_nan=False),
        loss=st.sampled_from(["kl", "imitation"]),
        report_to=st.none() | TEXTS | st.lists(TEXTS),
        limit=st.none() | st.integers(),
        resume=st.booleans() | TEXTS,
        weights=st.dictionaries(TEXTS, st.floats(allow_nan=False)),
        lora=st.builds(Lora, rank=st.integers(), modules=st.lists(TEXTS) | TEXTS),
    )
)
def test_a_configuration_written_and_read_is_the_same(config):
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    values["lora"] = dataclasses.asdict(config.lora)
    text = write_toml(resolved(values, BOTH))
    assert build(Config, check(tomllib.loads(text), BOTH, "test")) == config


def test_resolved_names_our_defaults_and_only_what_was_given_of_others():
    from transformers import TrainingArguments

    @dataclasses.dataclass
    class Own(TrainingArguments):
        ratio: float = 2.0

    whole = resolved({"learning_rate": 1e-3, "output_dir": "o"}, [Own])
    assert whole == {"learning_rate": 1e-3, "output_dir": "o", "ratio": 2.0}
    assert resolved({}, [Config])["lora"] == {"rank": 8, "modules": "all-linear", "alpha": None}


def test_every_setting_of_a_real_trainer_is_understood():
    from transformers import TrainingArguments

    text = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "report_to": ["none"],
        "max_steps": 5,
        "bf16": False,
    }
    found = check(text, [TrainingArguments], "test")
    assert found == text
    with pytest.raises(ConfigError, match='one of "linear", "cosine", .* got "cosin"'):
        check({"lr_scheduler_type": "cosin"}, [TrainingArguments], "test")
    with pytest.raises(ConfigError, match='Did you mean "learning_rate"'):
        check({"learning_rte": 1e-3}, [TrainingArguments], "test")
    with pytest.raises(ConfigError, match="--list-settings shows all"):
        check({"zzzzz": 1e-3}, [TrainingArguments], "test")


def test_explain_gives_every_setting_its_default_and_its_words():
    rows = {name: (default, text) for name, default, text in explain(BOTH)}
    assert rows["output"] == ("null", "Where it goes.")
    assert rows["learning_rate"] == ("0.0001", "Step size.")
    assert rows["lora.rank"] == ("8", "How many directions.")
    assert "lora" not in rows
