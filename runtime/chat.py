"""Chat templates: a conversation rendered as the model's authors wrote it down, in Jinja.

A template is part of an untrusted bundle. The sandbox keeps it from Python's objects, and what it
does wrong is one sentence; it can still loop for long, as any program can.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
import jinja2.sandbox

from smoe.runtime.errors import EngineError

ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
    SyntaxError, RuntimeError,
    MemoryError,
)  # fmt: skip


def render(
    template: str,
    messages: list[dict[str, Any]],
    settings: dict[str, Any],
    tools: list[Any] | None = None,
    documents: list[Any] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The text of `messages` (`role`, `content`) with the opening of the model's next turn.

    `settings` is tokenizer_config.json: its `..._token` entries are variables of the template, as
    in `transformers`.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda x, **options: json.dumps(
        x, ensure_ascii=False, **options
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    tokens = {key: _content(value) for key, value in settings.items() if key.endswith("_token")}
    try:
        return environment.from_string(template).render(
            messages=messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **tokens,
        )
    except ERRORS as error:
        raise EngineError(f"The chat template cannot render these messages: {error}.") from error


def _content(token: object) -> object:
    return token.get("content") if isinstance(token, dict) else token


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
