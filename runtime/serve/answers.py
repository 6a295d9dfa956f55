"""What clients get: OpenAI's objects for a chat and for a completion, whole and in parts.

A part of a stream is made of one token. `finish_reason` is null in all but the last part of a
choice, and usage is told in a stream where that is asked for."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from smoe.runtime.decoding import token_bytes
from smoe.runtime.generation import Token
from smoe.runtime.serve.calls import Called
from smoe.runtime.serve.channels import CONTENT, Part, Reader, Said
from smoe.runtime.serve.fields import Json
from smoe.runtime.serve.request import Generation
from smoe.runtime.text import Text

CALL_ID = 9  # letters: as many as those templates want that ask for a number
LEAST = -9999.0  # the logarithm of no probability: JSON has no infinity
Row = tuple[int, float | None, tuple[tuple[int, float], ...]]  # of a token's probabilities
FINISH = {"length": "length", "end": "stop", "stop": "stop"}


class Spelling:
    """What single tokens are in UTF-8, looked up once."""

    def __init__(self, text: Text):
        self._tokenizer = text.tokenizer
        self._bytes: dict[int, bytes] = {}

    def bytes(self, token: int) -> bytes:
        """Which may be a part of a character."""
        if token not in self._bytes:
            there = self._tokenizer
            self._bytes[token] = b"" if there is None else token_bytes(there, token)
        return self._bytes[token]

    def text(self, token: int) -> str:
        """As OpenAI spells tokens: with a part of a character in bytes."""
        spelled = self.bytes(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


class _Answer:
    """What both kinds have in common: `objects` names a whole answer, and a part."""

    objects = ("", "")
    prefix = ""

    def __init__(self, model: str, spelling: Spelling, generations: Sequence[Generation]):
        self.generations = generations
        self._spelling = spelling
        self._about = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def usage(self) -> Json:
        """Tokens of all prompts and answers, and those that were not computed again."""
        prompt = sum(len(one.ids) for one in self.generations)
        made = sum(self._made(one) for one in self.generations)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": sum(one.shared for one in self.generations)},
        }

    def last(self) -> Json:
        """The part that tells the usage."""
        return self._object(1, [], usage=self.usage())

    def _made(self, generation: Generation) -> int:
        return generation.made

    def _object(self, part: int, choices: list[Json], **more: Any) -> Json:
        return {"object": self.objects[part], **self._about, "choices": choices, **more}


class ChatAnswer(_Answer):
    """One turn of a conversation, taken apart by `reader` where there is something to take
    apart."""

    objects = ("chat.completion", "chat.completion.chunk")
    prefix = "chatcmpl"

    def __init__(
        self,
        model: str,
        spelling: Spelling,
        generations: Sequence[Generation],
        reader: Reader | None = None,
    ):
        super().__init__(model, spelling, generations)
        self._reader, self._calls = reader, 0

    def opening(self) -> list[Json]:
        """Who speaks, before there is a token."""
        return [self._part({"role": "assistant", "content": ""})]

    def part(self, index: int, token: Token) -> list[Json]:
        """Of one token; nothing where there is nothing to say yet."""
        delta = self._delta(self._parts(token.text))
        if not delta and token.logprob is None:
            return []
        return [self._part(delta or {"content": ""}, self._logprobs([token]))]

    def ending(self, index: int) -> list[Json]:
        """The last parts of the choice."""
        held = self._delta(self._reader.finish()) if self._reader else {}
        last = self._part({}, finish=self._finish())
        return [self._part(held), last] if held else [last]

    def whole(self, tokens: Sequence[Sequence[Token]]) -> Json:
        """All of it at once."""
        parts = self._parts("".join(token.text for token in tokens[0]))
        if self._reader:
            parts += self._reader.finish()
        said = self._delta(parts, indexed=False)
        silent = None if "tool_calls" in said else ""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": silent, "refusal": None} | said,
            "logprobs": self._logprobs(tokens[0]),
            "finish_reason": self._finish(),
        }
        return self._object(0, [choice], usage=self.usage())

    def _parts(self, text: str) -> list[Part]:
        if self._reader:
            return self._reader.push(text)
        return [Said(CONTENT, text)] if text else []

    def _delta(self, parts: Sequence[Part], indexed: bool = True) -> Json:
        """Texts by their fields, and calls."""
        delta: Json = {}
        for part in parts:
            if isinstance(part, Said):
                delta[part.field] = delta.get(part.field, "") + part.text
            else:
                delta.setdefault("tool_calls", []).append(self._call(part, indexed))
        return delta

    def _call(self, called: Called, indexed: bool) -> Json:
        number = {"index": self._calls} if indexed else {}
        self._calls += 1
        name = uuid.uuid4().hex[:CALL_ID]
        function = {"name": called.name, "arguments": called.arguments}
        return number | {"id": name, "type": "function", "function": function}

    def _finish(self) -> str:
        finish = FINISH[self.generations[0].finish]
        return "tool_calls" if self._calls and finish == "stop" else finish

    def _part(self, delta: Json, logprobs: Json | None = None, finish: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._object(1, [choice])

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if not tokens or tokens[0].logprob is None:
            return None
        told = [self._token(t.id, t.logprob) | {"top_logprobs": self._best(t)} for t in tokens]
        return {"content": told, "refusal": None}

    def _best(self, token: Token) -> list[Json]:
        return [self._token(one, logprob) for one, logprob in token.best]

    def _token(self, token: int, logprob: float | None) -> Json:
        spelled = self._spelling
        told = {"token": spelled.text(token), "logprob": finite(logprob)}
        return told | {"bytes": list(spelled.bytes(token))}


class CompletionAnswer(_Answer):
    """Prompts continued, each a choice. With `echo` its text begins with the prompt, of which
    `prompts` are the texts. Of `drawn` tokens that are told there may be none at all."""

    objects = ("text_completion", "text_completion")
    prefix = "cmpl"

    def __init__(
        self,
        model: str,
        spelling: Spelling,
        generations: Sequence[Generation],
        prompts: Sequence[str] | None,
        drawn: bool = True,
    ):
        super().__init__(model, spelling, generations)
        self._prompts, self._drawn = prompts, drawn
        self._offsets = [0] * len(generations)
        self._begun = [prompts is None] * len(generations)

    def opening(self) -> list[Json]:
        """Nothing."""
        return []

    def part(self, index: int, token: Token) -> list[Json]:
        """Of one token, after the prompt where that is told."""
        tokens = [token] if self._drawn else []
        echo = "" if self._begun[index] or self._prompts is None else self._prompts[index]
        text = echo + "".join(one.text for one in tokens)
        logprobs = self._logprobs(index, tokens)
        self._begun[index] = True
        if not text and logprobs is None:
            return []
        return [self._object(1, [self._choice(index, text, logprobs)])]

    def ending(self, index: int) -> list[Json]:
        """The last part of a choice."""
        return [self._object(1, [self._choice(index, "", None, self._finish(index))])]

    def whole(self, tokens: Sequence[Sequence[Token]]) -> Json:
        """All of it at once."""
        choices = []
        for index, made in enumerate(tokens):
            told = made if self._drawn else ()
            text = "".join(token.text for token in told)
            if self._prompts is not None:
                text = self._prompts[index] + text
            logprobs = self._logprobs(index, told)
            choices.append(self._choice(index, text, logprobs, self._finish(index)))
        return self._object(0, choices, usage=self.usage())

    def _finish(self, index: int) -> str:
        return FINISH[self.generations[index].finish] if self._drawn else "length"

    def _made(self, generation: Generation) -> int:
        return generation.made if self._drawn else 0

    def _choice(
        self, index: int, text: str, logprobs: Json | None, finish: str | None = None
    ) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> Json | None:
        """Of the prompt, where it is told now, and of these tokens. Nothing foretells the first
        token of a prompt."""
        generation = self.generations[index]
        told: list[Row] = [(t.id, t.logprob, t.best) for t in tokens if t.logprob is not None]
        if not self._begun[index] and generation.scored is not None:
            following = generation.ids[1:].tolist()
            scored = zip(following, generation.scores, strict=True)
            rows = [(token, *score) for token, score in scored]
            told = [(int(generation.ids[0]), None, ()), *rows, *told]
        if not told:
            return None
        texts = [self._spelling.text(token) for token, _, _ in told]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if one is None else finite(one) for _, one, _ in told],
            "top_logprobs": [None if one is None else self._best(best) for _, one, best in told],
            "text_offset": offsets,
        }

    def _best(self, best: Sequence[tuple[int, float]]) -> dict[str, float]:
        """By their texts; of several tokens with the same one the likeliest."""
        worst_first = reversed(best)
        return {self._spelling.text(token): finite(logprob) for token, logprob in worst_first}


def finite(logprob: float | None) -> float:
    """As a number of JSON."""
    return logprob if logprob is not None and math.isfinite(logprob) else LEAST
