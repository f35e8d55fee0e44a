"""The Inverse-Q* trainer: against naive forwards, on four classes of models, broken off and on."""

from __future__ import annotations

import json
import math
import textwrap

import pytest
import torch
from conftest import byte_tokenizer, random_model
from processes import together

from trueline import (
    AdaCD,
    Contrast,
    LanguageModel,
    LinearAlignment,
    SamplingParams,
    SelfCD,
    generate,
    load_model,
)
from trueline.errors import ConfigError, DataError
from trueline.models.packed import merged_products
from trueline.models.prompts import encode
from trueline.types import Request

peft = pytest.importorskip("peft")

from trueline.train.distil import trainer as trainer_module  # noqa: E402
from trueline.train.distil.policies import policies, rules_out, teacher_effect  # noqa: E402
from trueline.train.distil.sampling import Guide, Plan, own_answers, seed_of  # noqa: E402
from trueline.train.distil.teachers import TEACHERS, make_teacher, teacher_of  # noqa: E402
from trueline.train.distil.trainer import InverseQConfig, InverseQTrainer  # noqa: E402

pytestmark = [
    # transformers renamed the option; PEFT still uses the old name.
    pytest.mark.filterwarnings("ignore:`[a-z_]*gradient_checkpointing[a-z_]*` is:FutureWarning"),
    # DataLoader's default for pinning looks for an accelerator that a CPU machine has not.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning"),
]

PRINCIPLE = "Answer in French, please."
ROWS = [{"prompt": f"What is {x}?"} for x in ("rain", "a cat", "it", "snow", "a long tree", "sun")]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def config(tmp_path, **options):
    defaults = {
        "loss": "kl",
        "principle": PRINCIPLE,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
    }
    return InverseQConfig(str(tmp_path / "out"), **defaults | options)


def trainer_of(tmp_path, kind="llama", rows=ROWS, lora=True, model=None, **options):
    extra = {k: options.pop(k) for k in ("teacher", "evaluate", "eval_dataset") if k in options}
    if "teacher_name" in options:
        options["teacher"] = options.pop("teacher_name")
    return InverseQTrainer(
        random_model(kind) if model is None else model,
        config(tmp_path, **options),
        train_dataset=rows,
        processing_class=None if model == "tiny" else byte_tokenizer(),
        peft_config=peft.LoraConfig(**LORA, fan_in_fan_out=kind == "gpt2") if lora else None,
        **extra,
    )


def steps(trainer, *names):
    """The numbers of every logged step."""
    log = [row for row in trainer.state.log_history if "loss" in row]
    return [[row[name] for name in names] for row in log]


def watched(trainer):
    """The samples of every update, as lists of parts, as they are drawn."""
    drawn = []
    original = trainer.answers.sample

    def watch(rows, *batch):
        drawn.append(original(rows, *batch))
        return drawn[-1]

    trainer.answers.sample = watch
    return drawn


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


# Against naive forwards.


def naive_row(model, method, row, tokens):
    """Logits of teacher and start, one forward a branch, nothing padded."""
    chats = [[{"role": "user", "content": row["prompt"]}]]
    chats += method.prompts(chats[0])
    rows = []
    for chat in chats:
        ids = encode(model, chat)
        with torch.no_grad():
            z = model.model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
        rows.append(z.double())
    return method.combine(torch.stack(rows[1:], 1).float()).double(), rows[0]


@pytest.mark.parametrize(
    "method",
    [
        LinearAlignment(PRINCIPLE, ratio=1.5, candidates=1),
        LinearAlignment(PRINCIPLE, ratio=2, candidates=0.9, gate=0.1, damping=0.5),
        Contrast(principle=PRINCIPLE, negative="Be rude.", guidance=2),
        AdaCD(first_tokens=None),
    ],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_rows", [1, 8])
def test_policies_equal_naive_forwards(kind, method, batch_rows, request):
    model = request.getfixturevalue(kind)
    teacher = teacher_of(method)
    lessons = [teacher.lesson(model, row) for row in ROWS[:3]]
    answers = [[9, 8, 7, 6], [30], [11, 12]]
    found = policies(teacher, model, lessons, answers, floor=0.1, batch_rows=batch_rows)
    seen = []
    with torch.no_grad():
        for i, z_star, z_s in found:
            seen.append(i)
            star, start = naive_row(model, method, ROWS[i], answers[i])
            torch.testing.assert_close(z_s.double(), start, atol=2e-4, rtol=1e-3)
            mixed = 0.9 * star.softmax(-1) + 0.1 * start.softmax(-1)
            torch.testing.assert_close(z_star.double().softmax(-1), mixed, atol=1e-4, rtol=1e-2)
    assert seen == [0, 1, 2]


def test_the_first_step_is_the_formula_on_naive_forwards(tmp_path):
    """Loss and logged means of a step, for all three losses, from unpadded rows in float64."""
    method = LinearAlignment(PRINCIPLE, ratio=1, candidates=1)
    start = LanguageModel(random_model("gpt2"), byte_tokenizer())
    for loss, temperature in (("imitation", 1.0), ("advantage", 1.0), ("kl", 1.0), ("kl", 1.7)):
        trainer = trainer_of(
            tmp_path, "gpt2", loss=loss, ratio=1.0, candidates=1.0, max_steps=1, guided=0.0,
            temperature=temperature, max_completion_length=9, beta=0.3,
        )  # fmt: skip
        drawn = watched(trainer)
        trainer.train()
        sums = dict.fromkeys(("loss", "kl_to_teacher", "reward", "entropy"), 0.0)
        total = 0
        for lesson, tokens in zip(drawn[0].lessons, drawn[0].answers, strict=True):
            text = start.tokenizer.decode(lesson.prompt)
            row = next(r for r in ROWS if r["prompt"] in text)
            _, z_s = naive_row(start, method, row, tokens)
            z_s, branches = (
                z_s / temperature,
                method.prompts([{"role": "user", "content": row["prompt"]}]),
            )
            z = []
            for chat in branches:
                prompt = encode(start, chat)
                with torch.no_grad():
                    out = start.model(torch.tensor([prompt + tokens])).logits
                z.append(out[0, len(prompt) - 1 : -1].double() / temperature)
            log_q = (2 * z[0] - z[1]).log_softmax(-1)
            log_p = z_s.log_softmax(-1)
            y = torch.arange(len(tokens)), torch.tensor(tokens)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            gap = 0.3 * (log_p[y] - log_q[y])
            value = {"imitation": gap**2, "advantage": gap * log_p[y], "kl": kl}[loss]
            sums["loss"] += float(value.sum())
            sums["kl_to_teacher"] += float(kl.sum())
            sums["reward"] += float(0.3 * (log_q[y] - log_p[y]).sum())
            sums["entropy"] -= float((log_p.exp() * log_p).sum())
            total += len(tokens)
        logged = trainer.state.log_history[0]
        for name, value in sums.items():
            assert logged[name] == pytest.approx(value / total, rel=2e-3, abs=1e-4), (loss, name)
        assert logged["kl_to_reference"] == pytest.approx(0, abs=1e-5)
        assert logged["completion_length"] == pytest.approx(total / 2)


def test_the_student_samples_from_its_whole_distribution(tmp_path):
    """Whatever the model's own generation settings say: no top-k, no temperature, no penalty."""
    model = random_model("llama")
    model.generation_config.update(
        top_k=2, top_p=0.3, temperature=0.4, repetition_penalty=1.8, do_sample=True
    )
    rows = [{"prompt": "What is rain?"}] * 64
    trainer = trainer_of(
        tmp_path, model=model, rows=rows, loss="imitation", guided=0.0, min_effect=0.0,
        max_completion_length=1, per_device_train_batch_size=64, max_steps=30, learning_rate=0.0,
    )  # fmt: skip
    batches = watched(trainer)
    trainer.train()
    drawn = [answer[0] for samples in batches for answer in samples.answers]
    prompt = encode(trainer.student, [{"role": "user", "content": "What is rain?"}])
    with torch.no_grad(), trainer.model.disable_adapter():
        p = trainer.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor(drawn), minlength=len(p)).double()
    n = len(drawn)
    # Pearson's statistic over tokens expected at least five times, the others as one.
    often = p * n >= 5
    expected = torch.cat([p[often], p[~often].sum()[None]]).double() * n
    observed = torch.cat([counts[often], counts[~often].sum()[None]])
    statistic = float(((observed - expected) ** 2 / expected).sum())
    k = len(expected) - 1
    assert k > 5
    assert statistic < k + 5 * math.sqrt(2 * k)


# It trains.


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_it_trains_every_class_of_models(tmp_path, kind, lora):
    trainer = trainer_of(
        tmp_path, kind, lora=lora, ratio=0.5, candidates=1.0, max_steps=24, learning_rate=3e-3,
        rows=ROWS[:2] * 2, per_device_train_batch_size=4, max_completion_length=4,
    )  # fmt: skip
    before = weights(trainer)
    trainer.train()
    kl = [row[0] for row in steps(trainer, "kl_to_teacher")]
    assert sum(kl[-6:]) < 0.8 * sum(kl[:6])
    assert any(not torch.equal(before[n], p) for n, p in weights(trainer).items())
    reference = steps(trainer, "kl_to_reference")
    assert reference[0][0] == pytest.approx(0, abs=1e-4)
    assert reference[-1][0] > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "imitation"},
        {"loss": "advantage"},
        {"loss": "kl"},
        {"loss": "kl", "top_k": 50},
        {"loss": "kl", "teacher_name": "principle"},
    ],
    ids=str,
)
def test_five_steps_on_the_bundled_model(tmp_path, options):
    rows = [{"prompt": f"What is {x}?"} for x in ("the moon", "bread", "the sun", "rain")]
    if "teacher_name" not in options:
        options = {"ratio": 1.0, "candidates": 1.0, **options}
    trainer = trainer_of(
        tmp_path, model="tiny", rows=rows, max_steps=5, per_device_train_batch_size=4,
        learning_rate=5e-3, principle="Answer in French.", max_completion_length=16, **options,
    )  # fmt: skip
    start = trainer.check_effect()
    trainer.train()
    trained = trainer.student
    with torch.no_grad(), trainer.reference.opened() as reference:
        lessons = [trainer.teacher.lesson(reference, row) for row in rows]
        answers = generate(reference, [r["prompt"] for r in rows], sampling=SamplingParams(16, 1.0))
        ids = [c.token_ids for c in answers]
        taught = [
            (i, q.clone(), r.clone())
            for i, q, r in policies(trainer.teacher, reference, lessons, ids)
        ]
    before, after = [], []
    for i, z_star, z_s in taught:
        prompt = encode(trained, [{"role": "user", "content": rows[i]["prompt"]}])
        with torch.no_grad():
            z = trained.model(torch.tensor([prompt + ids[i]])).logits[0, len(prompt) - 1 : -1]
        for found, logits in ((before, z_s), (after, z)):
            log_p, log_q = logits.log_softmax(-1), z_star.log_softmax(-1)
            found.append(float((log_p.exp() * (log_p - log_q)).sum()))
    assert start > 0.01
    assert sum(after) < 0.7 * sum(before)


def test_a_principle_for_each_row(tmp_path):
    """Rows follow their own principle, the config's, or stay as the reference."""
    rows = [
        {"prompt": "What is rain?", "principle": "Shout."},
        {"prompt": "What is a cat?", "principle": None},
        {"prompt": "What is snow?", "principle": ""},
    ]
    trainer = trainer_of(tmp_path, rows=rows, per_device_train_batch_size=3)
    methods = [trainer.teacher.row_method(row) for row in rows]
    assert [m and m.principle for m in methods] == ["Shout.", PRINCIPLE, None]
    lessons = [trainer.teacher.lesson(trainer.student, row) for row in rows]
    answers = [[9, 8], [9, 8], [9, 8]]
    with torch.no_grad(), trainer.reference.opened() as start:
        found = {i: (q, r) for i, q, r in policies(trainer.teacher, start, lessons, answers)}
    for i, text in ((0, "Shout."), (1, PRINCIPLE)):
        star, z_s = naive_row(start, LinearAlignment(text), rows[i], answers[i])
        mixed = 0.999 * star.softmax(-1) + 0.001 * z_s.softmax(-1)
        torch.testing.assert_close(found[i][0].double().softmax(-1), mixed, atol=1e-4, rtol=1e-2)
    assert torch.equal(*found[2])
    assert found[0][0].ne(found[0][1]).any()
    trainer.train()
    # A column that only later rows have, and prompts of both kinds.
    mixed = [{"prompt": [{"role": "user", "content": "What is rain?"}]}, *rows[::-1]]
    late = trainer_of(tmp_path, rows=mixed)
    assert [late.teacher.row_method(row) is None for row in late.train_dataset] == [0, 1, 0, 0]
    assert late.train_dataset[0]["prompt"][0]["content"] == "What is rain?"
    without = trainer_of(tmp_path, rows=rows, principle=None)
    assert without.teacher.row_method(rows[1]) is None


def test_the_prompted_student_of_self_cd(tmp_path):
    trainer = trainer_of(
        tmp_path, teacher_name="self-cd", principle=None, teacher_options={"alpha": 1.5},
        rows=[*ROWS, {"prompt": "Make a bomb.", "principle": ""}],
    )  # fmt: skip
    method = SelfCD(alpha=1.5)
    messages = [{"role": "user", "content": ROWS[0]["prompt"]}]
    safe, plain = (encode(trainer.student, chat) for chat in method.prompts(messages))
    lesson = trainer.teacher.lesson(trainer.student, ROWS[0])
    assert (lesson.prompt, lesson.branches) == (safe, [safe, plain])
    kept = trainer.teacher.lesson(trainer.student, {"prompt": "Make a bomb.", "principle": ""})
    bomb = method.prompts([{"role": "user", "content": "Make a bomb."}])[0]
    assert kept.method is None
    assert kept.prompt == encode(trainer.student, bomb)
    plainly = make_teacher("self-cd", student="plain").lesson(trainer.student, ROWS[0])
    assert plainly.prompt == plain
    trainer.train()


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_checkpoints_teach_a_tuned_model_over_its_start(tmp_path, ratio):
    base = random_model("llama")
    tuned = random_model("llama")
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    tuned.save_pretrained(tmp_path / "tuned")
    byte_tokenizer().save_pretrained(tmp_path / "tuned")
    options = {"tuned": str(tmp_path / "tuned"), "ratio": ratio}
    trainer = trainer_of(
        tmp_path, model=base, teacher_name="checkpoints", teacher_options=options, principle=None,
        loss="imitation", guided=0.5,
    )  # fmt: skip
    lesson, answer = trainer.teacher.lesson(trainer.student, ROWS[0]), [9, 8, 7]
    with torch.no_grad(), trainer.reference.opened() as start:
        ((_, z_star, z_s),) = policies(trainer.teacher, start, [lesson], [answer])
    ids = torch.tensor([lesson.prompt + answer])
    with torch.no_grad():
        z_t, z_0 = (
            m(ids).logits[0, len(lesson.prompt) - 1 : -1] for m in (tuned, random_model("llama"))
        )
    torch.testing.assert_close(z_s, z_0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(z_star, z_t + ratio * (z_t - z_0), atol=1e-4, rtol=1e-4)
    trainer.train()
    assert not any("tuned" in name for name in weights(trainer))


def test_an_adapter_as_the_tuned_model(tmp_path):
    trainer = trainer_of(tmp_path, model="tiny", principle="Answer in French.")
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    teacher = make_teacher("checkpoints", {"tuned": str(tmp_path / "adapter")})
    assert teacher.tuned.has_adapter


# Guided answers.


def test_the_teacher_draws_its_share_of_the_answers(tmp_path):
    """Half of the rows; each guided answer is the decoder's, with the seed of its place."""
    rows = [*ROWS, {"prompt": "What is this?", "principle": ""}]
    trainer = trainer_of(
        tmp_path, rows=rows, loss="imitation", guided=0.3, max_steps=10, min_effect=0.0,
        per_device_train_batch_size=3, gradient_accumulation_steps=2, learning_rate=5e-3,
    )  # fmt: skip
    batches = watched(trainer)
    trainer.train()
    seen = [samples.measured.count(False) for samples in batches]
    calls = [
        (samples.lessons[i], samples.answers[i])
        for samples in batches
        for i, own in enumerate(samples.measured)
        if not own
    ]
    # 0.3 of six rows: 18 in ten batches, one or two in each.
    assert sum(seen) == 18
    assert set(seen) == {1, 2}
    shares = [row[0] for row in steps(trainer, "guided_share")]
    for samples, share in zip(batches, shares, strict=True):
        pairs = zip(samples.answers, samples.measured, strict=True)
        drawn = sum(len(answer) for answer, own in pairs if not own)
        assert share == pytest.approx(drawn / samples.tokens)
    start = LanguageModel(random_model("llama"), byte_tokenizer())
    by_prompt = {tuple(trainer.teacher.lesson(start, row).prompt): row for row in ROWS}
    pools = [seen[:8], seen[8:]]  # of 14 answers, and of the four that are still needed
    first = 0
    for pool, counts in enumerate(pools):
        for place in range(sum(counts)):
            lesson, ids = calls[first + place]
            seed = seed_of("teacher", 8 * pool, place, trainer.args.seed, 1, 0)
            request = Request(by_prompt[tuple(lesson.prompt)]["prompt"], seed=seed)
            made = generate(start, [request], lesson.method, SamplingParams(6, 1.0))
            assert ids == made[0].token_ids
        first += sum(counts)
    assert config(tmp_path, loss="imitation").guided_share == 0.25
    assert config(tmp_path, loss="kl").guided_share == 0


def test_what_the_student_never_says_is_learned_from_the_teacher(tmp_path):
    """A word that only the teacher draws: own samples leave it where it was, guided ones do not."""
    rows = [{"prompt": "What is rain?"}] * 4
    found = {}
    for guided in (0.0, 0.5):
        model = load_model("tiny", packed_weights=False)
        trainer = InverseQTrainer(
            model.model,
            config(
                tmp_path, loss="imitation", principle="Talk like a pirate.", max_steps=12,
                guided=guided, per_device_train_batch_size=4, learning_rate=5e-3,
                max_completion_length=8,
            ),
            train_dataset=rows,
            processing_class=model.tokenizer,
            peft_config=peft.LoraConfig(**LORA),
        )  # fmt: skip
        lesson = trainer.teacher.lesson(trainer.student, rows[0])
        with trainer.reference.opened() as start:
            word = generate(start, "What is rain?", lesson.method, SamplingParams(1))[0].token_ids
        trainer.train()
        with torch.no_grad():
            z = trainer.model(torch.tensor([lesson.prompt])).logits[0, -1]
        found[guided] = float(z.log_softmax(-1)[word[0]])
    assert found[0.5] > found[0.0] + 1


# Same result by other ways.


@pytest.mark.parametrize("loss", ["imitation", "advantage", "kl"])
def test_accumulation_does_not_change_the_curve(tmp_path, loss):
    curves = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        trainer = trainer_of(
            tmp_path, loss=loss, per_device_train_batch_size=size, max_steps=4,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        names = ("loss", "grad_norm", "kl_to_teacher", "kl_to_reference", "reward", "entropy")
        curves.append(steps(trainer, *names))
    assert len(curves[0]) == 4
    for other in curves[1:]:
        torch.testing.assert_close(
            torch.tensor(other), torch.tensor(curves[0]), atol=2e-4, rtol=2e-3
        )


@pytest.mark.parametrize(
    ("reuse", "lora", "loss"), [(1, True, "imitation"), (2, True, "advantage"), (1, False, "kl")]
)
def test_a_resumed_run_ends_like_an_unbroken_one(tmp_path, reuse, lora, loss):
    """Six rows, two a step: the break is in the second pass over the rows."""

    def run(folder, steps_to_do, resume=None):
        trainer = trainer_of(
            tmp_path / folder, loss=loss, max_steps=steps_to_do, save_strategy="steps",
            save_steps=4, reuse=reuse, lora=lora, lr_scheduler_type="constant",
            evaluate=lambda model: {"draw": float(torch.rand(()))},
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole", 8)
    run("broken", 4)
    again = run("broken", 8, resume=str(tmp_path / "broken" / "out" / "checkpoint-4"))
    assert again.state.global_step == 8
    for (name, a), b in zip(weights(whole).items(), weights(again).values(), strict=True):
        assert torch.equal(a, b), name
    names = ("loss", "kl_to_teacher", "kl_to_reference", "reward", "completion_length")
    assert steps(whole, *names) == steps(again, *names)


def test_the_order_of_the_rows_is_that_of_seed_and_epoch(tmp_path):
    trainer = trainer_of(tmp_path, reuse=2, gradient_accumulation_steps=2,
                         per_device_train_batch_size=1)  # fmt: skip
    orders = {}
    for step in (0, 5, 6, 12):
        trainer.state.global_step = step
        prompts = [row["prompt"] for part in trainer.get_train_dataloader() for row in part]
        orders[step] = [ROWS.index({"prompt": prompt}) for prompt in prompts]
        # Each update's two rows twice, for its two uses.
        assert len(orders[step]) == 6 * 2
        for i in (0, 4, 8):
            assert orders[step][i : i + 2] == orders[step][i + 2 : i + 4]
        assert sorted(orders[step][i] for i in (0, 1, 4, 5, 8, 9)) == list(range(6))
    assert orders[0] == orders[5]  # six updates are an epoch
    assert len({tuple(orders[step]) for step in (0, 6, 12)}) == 3


def test_evaluation_does_not_change_the_training(tmp_path):
    calls = []

    def judge(model):
        assert isinstance(model, LanguageModel)
        assert not model.model.training
        calls.append(generate(model, "What is rain?", sampling=SamplingParams(3))[0].text)
        torch.rand(5)
        return {"adherence": 0.25 * len(calls), "eval_named": 1.0}

    plain = trainer_of(tmp_path, max_steps=4)
    plain.train()
    judged = trainer_of(tmp_path, max_steps=4, eval_steps=2, evaluate=judge)
    judged.train()
    assert len(calls) == 3  # before, after two steps, at the end
    log = [row["eval_adherence"] for row in judged.state.log_history if "eval_adherence" in row]
    assert log == [0.25, 0.5, 0.75]
    assert steps(plain, "loss") == steps(judged, "loss")
    assert len(steps(judged, "loss")) == 4
    assert judged.model.training == plain.model.training


def test_losses_on_held_out_prompts(tmp_path):
    trainer = trainer_of(
        tmp_path, eval_strategy="steps", eval_steps=2, eval_dataset=ROWS[:3],
        per_device_eval_batch_size=2,
    )  # fmt: skip
    trainer.train()
    (row,) = (row for row in trainer.state.log_history if "eval_loss" in row)
    assert row["eval_kl_to_teacher"] == pytest.approx(row["eval_loss"], rel=0.2)
    assert row["eval_completion_length"] > 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradient_checkpointing_gives_the_same_curve(tmp_path, kind):
    curves = []
    for on in (False, True):
        trainer = trainer_of(
            tmp_path, kind, gradient_checkpointing=on, max_steps=3,
            evaluate=lambda model: {"x": len(generate(model, "Hi", sampling=SamplingParams(2)))},
        )  # fmt: skip
        args = trainer.args  # newer releases renamed it
        asked = getattr(args, "activation_checkpointing", args.gradient_checkpointing)
        assert bool(asked) is on
        trainer.train()
        curves.append(steps(trainer, "loss", "kl_to_teacher"))
    torch.testing.assert_close(*map(torch.tensor, curves), atol=1e-5, rtol=1e-4)


def test_reuse_makes_several_updates_of_each_batch(tmp_path):
    for loss in ("imitation", "advantage", "kl"):
        trainer = trainer_of(
            tmp_path, loss=loss, reuse=3, max_steps=6, gradient_accumulation_steps=2,
            per_device_train_batch_size=1,
        )  # fmt: skip
        batches = watched(trainer)
        trainer.train()
        assert [len(samples.answers) for samples in batches] == [2, 2]
        lengths = [row[0] for row in steps(trainer, "completion_length")]
        assert len(set(lengths[:3])) == len(set(lengths[3:])) == 1


def test_old_logprobs_are_those_of_the_first_use(tmp_path, monkeypatch):
    from trueline.train.distil import loss

    trainer = trainer_of(tmp_path, loss="imitation", reuse=3, max_steps=3, learning_rate=5e-3)
    kept = []
    original = loss._sampled_loss

    def watch(policy, teacher, reference, old, args, count):
        kept.append(([p.detach().clone() for p in policy], old))
        return original(policy, teacher, reference, old, args, count)

    monkeypatch.setattr(loss, "_sampled_loss", watch)
    trainer.train()
    assert not kept[0][1]
    for now, olds in kept[1:]:
        for first, old, current in zip(kept[0][0], olds, now, strict=True):
            assert torch.equal(first, old)
            assert not torch.equal(first, current)


def test_bfloat16(tmp_path):
    trainer = trainer_of(tmp_path, bf16=True, max_steps=2, loss="imitation")
    trainer.train()
    assert all(math.isfinite(x) for row in steps(trainer, "loss", "kl_to_teacher") for x in row)


def test_the_kl_budget_stops_the_run(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=50, kl_budget=1e-3, learning_rate=5e-3)
    trainer.train()
    assert trainer.over_budget > 1e-3
    assert trainer.state.global_step < 50
    assert trainer.over_budget == pytest.approx(steps(trainer, "kl_to_reference")[-1][0])
    assert all(row[0] <= 1e-3 for row in steps(trainer, "kl_to_reference")[:-1])


def test_what_is_saved_loads_without_trueline(tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = trainer_of(tmp_path, max_steps=2, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    ids = torch.tensor([[9, 8, 7, 30]])
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        loaded = peft.PeftModel.from_pretrained(random_model("llama"), tmp_path / "adapter")
        torch.testing.assert_close(loaded.eval()(ids).logits, expected, atol=1e-5, rtol=1e-5)
        merged = trainer.model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(plain(ids).logits, expected, atol=1e-3, rtol=1e-3)
    full = trainer_of(tmp_path, lora=False, max_steps=1)
    full.train()
    full.save_model(str(tmp_path / "full"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, full.model.eval()(ids).logits)


# The reference.


def test_the_reference_stays_where_it_was(tmp_path):
    ids = torch.tensor([[9, 8, 7, 30]])
    with torch.no_grad():
        start = random_model("llama")(ids).logits
    for lora in (True, False):
        trainer = trainer_of(tmp_path, lora=lora, max_steps=2, learning_rate=1e-2)
        assert (trainer.reference.copy is None) is lora
        trainer.train()
        with torch.no_grad(), trainer.reference.opened() as reference:
            assert torch.equal(reference.model(ids).logits, start)
        with torch.no_grad():
            assert not torch.equal(trainer.model(ids).logits, start)


def test_dropout_is_off_in_the_reference_and_in_what_is_sampled(tmp_path):
    """Even where it is on in the loss: the answers are the policy's, the rewards the start's."""
    trainer = trainer_of(
        tmp_path, disable_dropout=False, lora=False, model=with_dropout(), learning_rate=0.0,
        loss="imitation", guided=0.5, max_steps=1, fast_sampling=False,
    )  # fmt: skip
    trainer.model.train()
    ids = torch.tensor([[9, 8, 7, 30]])
    with torch.no_grad():
        assert not torch.equal(trainer.model(ids).logits, trainer.model(ids).logits)
        with trainer.reference.opened() as start:
            assert torch.equal(start.model(ids).logits, start.model(ids).logits)
    adapted = peft.get_peft_model(with_dropout(), peft.LoraConfig(**LORA, fan_in_fan_out=True))
    under = trainer_of(
        tmp_path, disable_dropout=False, lora=False, model=adapted, learning_rate=0.0,
        loss="imitation", guided=0.0, max_steps=1,
    )  # fmt: skip
    under.model.train()
    with torch.no_grad(), under.reference.opened() as start:
        assert torch.equal(start.model(ids).logits, start.model(ids).logits)
    assert under.model.training
    drawn = watched(under)
    under.train()
    for lesson, answer in zip(drawn[0].lessons, drawn[0].answers, strict=True):
        i = drawn[0].lessons.index(lesson)
        seed = seed_of("student", 0, i, under.args.seed, 1, 0)
        under.model.eval()
        plain = own_answers(under.student, [lesson], SamplingParams(6, 1.0), [seed])
        assert plain == [answer]


def with_dropout():
    """A model whose every forward in training differs."""
    model = random_model("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    return model


def test_a_frozen_part_of_an_adapter_stays_frozen(tmp_path):
    """PEFT would give all of an adapter a gradient once it was off and on again."""
    trainer = trainer_of(tmp_path, max_steps=2, learning_rate=1e-2)
    for name, p in trainer.model.named_parameters():
        p.requires_grad_("lora_B" in name)
    before = weights(trainer)
    a = {n: p.clone() for n, p in trainer.model.named_parameters() if "lora_A" in n}
    trainer.train()
    assert weights(trainer).keys() == before.keys()
    for name, p in trainer.model.named_parameters():
        if name in a:
            assert p.grad is None
            assert torch.equal(p, a[name])
        elif name in before:
            assert not torch.equal(p, before[name])


def test_fast_sampling_draws_the_same_and_leaves_no_trace(tmp_path):
    curves = []
    for fast in (True, False):
        trainer = trainer_of(tmp_path, fast_sampling=fast, max_steps=4, learning_rate=5e-3)
        trainer.train()
        curves.append(steps(trainer, "loss", "completion_length"))
    torch.testing.assert_close(*map(torch.tensor, curves), atol=1e-4, rtol=1e-3)
    model = trainer.model.eval()
    ids = torch.tensor([[9, 8, 7, 30]])
    with torch.no_grad():
        before = model(ids).logits
        with merged_products(model) as changed:
            assert changed > 0
            torch.testing.assert_close(model(ids).logits, before, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(ids).logits, before)
        with model.disable_adapter():
            plain = model(ids).logits
            with merged_products(model):
                torch.testing.assert_close(model(ids).logits, plain, atol=1e-4, rtol=1e-4)
    assert not any("forward" in vars(m) for m in model.modules() if "lora" in type(m).__module__)


# What is refused.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "imitaton"}, 'Unknown loss "imitaton". Did you mean "imitation"'),
        ({"beta": 0}, "`beta` must be"),
        ({"beta": 2.0}, "`beta` must be"),
        ({"reuse": 0}, "`reuse` must be"),
        ({"clip": 1.0}, "`clip` must be"),
        ({"floor": 1.0}, "`floor` must be"),
        ({"guided": 1.0}, "`guided` must be"),
        ({"kl_budget": 0.0}, "`kl_budget` must be"),
        ({"top_k": 5, "loss": "imitation"}, "`top_k` belongs to loss"),
        ({"temperature": 0.0}, "`temperature` must be"),
        ({"learning_rate": math.nan}, "`learning_rate` must be"),
        ({"learning_rate": -1e-4}, "`learning_rate` must be"),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` must be"),
        ({"max_completion_length": 0}, "`max_completion_length` must be"),
        ({"max_steps": 10**21}, "`max_steps` must be"),
        ({"push_to_hub": True}, "hf upload"),
        ({"deepspeed": "zero.json"}, "torchrun"),
        ({"fsdp": "full_shard"}, "torchrun"),
        ({"remove_unused_columns": True}, "drop the principles"),
        ({"reuse": 2, "save_strategy": "steps", "save_steps": 3}, "multiple of `reuse`"),
        ({"teacher_name": "linear-aligment"}, 'Did you mean "linear-alignment"'),
        ({"teacher_name": "principle", "ratio": 1.0}, "prompt alone"),
        ({"teacher_name": "self-cd", "ratio": 1.0, "principle": None}, "has no option `ratio`"),
        ({"teacher_name": "self-cd"}, "takes no `principle`"),
        ({"teacher_name": "contrast", "teacher_options": {"base": True}}, "checkpoints"),
        ({"teacher_name": "checkpoints", "principle": None}, "needs `tuned`"),
        ({"candidates": 0.0}, "`candidates` must be"),
        ({"student": "both"}, "`student` must be"),
        ({"principle": None}, "needs a principle"),
        ({"principle": " "}, "`principle` is empty"),
        ({"per_device_train_batch_size": 7}, "A step takes 7 prompts"),
        ({"rows": None}, "`train_dataset` is missing"),
        ({"rows": [{**row, "principle": ""} for row in ROWS], "principle": None}, "No row of"),
    ],
    ids=str,
)
def test_settings_are_refused_before_any_work(tmp_path, options, said):
    with pytest.raises(ConfigError) as error:
        trainer_of(tmp_path, **options)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": " "}, "The user message is empty"),
        ({"prompt": [{"role": "bot", "content": "x"}]}, "`role` must be"),
        ({"prompt": "x" * 600}, "512 positions"),
        ({"prompt": "x", "principle": 3}, "`principle` must be text"),
    ],
)
def test_rows_are_refused_by_their_place(tmp_path, row, said):
    rows = [{**row, "prompt": "What?"} if i != 3 else row for i in range(5)]
    if not isinstance(row.get("prompt"), str):
        rows = [{"prompt": [{"role": "user", "content": "What?"}]}] * 3 + [row] * 2
    with pytest.raises(DataError, match=r"^train_dataset\[[03]\]: ") as error:
        trainer_of(tmp_path, rows=rows)
    assert said in str(error.value)
    with pytest.raises(DataError, match='no "prompt"'):
        trainer_of(tmp_path, rows=[{"text": "x"}] * 4)


def test_a_principle_for_a_teacher_without_one_is_refused(tmp_path):
    with pytest.raises(DataError, match="takes none"):
        trainer_of(
            tmp_path, teacher_name="self-cd", principle=None,
            rows=[{"prompt": "x", "principle": "Shout."}] * 2,
        )  # fmt: skip


def test_an_empty_teacher_is_refused_with_its_number(tmp_path):
    trainer = trainer_of(tmp_path, ratio=-1.0, candidates=1.0)  # ratio -1 is the plain model
    with pytest.raises(ConfigError, match=r"The teacher is empty: on 6 rows .* nats a token"):
        trainer.train()
    assert trainer.effect == pytest.approx(0, abs=1e-6)
    off = trainer_of(tmp_path, ratio=-1.0, candidates=1.0, min_effect=0.0, max_steps=1)
    off.train()


def test_a_mask_without_a_floor_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, candidates=0.8, floor=0.0)
    with pytest.raises(ConfigError, match="`floor` is 0"):
        trainer.train()
    assert rules_out(LinearAlignment("x", candidates=0.8), 2)
    assert rules_out(AdaCD(), 2)
    assert not rules_out(LinearAlignment("x", candidates=1), 2)


def test_the_effect_is_the_mean_divergence_on_sampled_answers(llama):
    method = LinearAlignment(PRINCIPLE, ratio=1, candidates=1)
    found = teacher_effect(teacher_of(method), llama, ROWS, max_new_tokens=5, seed=3)
    total, count = 0.0, 0
    for i, row in enumerate(ROWS):
        request = Request(row["prompt"], seed=3 + i)
        ids = generate(llama, [request], sampling=SamplingParams(5, 1.0))[0].token_ids
        star, start = naive_row(llama, method, row, ids)
        log_q, log_r = star.log_softmax(-1), start.log_softmax(-1)
        total += float((log_q.exp() * (log_q - log_r)).sum())
        count += len(ids)
    assert found == pytest.approx(total / count, rel=1e-3)


def test_a_frozen_adapter_is_refused(tmp_path):
    model = peft.get_peft_model(random_model("llama"), peft.LoraConfig(**LORA))
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="No weight is trainable"):
        trainer_of(tmp_path, model=model, lora=False)


def test_every_setting_has_help():
    from trueline.settings.reader import explain

    own = {name: text for name, _, text in explain([InverseQConfig])}
    assert {"loss", "teacher", "ratio", "floor", "guided", "reuse", "kl_budget"} <= own.keys()
    for name in InverseQConfig.__annotations__:
        assert own[name].endswith("."), name
    assert set(TEACHERS) >= {"principle", "linear-alignment", "checkpoints", "self-cd", "ada-cd"}


@pytest.mark.parametrize(
    ("guided", "rows", "pool"),
    [(0.25, 4, 16), (0.3, 6, 14), (0.5, 3, 12), (0.1, 4, 16), (0.7, 5, 14), (0.25, 32, 32)],
)
def test_a_plan_takes_its_share_and_every_answer_of_a_pool_once(guided, rows, pool):
    plan, total = Plan.of(guided, rows), 0
    assert plan.size(0) == pool
    for first in range(0, 40 * plan.every, plan.every):
        taken = []
        for batch in range(first, first + plan.every):
            assert plan.first(batch) == first
            taken += range(plan.size(first))[plan.taken(batch)]
        assert taken == list(range(plan.size(first)))
        total += len(taken)
    assert abs(total - guided * rows * 40 * plan.every) <= 1
    assert Plan.of(guided, rows, stream=True).every == 1


@pytest.mark.parametrize("options", [{"loss": "imitation", "reuse": 2}, {"loss": "kl"}])
def test_rows_that_do_not_fit_at_once_are_learned_one_after_the_other(
    tmp_path, monkeypatch, options
):
    """The same weights but for rounding, the same numbers logged, a forward a row."""
    found = {}
    for name, room in (("whole", 1 << 40), ("cut", 1)):
        monkeypatch.setattr(trainer_module, "ACTIVATIONS", room)
        trainer = trainer_of(
            tmp_path / name, max_steps=4, per_device_train_batch_size=3, min_effect=0.0,
            gradient_accumulation_steps=2, learning_rate=1e-3, guided=0.0, **options,
        )  # fmt: skip
        sizes, original = [], trainer.compute_loss
        monkeypatch.setattr(
            trainer,
            "compute_loss",
            lambda model, inputs, *a, s=sizes, o=original, **k: (
                s.append(len(inputs["samples"].lessons)) or o(model, inputs, *a, **k)
            ),
        )
        trainer.train()
        found[name] = sizes, weights(trainer), steps(trainer, "loss", "kl_to_reference", "reward")
    assert found["whole"][0] == [3] * 8
    assert found["cut"][0] == [1] * 24
    for name, p in found["whole"][1].items():
        torch.testing.assert_close(found["cut"][1][name], p, rtol=1e-3, atol=1e-6)
    for one, other in zip(found["whole"][2], found["cut"][2], strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    """With gloo, as torchrun has it: all end with the same weights, the curve has every step."""
    together(
        textwrap.dedent(
            f"""
            import json
            import torch
            from pathlib import Path
            from test_inverse_q_trainer import trainer_of, weights, steps
            trainer = trainer_of(Path({str(tmp_path)!r}), loss="imitation", max_steps=3,
                                 evaluate=lambda model: {{"x": 1.0}})
            trainer.train()
            rank = trainer.accelerator.process_index
            total = {{n: float(p.double().sum()) for n, p in weights(trainer).items()}}
            found = [total, steps(trainer, "loss"), trainer.accelerator.num_processes]
            Path({str(tmp_path)!r}, f"rank{{rank}}.json").write_text(json.dumps(found))
            """
        ),
        2,
    )
    one, two = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2))
    assert one[2] == two[2] == 2
    assert one[0] == two[0]
    assert len(one[1]) == 3


def test_a_share_below_one_row_is_made_up_and_never_ahead():
    """A quarter of six rows: three answers in two batches, the second of them the fuller."""
    plan = Plan.of(0.25, 6)
    drawn = [len(range(plan.size(0))[plan.taken(batch)]) for batch in range(plan.every)]
    assert drawn == [1, 2] * 5
    assert plan.size(0) == sum(drawn)


def test_nothing_is_drawn_for_batches_that_never_come():
    """Two answers a batch, pools of eight batches: the eleventh batch is the last."""
    asked = []

    def draw(rows, seeds):
        asked.append((rows, seeds))
        return list(zip(rows, seeds, strict=True))

    guide, source = Guide(Plan(2, 8), draw), list(range(100))
    found = [guide.answers(batch, 11, source, 7) for batch in range(11)]
    assert [len(rows) for rows, _ in asked] == [16, 6]
    assert all(len(answers) == 2 for answers in found)
    more = Guide(Plan(2, 8), draw)
    assert [more.answers(batch, 16, source, 7) for batch in range(11)] == found
