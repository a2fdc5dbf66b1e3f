"""`POST /v1/chat/completions`: a conversation in, the assistant's next message out, whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from steelyard.errors import SteelyardError
from steelyard.infer.effort import MOST_ANSWER, check, longest_answer
from steelyard.infer.request import Output
from steelyard.serve.billing.bill import Payer
from steelyard.serve.connection import DONE, EventStream, event, while_connected
from steelyard.serve.explaining import asking, with_answer
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
from steelyard.serve.protocol.explanations import Explained, options
from steelyard.serve.protocol.fields import parse
from steelyard.serve.protocol.prompt_logprobs import prompt_logprobs
from steelyard.serve.protocol.tools import CalledFunction, FunctionDelta, ToolCall, ToolCallDelta, call_id
from steelyard.serve.protocol.usage import CompletionTokensDetails, Finish, Usage
from steelyard.serve.reading import demand
from steelyard.serve.rendering import answers_to, chat_source, reasoning_reader, rendered
from steelyard.serve.service import Service
from steelyard.serve.stored import Kept
from steelyard.text.prompt import Answers
from steelyard.text.reasoning import Answered, ReasoningReader, Thought, parted
from steelyard.text.source import Source
from steelyard.text.tool_calls import Arguments, Begun, CallReader, Piece, Said

Keep = Callable[[list[Choice]], Awaitable[None]]
Explain = Callable[[Choice], Coroutine[Any, Any, Explained | str]]
"""An answer -> why it is so."""
Explaining = Callable[[], contextlib.AbstractAsyncContextManager[Explain | None]]


async def create(service: Service, request: Request) -> Response:
    """Answer a conversation."""
    body = parse(ChatRequest, await request.body())
    served, payer = await service.ask(request, body.model, body.safety_identifier or body.user)
    demand(served, "generate")
    grammar = None
    if body.structured or body.offered:
        checking = service.checked(payer.project, lambda: body.form)
        grammar = await while_connected(request.receive, checking)
    source = await while_connected(request.receive, asyncio.to_thread(_source, served, body))
    generation = plan(
        body,
        served,
        payer,
        [source.ids],
        prefix="chatcmpl-",
        param="messages",
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        grammar=grammar,
        grammar_field="tools" if body.offered else body.grammar_field,
    )
    keep = partial(_keep, service, body, generation, source) if body.store else None
    explaining = partial(_explaining, body, generation, source, payer)
    if body.stream:
        return EventStream(_events(generation, body, source, keep, explaining), request.state.request_id)
    async with explaining() as explain:
        choices = await while_connected(request.receive, generation.gather())
        answer = _answer(body, generation, source, choices)
        if keep is not None:
            await keep(choices)
        if explain is not None:
            found = await while_connected(request.receive, explain(choices[0]))
            answer = msgspec.structs.replace(answer, **_explanation(found))
    return json_response(answer)


def _source(served: ServedModel, body: ChatRequest) -> Source:
    """The prompt; where it is to be explained, with what each of its tokens stands for."""
    if body.explain:
        return chat_source(served, body.messages, body.offer)
    text = rendered(served, body.messages, body.offer)
    return Source(text, served.tokenizer.encode_rendered(text), [])


@contextlib.asynccontextmanager
async def _explaining(
    body: ChatRequest, generation: Generation, source: Source, payer: Payer
) -> AsyncGenerator[Explain | None, None]:
    """Reserve for an explanation of the answer that is to come; None: none is wanted."""
    wanted = options(body.explain)
    if wanted is None:
        yield None
        return
    served, against = generation.served, list(dict.fromkeys(wanted.against or []))
    said = min(MOST_ANSWER, generation.requests[0].sampling.max_tokens)
    asked, labels = wanted.asked(answer=[0]), None
    check(asked, len(source.ids) + said, param="messages")  # before answers are written after it
    if against:
        labels = await asyncio.to_thread(answers_to, served, body.messages, against, "explain.against")
        asked = wanted.asked(answer=[0], against=labels.whole)
    longest = len(source.ids) + max(said, longest_answer(asked))
    async with asking(served, payer, [source], [asked], lengths=[longest], param="messages") as reserved:

        async def explain(choice: Choice) -> Explained | str:
            tokens = _heard(served, choice)
            if not tokens:
                return "the answer has no token"
            explained = asked
            if labels is not None:
                if _thought(served, body, source, tokens):
                    return "the model thought before it answered: leave 'against' out"
                tokens, others = _among(served, labels, tokens)
                explained = msgspec.structs.replace(asked, against=others)
            reserved.explains = [with_answer(explained, source, tokens[:MOST_ANSWER])]
            try:
                (found,) = await reserved.answers()
            except SteelyardError as error:  # the answer is there, and paid for
                return str(error)
            return found

        yield explain


def _heard(served: ServedModel, choice: Choice) -> list[int]:
    """The tokens of an answer without those of a stop string, which nobody was told."""
    count = len(choice.tokens)
    while count and len(served.tokenizer.decode(choice.tokens[:count])) > len(choice.text):
        count -= 1
    return choice.tokens[:count]


def _among(served: ServedModel, labels: Answers, tokens: list[int]) -> tuple[list[int], list[list[int]]]:
    """An answer, as the model learnt to write it if it is one of some labels; and all of these, written as it is."""
    begins = {label[0] for label in labels.whole}
    written = labels.bare if labels.apart and tokens[0] not in begins else labels.whole
    said = parted(served.tokenizer.decode(tokens))[1].strip()
    found = (label for label in written if parted(served.tokenizer.decode(label))[1].strip() == said)
    return next(found, tokens), written


def _thought(served: ServedModel, body: ChatRequest, source: Source, tokens: list[int]) -> bool:
    reader = reasoning_reader(served, source.text, formed=_formed(body))
    return reader is not None and bool(parted(served.tokenizer.decode(tokens), inside=reader.inside)[0])


def _answer(body: ChatRequest, generation: Generation, source: Source, choices: list[Choice]) -> ChatCompletion:
    served = generation.served
    answers, thoughts = [], []
    for number, choice in enumerate(choices):
        reader = reasoning_reader(served, source.text, formed=_formed(body))
        thought, text = ("", choice.text) if reader is None else parted(choice.text, inside=reader.inside)
        message, reason = _told(choice, text, bool(body.offered))
        if thought:
            message = msgspec.structs.replace(message, reasoning_content=thought)
        thoughts.append(thought)
        logprobs = chat_logprobs(choice.logprobs, served.tokenizer) if body.logprobs else None
        answers.append(ChatChoice(number, message, reason, logprobs))
    usage = _with_thoughts(generation, thoughts)
    answer = ChatCompletion(generation.id, generation.created, served.id, generation.fingerprint, answers, usage)
    if body.prompt_logprobs is not None:
        scored = prompt_logprobs(choices[0].prompt_logprobs, body.prompt_logprobs)
        answer = msgspec.structs.replace(answer, prompt_logprobs=scored)
    return answer


def _explanation(found: Explained | str) -> dict[str, Any]:
    return {"explanation_error" if isinstance(found, str) else "explanation": found}


def _formed(body: ChatRequest) -> bool:
    """Whether an answer is JSON, or a call, from its first token on."""
    held = body.structured_outputs
    as_json = body.response_format is not None and body.response_format.type != "text"
    as_json = as_json or (held is not None and (held.json_ is not None or held.json_object is not None))
    return as_json or (bool(body.offered) and body.offer.must_call)


def _with_thoughts(generation: Generation, thoughts: list[str]) -> Usage:
    """What was used, and how much of it for thoughts."""
    usage, tokenizer = generation.usage(), generation.served.tokenizer
    if not any(thoughts):
        return usage
    count = sum(len(tokenizer.encode(thought)) for thought in thoughts if thought)
    details = usage.completion_tokens_details
    details = CompletionTokensDetails() if details is msgspec.UNSET else details
    return msgspec.structs.replace(
        usage, completion_tokens_details=msgspec.structs.replace(details, reasoning_tokens=count)
    )


def _told(choice: Choice, text: str, calls: bool) -> tuple[Message, Finish]:
    """What the assistant says in a text of his, with the calls of tools in it, and why it ends."""
    if not calls:
        return Message(text), choice.finish_reason
    reader, said, found = CallReader(), "", list[ToolCall]()
    for piece in [*reader.push(text), *reader.flush()]:
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


async def _keep(
    service: Service, body: ChatRequest, generation: Generation, source: Source, choices: list[Choice]
) -> None:
    """Store the answer before its end is sent."""
    answer = msgspec.to_builtins(_answer(body, generation, source, choices))
    await service.stored.keep(generation.bill.payer.project, Kept(body.messages, answer), body.metadata)


async def _events(
    generation: Generation, body: ChatRequest, source: Source, keep: Keep | None, explaining: Explaining
) -> AsyncGenerator[bytes, None]:
    choices = [Choice() for _ in range(generation.choices)]
    served = generation.served
    told = [
        _Told(number, served, bool(body.offered), reasoning_reader(served, source.text, formed=_formed(body)))
        for number in range(generation.choices)
    ]
    blank = ChatChunk(
        generation.id,
        generation.created,
        generation.served.id,
        generation.fingerprint,
        [],
        usage=None if body.include_usage else msgspec.UNSET,
    )
    async with explaining() as explain:
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
        if explain is not None:
            yield event(msgspec.structs.replace(blank, **_explanation(await explain(choices[0]))))
    if body.include_usage:
        usage = _with_thoughts(generation, [one.thought for one in told])
        yield event(msgspec.structs.replace(blank, usage=usage))
    yield DONE


class _Told:
    """Makes a choice's parts of a stream."""

    def __init__(self, number: int, served: ServedModel, calls: bool, thoughts: ReasoningReader | None) -> None:
        self._number, self._served, self._thoughts = number, served, thoughts
        self.thought = ""
        self._reader = CallReader() if calls else None
        self._begun = False

    def parts(self, output: Output, choice: Choice) -> list[ChatChunkChoice]:
        """What a step adds: its text, calls of tools in it, then the end."""
        deltas: list[Delta] = []
        if not self._begun:
            self._begun = True
            deltas.append(Delta("assistant", ""))
        opened, ended = len(deltas), output.finish_reason is not None
        text = output.text
        if self._thoughts is not None:
            pieces = [*self._thoughts.push(text), *(self._thoughts.flush() if ended else [])]
            thought = "".join(piece.text for piece in pieces if isinstance(piece, Thought))
            text = "".join(piece.text for piece in pieces if isinstance(piece, Answered))
            self.thought += thought
            deltas += [Delta(reasoning_content=thought)] if thought else []
        if self._reader is None:
            deltas += [Delta(content=text)] if text else []
        else:
            called = [*self._reader.push(text), *(self._reader.flush() if ended else [])]
            deltas += [self._delta(piece, choice) for piece in called]
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
