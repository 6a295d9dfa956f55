"""What one record of a data set says: token ids, a conversation or text, under the names that
people give them."""

from __future__ import annotations

from dataclasses import dataclass

from smoe.prep.errors import PrepError

Message = dict[str, object]

CONVERSATIONS = ("messages", "conversations", "conversation")
# A question, what may be added to it, and its answer: a turn of a user and one of the model.
ASKED = ("prompt", "instruction", "question")
ADDED = "input"
ANSWERED = ("completion", "output", "response", "answer")
TEXTS = ("text", "content")
# Who speaks in records of the ShareGPT kind; other names are taken as they are.
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, with `role` and `content`."""

    messages: list[Message]


@dataclass(frozen=True)
class Document:
    """One piece of calibration text, and where it stands, for errors."""

    content: str | list[int] | Conversation
    where: str


def document(record: object, where: str) -> Document:
    """What a record holds; a `PrepError` that names `where` if it is nothing known."""
    if isinstance(record, dict):
        for reading in (_ids, _conversation, _answered, _text):
            content = reading(record)
            if content is not None:
                return Document(content, where)
    raise PrepError(
        f"{where} has neither a string `text` or `content`, nor token ids `input_ids`, nor "
        "`messages` or `conversations` of role and content, nor a `prompt` or `instruction` with a "
        "`completion`, `output` or `response`."
    )


def _ids(record: dict) -> list[int] | None:
    ids = record.get("input_ids")
    good = isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids)
    return ids if good else None


def _conversation(record: dict) -> Conversation | None:
    listed = next((record[name] for name in CONVERSATIONS if record.get(name)), None)
    messages = _messages(listed)
    if messages is None:
        return None
    system = record.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(messages)


def _messages(listed: object) -> list[Message] | None:
    """The messages of a list, if it is one of messages; tables write None for what one lacks."""
    if not isinstance(listed, list) or not listed:
        return None
    messages: list[Message] = []
    for said in listed:
        if not isinstance(said, dict):
            return None
        message = {name: value for name, value in said.items() if value is not None}
        if "from" in message and "role" not in message:
            speaker = message.pop("from")
            message = {
                "role": ROLES.get(str(speaker), speaker),
                "content": message.pop("value", ""),
            } | message
        message.setdefault("content", "")
        if not isinstance(message.get("role"), str):
            return None
        if not isinstance(message["content"], str | list):
            return None
        messages.append(message)
    return messages


def _answered(record: dict) -> Conversation | None:
    """A question and its answer: strings, or messages both."""
    asked = next((record[name] for name in ASKED if record.get(name)), None)
    answer = next((record[name] for name in ANSWERED if record.get(name)), None)
    first, last = _messages(asked), _messages(answer)
    if first and last:
        return Conversation(first + last)
    if not isinstance(asked, str) or not isinstance(answer, str):
        return None
    added = record.get(ADDED)
    if isinstance(added, str) and added:
        asked = f"{asked}\n\n{added}"
    turns: list[Message] = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answer},
    ]
    system = record.get("system")
    if isinstance(system, str) and system:
        turns.insert(0, {"role": "system", "content": system})
    return Conversation(turns)


def _text(record: dict) -> str | None:
    return next((record[name] for name in TEXTS if isinstance(record.get(name), str)), None)
