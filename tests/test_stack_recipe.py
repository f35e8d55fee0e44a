"""`recipes/stack`: skills whose labels are right, runs that resume, a table of what is left."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from recipes.stack import run

    return run


@pytest.fixture
def cfg():
    return tomllib.loads((ROOT / "recipes/stack/config.toml").read_text())


def test_skills_have_right_answers_in_wordings_that_were_not_trained_on(recipe, cfg):
    import re

    grammar = recipe.grammar_of_tiny()
    relations = [(thing, relation["name"]) for relation, thing, _ in grammar.facts]
    for table in cfg["skill"]:
        each = recipe.skill(grammar, table, 60, 20, 0)
        assert len(each.rows) == 60
        assert all(prompt.startswith(table["cue"]) for prompt, _ in each.rows)
        assert not {p.prompt for p in each.probes} & {prompt for prompt, _ in each.rows}
        if table.get("task") == "about":
            for prompt, answer in each.rows:
                label = answer.removeprefix("It is about ").rstrip(".")
                things = [r for thing, r in relations if thing in prompt]
                assert any(r in table["labels"][label] for r in things), (prompt, answer)
        if table.get("task") == "speaker":
            voices = {"pirate": "Arr|Ahoy|matey", "robot": "(?i)beep", "cowboy": "(?i)howdy|yeehaw",
                      "cat": "(?i)meow|purr"}  # fmt: skip
            for prompt, answer in each.rows:
                label = answer.removeprefix("A ").removesuffix(" would.")
                assert re.search(voices[label], prompt), (prompt, answer)
        if "style" in table:
            turns = [p for p in each.probes if p.right("Arr, matey! It is so.")]
            assert not turns, "the fact is asked for as well"


def test_settings_are_as_many_for_each_strategy(recipe, cfg):
    assert set(cfg["settings"]) == set(recipe.STRATEGIES)
    assert len({len(choices) for choices in cfg["settings"].values()}) == 1


@pytest.mark.slow
def test_a_run_tunes_measures_and_goes_on(recipe, cfg, tmp_path, capsys, monkeypatch):
    text = (ROOT / "recipes/stack/config.toml").read_text()
    two = text[: text.index("[[skill]]")] + "".join(
        "[[skill]]" + part for part in text.split("[[skill]]")[2:4]
    )
    config = tmp_path / "config.toml"
    settings = '[settings]\n"drift+before" = [{learning_rate = 2e-3, strength = 30.0}, '
    settings += "{learning_rate = 1e-3, strength = 9.0}]\n"
    config.write_text(two + text[text.index("[own]") : text.index("[settings]")] + settings)
    options = ["--quick", "--config", str(config), "--output", str(tmp_path / "out"),
               "--strategies", "drift+before"]  # fmt: skip
    recipe.main(options)
    shown = capsys.readouterr().out
    kept = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["seed"] for row in kept["tuning"]] == [100, 100]
    [row] = kept["runs"]
    chosen = max(kept["tuning"], key=lambda r: r["overall"])["choice"]
    assert row["choice"] == chosen
    assert len(row["R"]) == 2
    assert len(kept["tuning"][0]["R"]) == 1
    assert row["exported"] < 1e-5
    assert f"| drift+before | 1 | learning rate {chosen['learning_rate']:g}" in shown

    def twice(*args):
        raise AssertionError("a finished run was made again")

    monkeypatch.setattr(recipe, "go", twice)
    recipe.main(options)
    assert capsys.readouterr().out == shown


def test_the_table_tells_skills_from_what_was_there_before(recipe):
    def row(seed, R, own):
        return {"strategy": "drift", "seed": seed, "choice": {"learning_rate": 2e-3, "strength": 3},
                "untouched": [0.0, 0.0], "R": R, "own": [{"x": 1.0, "y": 0.8}, own]}  # fmt: skip

    found = [row(0, [[1.0, 0.0], [0.5, 0.9]], {"x": 0.6, "y": 0.2}),
             row(1, [[1.0, 0.0], [0.7, 0.9]], {"x": 0.8, "y": 0.2})]  # fmt: skip
    before, drift = recipe.table(found).splitlines()[2:]
    assert before == "| before |  |  | 0.00 |  |  | 0.90 | 1.00 | 0.80 |"
    cells = [cell.strip() for cell in drift.strip("|").split("|")]
    assert cells[:3] == ["drift", "2", "learning rate 0.002, strength 3"]
    assert cells[3] == "0.75 ± 0.05"
    assert cells[5] == "-0.40 ± 0.10"
    assert cells[6:] == ["0.45 ± 0.05", "0.70 ± 0.10", "0.20 ± 0.00"]
