"""`POST /v1/completions`: prompts in, their continuations out, whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from steelyard.infer.request import Output, PromptLogprob
from steelyard.serve.connection import DONE, EventStream, event, while_connected
from steelyard.serve.generation import Choice, Generation, finish, plan
from steelyard.serve.models import ServedModel
from steelyard.serve.protocol.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    EchoedPrompt,
    TextOffsets,
    joined,
)
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.protocol.fields import parse
from steelyard.serve.protocol.prompt_logprobs import prompt_logprobs
from steelyard.serve.reading import demand
from steelyard.serve.service import Service

DEFAULT_MAX_TOKENS = 16


async def create(service: Service, request: Request) -> Response:
    """Continue prompts."""
    body = parse(CompletionRequest, await request.body())
    served, payer = await service.ask(request, body.model, body.safety_identifier or body.user)
    demand(served, "generate")
    grammar = None
    if body.structured:
        checking = service.checked(payer.project, lambda: body.grammar)
        grammar = await while_connected(request.receive, checking)
    for prompt in body.prompt:
        served.demand_short(len(prompt) if isinstance(prompt, str) else 0, "prompt")
    prompts = await while_connected(request.receive, asyncio.to_thread(_prompts, served, body.prompt))
    generation = plan(
        body,
        served,
        payer,
        [prompt.ids for prompt in prompts],
        prefix="cmpl-",
        param="prompt",
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.scored,
        echo=bool(body.echo),
        grammar=grammar,
        grammar_field=body.grammar_field,
    )
    if body.stream:
        return EventStream(_events(generation, body, prompts), request.state.request_id)
    choices = await while_connected(request.receive, generation.gather())
    answers = [
        _answer(body, served, number, choice, choices[number - number % body.choices], prompts[number // body.choices])
        for number, choice in enumerate(choices)
    ]
    return json_response(
        Completion(generation.id, generation.created, served.id, generation.fingerprint, answers, generation.usage())
    )


def _prompts(served: ServedModel, prompts: list[Any]) -> list[EchoedPrompt]:
    """Token ids and texts; a text begins with what the tokenizer puts before one, which is no part of it."""
    return [
        EchoedPrompt.of_text(prompt, served.tokenizer)
        if isinstance(prompt, str)
        else EchoedPrompt.of_tokens(prompt, served.tokenizer)
        for prompt in prompts
    ]


def _answer(
    body: CompletionRequest, served: ServedModel, number: int, choice: Choice, first: Choice, prompt: EchoedPrompt
) -> CompletionChoice:
    """A whole choice; `first` is the first one of the same prompt, with what is said of the prompt."""
    text = prompt.text if body.echo else ""
    parts: list[CompletionLogprobs] = []
    if body.logprobs is not None:
        if body.echo:
            parts.append(prompt.logprobs(first.prompt_logprobs, body.logprobs, served.tokenizer))
        parts.append(TextOffsets(served.tokenizer, len(text)).logprobs(choice.logprobs, body.logprobs))
    answer = CompletionChoice(number, text + choice.text, joined(parts) if parts else None, choice.finish_reason)
    if body.prompt_logprobs is not None:
        scored = prompt_logprobs(first.prompt_logprobs, body.prompt_logprobs)
        answer = msgspec.structs.replace(answer, prompt_logprobs=scored)
    return answer


@dataclass
class Parts:
    """Makes the parts of a stream."""

    body: CompletionRequest
    served: ServedModel
    prompts: list[EchoedPrompt]
    offsets: dict[int, TextOffsets] = field(default_factory=dict)
    """Of the choices that have begun."""
    scored: dict[int, list[PromptLogprob]] = field(default_factory=dict)
    """By prompt, what has been said of it."""

    def of(self, number: int, output: Output) -> list[CompletionChoice]:
        """What an output of choice `number` adds."""
        place = number // self.body.choices
        scored = self.scored.setdefault(place, [])
        scored += output.prompt_logprobs or []
        if not output.tokens and output.finish_reason is None:
            return []  # its prompt is still being read
        parts: list[CompletionChoice] = []
        if number not in self.offsets:
            parts += self._echo(number, self.prompts[place], scored)
        logprobs: CompletionLogprobs | None = None
        if output.logprobs:
            logprobs = self.offsets[number].logprobs(output.logprobs, self.body.logprobs or 0)
        if output.text or logprobs or output.finish_reason:
            parts.append(CompletionChoice(number, output.text, logprobs, finish(output)))
        return parts

    def _echo(self, number: int, prompt: EchoedPrompt, scored: list[PromptLogprob]) -> list[CompletionChoice]:
        if not self.body.echo:
            self.offsets[number] = TextOffsets(self.served.tokenizer)
            return []
        self.offsets[number] = TextOffsets(self.served.tokenizer, len(prompt.text))
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = prompt.logprobs(scored, self.body.logprobs, self.served.tokenizer)
        return [CompletionChoice(number, prompt.text, logprobs)]


async def _events(
    generation: Generation, body: CompletionRequest, prompts: list[EchoedPrompt]
) -> AsyncGenerator[bytes, None]:
    parts = Parts(body, generation.served, prompts)
    blank = Completion(
        generation.id,
        generation.created,
        generation.served.id,
        generation.fingerprint,
        [],
        usage=None if body.include_usage else msgspec.UNSET,
    )
    async with contextlib.aclosing(generation.outputs()) as outputs:
        async for together in outputs:
            made = [part for number, output in together for part in parts.of(number, output)]
            if made:
                yield b"".join(event(msgspec.structs.replace(blank, choices=[part])) for part in made)
    if body.include_usage:
        yield event(msgspec.structs.replace(blank, usage=generation.usage()))
    yield DONE
