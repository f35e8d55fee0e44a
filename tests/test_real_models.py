"""`trueline train inverse-q` on two small real models with real prompts, as a user runs it."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trueline.cli import main

MODELS = {"craftgpt-5m": [], "stories260K": ["--raw"]}
"""A GPT-2 with a chat template and 64 positions, and a Llama base model without one."""


@pytest.fixture
def prompts(shared, tmp_path):
    """Short prompts of XSTest: 64 positions are few."""
    lines = (shared / "data/over_refusal/xstest.jsonl").read_text().splitlines()
    rows = (json.loads(line)["prompt"] for line in lines)
    path = tmp_path / "prompts.jsonl"
    few = islice((p for p in rows if len(p) < 36), 32)
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in few))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_real_models_move_to_their_teacher_and_load_anywhere(shared, prompts, tmp_path, name, full):
    base, out = shared / "models" / name, tmp_path / "out"
    argv = ["train", "inverse-q", "--model", base, "--principle", "Be brief.", "--prompts", prompts,
            "--output", out, "--max-new-tokens", 12, "--batch-size", 8, "--steps", 24,
            "--loss", "kl", "--ratio", 0.5, "--top-p", 1, "--learning-rate", 1e-4 if full else 3e-4,
            *MODELS[name],
            *(["--full"] if full else [])]  # fmt: skip
    assert main([str(word) for word in argv]) == 0
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    kl = [row["kl_to_teacher"] for row in rows if "kl_to_teacher" in row]
    assert len(kl) == 24
    assert sum(kl[-6:]) < 0.8 * sum(kl[:6])

    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if full:
        trained = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    else:
        again = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        trained = PeftModel.from_pretrained(again, out)
    trained = trained.eval()
    ids = AutoTokenizer.from_pretrained(base)("How do I kill the lights?", return_tensors="pt")
    with torch.no_grad():
        before, after = (m(ids["input_ids"]).logits for m in (start, trained))
    assert (after - before).abs().max() > 1e-2
    said = trained.generate(ids["input_ids"], max_new_tokens=8, do_sample=False)
    assert said.shape[1] > ids["input_ids"].shape[1]


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("craftgpt-5m", ["--max-new-tokens", 60], "more than the model's 64 positions"),
        ("stories260K", [], "has no chat template. Pass --chat-template FILE"),
    ],
)
def test_what_does_not_fit_a_real_model_is_refused_in_one_line(
    shared, prompts, tmp_path, capsys, name, more, said
):
    argv = ["train", "inverse-q", "--model", shared / "models" / name, "--principle", "Be brief.",
            "--prompts", prompts, "--output", tmp_path / "out", *more]  # fmt: skip
    assert main([str(word) for word in argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert said in error[-1]
    assert main([str(word) for word in (*argv, "--overwrite", "--raw", "--max-new-tokens", 4,
                                        "--batch-size", 4, "--steps", 1)]) == 0  # fmt: skip
