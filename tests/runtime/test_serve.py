"""The server as clients see it: on a real socket, answers are those of the engine alone."""

import json
import shutil
import subprocess
import threading

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="smoe[serve]")
from support.server import serving, until

from smoe.runtime import Engine
from smoe.runtime.evaluate import log_softmax

LINE = "def main(argument):\n    return None  # of all that is here\n"
TALK = [{"role": "user", "content": LINE}]
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def bundle(goldens):
    return goldens[-1]


@pytest.fixture(scope="module")
def client(bundle):
    with serving(bundle) as served:
        yield served


@pytest.fixture(scope="module")
def engine(bundle):
    with Engine.open(bundle, context=300) as alone:
        yield alone


def _alone(engine, ids, count):
    tokens = list(engine.generate(ids, count))
    return "".join(token.text for token in tokens), engine.stats.finish


def test_a_chat_is_what_the_engine_says(client, engine):
    ids = engine.text.chat(TALK)
    wanted, _ = _alone(engine, ids, 20)
    asked = {"messages": TALK, "max_tokens": 20, "temperature": 0, "model": "pico"}
    reply = client.ask(CHAT, asked)
    (choice,) = reply.body["choices"]
    assert reply.status == 200 and reply.body["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": wanted, "refusal": None}
    assert choice["index"] == 0 and choice["finish_reason"] == "length"
    usage = reply.body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(ids), 20)
    assert usage["total_tokens"] == len(ids) + 20
    parts = [{"type": "text", "text": LINE}]
    other = asked | {"messages": [{"role": "user", "content": parts, "name": None}]}
    assert client.ask(CHAT, other).body["choices"][0]["message"]["content"] == wanted
    assert client.ask(CHAT, other).body["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_a_stream_says_the_same_in_parts(client, engine):
    wanted, _ = _alone(engine, engine.text.chat(TALK), 20)
    asked = {"messages": TALK, "max_completion_tokens": 20, "temperature": 0}
    *parts, done = client.events(CHAT, asked)
    assert done == "[DONE]"
    assert all(part["object"] == "chat.completion.chunk" for part in parts)
    assert len({part["id"] for part in parts}) == 1 and not any("usage" in part for part in parts)
    choices = [choice for part in parts for choice in part["choices"]]
    assert choices[0]["delta"]["role"] == "assistant"
    assert "".join(choice["delta"].get("content", "") for choice in choices) == wanted
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == "length"
    asked["stream_options"] = {"include_usage": True}
    *parts, last, done = client.events(CHAT, asked)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 20
    assert all(part["usage"] is None for part in parts)


def test_prompts_come_as_texts_and_as_ids(client, engine):
    texts = ["def f(x):", "class A"]
    ids = [engine.text.encode(text) for text in texts]
    wanted = [_alone(engine, one, 8)[0] for one in ids]
    for prompt, count in ((texts[0], 1), (texts, 2), (ids[0], 1), (ids, 2)):
        asked = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
        reply = client.ask(COMPLETION, asked).body
        assert [choice["index"] for choice in reply["choices"]] == list(range(count))
        assert [choice["text"] for choice in reply["choices"]] == wanted[:count]
        *parts, _ = client.events(COMPLETION, asked)
        told = ["", ""]
        for choice in (choice for part in parts for choice in part["choices"]):
            told[choice["index"]] += choice["text"]
        assert told[:count] == wanted[:count]


@pytest.mark.parametrize("bundle", ["program", "onnx"])
def test_an_echo_has_the_log_likelihoods_of_the_prompt(goldens, bundle):
    path = goldens[-1 if bundle == "program" else 0]
    with Engine.open(path, context=300) as engine:
        prompts = [np.random.default_rng(n).integers(1, 200, 150 + n).tolist() for n in range(3)]
        truth = [log_softmax(engine.logits(ids)) for ids in prompts]
    asked = {"prompt": prompts, "max_tokens": 1, "temperature": 0, "seed": 1234}
    with serving(path) as client:
        for count in (1, 0):
            how = asked | {"max_tokens": count, "echo": True, "logprobs": 1}
            reply = client.ask(COMPLETION, how).body
            for choice, ids, right in zip(reply["choices"], prompts, truth, strict=True):
                told = choice["logprobs"]
                assert len(told["tokens"]) == len(ids) + count
                assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
                found = told["token_logprobs"][1 : len(ids)]
                wanted = right[np.arange(len(ids) - 1), ids[1:]]
                assert np.allclose(found, wanted, atol=1e-4)
                best = [max(top.values()) for top in told["top_logprobs"][1 : len(ids)]]
                assert np.allclose(best, right[: len(ids) - 1].max(1), atol=1e-4)
                if count:
                    assert told["token_logprobs"][-1] == pytest.approx(right[-1].max(), abs=1e-4)
                assert choice["finish_reason"] == "length"
            assert reply["usage"]["completion_tokens"] == 3 * count


def test_a_chat_has_probabilities_of_its_tokens(client):
    asked = {"messages": TALK, "max_tokens": 6, "logprobs": True, "top_logprobs": 3, "seed": 3}
    whole = client.ask(CHAT, asked).body["choices"][0]["logprobs"]["content"]
    assert len(whole) == 6
    for token in whole:
        assert token.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert len(token["top_logprobs"]) == 3
        assert token["logprob"] <= token["top_logprobs"][0]["logprob"] + 1e-9
    *parts, _ = client.events(CHAT, asked)
    told = [c["logprobs"] for part in parts for c in part["choices"] if c["logprobs"]]
    assert [token for one in told for token in one["content"]] == whole


def test_a_seed_repeats_an_answer(client):
    asked = {"messages": TALK, "max_tokens": 12, "seed": -7, "top_p": 0.95, "top_k": 50}
    texts = [client.ask(CHAT, asked).body["choices"][0]["message"]["content"] for _ in range(2)]
    assert texts[0] == texts[1]


def test_stop_strings_end_an_answer_before_them(client, engine):
    whole, _ = _alone(engine, engine.text.encode("def f"), 40)
    stop = whole[10:13]
    asked = {"prompt": "def f", "max_tokens": 40, "temperature": 0, "stop": [stop, "<end>"]}
    wanted = whole[: whole.index(stop)]
    (choice,) = client.ask(COMPLETION, asked).body["choices"]
    assert (choice["text"], choice["finish_reason"]) == (wanted, "stop")
    *parts, _ = client.events(COMPLETION, asked | {"stop": stop})
    choices = [choice for part in parts for choice in part["choices"]]
    assert "".join(choice["text"] for choice in choices) == wanted
    assert choices[-1]["finish_reason"] == "stop"


def _schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}


REFUSED = [
    ({"n": 2}, "n"),
    ({"foo": 1}, "foo"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": _schema({"type": "nonsense"})}, "response_format"),
    ({"response_format": _schema({"$ref": "http://127.0.0.1/x"})}, "response_format"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": True}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 100}, "stop"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
]


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["first", "second"]},
        "marks": {"type": "array", "items": {"type": "integer", "maximum": 9}, "maxItems": 2},
    },
    "required": ["name", "kind", "marks"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_is_held_to_a_schema(client, temperature):
    asked = {"messages": TALK, "max_tokens": 150, "temperature": temperature, "seed": 5}
    (choice,) = client.ask(CHAT, asked | {"response_format": _schema(SCHEMA)}).body["choices"]
    made = json.loads(choice["message"]["content"])
    assert choice["finish_reason"] == "stop" and made.keys() == set(SCHEMA["required"])
    assert len(made["name"]) <= 5 and made["kind"] in ("first", "second")
    assert all(isinstance(mark, int) for mark in made["marks"])
    *parts, _ = client.events(CHAT, asked | {"response_format": {"type": "json_object"}})
    deltas = [choice["delta"] for part in parts for choice in part["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas).startswith("{")


@pytest.mark.parametrize("more, param", REFUSED)
def test_what_is_not_supported_is_refused_by_name(client, more, param):
    reply = client.ask(CHAT, {"messages": TALK} | more)
    error = reply.body["error"]
    assert reply.status == 400 and error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"].startswith(param)


def test_what_changes_nothing_is_taken(client):
    plain = {
        "n": 1,
        "user": "me",
        "presence_penalty": 0,
        "logit_bias": {},
        "stop": None,
        "tools": [],
    }
    said = client.ask(CHAT, {"messages": TALK, "max_tokens": 2, "temperature": 0, **plain})
    assert said.status == 200


def test_more_than_the_context_is_refused_and_not_cut(client):
    for path, body in ((COMPLETION, {"prompt": [5] * 400}), (CHAT, {"messages": TALK * 20})):
        for stream in (False, True):
            reply = client.ask(path, body | {"stream": stream})
            assert reply.status == 400
            assert reply.body["error"]["code"] == "context_length_exceeded"
    reply = client.ask(COMPLETION, {"prompt": [5, 9999]})
    assert reply.status == 400 and "this model has 0 to 306" in reply.body["error"]["message"]


def test_the_model_has_a_name(client):
    for path in ("/v1/models", "/v1/models/", "/models"):
        (model,) = client.ask(path).body["data"]
        assert model["id"] == "pico" and model["object"] == "model" and model["owned_by"]
    assert client.ask("/v1/models/pico").body["id"] == "pico"
    for reply in (
        client.ask("/v1/models/gpt"),
        client.ask(COMPLETION, {"prompt": "x", "model": "gpt"}),
    ):
        assert reply.status == 404 and reply.body["error"]["code"] == "model_not_found"


def test_the_tokenizer_can_be_asked(client, engine):
    for special in (True, False):
        asked = {"prompt": "def <end>", "add_special_tokens": special}
        told = client.ask("/tokenize", asked).body
        assert told["tokens"] == engine.text.encode("def <end>", special)
        assert told["count"] == len(told["tokens"])
    named = client.ask("/tokenizer_info").body
    assert named["eos_token"] == "<end>" and "assistant" in named["chat_template"]


def test_many_at_once_get_what_each_gets_alone(client, engine):
    prompts = [np.random.default_rng(n).integers(1, 250, 5 + 9 * n).tolist() for n in range(12)]
    wanted = [_alone(engine, ids, 16)[0] for ids in prompts]
    found: dict[int, str] = {}

    def ask(number):
        asked = {"prompt": prompts[number], "max_tokens": 16, "temperature": 0}
        if number % 2:
            *parts, _ = client.events(COMPLETION, asked)
        else:
            parts = [client.ask(COMPLETION, asked).body]
        found[number] = "".join(c["text"] for part in parts for c in part["choices"])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(len(prompts))] == wanted


def test_a_page_shows_what_is_in_memory(client, engine):
    told = client.ask("/v1/residency").body
    assert told["levels"] == engine.level
    assert [len(layer) for layer in told["layers"]] == [len(e) for e in engine.residency()]
    assert all(level == engine.level for layer in told["layers"] for level in layer)
    assert told["memory"]["held"] > 1 << 20 and told["stats"]["hits"] > 0
    page = client.ask("/")
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for source in ("http://", "https://", "//cdn", "@import", "url("):
        assert source not in page.body.replace("http://www.w3.org/2000/svg", "")


def test_metrics_and_description_name_what_there_is(client):
    before = client.metric("smoe_new_tokens_total")
    client.ask(COMPLETION, {"prompt": "x", "max_tokens": 3, "temperature": 0})
    until(lambda: client.metric("smoe_new_tokens_total") > before)
    assert client.metric("smoe_hits_total") > 0 and client.metric("smoe_memory_bytes") > 0
    paths = client.ask("/openapi.json").body["paths"]
    assert {CHAT, COMPLETION, "/tokenize", "/health", "/metrics"} <= paths.keys()
    for path, methods in paths.items():
        for method in methods:
            status = client.ask(path, {} if method == "post" else None).status
            assert status == (400 if method == "post" else 200), path


def test_a_silent_stream_has_heartbeats(bundle):
    with serving(bundle, heartbeat=0.0005) as client:
        reply = client.ask(COMPLETION, {"prompt": [7] * 250, "max_tokens": 40, "stream": True})
        comments = [block for block in reply.body.split("\n\n") if block.startswith(":")]
        assert comments and reply.body.endswith("data: [DONE]\n\n")
        events = [b for b in reply.body.split("\n\n") if b.startswith("data: {")]
        assert all(json.loads(block[6:]) for block in events)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_a_stream_to_curl(client):
    address = f"http://127.0.0.1:{client.port}/v1/chat/completions"
    body = json.dumps({"messages": TALK, "max_tokens": 8, "temperature": 0, "stream": True})
    # As a page of instructions has it: no header says that the body is JSON.
    asked = ["curl", "--silent", "--show-error", "--no-buffer", "--fail", address, "-d", body]
    said = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout
    events = [line.removeprefix("data: ") for line in said.splitlines() if line]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    whole = client.ask("/v1/chat/completions", json.loads(body) | {"stream": False}).body
    text = "".join(delta.get("content") or "" for delta in deltas)
    assert text == whole["choices"][0]["message"]["content"]
