"""Training runs on disk, the start they share, and the gradient of SDFT next to ours.

A run leaves one JSON file; a run whose file is there is not made again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import disable_progress_bars as quiet_datasets

from benchmarks._training import Run, Setting
from benchmarks._ways import WAYS, prompted, sft
from recipes.distil.measure import answers, logprobs
from recipes.distil.questions import Principle
from trueline import LanguageModel, Message
from trueline.models.prompts import encode

WARM_RESPONSES, WARM_SEED = 224, 777


@dataclass(frozen=True)
class Job:
    """A run to be made: its group names the comparison it belongs to."""

    group: str
    way: str
    setting: Setting
    lr: float
    seed: int
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """A file name of its own."""
        parts = [self.group, self.way, f"{self.lr:g}", *(f"{k}={v}" for k, v in self.options)]
        parts += [self.setting.principle.name, f"{self.setting.responses}", f"seed{self.seed}"]
        return "_".join(parts).replace(", ", "-").replace(" ", "-")

    def done(self, folder: Path) -> dict[str, Any]:
        """Return the run's record, made now if it is not in `folder`."""
        path = folder / f"{self.name}.json"
        settings = json.loads(json.dumps(asdict(self.setting) | {"start": str(self.setting.start)}))
        if path.exists():
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if record["setting"] == settings:
                return record
        quiet_datasets()
        run = Run(self.setting, self.seed, self.lr)
        WAYS[self.way](run, **dict(self.options))
        record = {"group": self.group, "way": self.way, "lr": self.lr, "seed": self.seed}
        record |= {"options": dict(self.options), "setting": settings, "curve": run.curve}
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
        partial.replace(path)
        return record


def warm_start(folder: Path, principle: Principle, responses: int = WARM_RESPONSES) -> Path:
    """Return a start that follows the principle now and then, made if it is not there.

    Reinforcement learns from what is sampled, and the bundled model all but never follows a
    principle unasked. A little SFT on principled responses, then merged, as one does before RL.
    """
    path = folder / f"start-{principle.name}-{responses}"
    if (path / "model.safetensors").exists():
        return path
    quiet_datasets()
    batch = min(32, responses)
    setting = Setting(principle, responses=responses, batch=batch, points=(), questions=2)
    run = Run(setting, WARM_SEED, 1e-3)
    held: list[Any] = []
    finish = run.train

    def train(trainer: Any) -> None:
        finish(trainer)
        held.append(trainer.model)

    run.train = train  # type: ignore[method-assign]
    sft(run, prompted)
    held[0].merge_and_unload().save_pretrained(path)
    run.lm.tokenizer.save_pretrained(path)
    return path


def same_gradient(setting: Setting, seed: int, rows: int = 8) -> dict[str, float]:
    """Compare the gradients of SDFT's sampled loss and of the two sampled losses at ratio 0.

    One response at a time, so that means over responses and over tokens are the same. Returns the
    largest relative difference after division by the constants, 2 beta^2 and beta.
    """
    from peft import get_peft_model
    from trl.experimental.sdft.loss_utils import compute_sampled_token_self_distillation_loss

    from trueline.methods.inverse_q import advantage_loss, imitation_loss

    run, beta = Run(setting, seed, 1e-3), 0.1
    model = get_peft_model(run.lm.model, run.adapter())
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:  # away from the start, where the adapter is off
        torch.nn.init.normal_(p, std=0.02)
    prompts = run.prompts(rows)
    responses = answers(LanguageModel(cast(Any, model), run.lm.tokenizer), prompts, 1.0, seed)
    system: Message = {"role": "system", "content": setting.principle.text}
    teacher = logprobs(run.reference, [[system, *p] for p in prompts], responses)
    reference = logprobs(run.reference, prompts, responses)
    worst = {"imitation": 0.0, "advantage": 0.0}
    for i, response in enumerate(responses):
        ids = torch.tensor([response])
        prompt = encode(run.reference, prompts[i])
        out = model(input_ids=torch.tensor([prompt + response])).logits[:, len(prompt) - 1 : -1]
        policy = out.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        wanted, was = (x[i].gather(-1, ids.T)[:, 0].clone()[None] for x in (teacher, reference))
        rows_of = (policy, wanted, was, torch.ones_like(ids))
        theirs = compute_sampled_token_self_distillation_loss(
            out, teacher[i][None].clone(), ids, distillation_alpha=1.0
        ).mean()
        ours = {
            "imitation": imitation_loss(*rows_of, beta=beta)[0] / (2 * beta**2),
            "advantage": advantage_loss(*rows_of, beta=beta)[0] / beta,
        }
        expected = _gradient(theirs, trained)
        for name, loss in ours.items():
            gap = (_gradient(loss, trained) - expected).norm() / expected.norm()
            worst[name] = max(worst[name], float(gap))
    return worst


def _gradient(loss: Any, parameters: Sequence[Any]) -> Any:
    grads = torch.autograd.grad(loss, parameters, retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def effects(rows: int = 32) -> list[dict[str, Any]]:
    """Return the effect of teachers on the bundled model, in nats a token, before any training.

    The last principles are ones that it was brought up to ignore.
    """
    from recipes.distil.questions import grammar, principle, training
    from trueline import load_model
    from trueline.train.distil.policies import teacher_effect
    from trueline.train.distil.teachers import make_teacher

    lm = load_model("tiny", packed_weights=False, dtype="float32", device="cpu")
    prompts = [{"prompt": turn.user} for turn in training("fact", rows, 0)]
    texts = [(style["name"], principle(style["name"]).text) for style in grammar().styles]
    texts += [("ignored", text) for text in ("Answer in English.", "Today is Monday.")]
    found = []
    for name, text in texts:
        row: dict[str, Any] = {"name": name, "principle": text}
        for teacher in ("principle", "linear-alignment"):
            made = make_teacher(teacher, principle=text)
            row[teacher] = teacher_effect(made, lm, prompts)
        found.append(row)
    return found
