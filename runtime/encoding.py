"""Text to token ids, while other threads go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

LONG = 1 << 14  # characters, which take some milliseconds


def encoded(tokenizer: tokenizers.Tokenizer, text: str, special: bool) -> list[int]:
    """Ids of `text`, with the tokens that frame a prompt where `special`. `tokenizers` holds
    Python's lock while it encodes one text, and not while it encodes several, for which it keeps
    threads: so a long one is a list of one."""
    if len(text) < LONG:
        return tokenizer.encode(text, add_special_tokens=special).ids
    return tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids
