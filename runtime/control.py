"""Control tokens in a conversation: the template's own are control tokens, a user's are text.

Which control tokens a user spelled cannot be seen in what a template has rendered. So each is
marked before with a character on either side that occurs nowhere else, and what is marked
afterwards is encoded without looking for control tokens; all else as it always is. A conversation
that spells none is not touched, so that its ids are those of the rendered text. `transformers` does
so where it is asked to (`sanitize_control_tokens`), and gives the same ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from smoe.runtime.encoding import encoded
from smoe.runtime.errors import EngineError

if TYPE_CHECKING:
    import tokenizers

PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))  # characters that mean nothing


class Written(str):
    """What a model wrote itself, with the special tokens that it wrote: these stay what they
    are."""


def control_tokens(
    tokenizer: tokenizers.Tokenizer, template: str, named: Collection[str] | None = None
) -> set[str]:
    """The tokens that a user's text may not give: special ones, and of the other added ones those
    that are `named`, or else that the template writes."""
    return {
        token.content
        for token in tokenizer.get_added_tokens_decoder().values()
        if token.special
        or (named is not None and token.content in named)
        or (named is None and token.content in template and not token.content.isspace())
    } - {""}


class Marks:
    """The marks around each of `controls` in what a user `given`; `spelled` is whether there are
    any."""

    def __init__(self, controls: Collection[str], given: Any, template: str):
        longest_first = sorted(controls, key=len, reverse=True)
        self._controls = controls
        self._control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        texts = list(_strings(given))
        self.spelled = any(self._control.search(text) for text in texts)
        if self.spelled:
            self._start, self._end = _unused([*texts, template])

    def put(self, given: Any) -> Any:
        """`given` with its marks: of strings in lists and dicts; keys stay."""
        if isinstance(given, Written) or not self.spelled:
            return given
        if isinstance(given, str):
            return self._control.sub(f"{self._start}\\g<0>{self._end}", given)
        if isinstance(given, dict):
            return {key: self.put(value) for key, value in given.items()}
        if isinstance(given, list | tuple):
            return [self.put(value) for value in given]
        return given

    def encode(self, tokenizer: tokenizers.Tokenizer, rendered: str) -> list[int]:
        """Token ids of what the template made of marked text. A template that takes text apart may
        leave a mark alone: that is dropped, but what was apart does not join."""
        start, end = (f"(?:{c}|{re.escape(_escaped(c))})" for c in (self._start, self._end))
        marked = f"{start}({self._control.pattern}){end}|{start}|{end}"
        pieces = re.split(marked, rendered)  # text, control token or None, text, ..., text
        ids = _encode(tokenizer, pieces[0])
        for number, piece in enumerate(pieces[1:], 1):
            if piece and number % 2:
                ids += self._as_text(tokenizer, piece)
            elif piece:
                ids += _inside(tokenizer, piece, _encode)
        return ids

    def _as_text(self, tokenizer: tokenizers.Tokenizer, control: str) -> list[int]:
        """The ids of a control token's text, none of which is a control token: where the vocabulary
        has the text as a whole too, it is spelled in two parts."""
        forbidden = {tokenizer.token_to_id(text) for text in self._controls} - _unknown(tokenizer)
        for parts in ([control], [control[:1], control[1:]], list(control)):
            ids = [i for part in parts for i in _inside(tokenizer, part, _encode_plain)]
            if not forbidden.intersection(ids):
                return ids
        raise EngineError(
            f"A message spells the control token {control!r}, and this model's tokenizer has no "
            "other spelling of it; leave it out."
        )


def _strings(given: Any) -> Iterator[str]:
    if isinstance(given, str) and not isinstance(given, Written):
        yield given
    elif isinstance(given, dict):
        for value in given.values():
            yield from _strings(value)
    elif isinstance(given, list | tuple):
        for value in given:
            yield from _strings(value)


def _unused(texts: list[str]) -> tuple[str, str]:
    """Two characters that occur in none of `texts`, as themselves or as JSON escapes them."""
    whole = "\0".join(texts)
    unused = (
        character
        for code in (code for plane in PRIVATE for code in plane)
        if (character := chr(code)) not in whole and _escaped(character) not in whole.lower()
    )
    try:
        return next(unused), next(unused)
    except StopIteration:
        raise EngineError(
            "The messages hold every character of the private-use planes; leave some out."
        ) from None


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1]


def _inside(
    tokenizer: tokenizers.Tokenizer,
    text: str,
    encode: Callable[[tokenizers.Tokenizer, str], list[int]],
) -> list[int]:
    """Ids of `text` that is not the start: a tokenizer that puts a space in front of a text does so
    in front of the line break that goes before it here, and is taken off again."""
    newline, ids = _encode(tokenizer, "\n"), encode(tokenizer, f"\n{text}")
    return ids[len(newline) :] if ids[: len(newline)] == newline else encode(tokenizer, text)


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return encoded(tokenizer, text, special=False)


def _unknown(tokenizer: tokenizers.Tokenizer) -> set[int | None]:
    """The token of what is not in the vocabulary: special, but any text may give it."""
    named = getattr(tokenizer.model, "unk_token", None)
    if named is not None:
        return {tokenizer.token_to_id(named)}
    return set(_encode_plain(tokenizer, chr(PRIVATE[-1][-1])))


def _encode_plain(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """Ids of `text` as if no token had been added to the vocabulary."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    words = [text]
    if tokenizer.pre_tokenizer is not None:
        words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    return [token.id for word in words for token in tokenizer.model.tokenize(word)]
