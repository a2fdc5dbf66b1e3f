"""A closed loop of streaming requests to an OpenAI-compatible server, and what came of it.

It runs on the same cores as the server, so it does little: HTTP/1.1 read by hand, no client library.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Answer:
    """One request's times, in seconds of the performance counter."""

    started: float
    ended: float = 0.0
    pieces: list[float] = field(default_factory=list)
    """When each piece of text came."""
    tokens: int = 0
    cached: int = 0
    error: str | None = None


async def ask(url: str, key: str, body: dict[str, Any]) -> Answer:
    """Send one chat request and read its stream to the end."""
    answer = Answer(time.perf_counter())
    place = urlsplit(url)
    content = json.dumps(body).encode()
    head = (
        f"POST {place.path}/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    try:
        reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1 << 20)
        writer.write(head.encode() + content)
        status = await reader.readline()
        if b" 200 " not in status:
            answer.error = (await reader.read(2000)).decode(errors="replace")[-300:]
        async for line in reader:
            if line.startswith(b"data: {"):
                _take(answer, json.loads(line[6:]))
        writer.close()
    except (OSError, ValueError) as error:
        answer.error = str(error)
    answer.ended = time.perf_counter()
    return answer


def _take(answer: Answer, event: dict[str, Any]) -> None:
    if event.get("error"):
        answer.error = str(event["error"])[:300]
    if usage := event.get("usage"):
        answer.tokens = usage["completion_tokens"]
        answer.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    if any((choice.get("delta") or {}).get("content") for choice in event.get("choices") or ()):
        answer.pieces.append(time.perf_counter())


async def closed_loop(
    url: str, key: str, model: str, rows: Sequence[dict[str, Any]], concurrency: int, extra: dict[str, Any]
) -> dict[str, Any]:
    """Keep `concurrency` requests under way until all rows are answered; returns the figures of `summary`."""
    waiting: Iterator[dict[str, Any]] = iter(rows)
    answers: list[Answer] = []

    async def work() -> None:
        for row in waiting:
            body = {"model": model, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
            answers.append(await ask(url, key, {**body, **row, **extra}))

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return summary(answers, time.perf_counter() - started)


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, Any]:
    """Output tokens a second, milliseconds to the first token and between tokens (p50, p99), errors."""
    good = [answer for answer in answers if answer.error is None and answer.pieces]
    first = sorted(answer.pieces[0] - answer.started for answer in good)
    between = sorted(b - a for answer in good for a, b in zip(answer.pieces, answer.pieces[1:], strict=False))
    tokens = sum(answer.tokens or len(answer.pieces) for answer in good)
    errors = [answer.error for answer in answers if answer.error is not None or not answer.pieces]
    return {
        "tokens_per_second": tokens / seconds,
        "requests": len(answers),
        "errors": len(errors),
        "error": errors[0] if errors else None,
        "tokens": tokens,
        "cached_tokens": sum(answer.cached for answer in good),
        "first_ms": {"p50": _quantile(first, 0.5) * 1e3, "p99": _quantile(first, 0.99) * 1e3},
        "between_ms": {"p50": _quantile(between, 0.5) * 1e3, "p99": _quantile(between, 0.99) * 1e3},
    }


def _quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values, by linear interpolation; 0 of none."""
    if not values:
        return 0.0
    place = (len(values) - 1) * share
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)
