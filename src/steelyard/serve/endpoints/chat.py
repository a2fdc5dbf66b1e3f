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
from steelyard.serve.protocol.tools import CalledFunction, FunctionDelta, ToolCall, ToolCallDelta, call_id
from steelyard.serve.protocol.usage import Finish
from steelyard.serve.reading import demand
from steelyard.serve.service import Service
from steelyard.serve.stored import Kept
from steelyard.text.tool_calls import Arguments, Begun, CallReader, Piece, Said

Keep = Callable[[list[Choice]], Awaitable[None]]


async def create(service: Service, request: Request) -> Response:
    """Answer a conversation."""
    body = parse(ChatRequest, await request.body())
    served, payer = await service.ask(request, body.model, body.safety_identifier or body.user)
    demand(served, "generate")
    grammar = await asyncio.to_thread(lambda: body.form) if body.structured or body.offered else None
    prompt = await while_connected(request.receive, asyncio.to_thread(_prompt, served, body.messages, body.told))
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
        return EventStream(_events(generation, body, keep), request.state.request_id)
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
            *_told(choice, bool(body.offered)),
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


def _told(choice: Choice, calls: bool) -> tuple[Message, Finish]:
    """What the assistant says, with the calls of tools in it, and why it ends."""
    if not calls:
        return Message(choice.text), choice.finish_reason
    reader, said, found = CallReader(), "", list[ToolCall]()
    for piece in [*reader.push(choice.text), *reader.flush()]:
        match piece:
            case Said(text):
                said += text
            case Begun(number, name):
                if number == len(choice.call_ids):
                    choice.call_ids.append(call_id())
                found.append(ToolCall(choice.call_ids[number], CalledFunction(name, "")))
            case Arguments(number, text):
                one = found[number].function
                given = CalledFunction(one.name, one.arguments + text)
                found[number] = msgspec.structs.replace(found[number], function=given)
    message = Message(said or None, tool_calls=found) if found else Message(said)
    return message, _end(reader, choice.finish_reason)


def _end(reader: CallReader, reason: Finish) -> Finish:
    """Why an answer with calls ends."""
    return "tool_calls" if reader.whole and reason == "stop" else reason


async def _keep(service: Service, body: ChatRequest, generation: Generation, choices: list[Choice]) -> None:
    """Store the answer before its end is sent."""
    answer = msgspec.to_builtins(_answer(body, generation, choices))
    await service.stored.keep(generation.bill.payer.project, Kept(body.messages, answer), body.metadata)


def _prompt(served: ServedModel, messages: list[dict[str, str]], tools: str | None) -> list[int]:
    """The token ids of a conversation; control tokens that users wrote are only text.

    What is told of tools is the end of the first system message.
    """
    if tools is not None:
        first = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
        rest = messages[1:] if first else messages
        messages = [{"role": "system", "content": first + tools}, *rest]
    if served.template is None:
        raise RequestError(
            f"'{served.id}' has no chat template, it was not made to chat: use /v1/completions", param="model"
        )
    try:
        text = served.template.render(served.tokenizer.guard_messages(messages), add_generation_prompt=True)
    except TemplateError as error:
        raise RequestError(str(error), param="messages", code="template_failed") from None
    return served.tokenizer.encode_rendered(text)


async def _events(generation: Generation, body: ChatRequest, keep: Keep | None) -> AsyncGenerator[bytes, None]:
    choices = [Choice() for _ in range(generation.choices)]
    told = [_Told(number, generation.served, bool(body.offered)) for number in range(generation.choices)]
    blank = ChatChunk(
        generation.id,
        generation.created,
        generation.served.id,
        generation.fingerprint,
        [],
        usage=None if body.include_usage else msgspec.UNSET,
    )
    async with contextlib.aclosing(generation.outputs()) as outputs:
        async for together in outputs:
            parts: list[ChatChunkChoice] = []
            for number, output in together:
                choices[number].add(output)
                parts += told[number].parts(output, choices[number])
            if parts:
                yield b"".join(event(msgspec.structs.replace(blank, choices=[part])) for part in parts)
    if keep is not None:
        await keep(choices)
    if body.include_usage:
        yield event(msgspec.structs.replace(blank, usage=generation.usage()))
    yield DONE


class _Told:
    """Makes a choice's parts of a stream."""

    def __init__(self, number: int, served: ServedModel, calls: bool) -> None:
        self._number, self._served = number, served
        self._reader = CallReader() if calls else None
        self._begun = False

    def parts(self, output: Output, choice: Choice) -> list[ChatChunkChoice]:
        """What a step adds: its text, calls of tools in it, then the end."""
        deltas: list[Delta] = []
        if not self._begun:
            self._begun = True
            deltas.append(Delta("assistant", ""))
        opened = len(deltas)
        if self._reader is None:
            deltas += [Delta(content=output.text)] if output.text or output.logprobs else []
        else:
            ended = output.finish_reason is not None
            pieces = [*self._reader.push(output.text), *(self._reader.flush() if ended else [])]
            deltas += [self._delta(piece, choice) for piece in pieces]
            if output.logprobs and len(deltas) == opened:
                deltas.append(Delta(content=""))
        made = [ChatChunkChoice(self._number, delta) for delta in deltas]
        if output.logprobs:
            scored = chat_logprobs(output.logprobs, self._served.tokenizer)
            made[opened] = msgspec.structs.replace(made[opened], logprobs=scored)
        if output.finish_reason is not None:
            reason = finish(output)
            if self._reader is not None and reason is not None:
                reason = _end(self._reader, reason)
            made.append(ChatChunkChoice(self._number, Delta(), finish_reason=reason))
        return made

    def _delta(self, piece: Piece, choice: Choice) -> Delta:
        match piece:
            case Said(text):
                return Delta(content=text)
            case Begun(number, name):
                choice.call_ids.append(call_id())
                named = FunctionDelta(name, "")
                return Delta(tool_calls=[ToolCallDelta(number, choice.call_ids[number], "function", named)])
            case Arguments(number, text):
                return Delta(tool_calls=[ToolCallDelta(number, function=FunctionDelta(arguments=text))])
