"""What clients of OpenAI ask for, on one `desk`: each method is an endpoint of `app`.

Bodies are read, rendered and encoded in threads for that; what generates is the desk's loop. A
client that goes away ends what it asked for, wherever that is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, MutableMapping, Sequence
from importlib.metadata import version
from itertools import chain
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from smoe.runtime.generation import Allowed
from smoe.runtime.machine import held_memory
from smoe.runtime.serve import bodies, openapi, sse
from smoe.runtime.serve.answers import ChatAnswer, CompletionAnswer
from smoe.runtime.serve.channels import Channels, Reader
from smoe.runtime.serve.desk import Call, Desk
from smoe.runtime.serve.door import BODY
from smoe.runtime.serve.fields import Json, parse
from smoe.runtime.serve.grammar import Grammars
from smoe.runtime.serve.metrics import TYPE, Metrics
from smoe.runtime.serve.refusal import Refusal
from smoe.runtime.serve.request import Request

T = TypeVar("T")
Answer = ChatAnswer | CompletionAnswer
Told = Callable[[MutableMapping[str, Any], sse.Receive, sse.Send], Awaitable[None]]
END = 16  # tokens of a prompt in which a thought may begin
HEARTBEAT = 10.0  # seconds of silence in a stream
PATIENCE = 30.0  # seconds for a body to arrive
NOT_THERE = "The thread that generates does not answer; the server has to be started again."


class OpenAI:
    """Endpoints of one `desk`."""

    def __init__(self, desk: Desk, heartbeat: float = HEARTBEAT, patience: float = PATIENCE):
        self._desk, self._engine = desk, desk.engine
        self._heartbeat, self._patience = heartbeat, patience
        self._chats = self._engine.text.chats
        self._metrics, self._grammars = Metrics(desk), Grammars(self._engine)

    # -- answers -----------------------------------------------------------------------------------

    async def chat(self, http: HttpRequest) -> Told:
        """`/v1/chat/completions`."""
        asked = await self._read(http, bodies.chat)
        self._check_model(asked.how.model)

        readers: list[Reader | None] = []

        def prepare() -> list[Request]:
            text = self._engine.text
            messages = bodies.addressed(asked.messages, text.template(asked.tools))
            ids = text.chat(messages, tools=asked.tools, **asked.variables)
            readers.append(self._reader(ids, asked.tools))
            allowed = self._allowed(ids, asked)
            return [self._request(ids, asked.how, None, readers[0] is not None, allowed)]

        def answer(call: Call) -> ChatAnswer:
            return ChatAnswer(self._desk.model, self._desk.spelling, call.generations, readers[0])

        return self._told(asked.how, prepare, answer)

    def _reader(self, ids: Sequence[int], tools: list[Json] | None) -> Reader | None:
        """What takes the answer to a prompt of `ids` apart."""
        text = self._engine.text
        template = text.template(tools)
        channels = Channels.of(template)
        if tools and not ("tools" in template and (channels.calls or channels.harmony)):
            raise Refusal(
                "This model's chat template has no tools, or calls that are not known here; leave "
                "them out.",
                param="tools",
                code="unsupported_parameter",
            )
        offered = [tool["function"] for tool in tools or ()]
        schemas = {function["name"]: function.get("parameters", {}) for function in offered}
        schemas_of = schemas if tools else None
        return channels.reader(text.controls(), self._end(ids), schemas_of)

    def _allowed(self, ids: Sequence[int], asked: bodies.Chat) -> Allowed | None:
        """What holds the answer to a prompt of `ids` to a schema, or to a call."""
        if asked.schema is None and not asked.forced:
            return None
        template = self._engine.text.template(asked.tools)
        channels = Channels.of(template)
        param = "tool_choice" if asked.forced else "response_format"
        if (channels.harmony and not asked.forced) or channels.thinks(self._end(ids)):
            raise Refusal(
                f"The model thinks before it answers, which no {param} has; switch that off with "
                f"chat_template_kwargs, or leave {param} out.",
                param=param,
            )
        if asked.schema is not None:
            return self._grammars.of(asked.schema)
        return self._grammars.of_call(template, asked.forced)

    def _end(self, ids: Sequence[int]) -> str:
        return self._engine.text.decode(ids[-END:], special=True)

    async def completion(self, http: HttpRequest) -> Told:
        """`/v1/completions`."""
        asked = await self._read(http, bodies.completion)
        self._check_model(asked.how.model)
        text, how, echo = self._engine.text, asked.how, asked.echo
        echoed: list[str] = []

        def prepare() -> list[Request]:
            requests = []
            for prompt in asked.prompts:
                ids = text.encode(prompt) if isinstance(prompt, str) else prompt
                if echo:
                    echoed.append(
                        prompt if isinstance(prompt, str) else text.decode(ids, special=True)
                    )
                requests.append(self._request(ids, how, how.logprobs if echo else None))
            return requests

        def answer(call: Call) -> CompletionAnswer:
            told = echoed if echo else None
            about = self._desk.model, self._desk.spelling, call.generations
            return CompletionAnswer(*about, told, drawn=how.tokens != 0)

        return self._told(how, prepare, answer)

    def _request(
        self,
        ids: Sequence[int],
        how: bodies.Drawing,
        scored: int | None = None,
        special: bool = False,
        allowed: Allowed | None = None,
    ) -> Request:
        room = max(1, self._engine.context - len(ids))
        return Request(
            ids,
            room if how.tokens is None else max(1, how.tokens),
            how.sampling,
            how.stop,
            how.loss,
            how.logprobs,
            special,
            scored,
            allowed,
        )

    def _told(
        self,
        how: bodies.Drawing,
        prepare: Callable[[], list[Request]],
        answer: Callable[[Call], Answer],
    ) -> Told:
        """The response: a stream, or all at once."""

        async def streamed(send: sse.Send) -> None:
            async with self._desk.call(prepare) as call:
                events = _events(call, answer(call), how.usage)
                async with contextlib.aclosing(events):
                    await sse.stream(send, events, self._heartbeat)

        async def whole() -> Json:
            async with self._desk.call(prepare) as call:
                tokens: list[list[Any]] = [[] for _ in call.generations]
                async for came in call.tokens():
                    for number, token in came:
                        if token is not None:
                            tokens[number].append(token)
                return answer(call).whole(tokens)

        async def told(
            scope: MutableMapping[str, Any], receive: sse.Receive, send: sse.Send
        ) -> None:
            with contextlib.suppress(sse.Gone):
                if how.stream:
                    await sse.unless_gone(receive, streamed(send))
                else:
                    said = await sse.unless_gone(receive, whole())
                    await JSONResponse(said)(scope, receive, send)

        return told

    # -- what there is -----------------------------------------------------------------------------

    async def models(self, http: HttpRequest) -> Response:
        """`/v1/models`."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, http: HttpRequest) -> Response:
        """`/v1/models/NAME`."""
        self._check_model(http.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> Json:
        about = {"id": self._desk.model, "object": "model", "created": self._desk.started}
        more = {"max_model_len": self._engine.context, "chat": self._chats}
        return about | {"owned_by": "smoe"} | more

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._desk.model:
            raise Refusal(
                f"There is no model {name[:80]!r} here; the one there is is {self._desk.model!r}.",
                404,
                param="model",
                code="model_not_found",
            )

    async def tokenize(self, http: HttpRequest) -> Response:
        """`/tokenize`."""
        prompt, special = await self._read(http, bodies.tokenize)
        ids = await self._desk.work(lambda: self._engine.text.encode(prompt, special))
        most = self._engine.context
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": most})

    async def tokenizer_info(self, http: HttpRequest) -> Response:
        """`/tokenizer_info`."""
        named = await self._desk.work(self._engine.text.named)
        ends = self._engine.manifest.model.end_ids
        if named["eos_token"] is None and ends:
            named["eos_token"] = self._desk.spelling.text(ends[0])
        return JSONResponse(named)

    async def openapi(self, http: HttpRequest) -> Response:
        """`/openapi.json`."""
        return JSONResponse(openapi.page(version("smoe")))

    # -- how it goes -------------------------------------------------------------------------------

    async def health(self, http: HttpRequest) -> Response:
        """`/health`: what the thread that generates says, and nobody else."""
        there = await self._desk.ask(lambda: True)
        said = {"status": "ok" if there else "unhealthy"} | self._desk.loop.counts
        return JSONResponse(said, 200 if there else 503)

    async def metrics(self, http: HttpRequest) -> Response:
        """`/metrics`."""
        return Response(self._metrics.page(), headers={"Content-Type": TYPE})

    async def residency(self, http: HttpRequest) -> Response:
        """`/v1/residency`: levels of all experts, and what goes with them on a page."""
        levels = await self._desk.ask(self._engine.residency)
        if levels is None:
            raise Refusal(NOT_THERE, 503)
        engine, tally = self._engine, self._desk.tally
        return JSONResponse(
            {
                "levels": engine.level,
                "layers": [layer.tolist() for layer in levels],
                "memory": {"budget": engine.plan.budget or None, "held": held_memory()},
                "tokens": tally.new_tokens,
                "requests": self._desk.loop.counts,
                "stats": engine.stats.as_dict(),
            }
        )

    # -- bodies ------------------------------------------------------------------------------------

    async def _read(self, http: HttpRequest, read: Callable[[Json], T]) -> T:
        """What a body asks for."""
        try:
            body = await asyncio.wait_for(_body(http), self._patience)
        except asyncio.TimeoutError as error:
            raise Refusal(
                f"The body did not arrive within {self._patience:g} seconds; send it again.", 408
            ) from error
        return await self._desk.work(lambda: read(parse(body)))


async def _body(http: HttpRequest) -> bytes:
    """All of it, if that is not too much."""
    body = bytearray()
    async for piece in http.stream():
        body += piece
        if len(body) > BODY:
            raise Refusal(f"The body is longer than {BODY} bytes; shorten it.", 413)
    return bytes(body)


async def _events(call: Call, answer: Answer, usage: bool) -> AsyncGenerator[bytes, None]:
    """A stream: parts of the answer, its usage where that was asked for, and the end; or what is
    wrong."""

    def said(parts: Iterable[Json]) -> bytes:
        more = {"usage": None} if usage else {}
        return b"".join(sse.event(part | more) for part in parts)

    try:
        if opening := said(answer.opening()):
            yield opening
        async for came in call.tokens():
            parts = (
                answer.ending(number) if token is None else answer.part(number, token)
                for number, token in came
            )
            if told := said(chain.from_iterable(parts)):
                yield told
        yield (sse.event(answer.last()) if usage else b"") + sse.DONE
    except Refusal as refusal:
        yield sse.event(refusal.as_dict())
