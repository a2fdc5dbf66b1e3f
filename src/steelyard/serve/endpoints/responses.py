"""`/v1/responses`: input in, items out, whole or as events; what is kept of them read, listed, deleted."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from steelyard.errors import NotFoundError, RequestError
from steelyard.serve.auth import Caller
from steelyard.serve.connection import DONE, EventStream, named_event, while_connected
from steelyard.serve.generation import Generation, finish, plan
from steelyard.serve.models import ServedModel
from steelyard.serve.protocol.chat import ChosenToken, chat_logprobs
from steelyard.serve.protocol.errors import error_body, is_expected, json_response
from steelyard.serve.protocol.fields import parse
from steelyard.serve.protocol.lists import Page, allow, boolean, page_of, wanted
from steelyard.serve.protocol.parameters import BOOLEAN, Parameter
from steelyard.serve.protocol.response_object import InputTokens, ResponseDeleted, ResponseObject, ResponseUsage
from steelyard.serve.protocol.response_request import InputTokensRequest, ResponseRequest
from steelyard.serve.reading import demand
from steelyard.serve.rendering import reasoning_reader, rendered
from steelyard.serve.responding import Growing
from steelyard.serve.service import Service
from steelyard.serve.stored_responses import Kept

MOST_KEPT = 1 << 20
"""Bytes of a request whose response is kept."""
RETRIEVED = (Parameter("stream", BOOLEAN),)

log = logging.getLogger("steelyard.serve")


async def create(service: Service, request: Request) -> Response:
    """Answer input."""
    content = await request.body()
    body = parse(ResponseRequest, content)
    if body.store is not False and len(content) > MOST_KEPT:
        reason = f"a response to over {MOST_KEPT >> 20} MB is not kept: say 'store': false, or send less"
        raise RequestError(reason, param="store")
    served, payer = await service.ask(request, body.model, body.safety_identifier or body.user)
    demand(served, "generate")
    grammar = None
    if body.structured or body.offer.offered:
        checking = service.checked(payer.project, lambda: body.form)
        grammar = await while_connected(request.receive, checking)
    text = await _read(service, request, body, served)
    prompt = await asyncio.to_thread(served.tokenizer.encode_rendered, text)
    generation = plan(
        body.sampling,
        served,
        payer,
        [prompt],
        prefix="resp_",
        param="input",
        max_tokens=body.max_output_tokens,
        logprobs=body.logprobs,
        grammar=grammar,
        grammar_field="tools" if body.offer.offered else "text.format",
    )
    begun = ResponseObject.of(body, generation.id, generation.created, served.id)
    growing = Growing(
        begun, calls=bool(body.offer.offered), thoughts=reasoning_reader(served, text, formed=_formed(body))
    )
    if body.stream:
        request_id: str = request.state.request_id
        return EventStream(_events(service, body, generation, growing, request_id), request_id)
    (choice,) = await while_connected(request.receive, generation.gather())
    scored = chat_logprobs(choice.logprobs, served.tokenizer).content
    for _ in growing.push(choice.text, scored, choice.finish_reason):
        pass
    return json_response(await _ended(service, body, generation, growing))


def _formed(body: ResponseRequest) -> bool:
    """Whether an answer is JSON, or a call, from its first token on."""
    return body.structured or (bool(body.offer.offered) and body.offer.must_call)


async def retrieve(service: Service, request: Request) -> Response:
    """One that was kept."""
    if boolean(allow(request, "stream"), "stream"):
        raise RequestError("only background responses are streamed again: read it whole", param="stream")
    return json_response((await _kept(service, request)).answer)


async def delete(service: Service, request: Request) -> Response:
    """Forget one."""
    allow(request)
    name = request.path_params["response_id"]
    await service.responses.remove(request.state.caller.project, name)
    return json_response(ResponseDeleted(name))


async def cancel(service: Service, request: Request) -> Response:
    """Refused: none is made in the background."""
    allow(request)
    await _kept(service, request)
    reason = "only background responses can be cancelled; of others the connection is closed"
    raise RequestError(reason, param="response_id")


async def input_items(service: Service, request: Request) -> Response:
    """What one was asked with, without what was before it."""
    asked = wanted(request)
    items = (await _kept(service, request)).input
    if asked.order == "desc":
        items = items[::-1]
    ids = [item["id"] for item in items]
    if asked.after is not None and asked.after not in ids:
        raise NotFoundError("'after' names nothing of this list", param="after")
    begin = 0 if asked.after is None else ids.index(asked.after) + 1
    page: Page[Any] = page_of(items[begin : begin + asked.limit], ids[begin:], asked.limit)
    return json_response(page)


async def input_tokens(service: Service, request: Request) -> Response:
    """How many tokens a model would read."""
    body = parse(InputTokensRequest, await request.body())
    served, _ = await service.ask(request, body.model)
    demand(served, "generate")
    text = await _read(service, request, body, served)
    return json_response(InputTokens(len(await asyncio.to_thread(served.tokenizer.encode_rendered, text))))


async def _read(service: Service, request: Request, body: InputTokensRequest, served: ServedModel) -> str:
    """The prompt, rendered: instructions, responses before, the input."""
    caller: Caller = request.state.caller
    history = await service.responses.history(caller.project, body.previous_response_id)

    def read() -> str:
        return rendered(served, body.messages(history), body.offer, "input")

    return await while_connected(request.receive, asyncio.to_thread(read))


async def _kept(service: Service, request: Request) -> Kept:
    return await service.responses.read(request.state.caller.project, request.path_params["response_id"])


async def _ended(service: Service, body: ResponseRequest, generation: Generation, growing: Growing) -> ResponseObject:
    """The whole response; it is kept before its end is told."""
    thoughts = len(generation.served.tokenizer.encode(growing.thought)) if growing.thought else 0
    whole = growing.end(ResponseUsage.of(generation.usage(), thoughts), service.now())
    if body.store is not False:
        kept = Kept(body.input, msgspec.to_builtins(whole))
        await service.responses.keep(generation.bill.payer.project, kept)
    return whole


async def _events(
    service: Service, body: ResponseRequest, generation: Generation, growing: Growing, request_id: str
) -> AsyncGenerator[bytes, None]:
    """The events. What fails before the first of them is an ordinary error."""
    begun = False
    try:
        async with contextlib.aclosing(generation.outputs()) as outputs:
            async for together in outputs:
                events = [] if begun else list(growing.begin())
                begun = True
                for _, output in together:
                    scored: list[ChosenToken] = []
                    if output.logprobs:
                        scored = chat_logprobs(output.logprobs, generation.served.tokenizer).content
                    events += growing.push(output.text, scored, finish(output))
                if events:
                    yield b"".join(map(named_event, events))
        await _ended(service, body, generation, growing)
    except Exception as error:
        if not begun:
            raise
        if not is_expected(error):
            log.exception("%s failed in mid-stream", request_id)
        yield named_event(growing.failed(error_body(error, request_id).error.message))
        return
    yield named_event(growing.ended())
    yield DONE
