"""Calls that have to come: what a model writes is let through, nothing else is, and what comes of a
server is a call."""

import json
import re

import pytest

pytest.importorskip("uvicorn", reason="smoe[serve]")
llguidance = pytest.importorskip("llguidance", reason="smoe[serve]")
import tokenizers  # noqa: E402
from support.conversations import TEMPLATES  # noqa: E402
from support.server import serving, with_template  # noqa: E402

from smoe.runtime.serve.forced import call_grammar  # noqa: E402

WEATHER = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
OTHER = {"name": 'it "works"', "parameters": {"type": "object", "additionalProperties": False}}
ARGUMENTS = '{"city": "Köln", "days": 2}'
WRITTEN = {  # by template: what its model writes, and where it may not go on otherwise
    "qwen_tools": f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>',
    "mistral_tools": f'[TOOL_CALLS][{{"name": "weather", "arguments": {ARGUMENTS}}}]',
    "llama31_tools": f'{{"name": "weather", "parameters": {ARGUMENTS}}}',
    "harmony": (
        "<|channel|>analysis<|message|>hm\n, well<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.weather <|constrain|>json<|message|>{ARGUMENTS}"
    ),
    "coder": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nKöln\n</paramete\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
    ),
    "args": f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}",
}
OWN = {  # templates that are known by no more than this
    "coder": "{{ tools }}<tool_call><function=",
    "args": "{{ tools }}[TOOL_CALLS][ARGS]",
}
MARKS = [
    "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "<tool_call>",
    "</tool_call>", "[TOOL_CALLS]", "[ARGS]",
]  # fmt: skip


def _template(name: str) -> str:
    return OWN.get(name) or TEMPLATES[name]


def _bytes_tokenizer(marks: list[str]) -> tokenizers.Tokenizer:
    """Every byte is a token, and every mark."""
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model = tokenizers.models.BPE({letter: n for n, letter in enumerate(sorted(letters))}, [])
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<end>", *marks])
    return made


def _accepts(name: str, text: str, functions, marks: list[str]) -> bool:
    """Whether `text` is a whole call by the grammar."""
    tokenizer = _bytes_tokenizer(marks)
    special = {mark: tokenizer.token_to_id(mark) for mark in marks}
    grammar = call_grammar(_template(name), functions, special)
    known = llguidance.LLTokenizer(
        tokenizer.to_str(), tokenizer.get_vocab_size(), [tokenizer.token_to_id("<end>")]
    )
    matcher = llguidance.LLMatcher(known, llguidance.LLMatcher.grammar_from_lark(grammar))
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.encode(text).ids
    return (
        matcher.validate_tokens(ids) == len(ids)
        and all(matcher.consume_token(token) for token in ids)
        and matcher.is_accepting()
    )


@pytest.mark.parametrize("marks", [[], MARKS], ids=["spelled", "tokens"])
@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_model_writes_is_let_through_and_nothing_else(name, marks):
    text = WRITTEN[name]
    assert _accepts(name, text, [WEATHER], marks)
    assert _accepts(name, text, [OTHER, WEATHER], marks)
    assert not _accepts(name, text, [OTHER], marks)
    assert not _accepts(name, text[:-3], [WEATHER], marks)
    assert not _accepts(name, "Well. " + text, [WEATHER], marks)
    assert not _accepts(name, text.replace("city", "town"), [WEATHER], marks)
    assert not _accepts(name, text.replace('"days": 2', '"days": "2"').replace(
        "days>\n2", "days>\ntwo"), [WEATHER], marks)  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_a_schema_that_says_little_lets_any_arguments_through(name):
    for function in ({"name": "weather"}, {"name": "weather", "parameters": {}}):
        # Elements are those that a schema names.
        text = re.sub("<parameter.*</parameter>\n", "", WRITTEN[name], flags=re.DOTALL)
        assert _accepts(name, text, [function], MARKS)


@pytest.fixture(scope="module")
def talking(goldens, tmp_path_factory):
    """A server of a bundle whose template writes calls as Qwen's does."""
    bundle = with_template(goldens[-1], tmp_path_factory.mktemp("talking") / "talking.smoe")
    with serving(bundle) as client:
        yield client


FLAGS = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"],
         "additionalProperties": False}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": name, "parameters": FLAGS, "strict": True}}
         for name in ("lamp", "fan")]  # fmt: skip
ONE = {"type": "function", "function": {"name": "fan"}}
ASKED = {"messages": [{"role": "user", "content": "def main():"}], "tools": TOOLS, "seed": 1}


@pytest.mark.parametrize("choice", ["required", ONE])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_call_comes(talking, choice, temperature):
    asked = ASKED | {"tool_choice": choice, "temperature": temperature}
    reply = talking.ask("/v1/chat/completions", asked | {"parallel_tool_calls": False})
    assert reply.status == 200, reply.body
    (answer,) = reply.body["choices"]
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] in (("fan",) if choice == ONE else ("lamp", "fan"))
    assert json.loads(call["function"]["arguments"]).keys() == {"on"}
    assert answer["finish_reason"] == "tool_calls" and not answer["message"]["content"]
    events = talking.events("/v1/chat/completions", asked)
    deltas = [one["choices"][0]["delta"] for one in events[:-1] if one["choices"]]
    parts = [delta["tool_calls"][0] for delta in deltas if delta.get("tool_calls")]
    assert (
        "".join(p["function"].get("arguments", "") for p in parts)
        == (call["function"]["arguments"])
    )


NONSENSE = [{"properties": 3, "required": 4}, {"properties": {"a": 1}, "required": ["b"]}]
REFUSED = [
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "door"}}}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tool_choice": "required", "tools": []}, "tool_choice"),
    ({"tool_choice": "auto"}, "tools[0].function.strict"),
    ({"tool_choice": "none", "parallel_tool_calls": False}, "parallel_tool_calls"),
    ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
    ({"tool_choice": "required", "tools": [{"type": "function", "function": {
        "name": "f", "parameters": {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}},
    }}]}, "tools"),
]  # fmt: skip


@pytest.mark.parametrize("parameters", NONSENSE)
def test_what_is_no_schema_is_refused(talking, parameters):
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    asked = ASKED | {"tools": [tool], "tool_choice": "required"}
    reply = talking.ask("/v1/chat/completions", asked)
    assert reply.status == 400 and reply.body["error"]["param"] == "tools"


@pytest.mark.parametrize(("changes", "param"), REFUSED)
def test_what_cannot_be_is_refused_by_name(talking, changes, param):
    reply = talking.ask("/v1/chat/completions", ASKED | {"max_tokens": 4} | changes)
    assert reply.status == 400, reply.body
    assert reply.body["error"]["param"] == param
