"""Make the bundled model `tiny` from nothing: corpus, tokenizer, training, evaluation.

    python recipes/tiny/run.py                       # the shipped model, see README.md
    python recipes/tiny/run.py --max-steps 2 --output /tmp/tiny-smoke

An interrupted run goes on from its last checkpoint in the output folder.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path
from typing import Any

import torch
from corpus import Grammar, draw_corpus, load_grammar
from evaluate import evaluate, write_held_out, write_prompts
from train import batches, build_model, encode, save, train, train_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent


def train_phase(
    cfg: dict[str, Any],
    grammar: Grammar,
    seed: int,
    start: Path | None,
    output: Path,
    steps: int | None,
) -> float:
    """One pass over a fresh corpus, from nothing or from the folder `start`; returns seconds.

    A phase that is already saved is not run again.
    """
    if (output / "model.safetensors").exists():
        print(f"{output} is there already")
        return 0.0
    torch.manual_seed(seed)
    if steps is not None:
        cfg["corpus"]["dialogues"] = max(2000, steps * cfg["training"]["batch_size"])
    print(f"writing {cfg['corpus']['dialogues']:,} dialogues")
    dialogues = draw_corpus(grammar, cfg["corpus"], seed)
    if start is None:
        sample = dialogues[: cfg["tokenizer"]["sample"]]
        tokenizer = train_tokenizer(sample, cfg["tokenizer"]["vocab_size"])
        model = build_model(len(tokenizer), cfg["model"])
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    rows = [encode(tokenizer, dialogue) for dialogue in dialogues]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{sum(len(ids) for ids, _ in rows):,} tokens, {parameters:,} parameters")
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / "checkpoint.pt"
    grouped = batches(rows, cfg["training"]["batch_size"], seed)
    seconds = train(model, grouped, cfg["training"], checkpoint, steps)
    save(model, tokenizer, output)
    checkpoint.unlink(missing_ok=True)
    return seconds


def main() -> None:
    """Parse the options and run every stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/tiny"), help="the model's folder")
    parser.add_argument("--config", type=Path, default=HERE / "config.toml")
    parser.add_argument("--max-steps", type=int, help="stop early: a smoke test")
    args = parser.parse_args()
    cfg = tomllib.loads(args.config.read_text(encoding="utf-8"))
    refine = cfg.pop("refine")
    second = cfg | {name: cfg[name] | refine[name] for name in refine}
    torch.set_num_threads(cfg["training"]["threads"])

    grammar = load_grammar()
    first_folder = args.output / "first_phase"
    seconds = train_phase(cfg, grammar, cfg["seed"], None, first_folder, args.max_steps)
    seconds += train_phase(
        second, grammar, cfg["seed"] + 1, first_folder, args.output, args.max_steps
    )
    print(f"trained in {seconds / 60:.1f} minutes, saved in {args.output}")

    write_held_out(grammar, args.output / "held_out.json", cfg["seed"])
    write_prompts(grammar, args.output / "prompts.jsonl", cfg["seed"])
    report = evaluate(grammar, args.output, cfg["seed"], small=args.max_steps is not None)
    report["training_minutes"] = round(seconds / 60, 1)
    (args.output / "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
