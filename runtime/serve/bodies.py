"""What clients may ask: every field of every body, once, and what it becomes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from smoe.runtime.generation import MOST_LOGPROBS
from smoe.runtime.sampling import Sampling
from smoe.runtime.serve.fields import (
    Anything,
    Flag,
    Json,
    Kind,
    Listed,
    Number,
    Object,
    Only,
    Words,
    object_schema,
    read_fields,
    unfit,
    utf8,
)
from smoe.runtime.serve.refusal import Refusal
from smoe.runtime.text import StopWhen

MOST_TOKENS = 1 << 24
MOST_TEXT = 1 << 22  # characters of one text
MOST_MESSAGES, MOST_PARTS = 4096, 256
MOST_TOOLS, MOST_CALLS = 256, 256
MOST_STOPS, LONGEST_STOP = 16, 1024
MOST_PROMPTS = 64  # of a completion, which count as as many requests
COMPLETION_TOKENS = 16  # where none are stated, as with OpenAI; a chat takes what is left
LEAST_MASS = 1e-9  # of a nucleus: the best token alone
WHOLE = {"integer": True}

_TOKENS = Number(1, MOST_TOKENS, **WHOLE)
DRAWING: dict[str, Kind] = {
    "model": Words(256),
    "max_tokens": _TOKENS,
    "stop": Listed(Words(LONGEST_STOP), MOST_STOPS, single=True),
    "temperature": Number(0, 2),
    "top_p": Number(0, 1),
    "top_k": Number(-1, 1 << 30, **WHOLE),
    "seed": Number(-(1 << 63), (1 << 63) - 1, **WHOLE),
    "stream": Flag(),
    "stream_options": Object({"include_usage": Flag(), "include_obfuscation": Only((False,))}),
    "loss": Number(0, 1000),
    "n": Only((1,), "one answer is given to a request"),
    "presence_penalty": Only((0,), "tokens are not penalised here"),
    "frequency_penalty": Only((0,), "tokens are not penalised here"),
    "repetition_penalty": Only((1,), "tokens are not penalised here"),
    "min_p": Only((0,), "top_k and top_p are the filters here"),
    "logit_bias": Only(({},), "logits are not changed here"),
    "user": Anything(),
}


class Content:
    """What a message says: a text, or parts of one, which become lines."""

    _parts = Listed(
        Object({"type": Words(64), "text": Words(MOST_TEXT)}, required=("type",)), MOST_PARTS
    )

    def read(self, name: str, value: Any) -> str:
        if isinstance(value, str):
            return Words(MOST_TEXT).read(name, value)
        if not isinstance(value, list):
            raise unfit(name, value, "a text, or a list of parts,")
        for number, part in enumerate(value):
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise Refusal(
                    f"{name}[{number}].type is {kind[:64]!r}; this model reads text only.",
                    param=f"{name}[{number}].type",
                    code="unsupported_parameter",
                )
        parts = self._parts.read(name, value)
        return "\n".join(part.get("text", "") for part in parts)

    def schema(self) -> Json:
        return {"oneOf": [Words(MOST_TEXT).schema(), self._parts.schema()]}


class Arguments:
    """Of a call in a message: an object, in text as clients have it, which templates want as it
    is."""

    def read(self, name: str, value: Any) -> Any:
        if not isinstance(value, str):
            return Object().read(name, value)
        utf8(name, value)
        try:
            given = json.loads(value or "{}")
        except (ValueError, RecursionError):
            return value  # a model's own mistake: it is shown that
        return given if isinstance(given, dict) else value

    def schema(self) -> Json:
        return {"anyOf": [{"type": "string"}, {"type": "object"}]}


_CALL: dict[str, Kind] = {
    "id": Words(256),
    "type": Only(("function",)),
    "index": Anything(),
    "function": Object({"name": Words(256), "arguments": Arguments()}, ("name", "arguments")),
}
_FUNCTION: dict[str, Kind] = {
    "name": Words(256),
    "description": Words(1 << 16),
    "parameters": Object(),
    "strict": Flag(),
}
_TOOL: dict[str, Kind] = {
    "type": Only(("function",)),
    "function": Object(_FUNCTION, required=("name",)),
}


class Choice:
    """Whether tools are called: a word, or the function that is called."""

    _word = Only(("none", "auto", "required"))
    _named = Object(
        {"type": Only(("function",)), "function": Object({"name": Words(256)}, ("name",))},
        required=("type", "function"),
    )

    def read(self, name: str, value: Any) -> Any:
        return (self._named if isinstance(value, dict) else self._word).read(name, value)

    def schema(self) -> Json:
        return {"oneOf": [self._word.schema(), self._named.schema()]}


_SCHEMA: dict[str, Kind] = {
    "name": Words(256),
    "description": Words(1 << 16),
    "schema": Object(),
    "strict": Flag(),  # it is followed either way
}
MESSAGE: dict[str, Kind] = {
    "role": Words(64),
    "content": Content(),
    "name": Words(256),
    "reasoning_content": Words(MOST_TEXT),
    "refusal": Anything(),  # an older answer's, which says nothing to a model
    "annotations": Anything(),
    "tool_calls": Listed(Object(_CALL, required=("function",)), MOST_CALLS),
    "tool_call_id": Words(256),
}
CHAT: dict[str, Kind] = {
    **DRAWING,
    "messages": Listed(Object(MESSAGE, required=("role",)), MOST_MESSAGES, least=1),
    "max_completion_tokens": _TOKENS,
    "logprobs": Flag(),
    "top_logprobs": Number(0, MOST_LOGPROBS, **WHOLE),
    "reasoning_effort": Words(32),
    "chat_template_kwargs": Object(),
    "response_format": Object(
        {"type": Only(("text", "json_object", "json_schema")), "json_schema": Object(_SCHEMA)},
        required=("type",),
    ),
    "tools": Listed(Object(_TOOL, required=("type", "function")), MOST_TOOLS),
    "tool_choice": Choice(),
    "parallel_tool_calls": Flag(),
    "modalities": Only((["text"],)),
    "store": Only((False,)),
    "metadata": Anything(),
    "service_tier": Only(("auto", "default")),
    "prompt_cache_key": Anything(),
    "safety_identifier": Anything(),
}


class Prompts:
    """A text, token ids, or a list of either."""

    def read(self, name: str, value: Any) -> list[str | list[int]]:
        single = isinstance(value, str) or (
            isinstance(value, list) and value and all(_is_id(one) for one in value)
        )
        prompts = [value] if single else value
        if not isinstance(prompts, list) or not prompts:
            raise unfit(name, value, "a text, token ids, or a list of either,")
        if len(prompts) > MOST_PROMPTS:
            raise Refusal(
                f"{name} has {len(prompts)} prompts; up to {MOST_PROMPTS} are taken at once.",
                param=name,
            )
        return [self._one(name, number, one) for number, one in enumerate(prompts)]

    def _one(self, name: str, number: int, value: Any) -> str | list[int]:
        if isinstance(value, list) and all(_is_id(one) for one in value):
            return value
        return Words(MOST_TEXT).read(f"{name}[{number}]", value)

    def schema(self) -> Json:
        ids = {"type": "array", "items": {"type": "integer", "minimum": 0}}
        one = {"type": "string"}
        many = [{"type": "array", "items": kind, "maxItems": MOST_PROMPTS} for kind in (one, ids)]
        return {"anyOf": [one, ids, *many]}


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


COMPLETION: dict[str, Kind] = {
    **DRAWING,
    "prompt": Prompts(),
    "max_tokens": Number(0, MOST_TOKENS, **WHOLE),
    "echo": Flag(),
    "logprobs": Number(0, MOST_LOGPROBS, **WHOLE),
    "best_of": Only((1,), "one answer is given to a request"),
    "suffix": Only(("",), "models continue a text here and fill no gap"),
}
TOKENIZE: dict[str, Kind] = {
    "model": Words(256),
    "prompt": Words(MOST_TEXT),
    "add_special_tokens": Flag(),
}


@dataclass(frozen=True)
class Drawing:
    """How an answer is drawn, and told: up to `tokens` of it (None: as many as there is room for),
    in a `stream`, with `usage` at its end."""

    model: str | None
    tokens: int | None
    sampling: Sampling
    stop: StopWhen
    loss: float | None
    logprobs: int | None
    stream: bool
    usage: bool


@dataclass(frozen=True)
class Chat:
    """`messages` with a template's `variables`; `tools` are those that may be called (None: there
    are none), `forced` the functions of which one must be, and `schema` is that of an answer in
    JSON (None: it is free)."""

    messages: list[Json]
    tools: list[Json] | None
    forced: list[Json]
    schema: Json | None
    variables: Json
    how: Drawing


@dataclass(frozen=True)
class Completion:
    """`prompts` to be continued, each an answer of its own; told again with `echo`."""

    prompts: list[str | list[int]]
    echo: bool
    how: Drawing


def chat(body: Json) -> Chat:
    """A body of `/v1/chat/completions`."""
    given = read_fields(CHAT, body, ("messages",))
    logprobs = given.get("top_logprobs", 0) if given.get("logprobs") else None
    if logprobs is None and given.get("top_logprobs"):
        raise Refusal("top_logprobs has no effect without logprobs: true.", param="top_logprobs")
    variables = given.get("chat_template_kwargs", {})
    for name in ("messages", "template", "tools", "documents"):
        if name in variables:
            raise Refusal(
                f"{name} is no variable of a template; leave it out.", param="chat_template_kwargs"
            )
    if "reasoning_effort" in given:
        variables = {"reasoning_effort": given["reasoning_effort"]} | variables
    most = [given[n] for n in ("max_tokens", "max_completion_tokens") if n in given]
    how = _drawing(given, min(most, default=None), logprobs)
    tools = given.get("tools") if given.get("tool_choice") != "none" else None
    schema = _schema(given.get("response_format", {"type": "text"}))
    if schema is not None and tools:
        raise Refusal(
            "Tools and a response_format exclude each other here: a call is in no format of yours.",
            param="response_format",
            code="unsupported_parameter",
        )
    forced = _forced(given, tools or [])
    return Chat(given["messages"], tools or None, forced, schema, variables, how)


def _forced(given: Json, tools: list[Json]) -> list[Json]:
    """The functions of which one must be called."""
    choice, functions = given.get("tool_choice", "auto"), [tool["function"] for tool in tools]
    if choice in ("none", "auto"):
        _refuse_free(given, functions)
        return []
    if isinstance(choice, dict):
        wanted = choice["function"]["name"]
        functions = [function for function in functions if function["name"] == wanted]
    if not functions:
        raise Refusal("tool_choice asks for a tool that tools does not have.", param="tool_choice")
    return functions


def _refuse_free(given: Json, functions: list[Json]) -> None:
    """What is said of calls that a model makes or not as it wants to."""
    strict = [n for n, function in enumerate(functions) if function.get("strict")]
    names = [f"tools[{n}].function.strict" for n in strict]
    names += [] if given.get("parallel_tool_calls", True) else ["parallel_tool_calls"]
    if names:
        raise Refusal(
            f"{names[0]} is about a call that has to come, and this model calls what it wants to; "
            "let tool_choice ask for one, or leave it out.",
            param=names[0],
            code="unsupported_parameter",
        )


def _schema(given: Json) -> Json | None:
    """What a response_format asks for."""
    if given["type"] == "json_object":
        return {"type": "object"}
    if given["type"] == "text":
        return None
    schema = given.get("json_schema", {}).get("schema")
    if schema is None:
        name = "response_format.json_schema.schema"
        raise Refusal(f"{name} is missing.", param=name)
    return schema


def addressed(messages: list[Json], template: str) -> list[Json]:
    """Messages whose roles a template knows: what newer clients call developer is the system of
    most models."""
    if "developer" in template:
        return messages
    roles = {"developer": "system"}
    return [one | {"role": roles.get(one["role"], one["role"])} for one in messages]


def completion(body: Json) -> Completion:
    """A body of `/v1/completions`."""
    given = read_fields(COMPLETION, body, ("prompt",))
    tokens, echo = given.get("max_tokens", COMPLETION_TOKENS), given.get("echo", False)
    if not tokens and not echo:
        raise Refusal("max_tokens is 0, which is for echo only; ask for one.", param="max_tokens")
    return Completion(given["prompt"], echo, _drawing(given, tokens, given.get("logprobs")))


def tokenize(body: Json) -> tuple[str, bool]:
    """A body of `/tokenize`: a text, and whether it is framed as the model's authors do."""
    given = read_fields(TOKENIZE, body, ("prompt",))
    return given["prompt"], given.get("add_special_tokens", True)


def _drawing(given: Json, tokens: int | None, logprobs: int | None) -> Drawing:
    options, stream = given.get("stream_options"), given.get("stream", False)
    if options is not None and not stream:
        raise Refusal("stream_options has no effect without stream.", param="stream_options")
    stops = given.get("stop", [])
    if "" in stops:
        raise Refusal("A stop string is empty; it would stop before the first token.", param="stop")
    return Drawing(
        model=given.get("model"),
        tokens=tokens,
        sampling=_sampling(given),
        stop=StopWhen(tuple(stops)),
        loss=given.get("loss"),
        logprobs=logprobs,
        stream=stream,
        usage=bool(options and options.get("include_usage")),
    )


def _sampling(given: Json) -> Sampling:
    """At temperature 0 the best token is drawn, whatever else would be drawn among."""
    temperature = given.get("temperature", 1.0)
    if temperature < 1e-4:
        return Sampling()
    seed = given.get("seed")
    return Sampling(
        temperature=temperature,
        top_k=max(0, given.get("top_k", 0)),
        top_p=max(LEAST_MASS, given.get("top_p", 1.0)),
        seed=None if seed is None else seed % (1 << 64),
    )


SCHEMAS = {
    "Chat": object_schema(CHAT, ("messages",)),
    "Completion": object_schema(COMPLETION, ("prompt",)),
    "Tokenize": object_schema(TOKENIZE, ("prompt",)),
}
