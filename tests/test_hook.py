"""A method inside `generate`: the same tokens as Trueline's own loop, and honest refusals."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, NoBadWordsLogitsProcessor

from trueline import ConfigError, LinearAlignment, Plain, SamplingParams, SelfCD, generate, guided

METHOD = LinearAlignment("Talk like a pirate.")
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "What is rain?"}],
]


def inputs(lm, chats):
    tokenizer = lm.tokenizer
    tokenizer.padding_side = "left"
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    ).convert_to_tensors("pt")


def answers(out, width, pad=0):
    return [[t for t in row[width:].tolist() if t != pad] for row in out]


def test_one_line_gives_the_methods_tokens(lm):
    batch = {k: v for k, v in inputs(lm, CHATS).items() if k != "token_type_ids"}
    hook = guided(METHOD, lm.tokenizer, CHATS)
    out = lm.model.generate(**batch, max_new_tokens=9, do_sample=False, custom_generate=hook)
    expected = generate(lm, CHATS, METHOD, SamplingParams(max_new_tokens=9))
    assert answers(out, batch["input_ids"].shape[1]) == [c.token_ids for c in expected]


def test_plain_is_generate_itself(lm):
    batch = {k: v for k, v in inputs(lm, CHATS).items() if k != "token_type_ids"}
    hook = guided(Plain(), lm.tokenizer, CHATS)
    hooked, own = (
        lm.model.generate(**batch, max_new_tokens=9, do_sample=False, **extra)
        for extra in ({"custom_generate": hook}, {})
    )
    assert hooked.tolist() == own.tolist()


def test_sampling_settings_are_kept_and_the_seed_is_torchs(llama):
    batch = {k: v for k, v in inputs(llama, CHATS[:1]).items() if k != "token_type_ids"}
    hook = guided(SelfCD(), llama.tokenizer, CHATS[0])

    def run(**options):
        torch.manual_seed(5)
        return llama.model.generate(
            **batch, max_new_tokens=6, custom_generate=hook, **options
        ).tolist()

    sampled = run(do_sample=True, temperature=2.0, num_return_sequences=3)
    assert len(sampled) == 3
    assert sampled[0] != sampled[1]
    assert sampled == run(do_sample=True, temperature=2.0, num_return_sequences=3)
    assert run(do_sample=True, top_k=1) == run(do_sample=False)


def test_what_cannot_be_kept_is_refused(llama):
    batch = {k: v for k, v in inputs(llama, CHATS[:1]).items() if k != "token_type_ids"}
    hook = guided(METHOD, llama.tokenizer, CHATS[0])
    words = LogitsProcessorList([NoBadWordsLogitsProcessor([[7]], eos_token_id=1)])
    for options, fragment in (
        ({"num_beams": 2}, "num_beams"),
        ({"logits_processor": words}, "NoBadWords"),
        ({"max_time": 1.0}, "MaxTimeCriteria"),
        ({"custom_generate": guided(METHOD, llama.tokenizer, CHATS)}, "2 chats, the inputs 1"),
        ({"custom_generate": guided(METHOD, llama.tokenizer, "Other")}, "do not render"),
    ):
        with pytest.raises(ConfigError, match=fragment):
            llama.model.generate(**batch, max_new_tokens=4, **({"custom_generate": hook} | options))
