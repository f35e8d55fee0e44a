"""Run folders, sweeps and recommendations: numbers by hand, kills and resumes."""

from __future__ import annotations

import hashlib
import json
import math

import pytest

from trueline import ConfigError, DataError, SamplingParams
from trueline.evals import choice, items, metrics, points
from trueline.evals.points import Way
from trueline.jobs import reports
from trueline.records import hashes
from trueline.records.lines import Rows, plain
from trueline.records.run_folder import RunFolder
from trueline.settings import ranges

SAMPLING = SamplingParams(max_new_tokens=8)


# Values, grids, points


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0:3:0.5", (0, 0.5, 1, 1.5, 2, 2.5, 3)),
        ("0:0.3:0.1", (0, 0.1, 0.2, 0.3)),
        ("-1:1:1", (-1, 0, 1)),
        ("0:1:0.4", (0, 0.4, 0.8)),
        ("2,1,2", (2, 1)),
        ("1.5", (1.5,)),
    ],
)
def test_parse_values(text, values):
    assert ranges.parse_values(text) == values


@pytest.mark.parametrize("text", ["", "a", "0:3", "3:0:1", "0:3:0", "0:3:-1", "0:9:1e-9", "1,,2"])
def test_values_that_are_none(text):
    with pytest.raises(ConfigError):
        ranges.parse_values(text)


def test_whole_values():
    assert ranges.parse_values("1:3:1", whole=True) == (1, 2, 3)
    with pytest.raises(ConfigError, match="whole numbers"):
        ranges.parse_values("0.5,1", whole=True)


def test_grid_points_are_every_combination_of_method_and_sampling():
    grid = points.parse_grid(["alpha=0,1", "top_p=0.5,1"], "self-cd")
    found = points.grid_points(Way("self-cd"), grid, SAMPLING)
    assert [p.label for p in found] == [
        "alpha=0, top_p=0.5", "alpha=0, top_p=1", "alpha=1, top_p=0.5", "alpha=1, top_p=1",
    ]  # fmt: skip
    assert [(p.fields, p.sampling.top_p) for p in found[:2]] == [
        ({"alpha": 0}, 0.5),
        ({"alpha": 0}, 1.0),
    ]
    way = Way("linear-alignment", {"principle": "x"})
    own = points.grid_points(way, {"candidates": (0.5,), "top_p": (0.25,)}, SAMPLING)
    assert (own[0].fields["candidates"], own[0].sampling.top_p) == (0.5, 0.25)


def test_grid_errors_name_the_closest():
    with pytest.raises(ConfigError, match='Did you mean "alpha"'):
        points.parse_grid(["alfa=1"], "self-cd")
    with pytest.raises(ConfigError, match="NAME=VALUES"):
        points.parse_grid(["alpha"], "self-cd")
    with pytest.raises(ConfigError, match="no option `alpha`"):
        points.grid_points(Way("plain"), {"alpha": (1,)}, SAMPLING)
    with pytest.raises(ConfigError, match="`plausibility` must be"):
        points.grid_points(Way("self-cd"), {"plausibility": (0.5, 2)}, SAMPLING)


def test_the_default_point_is_found():
    found = points.grid_points(Way("self-cd"), {"alpha": (0, 2.5)}, SAMPLING)
    assert points.default_label(found) == "alpha=2.5"
    assert points.default_label(found[:1]) is None


# The recommendation


def prompts_of(kind: str, first: int, second: int, seed: int = 0) -> list[str]:
    """Prompts of which so many lie in the first half and in the second, first ones first."""
    halves: dict[bool, list[str]] = {True: [], False: []}
    for i in range(200):
        text = f"{kind} {i}"
        half = hashlib.sha256(f"{seed}:{text}".encode()).digest()[0] < 128
        halves[half].append(text)
    return halves[True][:first] + halves[False][:second]


def test_chosen_on_one_half_and_reported_on_the_other():
    safe, unsafe = prompts_of("safe", 4, 4), prompts_of("unsafe", 4, 4)
    # First half, then second. "b" is best where it is chosen and bad where it is reported.
    outcomes = {
        "a": ([1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]),
        "b": ([0, 0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 0]),
        "c": ([0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 1, 1]),
    }
    found = choice.recommend(outcomes, safe, unsafe, floor=0.97, default="c")
    assert (found.label, found.meets_floor) == ("b", True)
    chosen, reported, default = found.chosen_on, found.reported_on, found.default_on
    assert (chosen.over_refusal.value, chosen.harmful_refusal.value) == (0.25, 1.0)
    assert (reported.over_refusal.value, reported.harmful_refusal.value) == (0.75, 0.5)
    assert (default.over_refusal.value, default.harmful_refusal.value) == (0.0, 1.0)
    assert chosen.over_refusal.n == reported.harmful_refusal.n == 4
    # Three discordant pairs, all one way: 2 / 2^3; two: 2 / 2^2.
    assert (found.p_over_refusal, found.p_harmful_refusal) == (0.25, 0.5)
    assert choice.recommend(outcomes, safe, unsafe, floor=0.75).label == "c"


def test_no_point_reaches_the_floor():
    safe, unsafe = prompts_of("safe", 2, 2), prompts_of("unsafe", 2, 2)
    outcomes = {"a": ([0] * 4, [0] * 4), "b": ([1] * 4, [1, 0, 1, 1]), "c": ([0] * 4, [1, 0, 0, 0])}
    found = choice.recommend(outcomes, safe, unsafe)
    assert (found.label, found.meets_floor) == ("c", False)


def test_ties_go_to_more_harmful_refusals_then_to_the_earlier_point():
    safe, unsafe = prompts_of("safe", 2, 2), prompts_of("unsafe", 4, 4)
    half, whole = [1, 1, 0, 0] * 2, [1] * 8
    outcomes = {"a": ([0] * 4, half), "b": ([0] * 4, whole), "c": ([0] * 4, whole)}
    assert choice.recommend(outcomes, safe, unsafe, floor=0.5).label == "b"


def test_unknown_verdicts_are_in_no_rate_and_empty_halves_give_nothing():
    safe, unsafe = prompts_of("safe", 2, 2), prompts_of("unsafe", 2, 2)
    found = choice.recommend({"a": ([None, 1, None, 0], [1, None, None, 1])}, safe, unsafe)
    assert found.chosen_on.over_refusal.n == found.chosen_on.harmful_refusal.n == 1
    assert (found.chosen_on.over_refusal.value, found.reported_on.over_refusal.value) == (1.0, 0.0)
    outcomes = {"a": ([0, 0], [1, 1])}
    assert choice.recommend(outcomes, prompts_of("safe", 2, 0), prompts_of("unsafe", 1, 1)) is None


def test_the_seed_moves_the_halves():
    texts = [f"prompt {i}" for i in range(400)]
    zero, one = ([choice.in_first_half(t, seed) for t in texts] for seed in (0, 1))
    assert 150 < sum(zero) < 250
    assert 150 < sum(a == b for a, b in zip(zero, one, strict=True)) < 250


def test_paired_test_leaves_out_what_one_could_not_judge():
    assert choice.paired_test([1, 1, None, 1], [0, 0, 0, None]) == 0.5
    assert choice.paired_test([None], [1]) is None


# Rows


def double(batch, first):
    return [{"value": 2 * x, "place": first + i} for i, x in enumerate(batch)]


def test_rows_are_computed_once(tmp_path):
    rows = Rows(tmp_path / "r.jsonl")
    seen = []
    whole = rows.compute("k", [1, 2, 3], 2, double, seen.append)
    assert [r["value"] for r in whole] == [2, 4, 6]
    assert seen == [2, 1]
    rows.compute("other", [5], 2, double)
    rows.close()
    again = Rows(tmp_path / "r.jsonl")
    assert again.done("k", 3) == 3
    assert again.compute("k", [1, 2, 3], 2, lambda *_: 1 / 0) == whole
    again.close()


@pytest.mark.parametrize("cut", [1, 10, 60, 75, 120, 150, 200, 240])
def test_a_file_cut_anywhere_goes_on_to_the_same_bytes(tmp_path, cut):
    path = tmp_path / "r.jsonl"
    rows = Rows(path)
    for key in ("a", "b"):
        rows.compute(key, [1, 2, 3], 2, double)
    rows.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    again = Rows(path)
    assert path.stat().st_size <= cut
    for key in ("a", "b"):
        again.compute(key, [1, 2, 3], 2, double)
    again.close()
    assert path.read_bytes() == whole


def test_a_foreign_line_is_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"key": "a", "index": 1}\n')
    with pytest.raises(DataError, match=r"r\.jsonl:1: not a row"):
        Rows(path)


def test_nan_and_odd_line_ends_survive(tmp_path):
    rows = Rows(tmp_path / "r.jsonl")
    texts = ["a\u2028b\x85c\n", "é\t"]
    rows.compute("k", texts, 2, lambda b, _: [{"text": t, "x": math.nan} for t in b])
    rows.close()
    again = Rows(tmp_path / "r.jsonl")
    assert [(r["text"], r["x"]) for r in again.rows["k"]] == [(t, None) for t in texts]
    again.close()


# Run folders


def taken(path, kind, settings, **options):
    run = RunFolder(path, kind, settings, **options)
    run.start()
    return run


def test_another_runs_folder_is_refused_with_what_differs(tmp_path):
    taken(tmp_path / "run", "refusal", {"model": {"name": "tiny", "hash": "1"}, "seed": 0}).close()
    taken(tmp_path / "run", "refusal", {"model": {"name": "tiny", "hash": "1"}, "seed": 0}).close()
    other = {"model": {"name": "tiny", "hash": "2"}, "seed": 1}
    with pytest.raises(ConfigError, match=r'model\.hash was "1", now "2"; seed was 0, now 1'):
        RunFolder(tmp_path / "run", "refusal", other)
    taken(tmp_path / "run", "refusal", other, overwrite=True).close()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["settings"]["seed"] == 1


def test_a_folder_with_other_things_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"thesis\.tex"):
            RunFolder(tmp_path, "refusal", {}, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_overwrite_removes_what_the_run_wrote_and_nothing_else(tmp_path):
    run = taken(tmp_path / "run", "refusal", {})
    run.write("results.md", "old")
    run.subfolder("stages")
    run.close()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    held = RunFolder(tmp_path / "run", "refusal", {}, overwrite=True)
    assert (tmp_path / "run" / "results.md").read_text() == "old"  # until the run starts
    held.start()
    held.close()
    left = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert left == ["manifest.json", "thesis.tex"]


def test_a_file_that_the_run_did_not_write_is_not_replaced(tmp_path):
    run = taken(tmp_path / "run", "refusal", {})
    (run.folder / "results.md").write_text("mine")
    with pytest.raises(ConfigError, match="did not write it"):
        run.write("results.md", "new")
    run.close()
    assert (run.folder / "results.md").read_text() == "mine"


def test_a_full_disk_leaves_no_lock_and_names_the_file(tmp_path, monkeypatch):
    run = taken(tmp_path / "run", "refusal", {})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space") as error:
        run.write("results.md", "new")
    assert error.value.filename == str(tmp_path / "run" / "manifest.json")
    with pytest.raises(OSError, match="No space"):
        run.close({"seconds": 1})
    assert sorted(p.name for p in run.folder.iterdir()) == ["manifest.json"]
    assert json.loads((run.folder / "manifest.json").read_text())["sessions"] == []


@pytest.mark.parametrize(
    ("error", "number"),
    [("Error while serializing: I/O error: No space left on device (os error 28)", 28),
     ("Error while serializing: I/O error: File too large (os error 27)", 27),
     ("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file", None)],
)  # fmt: skip
def test_other_libraries_errors_of_the_disk_name_the_folder(tmp_path, error, number):
    from safetensors import SafetensorError

    from trueline.records.disk import saving

    kind = RuntimeError if number is None else SafetensorError
    with pytest.raises(OSError, match=".") as found, saving(tmp_path):
        raise kind(error)
    assert found.value.filename == str(tmp_path)
    assert number in (None, found.value.errno)
    with pytest.raises(RuntimeError, match="shape"), saving(tmp_path):
        raise RuntimeError("shape mismatch")


def test_a_run_of_another_kind_is_not_overwritten(tmp_path):
    taken(tmp_path / "run", "distilled", {}).close()
    with pytest.raises(ConfigError, match='another kind, "distilled"'):
        RunFolder(tmp_path / "run", "refusal", {}, overwrite=True)


def test_two_processes_cannot_write_one_run_and_nothing_is_removed_meanwhile(tmp_path):
    run = taken(tmp_path / "run", "refusal", {})
    run.rows("responses.jsonl").compute("k", [1, 2], 2, double)
    before = (tmp_path / "run" / "responses.jsonl").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="Another run is writing"):
            RunFolder(tmp_path / "run", "refusal", {}, overwrite=overwrite)
    run.close()
    assert (tmp_path / "run" / "responses.jsonl").read_bytes() == before
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_folder_that_was_made_and_no_more_is_the_next_runs(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".manifest.json.part").write_text('{"sett')
    (folder / "checkpoints").mkdir()
    run = taken(folder, "refusal", {}, resume=False)
    run.close()
    assert json.loads((folder / "manifest.json").read_text())["settings"] == {"kind": "refusal"}


def test_a_run_that_never_started_leaves_no_folder(tmp_path):
    RunFolder(tmp_path / "run", "refusal", {}).close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "null", '{"settings": []}', '{"settings": {}, "files": [1]}',
     '{"settings": {}, "sessions": 3}', '{"settings": {}, "facts": []}'],
)  # fmt: skip
def test_a_manifest_that_no_run_wrote_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match="Cannot read"):
        RunFolder(tmp_path, "refusal", {})


def test_a_link_in_the_folder_is_not_followed(tmp_path):
    other = tmp_path / "other"
    other.write_text("mine")
    run = taken(tmp_path / "run", "refusal", {})
    for name in ("responses.jsonl", "results.md", ".manifest.json.part", ".lock"):
        (run.folder / name).unlink(missing_ok=True)
        (run.folder / name).symlink_to(other)
    with pytest.raises(ConfigError, match="is a link"):
        run.rows("responses.jsonl")
    with pytest.raises(ConfigError, match="is a link"):
        run.write("results.md", "new")
    run.note({"seconds": 1})
    run.close()
    assert other.read_text() == "mine"
    (run.folder / ".lock").symlink_to(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="Cannot write"):
        RunFolder(tmp_path / "run", "refusal", {})
    assert not (tmp_path / "nothing").exists()


def test_plain_json_has_no_nan():
    assert plain({"a": [math.nan, math.inf, (1, 0.5)]}) == {"a": [None, "inf", [1, 0.5]]}


def test_model_hash_follows_the_weights(llama, tmp_path):
    first = hashes.model_hash(llama)
    weight = llama.model.get_input_embeddings().weight.data
    weight[0, 0] += 1
    assert hashes.model_hash(llama) != first
    weight[0, 0] -= 1
    (tmp_path / "config.json").write_text("{}")
    before = hashes.model_hash(llama, tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert hashes.model_hash(llama, tmp_path) != before


# Measures


def test_items_of_files_leave_out_what_the_file_marks_otherwise(tmp_path):
    path = tmp_path / "mixed.jsonl"
    rows = [{"prompt": "kill a process?", "safe": True}, {"prompt": "hurt him?", "safe": False}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found, _ = items.refusal_items(str(path), str(path))
    assert [(i.prompt, i.group) for i in found] == [
        ("kill a process?", "safe"),
        ("hurt him?", "unsafe"),
    ]
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="none of its prompts is unsafe"):
        items.refusal_items(None, str(path))


def test_summary_by_hand():
    responses = [
        {"token_ids": [1, 2, 3], "base_nll": 3 * math.log(2)},
        {"token_ids": [7] * 5, "base_nll": 5 * math.log(2)},
    ]
    verdicts = [{"over_refusal": 1.0}, {"over_refusal": None}, {"harmful_refusal": 1.0}]
    found = metrics.summarise("refusal", responses, verdicts)
    over = found["measures"]["over_refusal"]
    assert (over["value"], over["n"], over["unknown"], over["outcomes"]) == (1.0, 1, 1, "1?")
    assert found["measures"]["harmful_refusal"]["n"] == 1
    assert found["quality"]["perplexity"] == pytest.approx(2)
    assert found["quality"]["length"]["value"] == 4
    # 7777 7777: two 4-grams, one of them new
    assert found["quality"]["repetition"]["value"] == 0.25


@pytest.mark.parametrize("values", [[1.0, 0.0, None], [0.3, None, 1.0]])
def test_outcomes_round_trip(values):
    assert metrics.read_outcomes(metrics.write_outcomes(values)) == values


def test_adherence_is_judged_principle_by_principle():
    class Judge:
        def adherence(self, principle, prompts, responses):
            return [len(principle) / 10 + int(r) / 100 for r in responses]

    prompts = [items.Item("1", "p", "g", principle=p) for p in ("a", "bb", "a")]
    rows = metrics.judge_responses("adherence", prompts, ["1", "2", "3"], Judge())
    assert [r["adherence"] for r in rows] == pytest.approx([0.11, 0.22, 0.13])


def test_bundled_adherence_covers_principles_evenly():
    found, of = items.adherence_items(None, limit=40)
    assert of == 59 * 60
    assert len({i.principle for i in found}) == len({i.prompt for i in found}) == 40
    assert len({(i.principle, i.prompt) for i in items.adherence_items(None)[0]}) == 120


# Reports


def result(name: str, outcomes: str, label: str = "alpha=1") -> dict:
    flags = [v == "1" for v in outcomes]
    measure = {"value": sum(flags) / len(flags), "n": len(flags), "low": 0.1, "high": 0.9}
    point = {
        "label": label,
        "baseline": False,
        "measures": {"over_refusal": {**measure, "unknown": 0, "outcomes": outcomes}},
        "quality": {"length": {"value": 3.0}, "repetition": {"value": 0.1}, "perplexity": 2.0},
    }
    settings = {"kind": "refusal", "data": {"sha256": "1"}, "method": name}
    return {
        "name": name, "folder": "/nowhere", "metric": "refusal", "kind": "refusal",
        "settings": settings, "points": [point], "command": f"trueline <{name}>",
    }  # fmt: skip


def test_runs_on_the_same_prompts_are_tested_in_pairs():
    # Five prompts differ, all one way: p = 2 / 2^5.
    a, b = result("a", "11111000"), result("b", "00000000")
    _, rows = reports.compare_runs([a, b])
    assert rows[0][:3] == ["over refusal", "a: alpha=1", "b: alpha=1"]
    assert rows[0][3].startswith("+62.5 points")
    assert rows[0][4:] == ["0.062", "8"]
    b["settings"]["data"] = {"sha256": "2"}
    assert reports.compare_runs([a, b]) is None


def test_the_page_is_whole_and_escaped(tmp_path):
    page = reports.render_html([result("a", "10"), result("<script>", "11")])
    assert "<script>" not in page
    assert "trueline &lt;a&gt;" in page
    assert "http" not in page
    text = reports.render_markdown([result("a|b", "10")], tmp_path)
    assert "| alpha=1 | 50.0 % [10, 90] n=2 | 3.0 | 0.100 | 2.00 |" in text
