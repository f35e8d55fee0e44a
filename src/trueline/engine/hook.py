"""A method inside `model.generate` of transformers: an existing script gains it in one line.

model.generate(**inputs, custom_generate=guided(method, tokenizer, messages))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trueline.engine.decoding import Decoder
from trueline.errors import ConfigError, DataError
from trueline.models.load import LanguageModel
from trueline.models.prompts import encode
from trueline.types import Message, Method, Request, SamplingParams, check_messages

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

PROCESSORS = {"Temperature", "TopK", "TopP", "MinP", "RepetitionPenalty"}
"""Logits processors of transformers that `SamplingParams` covers."""
CRITERIA = {"MaxLengthCriteria", "EosTokenCriteria", "StopStringCriteria"}


def guided(
    method: Method,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Any],
    *,
    raw: bool = False,
) -> Callable[..., Any]:
    """Return a function for `generate(custom_generate=...)` that decodes under `method`.

    Args:
        method: Any method of `trueline.METHODS`.
        tokenizer: The one that made the inputs.
        messages: The chat behind the inputs, or one for each row: a method writes its principle
            into the messages, which token ids do not show. With `raw`, strings.
        raw: The inputs were made with no chat template.

    The generation config's sampling settings, end tokens, stop strings, length and number of
    sequences are kept; the seed comes from torch's global generator. Settings with no counterpart
    (beams, other logits processors, stopping criteria) raise `ConfigError`. transformers passes no
    streamer on to such a function: use `Decoder.stream` for that.

    >>> method = LinearAlignment(principle="Talk like a pirate.")
    >>> model.generate(**inputs, custom_generate=guided(method, tokenizer, messages))
    """
    if not isinstance(messages, Sequence) or not messages:
        raise DataError(f"`messages` must be a chat or a list of chats, got {messages!r:.80}.")
    single = isinstance(messages, str) or isinstance(messages[0], dict)
    chats: list[list[Message]] = [check_messages(m) for m in ([messages] if single else messages)]

    def custom_generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Sequence[Any],
        stopping_criteria: Sequence[Any],
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Any:
        _check_supported(generation_config, logits_processor, stopping_criteria)
        lm = LanguageModel(model, tokenizer, getattr(model, "name_or_path", "") or "model", raw)
        if generation_config.eos_token_id is not None:
            eos = generation_config.eos_token_id
            lm.eos_token_ids = frozenset(eos if isinstance(eos, list) else [eos])
        n = generation_config.num_return_sequences or 1
        # Naming the mask in the signature would make transformers pass it twice.
        _check_inputs(lm, chats, input_ids[::n], model_kwargs.get("attention_mask"), n)
        params = _sampling(generation_config, input_ids.shape[1], n)
        seed = int(torch.randint(2**31, ())) if generation_config.do_sample else 0
        requests = [Request(chat, seed=seed + i * n) for i, chat in enumerate(chats)]
        decoder = Decoder(lm, batch_size=len(chats), share_prefixes=len(chats) > 1)
        prompts = [decoder.encode(request, method, params) for request in requests]
        answers = [completion.token_ids for completion in decoder.complete(prompts)]
        return _output(input_ids, answers, lm.pad_token_id, generation_config)

    return custom_generate


def _check_supported(
    config: GenerationConfig, processors: Sequence[Any], criteria: Sequence[Any]
) -> None:
    if (config.num_beams or 1) > 1:
        raise ConfigError(f"`num_beams` must be 1 with a decoding method, got {config.num_beams}.")
    for processor in processors:
        name = type(processor).__name__
        if name.removesuffix("LogitsProcessor").removesuffix("LogitsWarper") not in PROCESSORS:
            raise ConfigError(f"Logits processor {name} has no counterpart here. Leave it out.")
    for criterion in criteria:
        if type(criterion).__name__ not in CRITERIA:
            name = type(criterion).__name__
            raise ConfigError(f"Stopping criterion {name} has no counterpart here. Leave it out.")


def _check_inputs(
    lm: LanguageModel,
    chats: list[list[Message]],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    n: int,
) -> None:
    """Raise unless the messages are those that the inputs were made from."""
    if len(chats) != len(input_ids):
        raise ConfigError(
            f"`messages` holds {len(chats)} chats, the inputs {len(input_ids)} rows. "
            "Give one chat for each row."
        )
    masks = torch.ones_like(input_ids) if attention_mask is None else attention_mask[::n]
    for i, (chat, ids, mask) in enumerate(zip(chats, input_ids, masks, strict=True)):
        if encode(lm, chat) != ids[mask.bool()].tolist():
            raise ConfigError(
                f"`messages` of row {i} do not render to its input ids. Give the messages behind "
                "the inputs, rendered with add_generation_prompt=True."
            )


def _sampling(config: GenerationConfig, prompt_length: int, n: int) -> SamplingParams:
    def of(name: str, default: Any) -> Any:
        value = getattr(config, name, None)
        return default if value is None else value

    sampled = bool(config.do_sample)
    return SamplingParams(
        max_new_tokens=max(1, of("max_length", prompt_length + 20) - prompt_length),
        temperature=float(of("temperature", 1.0)) if sampled else 0.0,
        top_k=of("top_k", 50) if sampled else 0,
        top_p=float(of("top_p", 1.0)),
        min_p=float(of("min_p", 0.0)),
        repetition_penalty=float(of("repetition_penalty", 1.0)),
        stop=tuple([s] if isinstance(s := of("stop_strings", ()), str) else s),
        n=n,
    )


def _output(
    input_ids: Tensor, answers: list[list[int]], pad_token_id: int, config: GenerationConfig
) -> Any:
    """Return what `generate` returns: prompts and answers, padded on the right."""
    width = max(map(len, answers))
    padded = [answer + [pad_token_id] * (width - len(answer)) for answer in answers]
    sequences = torch.cat([input_ids, input_ids.new_tensor(padded)], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
