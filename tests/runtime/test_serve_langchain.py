"""LangChain's client, against a server on a socket."""

import asyncio

import pytest

pytest.importorskip("uvicorn", reason="smoe[serve]")
langchain_openai = pytest.importorskip("langchain_openai", reason="a client to test with")
from support.server import serving, with_template  # noqa: E402

TALK = [("system", "You write code."), ("human", "def main():")]
NEW = 12


@pytest.fixture(scope="module")
def base(goldens, tmp_path_factory):
    bundle = with_template(goldens[-1], tmp_path_factory.mktemp("langchain") / "pico.smoe")
    with serving(bundle) as served:
        yield f"http://127.0.0.1:{served.port}/v1"


def _chat(base: str, **how):
    how = {"model": "pico", "temperature": 0, "max_tokens": NEW, "max_retries": 0} | how
    return langchain_openai.ChatOpenAI(base_url=base, api_key="none", **how)


def test_an_answer_whole_in_parts_and_of_many(base):
    chat = _chat(base, stream_usage=True)
    whole = chat.invoke(TALK)
    assert whole.usage_metadata["output_tokens"] == NEW
    assert whole.response_metadata["finish_reason"] == "length"
    parts = list(chat.stream(TALK))
    assert "".join(part.content for part in parts) == whole.content
    assert sum(part.usage_metadata["output_tokens"] for part in parts if part.usage_metadata) == NEW
    assert [one.content for one in chat.batch([TALK] * 3)] == [whole.content] * 3


def test_answers_to_an_asynchronous_client(base):
    async def ask() -> str:
        return "".join([part.content async for part in _chat(base).astream(TALK)])

    assert asyncio.run(ask()) == _chat(base).invoke(TALK).content


def test_an_answer_with_probabilities_and_stops(base):
    chat = _chat(base, logprobs=True, top_logprobs=2)
    content = chat.invoke(TALK).response_metadata["logprobs"]["content"]
    assert len(content) == NEW and all(len(token["top_logprobs"]) == 2 for token in content)
    text = chat.invoke(TALK).content
    assert chat.invoke(TALK, stop=[text[3:5]]).content == text[: text.index(text[3:5])]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_an_answer_of_a_schema(base, method):
    schema = {
        "title": "answer", "type": "object", "properties": {"kind": {"type": "boolean"}},
        "required": ["kind"], "additionalProperties": False,
    }  # fmt: skip
    chat = _chat(base, max_tokens=120).with_structured_output(schema, method=method)
    assert chat.invoke(TALK).keys() == {"kind"}


def test_tools_are_taken(base):
    def add(one: int, other: int) -> int:
        """Both together."""
        return one + other

    chat = _chat(base, max_tokens=100)
    answer = chat.bind_tools([add]).invoke(TALK)
    assert answer.content or answer.tool_calls
    for choice in ("any", "_flags"):
        (call,) = chat.bind_tools([_flags], tool_choice=choice).invoke(TALK).tool_calls
        assert call["name"] == "_flags" and call["args"].keys() == {"on"}


def _flags(on: bool) -> bool:
    """Whether it is on."""
    return on


def test_what_a_completion_model_asks(base):
    model = langchain_openai.OpenAI(
        base_url=base, api_key="none", model="pico", max_tokens=5, temperature=0, max_retries=0
    )
    assert "".join(model.stream("def main():")) == model.invoke("def main():")
