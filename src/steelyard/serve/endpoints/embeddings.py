"""`POST /v1/embeddings`, `/v1/score` and `/v1/rerank`: texts as vectors, and how like each other they are."""

from __future__ import annotations

import asyncio
import base64
import math
from array import array
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from steelyard.errors import RequestError
from steelyard.serve.connection import while_connected
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.protocol.fields import parse
from steelyard.serve.protocol.reading import (
    Document,
    Embedding,
    Embeddings,
    EmbeddingsRequest,
    Ranked,
    Ranking,
    ReadingFields,
    Readings,
    RerankRequest,
    Score,
    ScoreRequest,
)
from steelyard.serve.reading import Answer, Text, demand, read
from steelyard.serve.service import Service

Vector = list[float]


async def create(service: Service, request: Request) -> Response:
    """Embeddings of texts."""
    body = parse(EmbeddingsRequest, await request.body())
    answer = await _read(service, request, body, [Text(text) for text in body.texts], "embd-", "input", body.dimensions)
    return await asyncio.to_thread(_embeddings, body, answer)


def _embeddings(body: EmbeddingsRequest, answer: Answer) -> Response:
    vectors = [_vector(output.values or [], body.dimensions) for output in answer.outputs]
    coded = body.encoding_format == "base64"
    data = [Embedding(number, _coded(vector) if coded else vector) for number, vector in enumerate(vectors)]
    return json_response(Embeddings(data, answer.served.id, answer.usage))


async def score(service: Service, request: Request) -> Response:
    """How like each other pairs of texts are."""
    body = parse(ScoreRequest, await request.body())
    first, second = body.first, body.second
    answer = await _read(service, request, body, [Text(text) for text in (*first, *second)], "score-", "text_1")
    vectors = [output.values or [] for output in answer.outputs]
    ours, theirs = vectors[: len(first)], vectors[len(first) :]
    pairs = list(zip(ours * len(theirs) if len(ours) == 1 else ours, theirs, strict=True))
    likeness = await asyncio.to_thread(lambda: [_cosine(*pair) for pair in pairs])
    data = [Score(number, value) for number, value in enumerate(likeness)]
    return json_response(Readings(answer.id, answer.created, answer.served.id, data, answer.usage))


async def rerank(service: Service, request: Request) -> Response:
    """Documents in the order of their likeness to a question."""
    body = parse(RerankRequest, await request.body())
    texts = [Text(body.query), *map(Text, body.documents)]
    answer = await _read(service, request, body, texts, "rerank-", "documents")
    asked, *vectors = [output.values or [] for output in answer.outputs]
    likeness = await asyncio.to_thread(lambda: [_cosine(asked, vector) for vector in vectors])
    found = [
        Ranked(number, Document(document), value)
        for number, (document, value) in enumerate(zip(body.documents, likeness, strict=True))
    ]
    ranked = sorted(found, key=lambda one: -one.relevance_score)[: body.top_n or None]
    return json_response(Ranking(answer.id, answer.served.id, ranked, answer.usage))


async def _read(
    service: Service,
    request: Request,
    body: ReadingFields,
    texts: Sequence[Text],
    prefix: str,
    param: str,
    dimensions: int | None = None,
) -> Answer:
    served, payer = await service.ask(request, body.model, body.safety_identifier or body.user)
    ready = demand(served, "embed")
    if dimensions is not None and dimensions > ready.width:
        reason = f"'dimensions' is more than '{served.id}' has, {ready.width}"
        raise RequestError(reason, param="dimensions")
    return await while_connected(request.receive, read(served, payer, texts, "embed", prefix=prefix, param=param))


def _vector(values: Vector, dimensions: int | None) -> Vector:
    """The first so many, of length 1 again."""
    if dimensions is None or dimensions >= len(values):
        return values
    kept = values[:dimensions]
    length = math.sqrt(math.fsum(value * value for value in kept)) or 1.0
    return [value / length for value in kept]


def _coded(vector: Vector) -> str:
    numbers = array("f", vector)
    if array("i", [1]).tobytes()[0] == 0:
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


def _cosine(one: Vector, other: Vector) -> float:
    """Both have length 1."""
    return math.fsum(a * b for a, b in zip(one, other, strict=True))
