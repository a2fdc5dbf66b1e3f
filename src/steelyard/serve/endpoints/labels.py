"""`POST /v1/classify` and `/v1/tag`: the class of a text, the tag of every word."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from steelyard.errors import RequestError, SteelyardError
from steelyard.infer.request import Output
from steelyard.serve.billing.bill import Payer
from steelyard.serve.connection import while_connected
from steelyard.serve.examples import Shown
from steelyard.serve.explaining import asking
from steelyard.serve.models import ServedModel
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.protocol.explanations import Explained, options
from steelyard.serve.protocol.fields import parse
from steelyard.serve.protocol.reading import (
    Class,
    Classes,
    ClassifyRequest,
    Readings,
    TaggedText,
    TaggedWord,
    TagRequest,
    TagSequence,
)
from steelyard.serve.reading import Text, demand, read
from steelyard.serve.service import Service
from steelyard.text.source import Source, source_of

WORD = re.compile(r"\w+(?:[-'’.]\w+)*|[^\w\s]")
"""Words with what joins them, and every other sign by itself."""
MOST_TAGS = 1 << 17
"""Of an answer, of all its sequences."""
Words = list[tuple[str, int, int]]
"""Each with where it begins and ends."""


async def classify(service: Service, request: Request) -> Response:
    """The class of each text."""
    body = parse(ClassifyRequest, await request.body())
    served, payer = await service.ask(request, body.model, body.safety_identifier or body.user)
    ready = demand(served, "classify")
    decoding = service.showing.prepare(served, ready, payer.project, body.given, "input")
    shown = await while_connected(request.receive, decoding)
    async with _explaining(served, payer, shown, body) as explain:
        asked = read(served, payer, shown, "classify", prefix="classify-", param="input")
        answer = await while_connected(request.receive, asked)
        labels = answer.ready.labels
        data, classes = [], []
        for number, output in enumerate(answer.outputs):
            shares = [math.exp(value) for value in output.values or []]
            classes.append(max(range(len(labels)), key=shares.__getitem__))
            data.append(Class(number, labels[classes[-1]], shares, len(labels)))
        if explain is not None:
            found = await while_connected(request.receive, explain(classes))
            if isinstance(found, str):
                data = [msgspec.structs.replace(one, explanation_error=found) for one in data]
            else:
                pairs = zip(data, found, strict=True)
                data = [msgspec.structs.replace(one, explanation=explanation) for one, explanation in pairs]
    return json_response(Classes(answer.id, answer.created, served.id, labels, data, answer.usage))


@contextlib.asynccontextmanager
async def _explaining(
    served: ServedModel, payer: Payer, shown: list[Shown], body: ClassifyRequest
) -> AsyncGenerator[Callable[[list[int]], Coroutine[Any, Any, list[Explained] | str]] | None, None]:
    """Reserve for explanations of the classes that are to come; None: none is wanted."""
    wanted = options(body.explain)
    if wanted is None:
        yield None
        return
    texts = [one if isinstance(one, str) else one.text or "" for one in body.given]
    read_as: list[Shown] | None = None
    if served.ready().kinds:
        sources, read_as = [Source(text, one.prompt, []) for text, one in zip(texts, shown, strict=True)], shown
    else:
        sources = await asyncio.to_thread(lambda: [source_of(served.tokenizer, text) for text in texts])
    explains = [wanted.asked(target=0) for _ in sources]
    async with asking(served, payer, sources, explains, shown=read_as) as reserved:

        async def explain(classes: list[int]) -> list[Explained] | str:
            reserved.explains = [wanted.asked(target=number) for number in classes]
            try:
                return await reserved.answers()
            except SteelyardError as error:  # the classes are there, and paid for
                return str(error)

        yield explain


async def tag(service: Service, request: Request) -> Response:
    """The tag of each word, and the likeliest sequences of tags."""
    body = parse(TagRequest, await request.body())
    served, payer = await service.ask(request, body.model, body.safety_identifier or body.user)
    given = [body.input] if isinstance(body.input, str) else body.input
    parted = await asyncio.to_thread(lambda: [_words(one) for one in given])
    size = (body.n or 1) * sum(map(len, parted))
    if size > MOST_TAGS:
        reason = f"the answer would hold {size} tags, {MOST_TAGS} are the limit: send fewer words, or lower 'n'"
        raise RequestError(reason, param="input")
    for number, words in enumerate(parted):
        if not words:
            raise RequestError(f"'input[{number}]' has no word: write something", param="input")
    texts = [Text(words=[word for word, _, _ in words]) for words in parted]
    asked = read(served, payer, texts, "tag", prefix="tag-", param="input", paths=body.n or 1)
    answer = await while_connected(request.receive, asked)
    pairs = list(enumerate(zip(parted, answer.outputs, strict=True)))
    data = await asyncio.to_thread(
        lambda: [_tagged(number, words, output, answer.ready.labels) for number, (words, output) in pairs]
    )
    return json_response(Readings(answer.id, answer.created, served.id, data, answer.usage))


def _words(given: str | list[str]) -> Words:
    if isinstance(given, str):
        return [(match[0], match.start(), match.end()) for match in WORD.finditer(given)]
    found, at = Words(), 0
    for word in given:
        found.append((word, at, at + len(word)))
        at += len(word) + 1
    return found


def _tagged(number: int, words: Words, output: Output, labels: list[str]) -> TaggedText:
    paths, shares = output.paths or [], output.values or []
    told = [
        TaggedWord(word, labels[label], math.exp(share), start, end)
        for (word, start, end), label, share in zip(words, paths[0].labels, shares, strict=True)
    ]
    sequences = [TagSequence([labels[label] for label in path.labels], path.logprob) for path in paths]
    return TaggedText(number, told, sequences)
