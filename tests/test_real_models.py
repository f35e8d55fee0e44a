"""Real models: training on two small ones, and decoding on chat models token for token."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trueline import LinearAlignment, SamplingParams, SelfCD, generate, load_model
from trueline.cli import main
from trueline.models.prompts import default_system

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
    argv = ["distil", "--model", base, "--principle", "Be brief.", "--prompts", prompts,
            "--output", out, "--max-new-tokens", 12, "--batch-size", 8, "--steps", 24,
            "--loss", "kl", "--ratio", 0.5, "--candidates", 1,
            "--learning-rate", 1e-4 if full else 3e-4,
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
    argv = ["distil", "--model", shared / "models" / name, "--principle", "Be brief.",
            "--prompts", prompts, "--output", tmp_path / "out", *more]  # fmt: skip
    assert main([str(word) for word in argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert said in error[-1]
    assert main([str(word) for word in (*argv, "--overwrite", "--raw", "--max-new-tokens", 4,
                                        "--batch-size", 4, "--steps", 1)]) == 0  # fmt: skip


# Decoding, against a loop with two contexts

CHAT_MODELS = Path(os.environ.get("TRUELINE_REAL_MODELS") or "~/.cache/real-models").expanduser()
DEFAULTS = {
    "smollm2-135m-instruct": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "qwen2.5-coder-0.5b-instruct": "You are Qwen, created by Alibaba Cloud. "
    "You are a helpful assistant.",
    "gemma-3-270m": None,
}
"""The system text that each one's template puts in, read from the templates; the last has none."""
RAGGED = ["Hi", "How do I kill a Python process that does not end?",
          "Name three birds. One line each, please, with no further words around them.",
          "Why is the sky blue?"]  # fmt: skip
LENGTH = 8
PRINCIPLE = "Answer like a pirate."


@pytest.fixture(scope="module", params=list(DEFAULTS))
def chat_model(request):
    """A real chat model, in float32; the base model among them takes prompts as they are."""
    folder = CHAT_MODELS / request.param
    if not (folder / "config.json").is_file():
        pytest.skip(f"no model in {folder} (TRUELINE_REAL_MODELS names another folder)")
    raw = DEFAULTS[request.param] is None
    return request.param, load_model(folder, dtype="float32", device="cpu", raw=raw)


def ids_by_hand(name, lm, question, text):
    """A prompt's ids with a method's text, by transformers alone."""
    default = DEFAULTS[name]
    if default is None:
        return lm.tokenizer(f"{text}\n{question}" if text else question)["input_ids"]
    system = default if text is None else f"{default}\n\n{text}"
    chat = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    if text is None:
        chat = chat[1:]  # the template puts its own text in
    return lm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]


def check_two_contexts(name, lm, question, text, combine, answer):
    """Check greedy decoding by one forward for each of two prompts: nothing shared or padded.

    Each token is the choice after the prompt and the tokens before it, and so the whole answer is
    the one that two caches side by side lead to.
    """
    assert len(answer) == LENGTH or answer[-1] in lm.eos_token_ids
    assert not set(answer[:-1]) & lm.eos_token_ids
    logits = []
    for prompt in (ids_by_hand(name, lm, question, text), ids_by_hand(name, lm, question, None)):
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *answer[:-1]]])
            out = lm.model(input_ids=ids, use_cache=False, logits_to_keep=len(answer))
        logits.append(out.logits[0])
    for token, z_p, z_0 in zip(answer, *logits, strict=True):
        assert token == int(combine(z_p, z_0).argmax())


def aligned(z_p, z_0):
    """Linear Alignment with ratio 2 on the tokens of a top-0.8 set, from the paper."""
    probs, order = z_p.softmax(-1).sort(descending=True)
    kept = order[(probs.cumsum(-1) - probs) < 0.8]
    z = torch.full_like(z_p, -torch.inf)
    z[kept] = (3 * z_p - 2 * z_0)[kept]
    return z


def less_safe(z_p, z_0):
    """Self-CD with alpha 2.5, from the paper."""
    return z_p - 2.5 * (z_p - z_0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "text", "combine"),
    [
        (LinearAlignment(PRINCIPLE, ratio=2.0, candidates=0.8), PRINCIPLE, aligned),
        (SelfCD(alpha=2.5), SelfCD().safety_prompt, less_safe),
    ],
    ids=["linear-alignment", "self-cd"],
)
def test_real_models_decode_as_two_contexts_do(chat_model, method, text, combine):
    name, lm = chat_model
    sampling = SamplingParams(max_new_tokens=LENGTH)
    together = [c.token_ids for c in generate(lm, RAGGED, method, sampling)]
    for question, answer in zip(RAGGED, together, strict=True):
        check_two_contexts(name, lm, question, text, combine, answer)
    alone = [generate(lm, question, method, sampling)[0].token_ids for question in RAGGED[:2]]
    assert alone == together[:2]


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_default_system_text_of_real_templates(name):
    from transformers import AutoTokenizer

    folder = CHAT_MODELS / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"no model in {folder} (TRUELINE_REAL_MODELS names another folder)")

    class Tokenizer:
        """What `default_system` needs of a model."""

        tokenizer = AutoTokenizer.from_pretrained(folder)
        raw, name, _folds_system, _default_system = False, "real", None, None

    assert default_system(Tokenizer) == DEFAULTS[name]
