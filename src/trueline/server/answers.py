"""What a client gets back: OpenAI's objects, from the steps of a request."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trueline.engine.trace import token_row, trace_step

if TYPE_CHECKING:
    from collections.abc import Callable

    from trueline.engine.protocol import Prompt, Step


@dataclass
class Choice:
    """One completion under way."""

    index: int
    text: str = ""
    finish_reason: str | None = None
    tokens: list[dict[str, Any]] = field(default_factory=list)
    """Log-probabilities of its tokens, if they were asked for."""
    trace: list[dict[str, Any]] = field(default_factory=list)


class Answer:
    """The answer to one request: what is told of each step, and of all at the end.

    Args:
        model: The name that the client asked for.
        chat: Whether it is a chat, or a plain text.
        top: Alternatives a token, None for no log-probabilities.
        traced: Whether each token comes with its trace.
        texts: Token id to its text.
        prompts: What was asked, encoded; a text request may hold several.
        prompt_tokens: Counts the tokens of the caller's own prompts, with no method.
    """

    def __init__(
        self,
        *,
        model: str,
        chat: bool,
        top: int | None,
        traced: bool,
        texts: Callable[[int], str],
        prompts: Sequence[Prompt],
        prompt_tokens: Callable[[], int],
    ) -> None:
        self.model, self.chat, self.top, self.traced = model, chat, top, traced
        self.texts, self.prompts, self.prompt_tokens = texts, prompts, prompt_tokens
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        count = sum(prompt.sampling.n for prompt in prompts)
        self.choices = [Choice(i) for i in range(count)]
        self.completion_tokens = 0

    @property
    def done(self) -> bool:
        """Whether every completion has ended."""
        return all(choice.finish_reason for choice in self.choices)

    def add(self, prompt: int, step: Step) -> dict[str, Any] | None:
        """Take in a step of the prompt at that place; return the chunk to stream, if any."""
        first = sum(p.sampling.n for p in self.prompts[:prompt])
        choice = self.choices[first + step.sample]
        self.completion_tokens += 1
        choice.text += step.text
        choice.finish_reason = step.finish_reason
        news: dict[str, Any] = {"index": choice.index, "finish_reason": step.finish_reason}
        if self.top is not None:
            choice.tokens.append(self._logprobs(step))
            news["logprobs"] = self._render_logprobs(choice, choice.tokens[-1:])
        if self.traced:
            trace = trace_step(step, self.prompts[prompt].method, self.texts)
            choice.trace.append(token_row(trace))
            news["trace"] = choice.trace[-1:]
        if not (step.text or step.finish_reason or self.top is not None or self.traced):
            return None
        if self.chat:
            news["delta"] = {"content": step.text}
            if step.position == 0:
                news["delta"] = {"role": "assistant", "content": step.text}
        else:
            news["text"] = step.text
        return self._object([news], chunk=True)

    def whole(self) -> dict[str, Any]:
        """Return the answer in one piece."""
        choices = []
        for choice in self.choices:
            made: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason}
            if self.chat:
                made["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            else:
                made["text"] = choice.text
            made["logprobs"] = None
            if self.top is not None:
                made["logprobs"] = self._render_logprobs(choice, choice.tokens)
            if self.traced:
                made["trace"] = choice.trace
            choices.append(made)
        return self._object(choices) | {"usage": self.usage()}

    def usage_chunk(self) -> dict[str, Any]:
        """Return the last chunk of a stream that was asked for its usage."""
        return self._object([], chunk=True) | {"usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Return token counts: what the caller sees, and the branches' prompts apart."""
        asked = self.prompt_tokens()
        return {
            "prompt_tokens": asked,
            "completion_tokens": self.completion_tokens,
            "total_tokens": asked + self.completion_tokens,
            "branch_prompt_tokens": [len(b) for p in self.prompts for b in p.branches],
        }

    def _object(self, choices: list[dict[str, Any]], chunk: bool = False) -> dict[str, Any]:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        made = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return made | {"choices": choices}

    def _logprobs(self, step: Step) -> dict[str, Any]:
        """Return a token's log-probability in the distribution that it was drawn from."""
        assert step.combined is not None
        values = step.combined.float().log_softmax(-1)
        found = self._token(step.token_id, float(values[step.token_id]))
        top = values.topk(min(self.top or 0, len(values)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return found | {
            "top_logprobs": [self._token(i, value) for i, value in pairs if math.isfinite(value)]
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self.texts(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _render_logprobs(self, choice: Choice, tokens: list[dict[str, Any]]) -> dict[str, Any]:
        if self.chat:
            return {"content": tokens, "refusal": None}
        before = choice.tokens[: len(choice.tokens) - len(tokens)]
        offset, offsets = sum(len(t["token"]) for t in before), []
        for token in tokens:
            offsets.append(offset)
            offset += len(token["token"])
        return {
            "tokens": [t["token"] for t in tokens],
            "token_logprobs": [t["logprob"] for t in tokens],
            "top_logprobs": [{o["token"]: o["logprob"] for o in t["top_logprobs"]} for t in tokens],
            "text_offset": offsets,
        }
