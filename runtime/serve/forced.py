"""A call that has to come, in the way in which a template's model writes calls (`calls`), as a
grammar for llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from smoe.runtime.serve.calls import Json

# Arguments as models were shown them: what `json.dumps` writes.
SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANYTHING = "/(.|\\n)*/"
Rules = list[str]


class Lark:
    """Pieces of a grammar in llguidance's variant of Lark. `special` are the ids of control tokens,
    which no text spells."""

    def __init__(self, special: Mapping[str, int]):
        self._special = special

    def mark(self, text: str) -> str:
        """A mark that the model knows as a token, or a text."""
        return f"<[{self._special[text]}]>" if text in self._special else quoted(text)

    def text(self, rule: str, mark: str) -> str:
        """Any text, up to a mark."""
        if mark in self._special:  # no text spells it
            return f"{rule}: {ANYTHING} {self.mark(mark)}"
        return f"{rule}[suffix={quoted(mark)}]: {ANYTHING}"

    def arguments(self, rule: str, schema: Json) -> Rules:
        """JSON of a schema."""
        return [f"{rule}: %json {json.dumps(schema | {'x-guidance': SPACED})}"]


def call_grammar(template: str, functions: Sequence[Json], special: Mapping[str, int]) -> str:
    """Of one call of one of `functions`, as the model of a chat `template` writes it."""
    lark = Lark(special)
    write = next(write for mark, write in WAYS.items() if mark in template)
    names = [f"call{number}" for number in range(len(functions))]
    rules = [
        rule
        for name, function in zip(names, functions, strict=True)
        for rule in write(lark, name, function)
    ]
    return "\n".join([*_start(template, lark), f"calls: {' | '.join(names)}", *rules])


def _start(template: str, lark: Lark) -> Rules:
    """A thought may come before the call where thoughts are a channel (gpt-oss)."""
    if "<|channel|>" not in template:
        return ["start: calls"]
    channel, message, begin = map(lark.mark, ("<|channel|>", "<|message|>", "<|start|>"))
    thought = f'thought: {channel} "analysis" {message} thinks {begin} "assistant"'
    return ["start: thought? calls", thought, lark.text("thinks", "<|end|>")]


def _harmony(lark: Lark, rule: str, function: Json) -> Rules:
    channel, constrain, message = map(lark.mark, ("<|channel|>", "<|constrain|>", "<|message|>"))
    to = quoted(f"commentary to=functions.{function['name']} ")
    head = f'{channel} {to} {constrain} "json" {message}'
    return [f"{rule}: {head} {rule}_arguments", *_arguments(lark, rule, function)]


def _tags(lark: Lark, rule: str, function: Json) -> Rules:
    opening, closing = lark.mark("<tool_call>"), lark.mark("</tool_call>")
    head = quoted(f'\n{{"name": {json.dumps(function["name"])}, "arguments": ')
    body = f"{head} {rule}_arguments {quoted('}' + chr(10))}"
    return [f"{rule}: {opening} {body} {closing}", *_arguments(lark, rule, function)]


def _elements(lark: Lark, rule: str, function: Json) -> Rules:
    """Each argument an element: a text up to its end, or JSON of another type."""
    schema = function.get("parameters", {})
    required, properties = schema.get("required"), schema.get("properties")
    required = required if isinstance(required, list) else []
    rules, parts = Rules(), []
    for number, (key, known) in enumerate(
        properties.items() if isinstance(properties, dict) else ()
    ):
        part = f"{rule}_{number}"
        parts.append(part if key in required else f"{part}?")
        head, tail = quoted(f"<parameter={key}>\n"), "\n</parameter>\n"
        if isinstance(known, dict) and known.get("type", "string") != "string":
            rules += [f"{part}: {head} {part}_value {quoted(tail)}"]
            rules += lark.arguments(f"{part}_value", known)
        else:
            rules += [f"{part}: {head} {part}_text", lark.text(f"{part}_text", tail)]
    opening, closing = lark.mark("<tool_call>"), lark.mark("</tool_call>")
    head, tail = quoted(f"\n<function={function['name']}>\n"), quoted("</function>\n")
    return [f"{rule}: {opening} {head} {' '.join(parts)} {tail} {closing}", *rules]


def _listed(lark: Lark, rule: str, function: Json) -> Rules:
    head = quoted(f'[{{"name": {json.dumps(function["name"])}, "arguments": ')
    body = f"{lark.mark('[TOOL_CALLS]')} {head} {rule}_arguments {quoted('}]')}"
    return [f"{rule}: {body}", *_arguments(lark, rule, function)]


def _named(lark: Lark, rule: str, function: Json) -> Rules:
    name, opening, between = quoted(function["name"]), *map(lark.mark, ("[TOOL_CALLS]", "[ARGS]"))
    body = f"{opening} {name} {between} {rule}_arguments"
    return [f"{rule}: {body}", *_arguments(lark, rule, function)]


def _bare(lark: Lark, rule: str, function: Json) -> Rules:
    head = quoted(f'{{"name": {json.dumps(function["name"])}, "parameters": ')
    return [f'{rule}: {head} {rule}_arguments "}}"', *_arguments(lark, rule, function)]


def _arguments(lark: Lark, rule: str, function: Json) -> Rules:
    return lark.arguments(f"{rule}_arguments", function.get("parameters", {"type": "object"}))


def quoted(text: str) -> str:
    """A text in a grammar."""
    return json.dumps(text, ensure_ascii=False)


# By what a template writes; the first that it does.
WAYS = {
    "<|channel|>": _harmony,
    "<function=": _elements,
    "<tool_call>": _tags,
    "[ARGS]": _named,
    "[TOOL_CALLS]": _listed,
    "ipython": _bare,
}
