"""What a client gets back: OpenAI's objects, from the tokens of a request."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trueline.models.detokenizer import Detokenizer
from trueline.server.logprobs import chat_logprobs, text_logprobs

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

    from trueline.engine.protocol import Prompt
    from trueline.server.engine_loop import Told


@dataclass
class Choice:
    """One completion under way."""

    index: int
    detokenizer: Detokenizer
    """For tokens that come without their text."""
    text: str = ""
    finish_reason: str | None = None
    begun: bool = False
    """Whether a client that streams has got its first chunk."""
    tokens: list[dict[str, Any]] = field(default_factory=list)
    """Log-probabilities of its tokens, if they were asked for."""
    trace: list[dict[str, Any]] = field(default_factory=list)

    def read(self, told: Told) -> str:
        """Return the text that became final with a token."""
        if told.text is not None:
            return told.text
        text = self.detokenizer.push(told.token_id)
        return text + self.detokenizer.finish() if told.finish_reason else text


class Answer:
    """The answer to one request: what is told of each token, and of all at the end.

    Args:
        model: The name that the client asked for.
        chat: Whether it is a chat, or a plain text.
        logprobs: Whether each token comes with its log-probability.
        traced: Whether each token comes with its trace.
        tokenizer: Turns ids into text.
        prompts: What was asked, encoded; a text request may hold several.
        prompt_tokens: Counts the tokens of the caller's own prompts, with no method.
        end: What each chunk ends with, as JSON: `, "usage": null` where usage was asked for.
    """

    def __init__(
        self,
        *,
        model: str,
        chat: bool,
        logprobs: bool,
        traced: bool,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        prompt_tokens: Callable[[], int],
        end: str = "",
    ) -> None:
        self.model, self.chat, self.logprobs, self.traced = model, chat, logprobs, traced
        self.prompts, self.prompt_tokens = prompts, prompt_tokens
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        count = sum(prompt.sampling.n for prompt in prompts)
        self.choices = [Choice(i, Detokenizer(tokenizer)) for i in range(count)]
        self._first = [sum(p.sampling.n for p in prompts[:i]) for i in range(len(prompts))]
        self._left = count
        self._head = to_json(self._object([], chunk=True)).removesuffix("]}")
        self._end = f"]{end}}}"
        self.completion_tokens = 0

    @property
    def done(self) -> bool:
        """Whether every completion has ended."""
        return not self._left

    def add(self, prompt: int, told: Told) -> str:
        """Take in a token of the prompt at that place; return the chunk to stream as JSON, or "".

        A chunk is put together from text: nothing of it but its choice changes from token to token.
        """
        choice = self.choices[self._first[prompt] + told.sample]
        text = choice.read(told)
        self.completion_tokens += 1
        choice.text += text
        choice.finish_reason = told.finish_reason
        self._left -= told.finish_reason is not None
        more = self._more(choice, told) if self.logprobs or self.traced else ""
        if not (text or told.finish_reason or more):
            return ""
        end = f'"{told.finish_reason}"' if told.finish_reason else "null"
        if not self.chat:
            said = f'"text":{to_json(text)}'
        elif choice.begun:
            said = f'"delta":{{"content":{to_json(text)}}}'
        else:
            said = f'"delta":{{"role":"assistant","content":{to_json(text)}}}'
        choice.begun = True
        own = f'{{"index":{choice.index},"finish_reason":{end},{said}{more}}}'
        return f"{self._head}{own}{self._end}"

    def _more(self, choice: Choice, told: Told) -> str:
        """Return what a chunk says of its token beside the text."""
        more = ""
        if told.logprobs is not None:
            choice.tokens.append(told.logprobs)
            more += f',"logprobs":{to_json(self._render(choice, 1))}'
        if told.trace is not None:
            choice.trace.append(told.trace)
            more += f',"trace":{to_json([told.trace])}'
        return more

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
            if self.logprobs:
                made["logprobs"] = self._render(choice, len(choice.tokens))
            if self.traced:
                made["trace"] = choice.trace
            choices.append(made)
        return self._object(choices) | {"usage": self.usage()}

    def usage_chunk(self) -> str:
        """Return the last chunk of a stream that was asked for its usage."""
        return to_json(self._object([], chunk=True) | {"usage": self.usage()})

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

    def _render(self, choice: Choice, last: int) -> dict[str, Any]:
        """Return the log-probabilities of the last tokens in OpenAI's form."""
        tokens = choice.tokens[len(choice.tokens) - last :]
        if self.chat:
            return chat_logprobs(tokens)
        before = sum(len(t["token"]) for t in choice.tokens[: len(choice.tokens) - last])
        return text_logprobs(tokens, before)


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
to_json = _ENCODER.encode
