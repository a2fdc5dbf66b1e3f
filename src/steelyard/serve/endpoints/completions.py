"""`POST /v1/completions`: prompts in, their continuations out, whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from steelyard.serve.connection import DONE, EventStream, event, while_connected
from steelyard.serve.generation import Generation, Tally, finish, plan
from steelyard.serve.models import Models, ServedModel, find
from steelyard.serve.protocol.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    completion_logprobs,
)
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.protocol.fields import parse

DEFAULT_MAX_TOKENS = 16


async def create(models: Models, request: Request) -> Response:
    """Continue prompts."""
    body = parse(CompletionRequest, await request.body())
    served = find(models, body.model)
    served.ready()
    prompts = await while_connected(request.receive, asyncio.to_thread(_tokens, served, body.prompt))
    generation = plan(
        body,
        served,
        prompts,
        prefix="cmpl-",
        param="prompt",
        max_tokens=body.max_tokens or DEFAULT_MAX_TOKENS,
        logprobs=body.logprobs,
    )
    if body.stream:
        return EventStream(_events(generation, body.include_usage), request.state.request_id)
    choices, usage = await while_connected(request.receive, generation.gather())
    answers = [
        CompletionChoice(
            number,
            choice.text,
            completion_logprobs(choice.logprobs, 0)[0] if body.logprobs is not None else None,
            choice.finish_reason,
        )
        for number, choice in enumerate(choices)
    ]
    return json_response(
        Completion(generation.id, generation.created, served.id, generation.fingerprint, answers, usage)
    )


def _tokens(served: ServedModel, prompts: list[Any]) -> list[list[int]]:
    """Token ids of prompts that are texts; a text begins with what the tokenizer puts before one."""
    return [
        served.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]


async def _events(generation: Generation, include_usage: bool) -> AsyncGenerator[bytes, None]:
    tally, offsets = Tally(generation), dict[int, int]()
    blank = Completion(
        generation.id,
        generation.created,
        generation.served.id,
        generation.fingerprint,
        [],
        usage=None if include_usage else msgspec.UNSET,
    )
    async with contextlib.aclosing(generation.outputs()) as outputs:
        async for number, output in outputs:
            tally.add(number, output)
            logprobs: CompletionLogprobs | None = None
            if output.logprobs:
                logprobs, offsets[number] = completion_logprobs(output.logprobs, offsets.get(number, 0))
            if output.text or logprobs or output.finish_reason:
                part = CompletionChoice(number, output.text, logprobs, finish(output))
                yield event(msgspec.structs.replace(blank, choices=[part]))
    if include_usage:
        yield event(msgspec.structs.replace(blank, usage=tally.usage()))
    yield DONE
