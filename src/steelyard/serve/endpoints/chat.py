"""`POST /v1/chat/completions`: a conversation in, the assistant's next message out, whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from steelyard.errors import RequestError, TemplateError
from steelyard.infer.request import Output
from steelyard.serve.connection import DONE, EventStream, event, while_connected
from steelyard.serve.generation import Choice, Generation, finish, plan
from steelyard.serve.models import ServedModel
from steelyard.serve.protocol.chat import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatRequest,
    Delta,
    Message,
    chat_logprobs,
)
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.protocol.fields import parse
from steelyard.serve.protocol.prompt_logprobs import prompt_logprobs
from steelyard.serve.service import Service
from steelyard.serve.stored import Kept

Keep = Callable[[list[Choice]], Awaitable[None]]


async def create(service: Service, request: Request) -> Response:
    """Answer a conversation."""
    body = parse(ChatRequest, await request.body())
    served, payer = await service.ask(request, body.model, body.safety_identifier or body.user)
    grammar = await asyncio.to_thread(lambda: body.grammar) if body.structured else None
    prompt = await while_connected(request.receive, asyncio.to_thread(_prompt, served, body.messages))
    generation = plan(
        body,
        served,
        payer,
        [prompt],
        prefix="chatcmpl-",
        param="messages",
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        grammar=grammar,
    )
    keep = partial(_keep, service, body, generation) if body.store else None
    if body.stream:
        return EventStream(_events(generation, body.include_usage, keep), request.state.request_id)
    choices = await while_connected(request.receive, generation.gather())
    answer = _answer(body, generation, choices)
    if keep is not None:
        await keep(choices)
    return json_response(answer)


def _answer(body: ChatRequest, generation: Generation, choices: list[Choice]) -> ChatCompletion:
    served = generation.served
    answers = [
        ChatChoice(
            number,
            Message(choice.text),
            choice.finish_reason,
            chat_logprobs(choice.logprobs, served.tokenizer) if body.logprobs else None,
        )
        for number, choice in enumerate(choices)
    ]
    answer = ChatCompletion(
        generation.id, generation.created, served.id, generation.fingerprint, answers, generation.usage()
    )
    if body.prompt_logprobs is not None:
        scored = prompt_logprobs(choices[0].prompt_logprobs, body.prompt_logprobs)
        answer = msgspec.structs.replace(answer, prompt_logprobs=scored)
    return answer


async def _keep(service: Service, body: ChatRequest, generation: Generation, choices: list[Choice]) -> None:
    """Store the answer before its end is sent."""
    answer = msgspec.to_builtins(_answer(body, generation, choices))
    await service.stored.keep(generation.bill.payer.project, Kept(body.messages, answer), body.metadata)


def _prompt(served: ServedModel, messages: list[dict[str, str]]) -> list[int]:
    """The token ids of a conversation; control tokens that users wrote are only text."""
    if served.template is None:
        raise RequestError(
            f"'{served.id}' has no chat template, it was not made to chat: use /v1/completions", param="model"
        )
    try:
        text = served.template.render(served.tokenizer.guard_messages(messages), add_generation_prompt=True)
    except TemplateError as error:
        raise RequestError(str(error), param="messages", code="template_failed") from None
    return served.tokenizer.encode_rendered(text)


async def _events(generation: Generation, include_usage: bool, keep: Keep | None) -> AsyncGenerator[bytes, None]:
    begun = set[int]()
    choices = [Choice() for _ in range(generation.choices)]
    blank = ChatChunk(
        generation.id,
        generation.created,
        generation.served.id,
        generation.fingerprint,
        [],
        usage=None if include_usage else msgspec.UNSET,
    )
    async with contextlib.aclosing(generation.outputs()) as outputs:
        async for together in outputs:
            parts: list[ChatChunkChoice] = []
            for number, output in together:
                choices[number].add(output)
                if number not in begun:
                    begun.add(number)
                    parts.append(ChatChunkChoice(number, Delta("assistant", "")))
                parts += _parts(number, output, generation.served)
            if parts:
                yield b"".join(event(msgspec.structs.replace(blank, choices=[part])) for part in parts)
    if keep is not None:
        await keep(choices)
    if include_usage:
        yield event(msgspec.structs.replace(blank, usage=generation.usage()))
    yield DONE


def _parts(number: int, output: Output, served: ServedModel) -> list[ChatChunkChoice]:
    """What a step adds to the stream: its text, then the end."""
    parts: list[ChatChunkChoice] = []
    if output.text or output.logprobs:
        logprobs = chat_logprobs(output.logprobs, served.tokenizer) if output.logprobs else None
        parts.append(ChatChunkChoice(number, Delta(content=output.text), logprobs))
    if output.finish_reason is not None:
        parts.append(ChatChunkChoice(number, Delta(), finish_reason=finish(output)))
    return parts
