"""Files of prompts in, rows of completions out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trueline.errors import ConfigError, DataError
from trueline.records.lines import read_jsonl
from trueline.records.output_file import OutputFile, kept_settings
from trueline.records.prompt_rows import read_prompts


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines))
    return path


def test_read_jsonl_numbers_lines_as_an_editor_does(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"a": 1}', "", '{"b": "é"}\r')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (3, {"b": "é"})]


def test_read_jsonl_stops_at_the_first_bad_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"a": 1}', '{"a": 1,}')
    rows = read_jsonl(path)
    assert next(rows) == (1, {"a": 1})
    with pytest.raises(DataError) as error:
        next(rows)
    assert str(error.value).startswith(f"{path}:2: broken JSON at column ")


BAD = {
    '{"text_": "Hi"}': 'missing field "prompt" (or "messages"); the row has "text_"',
    "{}": "the row has no fields",
    '{"prompt": "Hi"': "broken JSON at column 16",
    '{"prompt": NaN}': "NaN is no JSON number",
    '["Hi"]': "not a JSON object but a list",
    "3": "not a JSON object but a number",
    "null": "not a JSON object but null",
    '{"prompt": ""}': 'field "prompt" is empty',
    '{"prompt": "  \\n"}': 'field "prompt" is empty',
    '{"prompt": 3}': 'field "prompt" must be a string, got a number',
    '{"prompt": ["Hi"]}': 'field "prompt" must be a string, got a list',
    '{"prompt": "Hi", "messages": []}': 'has both "prompt" and "messages"',
    '{"messages": "Hi"}': 'field "messages" must be a list, got a string',
    '{"messages": []}': "no user message",
    '{"messages": ["Hi"]}': "A message must be",
    '{"messages": [{"role": "bot", "content": "Hi"}]}': 'got "bot"',
    '{"messages": [{"role": "user", "content": ""}]}': "user message is empty",
    '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}': "content parts",
    '{"messages": [{"role": "user", "content": "Hi", "name": "x"}]}': 'has also "name"',
    '{"messages": [{"role": "assistant", "content": null, "tool_calls": []}]}': '"tool_calls"',
    '{"prompt": "Hi", "x": 1e999}': "cannot read the JSON: 1e999 is too large for a number",
    '{"prompt": "Hi", "system": null}': 'field "system" must be a string, got null',
    '{"prompt": "Hi", "principle": " "}': 'field "principle" is empty',
    '{"prompt": "Hi", "seed": "1"}': 'field "seed" must be a whole number',
    '{"prompt": "Hi", "seed": true}': 'field "seed" must be a whole number',
    '{"prompt": "Hi", "seed": 9223372036854775808}': 'field "seed" must be a whole number',
    '{"prompt": "Hi", "id": [1]}': 'field "id" must be a string or a whole number, got a list',
    '{"prompt": "Hi", "id": true}': "got true or false",
    '{"prompt": "Hi", "text": "x"}': 'field "text" is one that the output adds',
    '{"prompt": "\\ud83d"}': "half of a surrogate pair",
    "[" * 100_000: "cannot read the JSON",
    '{"prompt": "Hi", "seed": 1' + "0" * 5000 + "}": "cannot read the JSON",
    b'{"prompt": "caf\xe9"}': "not UTF-8: byte 0xe9 at byte 16",
    '{"system": "A", "messages": [{"role": "system", "content": "B"}, '
    '{"role": "user", "content": "Hi"}]}': 'has "system" and a system message',
}


@pytest.mark.parametrize(("line", "reason"), BAD.items(), ids=BAD.values())
def test_a_bad_row_is_reported_with_its_line(tmp_path, line, reason):
    path = write(tmp_path / "a.jsonl", '{"prompt": "good"}', line, '{"prompt": "good"}')
    given = read_prompts(path)
    rows, bad = given.rows, given.bad
    assert [row.line for row in rows] == [1, 3]
    assert [b.line for b in bad] == [2]
    assert reason in bad[0].error


def test_rows_keep_what_they_bring(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        '{"prompt": "Hi", "system": "Be kind.", "principle": "Rhyme.", "seed": 7, "tag": [1]}',
        '{"id": "b", "messages": [{"role": "user", "content": "A"}, '
        '{"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]}',
    )
    given = read_prompts(path)
    (first, second), bad = given.rows, given.bad
    assert not bad
    assert first.messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
    ]
    assert (first.principle, first.seed) == ("Rhyme.", 7)
    assert first.fields == {"id": 1} | json.loads(path.read_text().splitlines()[0])
    assert [m["content"] for m in second.messages] == ["A", "B", "C"]
    assert (second.fields["id"], second.principle, second.seed) == ("b", None, None)


def test_ids_are_unique_and_a_number_is_no_string(tmp_path):
    lines = ('{"prompt": "a", "id": "2"}', '{"prompt": "b"}', '{"prompt": "c", "id": 2}')
    given = read_prompts(write(tmp_path / "a.jsonl", *lines))
    rows, bad = given.rows, given.bad
    assert [row.fields["id"] for row in rows] == ["2", 2]
    assert [(b.line, b.error) for b in bad] == [(3, "duplicate id 2, first seen on line 2.")]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_text(""), "the file is empty"),
        (lambda path: path.write_text("\n\n"), "the file is empty"),
        (lambda path: path.write_bytes('{"prompt": "Hi"}'.encode("utf-16")), "is UTF-16"),
        (lambda path: path.write_bytes('{"prompt": "Hi"}'.encode("utf-16-le")), "is UTF-16"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    ],
    ids=["missing", "folder", "empty", "blank", "utf-16", "utf-16 without a mark", "device"],
)
def test_a_file_that_cannot_be_used(tmp_path, make, reason):
    path = tmp_path / "a.jsonl"
    make(path)
    with pytest.raises(DataError, match=reason) as error:
        read_prompts(path)
    assert str(error.value).startswith(f"{path}: ")


def test_a_message_is_not_printed_whole(tmp_path):
    message = {"role": "user", "content": "a" * 10**6, "name": "b" * 10**6}
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": [message]}))
    assert len(read_prompts(path).bad[0].error) < 200


def test_a_pipe_is_read_once_and_hashed(tmp_path):
    import hashlib
    import os
    import threading

    path, content = tmp_path / "pipe", b'{"prompt": "Hi"}\n'
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(content))
    writer.start()
    given = read_prompts(path)
    writer.join()
    assert given.rows[0].messages[0]["content"] == "Hi"
    assert given.sha256 == hashlib.sha256(content).hexdigest()


def row(i: int) -> dict[str, object]:
    return {"id": i, "text": "Ahoy ü " + "é" * i}


def run(path: Path, settings: dict[str, object], total: int = 7, size: int = 2) -> int:
    """Write what is missing; return how many rows were there."""
    output = OutputFile(path, settings, list(range(total)), size)
    already = output.done
    for first in range(already, total, size):
        output.append(row(i) for i in range(first, min(first + size, total)))
    output.close({"rows": total - already})
    return already


def test_a_file_cut_at_any_byte_is_completed_to_the_same_bytes(tmp_path):
    path = tmp_path / "out.jsonl"
    assert run(path, {"seed": 0}) == 0
    whole = path.read_bytes()
    assert [json.loads(line) for line in whole.splitlines()] == [row(i) for i in range(7)]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        kept = run(path, {"seed": 0})
        assert path.read_bytes() == whole
        # Whole batches of two stay; the last row alone is a batch as well.
        assert kept == whole[:cut].count(b"\n") // 2 * 2
    assert run(path, {"seed": 0}) == 7


def test_an_output_of_another_run_is_left_alone(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, {"seed": 0, "model": "tiny"})
    whole, sidecar = path.read_bytes(), Path(f"{path}.run.json").read_bytes()
    with pytest.raises(ConfigError, match=r"seed was 0, now 1\. Give another --output"):
        run(path, {"seed": 1, "model": "tiny"})
    assert path.read_bytes() == whole
    assert Path(f"{path}.run.json").read_bytes() == sidecar
    assert kept_settings(path, {"seed": 0, "model": "tiny"})["rows"] == 7
    output = OutputFile(path, {"seed": 1}, [0], 2, overwrite=True)
    assert (output.done, path.read_bytes()) == (0, b"")
    output.close()


def test_an_output_with_no_settings_beside_it_is_left_alone(tmp_path):
    path = write(tmp_path / "out.jsonl", "precious")
    with pytest.raises(ConfigError, match="exists, and no"):
        run(path, {"seed": 0})
    assert path.read_text() == "precious\n"


def test_settings_that_cannot_be_read(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, {"seed": 0})
    Path(f"{path}.run.json").write_text("{}")
    with pytest.raises(ConfigError, match="Cannot read"):
        run(path, {"seed": 0})


@pytest.mark.parametrize("line", ['{"id": 5, "text": ""}', "{", "3"])
def test_a_row_that_the_run_did_not_write(tmp_path, line):
    path = tmp_path / "out.jsonl"
    run(path, {"seed": 0})
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0] + line.encode() + b"\n")
    with pytest.raises(DataError, match=r"out\.jsonl:2: not a row of this run"):
        run(path, {"seed": 0})


def test_two_runs_cannot_write_to_one_file(tmp_path):
    pytest.importorskip("fcntl", reason="locks files where the system has fcntl")
    path = tmp_path / "out.jsonl"
    output = OutputFile(path, {}, [0], 2)
    with pytest.raises(ConfigError, match="Another run is writing"):
        OutputFile(path, {}, [0], 2)
    output.close()


def test_timings_of_every_session_are_kept(tmp_path):
    path = tmp_path / "out.jsonl"
    run(path, {})
    path.write_bytes(path.read_bytes()[:20])
    run(path, {})
    kept = json.loads(Path(f"{path}.run.json").read_text())
    assert kept == {"settings": {}, "rows": 7, "sessions": [{"rows": 7}, {"rows": 7}]}


def test_a_torn_line_is_cut_off_by_the_first_row_that_follows_it(tmp_path):
    from trueline.records.lines import LineFile

    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"b": ')
    file = LineFile(path)
    file.append([{"c": 2}])
    file.close()
    assert path.read_text() == '{"a": 1}\n{"c": 2}\n'


def test_a_setting_that_only_the_new_run_has_is_a_difference():
    from trueline.records.manifest import different

    assert different({"a": 1}, {"a": 1, "b": {"c": 2}}) == [("b", "null", '{"c": 2}')]
    assert different({"b": {"c": 2}}, {"b": {}}) == [("b.c", "2", "null")]


def test_what_a_kill_left_beside_a_file_is_in_nobodys_way(tmp_path):
    from trueline.records.disk import replace_file

    (tmp_path / ".run.json.part").write_text("half of it")
    replace_file(tmp_path / "run.json", "whole")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"run.json": "whole"}
