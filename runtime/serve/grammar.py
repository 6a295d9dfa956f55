"""Answers that are JSON of a schema, or a call: of every draw only those tokens are left that go on
with it.

What may follow is llguidance's word (an Earley parser over the vocabulary's bytes); it reads the
bundle's tokenizer.json and nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from smoe.runtime.engine import Engine
from smoe.runtime.errors import EngineError
from smoe.runtime.serve.fields import SHOWN, Json
from smoe.runtime.serve.forced import call_grammar
from smoe.runtime.serve.refusal import Refusal

# Space that may stand everywhere is where a small model stays for ever.
COMPACT: Any = {"whitespace_flexible": False}


class Grammars:
    """Of an `engine`'s vocabulary, which is read when the first one is asked for."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._tokenizer: LLTokenizer | None = None

    def of(self, schema: Json) -> Grammar:
        """Of what `schema` describes; a `Refusal` says why it cannot be followed."""
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=COMPACT)
        return self._made(grammar, "response_format")

    def of_call(self, template: str, functions: Sequence[Json]) -> Grammar:
        """Of one call of one of `functions`, as the model of a chat `template` writes it."""
        tokenizer = self._engine.text.tokenizer
        known = {} if tokenizer is None else tokenizer.get_added_tokens_decoder()
        special = {token.content: number for number, token in known.items() if token.special}
        grammar = LLMatcher.grammar_from_lark(call_grammar(template, functions, special))
        return self._made(grammar, "tools")

    def _made(self, grammar: str, param: str) -> Grammar:
        matcher = LLMatcher(self._read(param), grammar)
        if matcher.is_error():
            said = matcher.get_error().strip().splitlines() or ["it has no words"]
            raise Refusal(f"This schema cannot be followed: {said[0][: 2 * SHOWN]}.", param=param)
        return Grammar(matcher)

    def _read(self, param: str) -> LLTokenizer:
        model, tokenizer = self._engine.manifest.model, self._engine.text.tokenizer
        if tokenizer is None or not model.end_ids:
            raise Refusal(
                "This bundle has no tokenizer or no end token, without which an answer cannot be "
                f"held to a format; leave {param} out.",
                param=param,
            )
        if self._tokenizer is None:
            # A tokenizer may know more tokens than the model has logits of.
            size = max(model.vocabulary, tokenizer.get_vocab_size())
            self._tokenizer = LLTokenizer(tokenizer.to_str(), size, list(model.end_ids))
        return self._tokenizer


class Grammar:
    """One answer's way through what is allowed."""

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def allow(self, logits: np.ndarray) -> np.ndarray:
        """float32 `[vocabulary]`, a copy that is -inf where a token does not go on with it."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
        if self._matcher.is_error() or not allowed.any():
            raise EngineError("No token goes on with the format of the answer; change the schema.")
        return np.where(allowed, logits, -np.inf).astype(np.float32)

    def take(self, token: int) -> None:
        """It was drawn."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
