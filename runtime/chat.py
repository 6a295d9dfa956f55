"""Chat templates: a conversation rendered as the model's authors wrote it down, in Jinja, character
by character as `apply_chat_template` of `transformers` renders it.

A template is part of an untrusted bundle. The sandbox keeps it from Python's objects, its work is
counted and stopped when it is too much (`templates.meter`), and what it does wrong is one sentence.
It sees plain data only: a copy, without the methods of whatever the caller put in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jinja2
import numpy as np

from smoe.runtime.errors import EngineError
from smoe.runtime.templates.meter import Meter
from smoe.runtime.templates.sandbox import Sandbox

ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
    AssertionError, SyntaxError, RuntimeError, MemoryError,
)  # fmt: skip
REASONING = ("reasoning_content", "thinking", "reasoning")  # what templates call the same thing
MARK = "SMOE_GOES_ON_HERE "  # where a message that is to be continued ends


def render(
    template: str,
    messages: list[dict[str, Any]],
    settings: Mapping[str, Any],
    /,
    tools: list[dict[str, Any]] | None = None,
    documents: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | str = False,
    **variables: Any,
) -> str:
    """The text of `messages`: each a dict of `role` and what else the template reads, such as
    `content` (a text, or parts of one), `tool_calls`, `reasoning_content`.

    It ends with the opening of the model's next turn, unless `add_generation_prompt` is false or
    `continue_final_message` true: then it ends within the last message (in the field that it
    names, or its content), which the model goes on with. `tools` are JSON schemas, `documents`
    dicts; `variables` are the template's own. `settings` is tokenizer_config.json, whose special
    tokens are variables too. An `EngineError` says in one sentence what a template refuses.

    A rendering may make 4 million characters or run as many nodes of its template, and 32 more for
    each character that it is given: for a short conversation a second and some 60 MB at most. A
    template may have 65,536 characters, nest 100 deep, and count in integers of 16,384 bits.
    """
    goes_on = bool(continue_final_message)
    if goes_on and add_generation_prompt:
        raise EngineError(
            "continue_final_message and add_generation_prompt exclude each other: the model goes "
            "on with the last message, or begins a new one."
        )
    field = continue_final_message if isinstance(continue_final_message, str) else "content"
    try:
        conversation = [_message(message) for message in _dicts("messages", messages)]
        final = _marked(conversation, field, template) if goes_on else ""
        given = {
            **_special_tokens(settings),
            **_plain(variables),
            "messages": conversation,
            "tools": None if tools is None else _dicts("tools", tools),
            "documents": None if documents is None else _dicts("documents", documents),
            "add_generation_prompt": not goes_on
            if add_generation_prompt is None
            else add_generation_prompt,
        }
        sandbox = Sandbox(Meter(len(template) + len(repr(given))))
        rendered = sandbox.render(template, given)
    except ERRORS as error:
        said = str(error) or type(error).__name__
        end = "" if said.endswith((".", "!", "?")) else "."
        raise EngineError(f"The chat template cannot render these messages: {said}{end}") from error
    return _cut(rendered, final) if goes_on else rendered


def chosen(
    templates: Mapping[str, str], asked: str | None = None, tools: object | None = None
) -> str:
    """The template of a bundle that `asked` names, or `asked` itself; without it the one that fits
    (`tool_use` if there are tools, else `default`)."""
    if asked is not None:
        return templates.get(asked, asked)
    for name in ["tool_use"] * (tools is not None) + ["default"]:
        if name in templates:
            return templates[name]
    if templates:
        raise EngineError(
            f"This bundle has the chat templates {', '.join(sorted(templates))} and none is the "
            "default; name one."
        )
    raise EngineError(
        "This bundle has no chat template: the model was not made for chat. Use `smoe run`, or "
        "give a template with --chat-template FILE."
    )


def named_templates(template: object) -> dict[str, str]:
    """The templates in tokenizer_config.json's `chat_template`: one, or a list of named ones."""
    if isinstance(template, str):
        return {"default": template}
    entries = (
        [entry for entry in template if isinstance(entry, dict)]
        if isinstance(template, list)
        else []
    )
    pairs = [(entry.get("name"), entry.get("template")) for entry in entries]
    return {n: text for n, text in pairs if isinstance(n, str) and isinstance(text, str)}


def _dicts(what: str, values: object) -> list[dict[str, Any]]:
    plain = _plain(values)
    if not isinstance(plain, (list, tuple)) or not all(isinstance(v, dict) for v in plain):
        raise EngineError(f"{what} is {_short(values)}; a list of dicts is wanted.")
    if what == "messages" and not plain:
        raise EngineError("messages is empty; a conversation has at least one message.")
    return list(plain)


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates read it: without what is None, its reasoning under every name."""
    if not isinstance(message.get("role"), str):
        raise EngineError(f"The message {_short(message)} has no role, such as user or assistant.")
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in REASONING if name in kept), None)
    if reasoning is None:
        return kept
    return {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Variables such as `bos_token`: texts, or dicts with a text."""
    extra = settings.get("extra_special_tokens")
    entries = {name: value for name, value in settings.items() if name.endswith("_token")}
    entries |= extra if isinstance(extra, dict) else {}
    texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in entries.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _plain(value: Any) -> Any:
    """A copy in JSON's types; what is none of them becomes its type's name."""
    if value is None or type(value) in (str, bool, int, float):
        return value
    for scalar in (str, int, float):  # what a subclass holds, such as a member of an enumeration
        if isinstance(value, scalar):
            return getattr(scalar, f"__{scalar.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(element) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        kind = list if isinstance(value, list) else tuple
        return kind(_plain(element) for element in value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"


def _marked(conversation: list[dict[str, Any]], field: str, template: str) -> str:
    """Mark where the last message ends; returns the text that ends there."""
    message = conversation[-1]
    text = message.get(field)
    fields = [field]
    if field in REASONING:
        fields = [name for name in REASONING if message.get(name) == text]
    if text is None or not any(name in template for name in fields):
        where = "the last message" if text is None else "the chat template"
        raise EngineError(f"{where.capitalize()} has no {field!r} to continue.")
    if isinstance(text, str):
        message.update(dict.fromkeys(fields, text + MARK))
        return text
    parts = [part for part in text if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if not parts:
        raise EngineError("The last message has no text to continue.")
    text = parts[-1]["text"]
    parts[-1]["text"] = text + MARK
    return text


def _cut(rendered: str, final: str) -> str:
    """The text up to the mark, or to the last character before it if the template trims."""
    end = rendered.rfind(MARK.strip())
    if end < 0 or final.strip() not in rendered:
        raise EngineError(
            "The chat template does not render the last message as it is, so it cannot be "
            "continued; leave out continue_final_message."
        )
    text = rendered[:end].replace(MARK, "")  # a template may write a field twice
    return text if rendered.startswith(MARK, end) else text.rstrip()
