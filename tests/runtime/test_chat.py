"""Chat templates: what they may do, what they may not, and what they cost."""

from __future__ import annotations

import dataclasses
import enum
import resource
import threading
import time

import numpy as np
import pytest
from support.conversations import CONVERSATIONS, EVERYTHING, SETTINGS, TEMPLATES

from smoe.runtime import chat
from smoe.runtime.errors import EngineError

HELLO = [{"role": "user", "content": "hi"}]


def rendered(template: str, messages=HELLO, **given) -> str:
    return chat.render(template, messages, SETTINGS, **given)


def test_a_conversation_with_a_tool_is_written_as_its_template_says():
    call = {"function": {"name": "f", "arguments": {"x": "é"}}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert rendered(TEMPLATES["qwen_tools"], messages) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<tool_call>\n"
        '{"name": "f", "arguments": {"x": "é"}}\n</tool_call><|im_end|>\n<|im_start|>assistant\n'
    )


def test_special_tokens_that_are_texts_are_variables():
    text = "{{ bos_token }}{{ eos_token }}{{ image_token }}{{ unk_token }}{{ add_bos_token }}"
    assert rendered(text) == "<s></s><img>"
    assert rendered(text, eos_token="mine") == "<s>mine<img>"


def test_a_message_is_continued_where_it_ends():
    messages = [*HELLO, {"role": "assistant", "content": "The answer is "}]
    end = "<|im_start|>assistant\nThe answer is "
    text = rendered(TEMPLATES["chatml"], messages, continue_final_message=True)
    assert text.endswith(end) and "hi<|im_end|>" in text
    trimmed = "{% for m in messages %}[{{ m.content|trim }}]{% endfor %}"
    assert rendered(trimmed, messages, continue_final_message=True) == "[hi][The answer is"
    assert messages[-1]["content"] == "The answer is "


@pytest.mark.parametrize("template, given, said", [
    ("{{ messages }}", {"continue_final_message": True}, "The chat template has no 'content'"),
    ("content", {"continue_final_message": True}, "does not render the last message"),
    ("content", {"continue_final_message": "thinking"}, "The last message has no 'thinking'"),
    ("x", {"continue_final_message": True, "add_generation_prompt": True}, "exclude each other"),
    ("x", {"messages": []}, "at least one message"),
    ("x", {"messages": "hi"}, "messages is 'hi'; a list of dicts"),
    ("x", {"messages": ["hi"]}, "a list of dicts"),
    ("x", {"messages": [{"content": "hi"}]}, "has no role"),
    ("x", {"tools": [len]}, "tools is .*a list of dicts"),
    ("x", {"documents": {"a": 1}}, "documents is .*a list of dicts"),
    ("{{ raise_exception('Roles must alternate!') }}", {}, "Roles must alternate!"),
    ("{{ messages[0].content.x.y }}", {}, "has no attribute 'x'"),
    ("{% set ns = namespace(_x=1) %}", {}, "'_x'"),
    ("{% set ns = namespace() %}{% set ns._x = 1 %}", {}, "'_x'"),
    ("{{ messages.append(1) }}", {}, "unsafe"),
    ("{% include 'x' %}", {}, "no loader"),
    ("{{ x|tojson(nothing=1) }}", {}, "nothing"),
])  # fmt: skip
def test_what_cannot_be_rendered_is_a_sentence(template, given, said):
    with pytest.raises(EngineError, match=said):
        rendered(template, **given)


class Role(str, enum.Enum):
    USER = "user"


@dataclasses.dataclass
class Part:
    type: str
    text: str


class Model:
    def model_dump(self):
        return {"role": Role.USER, "content": (np.float32(1.5), np.bool_(False), object())}


def test_a_template_sees_plain_data_only():
    text = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    messages = [{"role": Role.USER, "content": [Part("text", "a")]}, Model()]
    plain = "user[{'type': 'text', 'text': 'a'}]user(1.5, False, '<object>')"
    assert rendered(text, messages) == plain


def test_the_template_that_fits_is_chosen():
    named = [{"name": n, "template": n[0]} for n in ("default", "tool_use", "rag")] + ["no"]
    templates = chat.named_templates(named)
    assert chat.chosen(templates) == "d"
    assert chat.chosen(templates, tools=[]) == "t"
    assert chat.chosen(templates, "rag", tools=[]) == "r"
    assert chat.chosen(templates, "{{ x }}") == "{{ x }}"
    assert chat.chosen(chat.named_templates("one"), tools=[]) == "one"
    with pytest.raises(EngineError, match="chat templates rag and none is the default; name one"):
        chat.chosen({"rag": "r"})


# Each would run for hours, or hold gigabytes: a length or a loop that only the template sets.
GROW = "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = GROWN %}{% endfor %}"
DAG = GROW.replace("GROWN", "(ns.x, ns.x)")
DEEP = GROW.replace("GROWN", "(ns.x,)").replace("60", "50000")
LOOP = "{% for i in range(100000) %}{% for j in range(100000) %}BODY{% endfor %}{% endfor %}"
ENDLESS = [
    LOOP, LOOP.replace("BODY", ""), LOOP.replace(" %}BODY", " if false %}"),
    LOOP.replace("BODY", "{{ messages|tojson }}"), LOOP.replace("BODY", "{{ '%s' % messages }}"),
    LOOP.replace("BODY", "{% if false %}{{ x }}{% endif %}"), "{% set x %}" + LOOP + "{% endset %}",
    LOOP.replace("BODY", "{% set x = messages[:] %}"),
    "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    GROW.replace("GROWN", "ns.x ~ ns.x"), GROW.replace("GROWN", "ns.x + ns.x"),
    GROW.replace("GROWN", "ns.x|replace('x', 'xx')"), GROW.replace("GROWN", "[ns.x, ns.x]|join"),
    GROW.replace(" = GROWN", "%}{{ ns.x }}{{ ns.x }}{% endset"), GROW.replace("GROWN", "ns.x * 2"),
    GROW.replace("'x'", "3").replace("GROWN", "ns.x * ns.x"), "{{ 10 ** (10 ** 10) }}",
    "{{ 'x' * 10 ** 12 }}", "{{ [0] * 10 ** 12 }}", "{{ 'x'|center(10 ** 9) }}",
    "{{ 'x'.center(1000000000) }}", "{{ 'x'.zfill(10 ** 9) }}", "{{ '\t'.expandtabs(10 ** 9) }}",
    "{{ '%1000000000d' % 1 }}", "{{ '%.1000000000f'|format(1) }}", "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ '%((a))1000000000s' % {'(a)': 1} }}", "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w='1000000000') }}", "{{ ('{0}' * 100000).format('x' * 100000) }}",
    "{{ ('%s' * 100000) % (('x' * 100000,) * 100000) }}", "{{ [1]|tojson(indent=10 ** 9) }}",
    "{{ 'x'|indent(10 ** 9, true) }}", "{{ ('x' * 10 ** 6).replace('x', 'x' * 10 ** 6) }}",
    "{{ ('x' * 10 ** 6).join(range(100000)|map('string')) }}",
    "{{ range(100000)|list|join('x' * 10 ** 6) }}", "{{ (5).to_bytes(10 ** 9, 'big') }}",
    "{{ ('a' * 4000).translate({97: 'x' * 10 ** 6}) }}", "{{ lipsum(10 ** 6) }}",
    "{{ range(9)|batch(10 ** 9, 0)|list }}", "{{ range(9)|slice(10 ** 9)|list }}",
    "{{ 1.5|round(10 ** 9) }}", "{{ ([[1]] * 100000)|sum(start=[]) }}",
    "{{ ('a' * 5000000).rfind('b' ~ 'a' * 2000000) }}", "{{ ('<!---->' * 300000)|striptags }}",
    "{{ ('a' * 1000000 ~ 'c') in ['a' * 1000000 ~ 'b'] * 100000 }}",
    "{{ (['a' * 1000000 ~ 'b'] * 100000)|sort }}", "{{ ('a' * 6000000).split('a') }}",
    DAG + "{{ ns.x }}", DAG + "{{ ns.x == (ns.x, 1) }}", DAG + "{{ {ns.x: 1} }}",
    DAG + "{{ {}.get(ns.x) }}", DAG + "{{ ns.x|tojson }}", DAG + "{{ ns.x|string }}",
    DAG + "{{ 'a' ~ ns.x }}", DAG + "{{ ns.x|replace('a', 'b') }}", DAG + "{{ '%s' % (ns.x,) }}",
    DAG + "{{ ns.x in {} }}", DAG + "{{ [ns.x]|unique|list }}", DAG + "{{ ns.x is eq ns.x }}",
    DEEP + "{{ {ns.x: 1} }}", DEEP + "{{ {}[ns.x] }}", DEEP + "{{ [{}]|map(attribute=ns.x)|list }}",
    DEEP + "{{ ns.x in {} }}", DEEP + "{{ dict([[ns.x, 1]]) }}", DEEP + "{{ ns.x }}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}", "{% if a %}" * 5000, "{{ a }}" * 100000,
]  # fmt: skip


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_that_would_not_end_is_stopped(template):
    start, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(EngineError, match="chat template cannot render these messages: ."):
        rendered(template)
    assert time.monotonic() - start < 10  # one or two on a machine that has nothing else to do
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 150_000  # KiB


def test_it_is_stopped_off_the_main_thread_too():
    said = []

    def run() -> None:
        try:
            rendered(LOOP)
        except EngineError as error:
            said.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert said and "loops for too long" in said[0]


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n not in ("mixtral", "x_raises")])
def test_a_long_conversation_is_within_the_bounds(name):
    turns = [
        {"role": role, "content": f"{role} {i} " + "word " * 100}
        for i in range(500)
        for role in ("user", "assistant")
    ]
    assert rendered(TEMPLATES[name], [*turns, *HELLO], **EVERYTHING)


def test_messages_are_not_changed():
    messages = CONVERSATIONS["thinks"]
    before = repr(messages)
    rendered(TEMPLATES["harmony"], messages)
    assert repr(messages) == before
