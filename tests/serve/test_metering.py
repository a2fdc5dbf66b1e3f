"""Every token that the engine generates is paid for, once: whole, streamed, cut off, killed."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import openai
import pytest
from running_service import Service, eventually, serving
from sqlalchemy import Connection, func, select

from databases import database_url
from steelyard.serve.billing.prices import Price, newest, publish
from steelyard.store import chain, tables
from steelyard.store.secrets import Secrets

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
PRICE = Price(input=1000, cached_input=100, output=2000)
SECRETS = Secrets.make()


@pytest.fixture
def priced(make_checkpoint: Callable[[str], Path], fresh_database: str) -> Iterator[Service]:
    with serving(make_checkpoint("tiny"), database=fresh_database, secrets=SECRETS) as service:
        set_prices(service)
        yield service


def set_prices(service: Service) -> None:
    service.behind.database.write_now(lambda connection: publish(connection, {"*": PRICE}, 1))
    service.behind.prices = service.behind.database.read_now(newest)


def settled(service: Service) -> tuple[int, int, int]:
    """Settlements, their prompt tokens, their generated tokens; once nothing is open."""
    entries = tables.ledger.c

    def read(connection: Connection) -> tuple[int, int, int] | None:
        if connection.execute(select(tables.reservations.c.id)).first() is not None:
            return None
        row = connection.execute(
            select(
                func.count(),
                func.coalesce(func.sum(entries.input_tokens), 0),
                func.coalesce(func.sum(entries.output_tokens), 0),
            ).where(entries.kind == "settle")
        ).one()
        return int(row[0]), int(row[1]), int(row[2])

    found: tuple[int, int, int] = eventually(lambda: service.behind.database.read_now(read), 5)
    wrong = service.behind.database.read_now(
        lambda connection: chain.verify(connection, SECRETS.chain, tables.ledger, [service.behind.ledger.head()])
    )
    assert wrong == []
    return found


def engine_count(service: Service) -> int:
    """What the engine says that it generated, once it has said its last."""
    eventually(lambda: service.engine.stats.running == 0, 5)
    time.sleep(0.1)
    count: int = service.engine.stats.generated_tokens
    return count


def test_whole_streamed_and_several_are_counted_alike(priced: Service) -> None:
    client = priced.sdk()
    whole = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=7, n=2)
    streamed = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=9, stream=True, stream_options={"include_usage": True}
        )
    )
    many = client.completions.create(model="tiny", prompt=["a", "b c"], max_tokens=5, n=3)
    scored = client.completions.create(model="tiny", prompt="a b c", max_tokens=0, logprobs=1, echo=True)
    usages: list[Any] = [whole.usage, streamed[-1].usage, many.usage, scored.usage]
    count, prompt, generated = settled(priced)
    assert count == 4
    assert prompt == sum(usage.prompt_tokens for usage in usages)
    assert generated == sum(usage.completion_tokens for usage in usages) == 14 + 9 + 30 == engine_count(priced)
    for usage in usages:
        cost = (usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens) * 1000 + usage.completion_tokens * 2000
        assert usage.cost == pytest.approx(cost / 1e9)


@pytest.mark.parametrize("streamed", [True, False])
def test_who_leaves_pays_for_what_was_generated(priced: Service, streamed: bool) -> None:
    seeded = random.Random(5)
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 200, "seed": 5, "stream": streamed, "n": 2}
    content = json.dumps(body).encode()
    host, port = priced.url.removeprefix("http://").split(":")
    for _ in range(6):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {priced.key}\r\n"
                f"content-length: {len(content)}\r\n\r\n".encode()
                + content
            )
            time.sleep(seeded.uniform(0.05, 0.4))
        left = time.monotonic()
        eventually(lambda: priced.behind.metering.open == 0, 5)
        assert time.monotonic() - left < 1, "settled within a second"
    count, _, generated = settled(priced)
    assert count == 6
    assert 0 < generated < 6 * 400
    assert generated == engine_count(priced)


def test_refused_and_failed_requests_cost_nothing(priced: Service) -> None:
    client = priced.sdk()
    for prompt in ([7, 7, 7], [8, 8, 8]):
        with pytest.raises(openai.APIStatusError):
            client.completions.create(model="tiny", prompt=prompt, max_tokens=5)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="a " * 300, max_tokens=5)
    assert settled(priced) == (2, 0, 0)


def test_an_engine_that_dies_is_paid_for_what_it_had_said(priced: Service) -> None:
    client = priced.sdk()
    stream = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=200, stream=True, seed=10)
    received = [next(iter(stream)) for _ in range(5)]
    priced.engine._process.kill()
    with pytest.raises(openai.APIError):
        list(stream)
    count, prompt, generated = settled(priced)
    assert (count, len(received)) == (1, 5)
    assert prompt > 0
    assert 4 <= generated < 200


def test_64_at_once_spend_no_more_than_the_limit(priced: Service) -> None:
    """Each may cost $0.0004 or so, and the limit covers ten of them."""
    behind, database = priced.behind, priced.behind.database
    client = priced.sdk()
    prompt = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1).usage.prompt_tokens  # type: ignore[union-attr]
    spent = prompt * 1000 + 2000
    each = prompt * 1000 + 100 * 2000
    database.write_now(
        lambda connection: connection.execute(tables.projects.update().values(monthly_limit=spent + 10 * each))
    )
    results: list[object] = []

    def ask() -> None:
        try:
            results.append(client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=100, seed=10))
        except openai.RateLimitError as error:
            results.append(error)

    threads = [threading.Thread(target=ask) for _ in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [result for result in results if isinstance(result, openai.RateLimitError)]
    assert len(refused) == 54
    assert all(error.code == "insufficient_quota" for error in refused)
    total = database.read_now(lambda connection: connection.execute(select(func.sum(tables.ledger.c.amount))).scalar())
    assert total == spent + 10 * each
    eventually(lambda: behind.metering.open == 0)


def test_a_server_that_was_killed_settles_at_the_next_start(make_checkpoint: Callable[[str], Path]) -> None:
    with database_url("sqlite", None) as url:
        checkpoint = make_checkpoint("tiny")
        with serving(checkpoint, database=url, secrets=SECRETS) as service:
            set_prices(service)
            client = service.sdk()
            stream = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=200, stream=True, seed=20)
            for _ in range(3):
                next(iter(stream))
            time.sleep(2.5)  # so that its progress is persisted
            # As if killed: what it would settle from now on does not reach the ledger.
            service.behind.ledger.settle = lambda *_: Future()  # type: ignore[method-assign]
            service.engine._process.kill()
        with serving(checkpoint, database=url, secrets=SECRETS) as again:
            count, prompt, generated = settled(again)
            assert count == 1
            assert prompt > 0
            assert 20 < generated < 200
