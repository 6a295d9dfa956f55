"""Calls of tools as models write them, read into a name and arguments in JSON.

Each way of writing has its place in `SYNTAXES`, found by what a chat template writes itself:

* JSON between `<tool_call>` and `</tool_call>` (Hermes, Qwen), or there
  `<function=NAME><parameter=KEY>VALUE</parameter></function>` (Qwen-Coder),
* `[TOOL_CALLS]` and a list in JSON, or `NAME[ARGS]{…}` (Mistral),
* an answer that is nothing but JSON, behind `<|python_tag|>` or not (Llama 3).

Channels (gpt-oss) are in `channels`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
NAMED = re.compile(r"\s*([\w.-]+)\[ARGS\]")


@dataclass(frozen=True)
class Called:
    """A call: `arguments` is a JSON object in text, as clients read it."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Calls:
    """Where calls stand: from `opening` to `closing` (None: the end of the answer). Without an
    `opening` the whole answer may be one."""

    opening: str
    closing: str | None
    bare: bool = False


# What a template writes, and what its model does then.
SYNTAXES = {
    "<tool_call>": Calls("<tool_call>", "</tool_call>"),
    "[TOOL_CALLS]": Calls("[TOOL_CALLS]", None),
    "ipython": Calls("<|python_tag|>", None, bare=True),
}


def read_calls(text: str, tools: Mapping[str, Json]) -> list[Called] | None:
    """The calls in `text`, which stood where calls stand; None if it is none after all. `tools` are
    the JSON schemas of arguments by the tool's name, for values that are written without types."""
    functions = _elements(text, "function")
    if functions:
        return [_written_out(name, body, tools) for name, body in functions]
    called, left = [], text
    while named := NAMED.match(left):
        arguments, end = _decoded(left[named.end() :])
        if not isinstance(arguments, dict):
            return None
        called.append(Called(named[1], json.dumps(arguments, ensure_ascii=False)))
        left = left[named.end() + end :]
    if called:
        return called
    while left.strip(" \n;,"):
        value, end = _decoded(left)
        found = _objects(value)
        if not found:
            return None
        called += found
        left = left[end:]
    return called or None


def _decoded(text: str) -> tuple[Any, int]:
    """The JSON value that a text begins with, and where it ends; None where it does not."""
    start = len(text) - len(text.lstrip(" \n\t;,"))
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, len(text)


def _objects(value: Any) -> list[Called]:
    """Of an object with a name and arguments, or a list of such; [] if it is something else."""
    called = []
    for one in value if isinstance(value, list) else [value]:
        if not isinstance(one, dict) or not isinstance(one.get("name"), str):
            return []
        arguments = one.get("arguments", one.get("parameters", {}))
        if isinstance(arguments, str):
            arguments, _ = _decoded(arguments)
        if not isinstance(arguments, dict):
            return []
        called.append(Called(one["name"], json.dumps(arguments, ensure_ascii=False)))
    return called


def _elements(text: str, kind: str) -> list[tuple[str, str]]:
    """Names and insides of `<kind=NAME>…</kind>`."""
    opened = [piece.partition(">") for piece in text.split(f"<{kind}=")[1:]]
    return [(n.strip(), rest.partition(f"</{kind}>")[0]) for n, closed, rest in opened if closed]


def _written_out(name: str, body: str, tools: Mapping[str, Json]) -> Called:
    schema = tools.get(name, {}).get("properties", {})
    arguments = {}
    for key, written in _elements(body, "parameter"):
        value = written.removeprefix("\n").removesuffix("\n")
        known = schema.get(key, {}) if isinstance(schema, dict) else {}
        typed = isinstance(known, dict) and known.get("type", "string") != "string"
        parsed, end = _decoded(value) if typed else (None, 0)
        arguments[key] = parsed if typed and end == len(value.rstrip()) else value
    return Called(name, json.dumps(arguments, ensure_ascii=False))
