"""A decoding method as a model of lm-evaluation-harness: likelihoods and texts under the method.

    python -m trueline.integrations.lm_eval run --model trueline --tasks arc_easy \\
        --model_args pretrained=gpt2 method=linear-alignment "principle=Be brief." candidates=1

The log-likelihood of a continuation y after a context c, with z_k the logits of branch k:

    log p(y | c) = sum_t log softmax(combine(z_1, ..., z_K))[y_t],   z_k from prompt_k(c), y_<t

All branches are followed by the same tokens: those that follow the bare context. Temperature is 1.
After a method's `first_tokens` its `rest_branch` counts alone. A method that restricts the
tokens (`candidates` of Linear Alignment and Blend, `plausibility`) gives all other tokens
probability 0, hence a log-likelihood of minus infinity: score with `candidates=1`.

Contexts are text (base models: a principle goes before it, with a line break) or, with the
harness's --apply_chat_template, messages. What exceeds the model's positions is cut from the left
of the context as in the harness's own `hf` model, but never from a principle.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from trueline.engine.decoding import Decoder
from trueline.engine.protocol import Continuation, Prompt
from trueline.engine.scoring import combined, longest_first, score
from trueline.errors import ConfigError, DataError, ModelError, TruelineError, suggestion
from trueline.integrations import split_options
from trueline.models.load import LanguageModel, load_model
from trueline.models.prompts import encode, render, shared_length, with_default
from trueline.types import Message, SamplingParams, base_branches, check_messages

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise ModelError(
        "This needs lm-evaluation-harness. Install it: pip install 'trueline[lm-eval]'"
    ) from error

log = logging.getLogger(__name__)
T = TypeVar("T")
CHAT = "trueline-chat:"
"""Head of a context that holds messages as JSON, for the method to write its prompts into."""
NO_LIMIT = 2048
"""Window of rolling likelihoods for models without a limit, as in the harness."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("trueline")
class TruelineLM(LM):
    """A model under a decoding method, for the harness."""

    def __init__(
        self,
        pretrained: str | LanguageModel = "tiny",
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        """Load the model and make the method.

        Args:
            pretrained: Folder, hub name, "tiny", or a loaded model.
            batch_size: Requests scored or decoded together; 1 by default. "auto" is refused.
            max_batch_size: For the harness's "auto" alone.
            device: As in `load_model`; "cuda:0", the harness's default, is "auto" without CUDA.
            seed: Of the first request, where tasks sample; each further one adds 1.
            **options: `method`, its fields, and what `load_model` takes.

        Raises:
            ConfigError: An option is unknown or out of range.
        """
        super().__init__()
        self.method, load = split_options(options)
        try:
            self.batch_size = int(batch_size or 1)
        except ValueError:
            raise ConfigError(f"`batch_size` must be a number, got {batch_size!r}.") from None
        if isinstance(pretrained, LanguageModel):
            if load:
                raise ConfigError(f"The model is loaded: leave {', '.join(load)} out.")
            self.model = pretrained
        else:
            # The harness's command line says cuda:0 whenever nobody said anything.
            if device is None or (device == "cuda:0" and not torch.cuda.is_available()):
                device = "auto"
            self.model = load_model(pretrained, device=device, **load)
        if base_branches(self.method) and not self.model.has_adapter:
            raise ModelError(f'Method "{self.method.name}" needs an adapter. Give `adapter`.')
        self.seed = seed
        self._device = self.model.device
        self._raw = dataclasses.replace(self.model, raw=True)
        self._branches = lru_cache(maxsize=1024)(self._encode_branches)
        self._cut = 0

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness stores contexts: not that of `hf`, which stores text."""
        return "trueline__" + self.model.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the template, for the harness's log."""
        if isinstance(chat_template, str):
            raise ConfigError("Name a template as `chat_template=FILE` among the model's options.")
        return str(self.model.tokenizer.chat_template) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the messages as a string that this class reads back; no template is applied yet.

        A last message from the assistant is continued, as `add_generation_prompt=False` asks for.
        """
        return CHAT + json.dumps(chat_history)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness records beside its results."""
        return {
            "model_num_parameters": self.model.model.num_parameters(),
            "model_dtype": self.model.model.dtype,
            "decoding_method": repr(self.method),
        }

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy decoding gives it) of each continuation."""
        items = [self._scored(*request.args) for request in requests]
        self._report_cut("continuations", len(items))
        answers = self._score(items, disable_tqdm)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        impossible = sum(logprob == float("-inf") for logprob, _ in answers)
        if impossible:
            log.warning(
                "%d of %d continuations have probability 0 under %r: candidates are restricted. "
                "Pass candidates=1 (or no plausibility) to score them.",
                *(impossible, len(answers), self.method),
            )
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in windows of the model's positions."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        scores = iter(self._score([w for text in windows for w in text], disable_tqdm))
        totals = [sum(next(scores)[0] for _ in text) for text in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that each request decodes to, ended by its stop strings."""
        prompts = [
            self._prompt(r.args[0], r.args[1], self.seed + i) for i, r in enumerate(requests)
        ]
        self._report_cut("prompts", len(prompts))
        decoder, texts = Decoder(self.model, batch_size=self.batch_size), [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -max(map(len, prompts[i].branches)))
        answers = decoder.each([prompts[i] for i in order])
        for i, [answer] in zip(order, self._shown(answers, len(order), disable_tqdm), strict=True):
            texts[i] = answer.text
            self.cache_hook.add_partial("generate_until", requests[i].args, answer.text)
        return texts

    def _shown(self, items: Iterable[T], total: int, quiet: bool) -> Iterable[T]:
        return tqdm(items, total=total, desc="trueline", disable=quiet)

    def _messages(self, context: str) -> tuple[LanguageModel, list[Message]]:
        """Return the model that encodes a context, with a template or without, and its messages."""
        if context.startswith(CHAT):
            return self.model, check_messages(json.loads(context.removeprefix(CHAT)))
        return self._raw, [{"role": "user", "content": context}]

    def _encode_branches(self, context: str) -> tuple[list[int], list[list[int]]]:
        """Return the ids of the context as it is, and of the method's prompts."""
        model, messages = self._messages(context)
        prompts = self.method.prompts(with_default(model, messages))
        rows = [encode(model, chat) for chat in (messages, *prompts)]
        rows = [row or [self._prefix] for row in rows]
        return rows[0], rows[1:]

    @property
    def _prefix(self) -> int:
        """What stands before a text that has nothing before it."""
        found = self.model.tokenizer.bos_token_id
        found = self.model.tokenizer.eos_token_id if found is None else found
        return self.model.pad_token_id if found is None else int(found)

    def _scored(self, context: str, continuation: str) -> Continuation:
        """Encode a pair as the harness does: the continuation is what follows in the whole text."""
        tokenizer = self.model.tokenizer
        if not context:
            bare, branches = self._branches(context)
            ids = list(tokenizer(continuation, add_special_tokens=False)["input_ids"])
            ids = ids[1:] if ids[:1] == [self._prefix] else ids
        else:
            if not context.startswith(CHAT):
                # Spaces at the end of a context belong to the first word of the continuation.
                bare_text = context.rstrip()
                context, continuation = bare_text, context[len(bare_text) :] + continuation
            bare, branches = self._branches(context)
            model, messages = self._messages(context)
            text = context if model.raw else render(model, messages)
            whole = tokenizer(text + continuation, add_special_tokens=model.raw)["input_ids"]
            ids = list(whole[len(bare) :])
        if not ids:
            raise DataError(f"Continuation {continuation!r} has no tokens of its own.")
        contexts = self._fit(bare, branches, len(ids) - 1)
        return Continuation(contexts, ids)

    def _fit(self, bare: list[int], branches: list[list[int]], extra: int) -> list[list[int]]:
        """Return the branches cut to leave `extra` positions free: after the principle, if any.

        What all branches end with loses its first tokens, the same in each.
        """
        limit = self.model.max_positions
        excess = max(map(len, branches)) + extra - limit if limit is not None else 0
        if excess <= 0:
            return branches
        shared = min(shared_length(bare[::-1], row[::-1]) for row in branches)
        if excess >= shared:
            raise DataError(
                f"A prompt of {max(map(len, branches))} tokens and {extra} more do not fit the "
                f"{limit} positions of the model, even without its context."
            )
        self._cut += 1
        return [row[: len(row) - shared] + row[len(row) - shared + excess :] for row in branches]

    def _report_cut(self, what: str, total: int) -> None:
        if self._cut:
            limit = self.model.max_positions
            log.warning("%d of %d %s cut to %s positions.", self._cut, total, what, limit)
        self._cut = 0

    def _windows(self, text: str) -> Iterator[Continuation]:
        """Cut a text into windows that predict each token once, as the harness does.

        A principle stands before each window. Without one, later windows start in mid-text.
        """
        bare, heads = self._branches("")
        guided = any(head != bare for head in heads)
        size = self.model.max_positions or NO_LIMIT
        if guided:
            size -= max(map(len, heads))
        if size < 1:
            raise DataError("The principle fills all positions of the model.")
        ids = list(self.model.tokenizer(text, verbose=False)["input_ids"])
        first = 0
        for pair in get_rolling_token_windows(ids, self._prefix, size, 1):
            before, tokens = make_disjoint_window(pair)
            if first == 0:
                contexts = heads
            else:
                contexts = [[*(head if guided else []), *before] for head in heads]
            yield Continuation(contexts, tokens, first=first)
            first += len(tokens)

    def _score(self, items: list[Continuation], quiet: bool) -> list[tuple[float, bool]]:
        """Return (log-likelihood, greedy) of each; one forward serves all that share its rows."""
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(items)
        off = base_branches(self.method)
        rows = self.batch_size * max((len(item.branches) for item in items), default=1)
        for n, item in enumerate(items):
            on = tuple(k not in off for k in range(len(item.branches)))
            items[n] = dataclasses.replace(item, adapters=on)
        order = longest_first(items)
        found = score(self.model, [items[i] for i in order], rows=rows)
        for i, logits in zip(order, self._shown(found, len(items), quiet), strict=True):
            z = combined(self.method, logits, items[i].first)
            logprobs, best = z.log_softmax(-1), z.argmax(-1)
            ids = torch.tensor(items[i].tokens, device=z.device)
            total = logprobs.gather(-1, ids[:, None]).sum()
            answers[i] = (float(total), bool((best == ids).all()))
        return answers

    def _prompt(self, context: str, gen_kwargs: dict[str, Any], seed: int) -> Prompt:
        params = sampling_params(gen_kwargs)
        bare, branches = self._branches(context)
        return Prompt(self._fit(bare, branches, params.max_new_tokens), self.method, params, seed)


def sampling_params(gen_kwargs: dict[str, Any]) -> SamplingParams:
    """Return the harness's generation settings as ours.

    `do_sample` false or absent with no temperature is greedy; true with no temperature means 1.

    Raises `ConfigError` for a setting with no counterpart, such as beams.
    """
    sampled = gen_kwargs.get("do_sample")
    given = dict(normalize_gen_kwargs(gen_kwargs))
    known = ("until", "do_sample", "max_gen_toks", *SAMPLING)
    for name in given:
        if name not in known:
            raise ConfigError(f"Unknown generation setting `{name}`.{suggestion(name, known)}")
    options = {name: given[name] for name in SAMPLING if name in given}
    if not given["do_sample"]:
        options["temperature"] = 0.0
    elif sampled and "temperature" not in gen_kwargs:
        options["temperature"] = 1.0
    return SamplingParams(
        max_new_tokens=given["max_gen_toks"],
        stop=tuple(text for text in given["until"] or () if text),
        **options,
    )


def main() -> None:
    """Run the harness's own command line, with `--model trueline` known to it."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except TruelineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
