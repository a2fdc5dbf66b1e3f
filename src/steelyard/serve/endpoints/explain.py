"""`POST /v1/explain`: why a model says what it says, by the tokens of what it read."""

from __future__ import annotations

import asyncio
import time

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from steelyard.errors import RequestError
from steelyard.infer.effort import check, fitting_own, longest_answer
from steelyard.infer.request import Explain, Ready
from steelyard.serve.connection import while_connected
from steelyard.serve.examples import Shown
from steelyard.serve.explaining import asking, with_answer
from steelyard.serve.learnt import learnt_rows
from steelyard.serve.models import ServedModel
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.protocol.examples import Example
from steelyard.serve.protocol.explain import ExplainRequest, Explanation
from steelyard.serve.protocol.fields import parse
from steelyard.serve.reading import demand
from steelyard.serve.rendering import answers_to, chat_source
from steelyard.serve.service import Service
from steelyard.text.source import Source, source_of


async def create(service: Service, request: Request) -> Response:
    """Explain a class, or an answer."""
    body = parse(ExplainRequest, await request.body())
    served, payer = await service.ask(request, body.model, body.safety_identifier or body.user)
    ready = demand(served, "generate", "classify")
    if ready.task == "classify":
        if body.messages is not None:
            raise RequestError(f"'{served.id}' classifies texts: give 'input'", param="messages")
        if body.nearest:
            raise RequestError(
                f"'{served.id}' writes nothing: its rows are compared by the command line", param="nearest"
            )
        if body.lens:
            raise RequestError(f"'{served.id}' writes nothing: it has no lens", param="lens")
        if body.against:
            raise RequestError(f"'{served.id}' compares all its classes: leave 'against' out", param="against")
        if body.target is not None and body.target not in ready.labels:
            raise RequestError(f"'target' must be one of {', '.join(ready.labels)}", param="target")
    source, shown = await while_connected(request.receive, _read(service, served, ready, payer.project, body))
    if ready.task == "classify":
        explain = body.asked(target=None if body.target is None else ready.labels.index(body.target))
    else:
        check(body.asked(answer=[0]), len(source.ids) + 1, param=_param(body))  # before more is computed of it
        explain = await asyncio.to_thread(_asked, served, body, source)
    learnt = None
    if body.nearest:
        reading = asyncio.to_thread(learnt_rows, service.files, served, payer.project)
        learnt = await while_connected(request.receive, reading)
        rows = [(row.prompt, row.answer) for row in learnt.rows]
        explain = msgspec.structs.replace(explain, rows=rows, nearest=body.nearest)
    longest = longest_answer(explain)
    if len(source.ids) + max(0, longest - 1) > ready.context:
        reason = f"input and target have {len(source.ids) + longest} tokens, but the context of"
        reason += f" '{served.id}' is {ready.context}"
        raise RequestError(f"{reason}: shorten it", param=_param(body), code="context_length_exceeded")
    async with asking(served, payer, [source], [explain], shown=shown, param=_param(body)) as asked:
        (found,) = await while_connected(request.receive, asked.answers(learnt))
    told = msgspec.structs.asdict(found)
    return json_response(Explanation(id=asked.id, created=int(time.time()), model=served.id, **told))


def _asked(served: ServedModel, body: ExplainRequest, source: Source) -> Explain:
    """What the engine explains of a model that writes."""
    against = [one for one in dict.fromkeys(body.against or []) if one != body.target]
    if not against:
        if body.against:
            raise RequestError("'against' is what else it could be: name more than the target", param="against")
        answer = [] if body.target is None else served.tokenizer.encode_plain(body.target)
        own = 1
        if body.messages is not None and not answer:
            own = fitting_own(body.asked(), len(source.ids), served.ready().context)
        return with_answer(body.asked(own=own), source, answer)
    said = against if body.target is None else [body.target, *against]
    if len(said) < 2:
        raise RequestError("'against' names one answer: name another, or the 'target'", param="against")
    if body.messages is not None:
        tokens = answers_to(served, body.messages, said, "against").whole
    else:
        end = sorted(served.tokenizer.eos_ids)[:1]
        tokens = [[*served.tokenizer.encode_plain(one), *end] for one in said]
    if body.target is None:
        return with_answer(body.asked(against=tokens), source, [])
    return with_answer(body.asked(against=tokens[1:]), source, tokens[0])


def _param(body: ExplainRequest) -> str:
    return "input" if body.messages is None else "messages"


async def _read(
    service: Service, served: ServedModel, ready: Ready, project: str, body: ExplainRequest
) -> tuple[Source, list[Shown] | None]:
    """What is explained; and, where it is more than a text, what the engine is shown of it."""
    if body.messages is not None:
        return await asyncio.to_thread(chat_source, served, body.messages), None
    given = body.input if isinstance(body.input, Example) else Example(text=body.input)
    if given.image is None and given.audio is None and not ready.kinds:
        served.demand_short(len(given.text or ""), "input")
        writes = ready.task == "generate"
        return await asyncio.to_thread(source_of, served.tokenizer, given.text or "", control=writes), None
    shown = await service.showing.prepare(served, ready, project, [given], "input")
    return Source(given.text or "", shown[0].prompt, []), shown
