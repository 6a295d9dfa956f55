"""Templates of many models' kinds and conversations to render with them.

The templates under `templates/` were written here: one for each way in which known families use
Jinja (`x_...`: one for each kind of construct).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATES = {
    file.stem: file.read_bytes().decode("utf-8")  # line ends as they are
    for file in sorted((Path(__file__).parent / "templates").glob("*.jinja"))
}


def _turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": "a1b2c3d4e",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


WEATHER = [_call("weather", {"city": "Köln", "days": 2, "units": {"t": "C"}, "at": [1, 2.5]})]
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [_turn("user", " Hi there! ")],
    "system": [_turn("system", "Be brief.\n"), _turn("user", "2 < 3 & \"so\" it's…")],
    "turns": [
        _turn("system", "S"),
        _turn("user", "a"),
        _turn("assistant", "<think>\nhm\n</think>\n\n b \n"),
        _turn("user", "日本語 🙂\ttab"),
        _turn("assistant", "second"),
        _turn("user", "</think>"),
    ],
    "no_system": [_turn("user", "a"), _turn("assistant", " b "), _turn("user", "c")],
    "ends": [_turn("user", "a"), _turn("assistant", "The answer is ")],
    "tools": [
        _turn("user", "weather?"),
        _turn("assistant", None, tool_calls=WEATHER, reasoning_content="ask"),
        _turn("tool", '{"t": 7}', name="weather", tool_call_id="a1b2c3d4e"),
        _turn("assistant", "7 degrees"),
        _turn("user", "thanks"),
    ],
    "calls": [
        _turn("system", "S"),
        _turn("user", "weather twice?"),
        _turn("assistant", "wait", tool_calls=WEATHER * 2),
        _turn("tool", "7", name="weather"),
        _turn("tool", {"content": "8"}, name="weather"),
    ],
    "thinks": [
        _turn("user", "think"),
        _turn("assistant", "done", thinking="first\n", name="x"),
        _turn("user", "again"),
        _turn("assistant", "end", reasoning="\nlast", extra=None),
    ],
    "parts": [
        _turn("system", [{"type": "text", "text": "S "}]),
        _turn("user", [{"type": "image"}, {"type": "text", "text": " what? "}, {"type": "text",
              "text": "é"}]),
        _turn("assistant", [{"type": "text", "text": "a cat "}]),
    ],
    "alternates_not": [_turn("assistant", "I begin"), _turn("user", "a"), _turn("user", "b")],
    "odd_role": [_turn("developer", "D"), _turn("critic", "C")],
}  # fmt: skip

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": " The weather <of> a place's \"sky\". ",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Größe"},
                    "days": {"type": "integer", "default": 1},
                    "units": {"type": "string", "enum": ["C", "F"], "default": "C"},
                    "at": {"type": "array", "items": {"type": "number"}, "nullable": True},
                    "where": {"oneOf": [{"type": "string"}, {"type": "object"}], "default": "x"},
                    "map": {"type": "object", "properties": {"a": {"type": ["string", "null"]}},
                            "additionalProperties": {"type": "boolean"}, "required": ["a"]},
                },
                "required": ["city"],
            },
            "return": {"type": "string"},
        },
    },
    {"type": "function", "function": {"name": "now", "description": "Time.",
     "parameters": {"type": "object", "properties": {}}}},
]  # fmt: skip
DOCUMENTS = [{"title": "One", "text": "First\ntext."}, {"title": "", "text": "Zweiter — 2"}]
VARIABLES: dict[str, Any] = {
    "enable_thinking": False,
    "reasoning_effort": "high",
    "date_string": "1 Jan 2025",
    "thinking": True,
    "controls": {"citations": True, "length": "short"},
    "tools_in_user_message": False,
    "citation_mode": "fast",
    "custom": "mine",
    "eos_token": "<over>",
}
EVERYTHING = {"tools": TOOLS, "documents": DOCUMENTS, **VARIABLES}
GIVEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_prompt": {"add_generation_prompt": False},
    "tools": {"tools": TOOLS},
    "no_tools": {"tools": [], "documents": []},
    "documents": {"documents": DOCUMENTS},
    "variables": VARIABLES,
    "everything": EVERYTHING,
    "everything_no_prompt": {**EVERYTHING, "add_generation_prompt": False},
    "continued": {"continue_final_message": True},
    "thought_continued": {"continue_final_message": "reasoning_content", "tools": TOOLS},
}
SETTINGS = {
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False,
                  "normalized": False, "single_word": False, "special": True},
    "unk_token": None,
    "pad_token": "<pad>",
    "add_bos_token": True,
    "extra_special_tokens": {"image_token": "<img>"},
}  # fmt: skip
