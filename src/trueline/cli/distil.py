"""`trueline train inverse-q`: a decoding method's policy into an adapter or the weights."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trueline.cli.cards import finish, note
from trueline.cli.train import add_setting, read_layers, show
from trueline.errors import ConfigError, DataError, ModelError, check_number
from trueline.records.prompt_rows import BadRowsError
from trueline.records.run_folder import CHECKPOINTS
from trueline.train.base import (
    FIXED,
    Recipe,
    base_settings,
    defaults,
    device_settings,
    load,
    lora_config,
    read_rows,
)

if TYPE_CHECKING:
    from trueline.models.load import LanguageModel
    from trueline.records.run_folder import RunFolder
    from trueline.train.distil.trainer import InverseQConfig, InverseQTrainer

SHOWN = {
    "loss": "loss",
    "kl_to_teacher": "kl_teacher",
    "kl_to_reference": "kl_start",
    "reward": "reward",
    "completion_length": "length",
    "tokens_per_second": "tokens/s",
}
"""What the progress bar shows, and how it is called there."""
NEUTRAL = ("prompts", "evaluate", "report_to", "run_name", "save_steps", "save_total_limit")
"""Settings in which two calls for the same result may differ; files are told by their hash."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that most runs need; each is a setting."""
    group = parser.add_argument_group("what is trained")
    add_setting(group, "--model", "model", help='folder, hub name, or "tiny", bundled (default)')
    add_setting(group, "--prompts", "prompts", metavar="FILE", help='JSONL; a row has "prompt" '
                'or "messages", and may have "system" and a "principle" of its own, "" for a row '
                "on which the model is to stay as it is")  # fmt: skip
    add_setting(group, "--limit", "limit", type=int, metavar="N", help="at most N rows")
    add_setting(group, "--rank", "lora.rank", type=int, metavar="N", help="rank of the LoRA (16)")
    add_setting(group, "--target-modules", "lora.target_modules", nargs="+", metavar="NAME",
                help="modules that get a LoRA (all linear ones)")  # fmt: skip
    add_setting(group, "--full", "full", action="store_true", help="train all weights, no LoRA")
    add_setting(group, "--merge", "merge", action="store_true", help="write the merged model")
    add_setting(group, "--dtype", "dtype", help="auto (default), float32, bfloat16, float16")
    add_setting(group, "--device", "device", help="auto (default), cpu, cuda, mps")
    add_setting(group, "--quantize", "quantize", choices=("4bit", "8bit"),
                help="needs bitsandbytes")  # fmt: skip
    add_setting(group, "--raw", "raw", action="store_true", help="no chat template: base models")

    group = parser.add_argument_group("the policy to learn")
    add_setting(group, "--principle", "principle", metavar="TEXT", help="what to follow, for rows "
                "that name none")  # fmt: skip
    add_setting(group, "--teacher", "teacher", metavar="NAME", help="linear-alignment (default), "
                "principle (its prompt alone), checkpoints, or a decoding method")  # fmt: skip
    add_setting(group, "--ratio", "ratio", type=float, metavar="X", help="the teacher's ratio")
    add_setting(group, "--top-p", "top_p", type=float, metavar="X", help="its candidates mask")
    add_setting(group, "--alpha", "teacher_options.alpha", type=float, metavar="X",
                help="alpha of --teacher self-cd")  # fmt: skip
    add_setting(group, "--tuned", "teacher_options.tuned", metavar="DIR",
                help="the tuned model of --teacher checkpoints")  # fmt: skip
    add_setting(group, "--loss", "loss", metavar="NAME", help="imitation (the paper's), advantage "
                "or kl (the whole vocabulary)")  # fmt: skip

    group = parser.add_argument_group("training")
    for flag, setting, kind, text in (
        ("--steps", "max_steps", int, "updates; without it --epochs counts"),
        ("--epochs", "num_train_epochs", float, "passes over the prompts (3)"),
        ("--batch-size", "per_device_train_batch_size", int, "prompts an update (16)"),
        ("--learning-rate", "learning_rate", float, "default by the model's size, see the docs"),
        ("--max-new-tokens", "max_completion_length", int, "tokens of a sampled response"),
        ("--guided", "guided", float, "share of responses that the teacher draws (0.25)"),
        ("--reuse", "reuse", int, "updates made with each batch of samples (1)"),
        ("--kl-budget", "kl_budget", float, "stop beyond this KL to the start, nats a token"),
        ("--save-steps", "save_steps", int, "updates between checkpoints (50)"),
    ):
        letter = "X" if kind is float else "N"
        add_setting(group, flag, setting, type=kind, metavar=letter, help=text)

    group = parser.add_argument_group("evaluation while training")
    add_setting(group, "--evaluate", "evaluate", metavar="FILE", help="held-out prompts; rows with "
                'a "pattern" say what a response that follows matches')  # fmt: skip
    add_setting(group, "--eval-steps", "eval_steps", type=float, metavar="N",
                help="updates between evaluations (only before and after)")  # fmt: skip
    add_setting(group, "--judge", "judge", metavar="NAME", help="instead of patterns: keywords "
                "(refusals; rows with \"safe\": false should be), local, model")  # fmt: skip
    add_setting(group, "--judge-model", "judge_model", metavar="NAME", help="a model as the judge")
    add_setting(group, "--judge-url", "judge_url", metavar="URL", help="endpoint of --judge model")


def run(args: argparse.Namespace) -> int | None:
    """Check settings and data, train, and write what the run leaves."""
    if args.list_settings:
        list_settings()
        return None
    if args.output is None:
        raise ConfigError("`--output DIR` is missing: the folder for the trained weights.")
    layers = read_layers(args)
    found: dict[str, Any] = {name: value for values, _ in layers for name, value in values.items()}
    rows, bad, data = read_rows(found.get("prompts"), found.get("limit"))
    if bad:
        raise BadRowsError(str(found["prompts"]), bad)
    from trueline.train.progress import quiet

    with quiet():
        from trueline.settings.reader import build, check, merge, resolved
        from trueline.train.distil.trainer import InverseQConfig

        classes = [Recipe, InverseQConfig]
        values = merge(FIXED, *(check(given, classes, source) for given, source in layers))
        recipe = build(Recipe, values)
        check_recipe(recipe, values)
        config_of(values, args.output, recipe)  # refuses before the model loads
        judging = read_evaluation(recipe, values, Path(args.output))
        model = load(recipe, values)
        size = sum(p.numel() for p in model.model.parameters())
        values = resolved(merge(defaults(size, recipe.full), values), classes)
        for name in ("output_dir", *(["lora"] if recipe.full else [])):
            values.pop(name, None)
    folder = open_folder(args, values, recipe, model, data)
    try:
        for name in folder.broken:
            print(f"{folder.folder}: {name} is broken; going on from before it.", file=sys.stderr)
        if folder.finished:
            show(args, folder, note(recipe))
            return None
        train(args, values, recipe, model, rows, judging, folder)
    except KeyboardInterrupt:
        if any((folder.folder / CHECKPOINTS).glob("checkpoint-*")):
            print(f"--resume goes on from the last checkpoint in {folder.folder}", file=sys.stderr)
        raise
    finally:
        folder.close()
    return None


def list_settings() -> None:
    """Print every setting with its default and what it is."""
    from trueline.train.progress import quiet

    with quiet():
        from trueline.settings.reader import explain
        from trueline.train.distil.trainer import InverseQConfig

        for name, default, text in explain([Recipe, InverseQConfig]):
            if name != "output_dir":
                print(f"{name} = {FIXED.get(name, default)}\n    {text}")


def check_recipe(recipe: Recipe, values: dict[str, Any]) -> None:
    """Raise `ConfigError` for settings that contradict each other or are out of range."""
    check_number("lora.rank", recipe.lora.rank, low=1, whole=True)
    check_number("lora.dropout", recipe.lora.dropout, low=0, high=1, high_open=True)
    for name in ("limit", "threads"):
        if getattr(recipe, name) is not None:
            check_number(name, getattr(recipe, name), low=1, whole=True)
    if recipe.full and recipe.quantize:
        raise ConfigError("`full` cannot train quantized weights. Leave one out.")
    if recipe.full and (recipe.merge or "lora" in values):
        raise ConfigError("`full` trains no adapter: leave out `merge`, `rank` and `lora`.")
    if recipe.evaluate is None:
        for name in ("eval_steps", "judge"):
            if values.get(name):
                raise ConfigError(f"`{name}` goes with `evaluate`, a file of held-out prompts.")


def config_of(values: dict[str, Any], output: str, recipe: Recipe) -> InverseQConfig:
    """Return the trainer's configuration."""
    from trueline.settings.reader import build, merge
    from trueline.train.distil.trainer import InverseQConfig

    own = {"output_dir": str(Path(output) / CHECKPOINTS), "disable_tqdm": True}
    return build(InverseQConfig, merge(device_settings(recipe), values, own))


def open_folder(
    args: argparse.Namespace,
    values: dict[str, Any],
    recipe: Recipe,
    model: LanguageModel,
    data: str,
) -> RunFolder:
    """Return the run's folder, refused where it holds anything else."""
    from trueline.cli.folders import command
    from trueline.records.run_folder import RunFolder

    settings = {
        "config": {k: v for k, v in values.items() if k not in NEUTRAL},
        "data": {"hash": data},
        **base_settings(recipe, model),
    }
    return RunFolder(
        args.output,
        "inverse-q",
        settings,
        command=command(args),
        resume=args.resume,
        overwrite=args.overwrite,
        main=int(os.environ.get("RANK", 0)) == 0,
    )


Judging = tuple[list[Any], str, Any]
"""Items, their metric and their judge."""


def read_evaluation(recipe: Recipe, values: dict[str, Any], output: Path) -> Judging | None:
    """Return what judges held-out responses; None where only losses are measured on them."""
    from trueline.evals.datasets import load_prompts
    from trueline.evals.items import Item, adherence_items
    from trueline.evals.judging import JudgeConfig, check_judge, make_judge

    if recipe.evaluate is None:
        return None
    refusal = recipe.judge == "keywords" or values.get("teacher") in ("self-cd", "ada-cd")
    if refusal:
        rows = load_prompts(recipe.evaluate)
        items = [Item(r.id, r.prompt, "unsafe" if r.safe is False else "safe") for r in rows]
    else:
        items, _ = adherence_items(recipe.evaluate, principle=values.get("principle"))
        if recipe.judge is None and not any(item.pattern for item in items):
            return None
        if recipe.judge is None and (odd := [item.id for item in items if not item.pattern]):
            raise DataError(f'{recipe.evaluate}: prompt "{odd[0]}" has no "pattern", others have.')
    metric = "refusal" if refusal else "adherence"
    asked = check_judge(JudgeConfig(recipe.judge, recipe.judge_model, recipe.judge_url), metric)
    judge, _ = make_judge(asked, metric, output)
    return items, metric, judge


def train(
    args: argparse.Namespace,
    values: dict[str, Any],
    recipe: Recipe,
    model: LanguageModel,
    rows: list[dict[str, Any]],
    judging: Judging | None,
    folder: RunFolder,
) -> None:
    """Train from the start or the checkpoint, and write weights, log, curves and card."""
    from trueline.records.disk import saving
    from trueline.settings.reader import write_toml
    from trueline.train.progress import attach, quiet

    with quiet():
        trainer = make_trainer(args, values, recipe, model, rows, judging)
        attach(trainer, folder if folder.main else None, write_toml(values), SHOWN)
        with saving(folder.folder):
            trainer.train(
                resume_from_checkpoint=str(folder.checkpoint) if folder.checkpoint else None
            )
        if recipe.evaluate is not None and judging is None:
            trainer.evaluate()
        folder.facts |= {"over_budget": trainer.over_budget} if trainer.over_budget else {}
        folder.put(lambda path: save(trainer, path, recipe), keep=("README.md",))
    if folder.main:
        finish(values, recipe, folder, len(rows))
        show(args, folder, note(recipe))


def make_trainer(
    args: argparse.Namespace,
    values: dict[str, Any],
    recipe: Recipe,
    model: LanguageModel,
    rows: list[dict[str, Any]],
    judging: Judging | None,
) -> InverseQTrainer:
    """Return the trainer; a row that does not fit the model is named by its line."""
    from trueline.train.distil.evaluation import HeldOut
    from trueline.train.distil.trainer import InverseQTrainer

    held_out = None
    if recipe.evaluate is not None and judging is None:
        held_out, bad, _ = read_rows(recipe.evaluate)
        if bad:
            raise DataError(f"{recipe.evaluate}:{bad[0].line}: {bad[0].error}")
        held_out = [{k: v for k, v in row.items() if k != "line"} for row in held_out]
        if values.get("eval_steps"):
            values = {"eval_strategy": "steps", **values}
    try:
        trainer = InverseQTrainer(
            model.model,
            config_of(values, args.output, recipe),
            train_dataset=[{k: v for k, v in row.items() if k != "line"} for row in rows],
            eval_dataset=held_out,
            processing_class=model.tokenizer,
            peft_config=None if recipe.full else lora_config(recipe.lora),
        )
    except (ConfigError, ModelError):
        raise
    except DataError as error:
        place = re.match(r"train_dataset\[(\d+)\]", str(error))
        if place is None:
            raise
        line, rest = rows[int(place[1])]["line"], str(error)[place.end() :]
        raise DataError(f"{recipe.prompts}:{line}{rest}") from None
    except (ValueError, ImportError) as error:  # target modules that are not there, a package
        raise ConfigError(" ".join(str(error).split())) from error
    if judging is not None:
        length = values["max_completion_length"]
        trainer.evaluate_with(HeldOut(*judging, trainer.teacher, length))
    return trainer


def save(trainer: InverseQTrainer, path: str, recipe: Recipe) -> None:
    """Write the adapter or the model, with its tokenizer, and nothing that only a trainer reads."""
    if recipe.merge:
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.is_world_process_zero():
            model.merge_and_unload().save_pretrained(path)
            trainer.processing_class.save_pretrained(path)  # type: ignore[union-attr]
        return
    trainer.save_model(path)
    Path(path, "training_args.bin").unlink(missing_ok=True)
