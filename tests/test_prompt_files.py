"""Files of prompts as a job: what tells a run, what is refused, what stays on the disk."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from trueline import ConfigError, DataError, LanguageModel, LinearAlignment, load_model
from trueline.jobs.prompt_files import generate_file
from trueline.jobs.row_plan import PromptFileConfig
from trueline.models.adapter import adapter_settings
from trueline.models.source import ModelConfig
from trueline.records.disk import Held
from trueline.records.prompt_rows import BadRowsError

ROWS = [{"id": f"r{i}", "prompt": f"Name {i} animals."} for i in range(5)]
SHORT = {"max_new_tokens": 3}


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    """The bundled model."""
    return load_model("tiny")


@pytest.fixture(autouse=True)
def one_load(tiny, monkeypatch):
    """Every job works on the one model that the tests hold."""
    monkeypatch.setattr("trueline.models.load.load_model", lambda *args, **options: tiny)


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def folders(tmp_path) -> dict[str, str]:
    """A model, an adapter and a template, of which a hash is all that the job takes."""
    for name, start in (("model", ""), ("adapter", "adapter_")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{start}config.json").write_text("{}")
        (tmp_path / name / f"{start}model.safetensors").write_bytes(b"weights")
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    return {
        "name": str(tmp_path / "model"),
        "adapter": str(tmp_path / "adapter"),
        "chat_template": str(tmp_path / "template.jinja"),
    }


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_file_is_answered_row_by_row_and_progress_is_told(rows, tmp_path):
    told = []
    config = PromptFileConfig(rows, options=SHORT, batch_size=2)
    out = tmp_path / "out.jsonl"
    done = generate_file(config, out, progress=lambda what, n, total: told.append((n, total)))
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in written] == [row["id"] for row in ROWS]
    assert (done.total, done.rows, done.bad) == (5, 5, 0)
    assert done.tokens == sum(len(row["token_ids"]) for row in written)
    assert told[0] == (0, 5)
    assert told[-1] == (5, 5)
    assert generate_file(config, out).rows == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "out.jsonl", "out.jsonl.run.json", "rows.jsonl",
    ]  # fmt: skip


def test_a_method_object_and_its_name_are_the_same_run(rows, tmp_path):
    given = PromptFileConfig(rows, LinearAlignment("Be brief.", ratio=2), SHORT)
    named = PromptFileConfig(rows, options={"principle": "Be brief.", "ratio": 2.0, **SHORT})
    generate_file(given, tmp_path / "out.jsonl")
    assert generate_file(named, tmp_path / "out.jsonl").rows == 0


CHANGES = {
    "weights": ("model/model.safetensors", "model.weights was"),
    "template of the model": ("model/config.json", "model.weights was"),
    "adapter": ("adapter/adapter_model.safetensors", "model.adapter.hash was"),
    "adapter's settings": ("adapter/adapter_config.json", "model.adapter.hash was"),
    "chat template": ("template.jinja", "model.chat_template was"),
    "prompts": ("rows.jsonl", "input.sha256 was"),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("name", "message"), CHANGES.values(), ids=CHANGES)
def test_other_bytes_are_another_run(rows, folders, tmp_path, name, message, finished):
    config = PromptFileConfig(rows, options=SHORT, model=ModelConfig(**folders), batch_size=2)
    out = tmp_path / "out.jsonl"
    generate_file(config, out)
    if not finished:
        out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:2]))
    path = tmp_path / name
    path.write_bytes(path.read_bytes() + b" ")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=message):
        generate_file(config, out)
    assert snapshot(tmp_path) == before


def test_other_bytes_of_an_adapter_on_the_hub_are_another_run(rows, folders, tmp_path, hub_cache):
    own, out = Path(folders["adapter"]), tmp_path / "out.jsonl"
    (own / "README.md").write_text("not loaded")
    hub_cache("me/adapter", own)
    config = PromptFileConfig(rows, options=SHORT, model=ModelConfig(adapter="me/adapter"))
    assert generate_file(config, out).rows == 5
    kept = json.loads(Path(f"{out}.run.json").read_text())["settings"]["model"]["adapter"]
    assert kept == adapter_settings("me/adapter", own)
    assert len(kept["hash"]) == 16
    (own / "README.md").write_text("other words")
    hub_cache("me/adapter", own, "1" * 40)
    assert generate_file(config, out).rows == 0
    (own / "adapter_model.safetensors").write_bytes(b"other weights")
    hub_cache("me/adapter", own, "2" * 40)
    with pytest.raises(ConfigError, match=r"model\.adapter\.hash was"):
        generate_file(config, out)


def test_the_bytes_of_a_pipe_tell_its_run(tmp_path):
    pipe, out = tmp_path / "pipe", tmp_path / "out.jsonl"
    os.mkfifo(pipe)

    def run(text: str) -> int:
        writer = threading.Thread(target=lambda: pipe.write_text(text))
        writer.start()
        try:
            return generate_file(PromptFileConfig(pipe, options=SHORT), out).rows
        finally:
            writer.join()

    assert run('{"prompt": "Hi"}\n') == 1
    assert run('{"prompt": "Hi"}\n') == 0
    with pytest.raises(ConfigError, match=r"input\.sha256 was"):
        run('{"prompt": "Ho"}\n')


@pytest.mark.parametrize("change", [{"id": "r4"}, {"id": "new"}, {"id": None}])
def test_a_finished_output_with_other_ids_is_not_done(rows, tmp_path, change):
    config, out = PromptFileConfig(rows, options=SHORT), tmp_path / "out.jsonl"
    generate_file(config, out)
    lines = out.read_text().splitlines(keepends=True)
    lines[1] = json.dumps({**json.loads(lines[1]), **change}) + "\n"
    out.write_text("".join(lines))
    with pytest.raises(DataError, match=r"out\.jsonl:[23]: not a row of this run"):
        generate_file(config, out)
    assert out.read_text() == "".join(lines)


def test_an_input_that_belongs_to_the_output_is_kept(rows, tmp_path):
    out = tmp_path / "out.jsonl"
    for name in ("out.jsonl", "out.jsonl.run.json", "out.jsonl.bad.jsonl"):
        path = tmp_path / name
        rows.replace(path)
        before = snapshot(tmp_path)
        with pytest.raises(ConfigError, match="Give another --output"):
            generate_file(PromptFileConfig(path, skip_bad=True), out, overwrite=True)
        assert snapshot(tmp_path) == before
        path.replace(rows)


def test_bad_rows_of_nobody_and_of_another_run_are_kept(rows, tmp_path):
    rows.write_text(rows.read_text() + '{"prompt": ""}\n')
    out, bad = tmp_path / "out.jsonl", tmp_path / "out.jsonl.bad.jsonl"
    config = PromptFileConfig(rows, options=SHORT, skip_bad=True)
    bad.write_text("mine")
    with pytest.raises(ConfigError, match="is no run's"):
        generate_file(config, out)
    assert bad.read_text() == "mine"
    bad.unlink()
    assert generate_file(config, out).bad == 1
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match="seed was 0, now 1"):
        generate_file(PromptFileConfig(rows, options=SHORT, skip_bad=True, seed=1), out)
    assert snapshot(tmp_path) == before


LINK = lambda path: path.symlink_to("/dev/full")  # noqa: E731


@pytest.mark.parametrize("make", [os.mkfifo, LINK], ids=["pipe", "link"])
def test_an_output_that_is_no_file_is_refused_at_once(rows, tmp_path, make):
    make(tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="is a (pipe|link)"):
        generate_file(PromptFileConfig(rows, options=SHORT), tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="is a device"):
        generate_file(PromptFileConfig(rows, options=SHORT), "/dev/full")


def test_a_link_planted_where_a_part_is_written_is_not_followed(rows, tmp_path):
    other = tmp_path / "other"
    other.write_text("mine")
    for name in (".out.jsonl.run.json.part", "out.jsonl.run.json.part"):
        (tmp_path / name).symlink_to(other)
    generate_file(PromptFileConfig(rows, options=SHORT), tmp_path / "out.jsonl")
    assert other.read_text() == "mine"


def test_overwrite_waits_for_nobody_and_removes_nothing_that_is_held(rows, tmp_path):
    config, out = PromptFileConfig(rows, options=SHORT), tmp_path / "out.jsonl"
    generate_file(config, out)
    before = out.read_bytes()
    held = Held(tmp_path / ".out.jsonl.lock", out)
    with pytest.raises(ConfigError, match="Another run is writing"):
        generate_file(config, out, overwrite=True)
    assert out.read_bytes() == before
    held.release()
    assert generate_file(config, out, overwrite=True).rows == 5


def test_the_job_is_public():
    import trueline

    assert (trueline.generate_file, trueline.PromptFileConfig) == (generate_file, PromptFileConfig)


def test_bad_rows_are_named_by_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": ""}\n' * 30)
    with pytest.raises(BadRowsError) as error:
        generate_file(PromptFileConfig(path), tmp_path / "out.jsonl")
    assert len(error.value.rows) == 30
    lines = error.value.lines()
    assert lines[0].startswith(f"{path}:1: field")
    assert lines[20] == "and 10 more bad rows. --skip-bad runs the others."
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": 0}, {"seed": 2**63}, {"seed": 0.5}, {"system": " "}, {"model": 3}, {"input": 3},
     {"system": ["Be brief."]}],
)  # fmt: skip
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PromptFileConfig(**{"input": "rows.jsonl", **wrong})
