"""What an answer is taken apart into: thoughts, what is said, calls; however it is cut into
pieces."""

import json
import random

import pytest
from support.conversations import TEMPLATES

from smoe.runtime.serve.calls import Called
from smoe.runtime.serve.channels import Channels, Said

HIDDEN = {
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<think>",
    "</think>",
    "<|constrain|>",
    "</s>",
}
TOOLS = {
    "weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {}}},
    "add": {
        "properties": {"a": {"type": "integer"}, "b": {"type": "number"}, "c": {"type": "string"}}
    },
}
WEATHER = Called("weather", '{"city": "Köln", "days": 2}')
ADD = Called("add", '{"a": 1, "b": 2.5, "c": "3"}')


def _taken(template, prompt, text, tools=TOOLS, cuts=()):
    """Fields of an answer, joined, and its calls."""
    reader = Channels.of(template).reader(HIDDEN, prompt, tools)
    fields: dict[str, str] = {}
    calls = []
    ends = [*cuts, len(text)]
    parts = [
        part
        for start, end in zip([0, *cuts], ends, strict=True)
        for part in reader.push(text[start:end])
    ]
    for part in [*parts, *reader.finish()]:
        if isinstance(part, Said):
            fields[part.field] = fields.get(part.field, "") + part.text
        else:
            calls.append(part)
    return fields, calls


ARGUMENTS = '{"city": "Köln", "days": 2}'
ONE = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
TWO = f"<tool_call>{ONE}</tool_call>\n<tool_call>{ONE}</tool_call>"
LLAMA = f'{{"name": "weather", "parameters": {ARGUMENTS}}}'
CODER = (
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2.5\n</parameter>"
    "\n<parameter=c>\n3\n</parameter>\n</function>\n</tool_call>"
)
THINKS = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
LOOKS = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
SAYS = "<|channel|>final<|message|>So.\n<|return|>"
ASKS = f" to=functions.weather<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>"
ASKS_LATE = f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{ARGUMENTS}"
CASES = [  # template, end of the prompt, answer, thought, content, calls
    ("qwen_thinking", "", "<think>\nhm, well\n</think>\n\nSo.<|im_end|>", "hm, well", "So.", []),
    ("qwen_thinking", "<think>\n", "hm\n\n</think>\n\na\n b\n", "hm", "a\n b\n", []),
    ("qwen_thinking", "", "none <b> 1 < 2 <thin", None, "none <b> 1 < 2 <thin", []),
    ("qwen_thinking", "", "<think>never ends", "never ends", None, []),
    ("qwen_tools", "", f"<tool_call>\n{ONE}\n</tool_call><|im_end|>", None, None, [WEATHER]),
    ("qwen_tools", "", f"Well.\n{TWO}", None, "Well.", [WEATHER, WEATHER]),
    ("qwen_tools", "", "<tool_call>not json</tool_call>", None, "not json", []),
    ("qwen_tools", "", f"<tool_call>{ONE}", None, None, [WEATHER]),
    ("qwen_tools", "", "plain {x}", None, "plain {x}", []),
    ("qwen_tools", "", CODER, None, None, [ADD]),
    ("mistral_tools", "", f"[TOOL_CALLS] [{ONE}, {ONE}]</s>", None, None, [WEATHER, WEATHER]),
    ("mistral_tools", "", f"[TOOL_CALLS] [{ONE}]", None, None, [WEATHER]),
    ("mistral_tools", "", f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}", None, None, [WEATHER]),
    ("llama31_tools", "", f"{LLAMA}<|eot_id|>", None, None, [WEATHER]),
    ("llama31_tools", "", f"<|python_tag|>{LLAMA}", None, None, [WEATHER]),
    ("llama31_tools", "", '{"a": 1} is JSON', None, '{"a": 1} is JSON', []),
    ("harmony", "", THINKS + SAYS, "hm", "So.", []),
    ("harmony", "", THINKS + ASKS, "hm", None, [WEATHER]),
    ("harmony", "", ASKS_LATE, None, None, [WEATHER]),
    ("harmony", "", LOOKS + SAYS, None, "I look.\nSo.", []),
]


@pytest.mark.parametrize("name, prompt, text, thought, content, calls", CASES)
def test_an_answer_is_taken_apart_wherever_it_is_cut(name, prompt, text, thought, content, calls):
    fields = {"reasoning_content": thought, "content": content}
    wanted = {field: said for field, said in fields.items() if said}
    shuffle = random.Random(len(text))
    every = range(1, len(text))
    for cuts in ((), every, *(sorted(shuffle.sample(every, 5)) for _ in range(8))):
        fields, called = _taken(TEMPLATES[name], prompt, text, cuts=cuts)
        assert fields == wanted, cuts
        assert called == calls, cuts
        assert all(isinstance(json.loads(one.arguments), dict) for one in called)


def test_without_tools_nothing_is_a_call():
    assert Channels.of(TEMPLATES["qwen_tools"]).reader(HIDDEN, "", None) is None
    fields, calls = _taken(TEMPLATES["qwen_thinking"], "", f"<tool_call>{ONE}</tool_call>", None)
    assert not calls and ONE in fields["content"]


def test_text_without_parts_comes_as_it_is():
    assert Channels.of(TEMPLATES["chatml"]).reader(HIDDEN, "", None) is None
    fields, _ = _taken(TEMPLATES["qwen_thinking"], "", "  two spaces  \n")
    assert fields == {"content": "  two spaces  \n"}


def test_text_is_said_as_soon_as_it_is_sure():
    reader = Channels.of(TEMPLATES["qwen_thinking"]).reader(HIDDEN, "", None)
    assert reader.push("word") == [Said("content", "word")]
    assert reader.push(" <") == []
    assert reader.push("x") == [Said("content", " <x")]


@pytest.mark.parametrize(
    "text", ["[" * 5000, '{"name": ' * 3000, "<function=" * 2000, "{" + "x" * 100000]
)
def test_nonsense_is_said_and_not_called(text):
    for name in ("qwen_tools", "mistral_tools", "llama31_tools"):
        opening = {"qwen_tools": "<tool_call>", "mistral_tools": "[TOOL_CALLS]"}.get(name, "")
        _, calls = _taken(TEMPLATES[name], "", opening + text)
        assert not calls
