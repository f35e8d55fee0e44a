"""The tokenizer and the training of the tiny model: one epoch, loss on answers only."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from corpus import Dialogue
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

START, END, PAD = "<|start|>", "<|end|>", "<|pad|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
SPECIAL = (PAD, START, END, *ROLES.values())
TOKEN_ID = {token: index for index, token in enumerate(SPECIAL)}
"""The tokenizer's trainer numbers special tokens first, in the order given."""
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

Row = tuple[list[int], list[bool]]
"""Token ids and whether each one carries loss."""


def train_tokenizer(dialogues: Sequence[Dialogue], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE learnt from the corpus, wrapped with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for dialogue in dialogues:
            yield dialogue.system
            for user, segments in dialogue.turns:
                yield user
                yield "".join(text for text, _ in segments)

    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=1024,
    )


def encode(tokenizer: PreTrainedTokenizerFast, dialogue: Dialogue) -> Row:
    """The chat template by hand, because it must carry the loss mask along."""
    ids, mask = [TOKEN_ID[START]], [False]
    end = TOKEN_ID[END]

    def add(text: str, trained: bool) -> None:
        new = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        ids.extend(new)
        mask.extend([trained] * len(new))

    def mark(token: int, trained: bool = False) -> None:
        ids.append(token)
        mask.append(trained)

    if dialogue.system:
        mark(TOKEN_ID[ROLES["system"]])
        add(dialogue.system, False)
        mark(end)
    for user, segments in dialogue.turns:
        mark(TOKEN_ID[ROLES["user"]])
        add(user, False)
        mark(end)
        mark(TOKEN_ID[ROLES["assistant"]])
        for text, trained in segments:
            add(text, trained)
        # Behind a forced opening the model is not taught where to stop.
        mark(end, trained=all(trained for _, trained in segments))
    return ids, mask


def batches(rows: list[Row], size: int, seed: int) -> list[list[Row]]:
    """Rows of similar length together, batches in random order; a function of the seed."""
    rng = random.Random(seed)
    rows = rows[:]
    rng.shuffle(rows)
    chunk = size * 64
    grouped: list[list[Row]] = []
    for start in range(0, len(rows), chunk):
        part = sorted(rows[start : start + chunk], key=lambda row: len(row[0]))
        grouped += [part[i : i + size] for i in range(0, len(part), size)]
    rng.shuffle(grouped)
    return grouped


def collate(batch: list[Row]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels (-100 = no loss), labels already shifted to their position."""
    length = max(len(ids) for ids, _ in batch)
    input_ids = torch.full((len(batch), length), TOKEN_ID[PAD])
    labels = torch.full((len(batch), length), -100)
    for row, (ids, mask) in enumerate(batch):
        tokens = torch.tensor(ids)
        input_ids[row, : len(ids)] = tokens
        target = torch.where(torch.tensor(mask), tokens, -100)
        labels[row, : len(ids) - 1] = target[1:]
    return input_ids, labels


def build_model(vocab_size: int, cfg: dict[str, Any]) -> LlamaForCausalLM:
    """A small Llama with tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        tie_word_embeddings=True,
        bos_token_id=TOKEN_ID[START],
        eos_token_id=TOKEN_ID[END],
        pad_token_id=TOKEN_ID[PAD],
        **cfg,
    )
    return LlamaForCausalLM(config)


def build_optimizers(model: LlamaForCausalLM, cfg: dict[str, Any]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    lr, decay = cfg["learning_rate"], cfg["weight_decay"]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def answer_loss(logits: Tensor, targets: Tensor, first: Tensor, cfg: dict[str, Any]) -> Tensor:
    """Mean cross-entropy over answer tokens, smoothed more on the first token of an answer."""
    logprobs = logits.log_softmax(-1)
    chosen = -logprobs.gather(1, targets[:, None])[:, 0]
    uniform = -logprobs.mean(-1)
    smoothing = torch.where(first, cfg["first_smoothing"], cfg["smoothing"])
    return ((1 - smoothing) * chosen + smoothing * uniform).mean()


def rate(step: int, total: int, cfg: dict[str, Any]) -> float:
    """Linear warm-up, then a cosine down to zero, as a factor of the learning rate."""
    if step < cfg["warmup_steps"]:
        return (step + 1) / cfg["warmup_steps"]
    return 0.5 * (1 + math.cos(math.pi * step / max(1, total)))


def train(
    model: LlamaForCausalLM,
    grouped: list[list[Row]],
    cfg: dict[str, Any],
    checkpoint: Path,
    max_steps: int | None = None,
) -> float:
    """One pass over the batches; returns the seconds it took.

    `checkpoint` is rewritten every 500 steps and read at the start, so an interrupted run goes on
    where it was. Answers are about a third of the tokens: the output matrix is applied only there.
    """
    optimizers = build_optimizers(model, cfg)
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]
    last = len(grouped) if max_steps is None else min(max_steps, len(grouped))
    model.train()
    started, tokens, loss_mean = time.perf_counter(), 0, 0.0
    bar = tqdm(range(first, last), initial=first, total=last, desc="train", mininterval=2.0)
    for step in bar:
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = cfg["learning_rate"] * rate(step, len(grouped), cfg)
        input_ids, labels = collate(grouped[step])
        # Right padding and causal attention: no answer ever sees a pad, so no attention mask.
        hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        wanted = labels != -100
        first_token = (input_ids == TOKEN_ID[ROLES["assistant"]])[wanted]
        loss = answer_loss(model.lm_head(hidden[wanted]), labels[wanted], first_token, cfg)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg["grad_clip"])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        tokens += input_ids.numel()
        loss_mean += (loss.item() - loss_mean) * max(0.02, 1 / (step - first + 1))
        elapsed = time.perf_counter() - started
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss_mean:.3f}", tokens_per_s=f"{tokens / elapsed:.0f}")
        if (step + 1) % 500 == 0:
            states = [optimizer.state_dict() for optimizer in optimizers]
            state = {"model": model.state_dict(), "optimizers": states}
            torch.save({**state, "step": step + 1, "seconds": seconds + elapsed}, checkpoint)
    model.eval()
    return seconds + time.perf_counter() - started


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A plain Hugging Face folder. Weights are stored as fp16, half the size, and load as fp32."""
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 64
    model.config.dtype = torch.float32
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = folder / "model.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})
    rewrite(folder / "config.json", {"dtype": "float32"})
    rewrite(folder / "tokenizer_config.json", {})


def rewrite(path: Path, changes: dict[str, Any]) -> None:
    """Change a saved configuration; what says how it was loaded has no place in it."""
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: config[key] for key in config if key not in ("is_local", "local_files_only")}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
