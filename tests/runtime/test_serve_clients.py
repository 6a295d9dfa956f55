"""The client that most others are built on, against a server on a socket."""

import asyncio
import json

import pytest

pytest.importorskip("uvicorn", reason="smoe[serve]")
openai = pytest.importorskip("openai", reason="a client to test with")
from support.server import serving  # noqa: E402

TALK = [{"role": "user", "content": "def main():"}]
KEY = "a key"


@pytest.fixture(scope="module")
def client(goldens):
    from smoe.runtime.serve.door import Lock

    with serving(goldens[-1], lock=Lock(KEY)) as served:
        yield openai.OpenAI(
            base_url=f"http://127.0.0.1:{served.port}/v1", api_key=KEY, max_retries=0
        )


def _how(**more):
    return {"model": "pico", "messages": TALK, "max_tokens": 12, "temperature": 0} | more


def test_answers_whole_and_in_parts(client):
    whole = client.chat.completions.create(**_how())
    assert whole.choices[0].message.role == "assistant" and whole.usage.completion_tokens == 12
    parts = list(
        client.chat.completions.create(**_how(stream=True, stream_options={"include_usage": True}))
    )
    said = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert said == whole.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].usage.completion_tokens == 12
    raw = client.chat.completions.with_raw_response.create(**_how())
    assert raw.http_response.status_code == 200 and raw.parse().choices[0].finish_reason == "length"


def test_answers_to_an_asynchronous_client(client):
    async def ask():
        other = openai.AsyncOpenAI(base_url=str(client.base_url), api_key=KEY)
        async with other:
            stream = await other.chat.completions.create(**_how(stream=True))
            return "".join([part.choices[0].delta.content or "" async for part in stream])

    assert asyncio.run(ask()) == client.chat.completions.create(**_how()).choices[0].message.content


def test_a_stream_that_is_closed_early(client):
    for _ in range(3):
        with client.chat.completions.create(**_how(stream=True, max_tokens=200)) as stream:
            next(iter(stream))
    assert client.chat.completions.create(**_how(max_tokens=1)).choices


def test_completions_and_models(client):
    made = client.completions.create(model="pico", prompt=["a", "b"], max_tokens=3, logprobs=2)
    assert len(made.choices) == 2 and len(made.choices[0].logprobs.tokens) == 3
    assert [model.id for model in client.models.list()] == ["pico"]
    assert client.models.retrieve("pico").owned_by == "smoe"


def test_logprobs_of_a_chat(client):
    made = client.chat.completions.create(**_how(logprobs=True, top_logprobs=2))
    content = made.choices[0].logprobs.content
    assert len(content) == 12 and all(len(token.top_logprobs) == 2 for token in content)


def test_an_answer_that_is_parsed(client):
    pydantic = pytest.importorskip("pydantic")

    class Answer(pydantic.BaseModel):
        kind: bool
        marks: list[bool] = pydantic.Field(max_length=2)

    made = client.chat.completions.parse(**_how(max_tokens=100, response_format=Answer))
    assert isinstance(made.choices[0].message.parsed, Answer)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**_how(max_tokens=1, response_format=Answer))


def test_errors_are_those_of_the_client(client):
    with pytest.raises(openai.BadRequestError, match="n is 2") as error:
        client.chat.completions.create(**_how(n=2))
    assert error.value.param == "n" and error.value.code == "unsupported_parameter"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**_how(model="gpt-4"))
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="another").models.list()
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(**_how(max_tokens=4000, stream=True))
    assert json.loads(error.value.response.text)["error"]["type"] == "invalid_request_error"
