"""Money and what was acknowledged, under kills, races, retries and clients that leave: parts of `reliability.py`."""

from __future__ import annotations

import random
import socket
import threading
import time
from functools import partial
from typing import Any

import httpx
import openai
from sqlalchemy import delete, func, select, update

from reliability_server import (
    HELLO,
    NAME,
    Found,
    Part,
    Server,
    Target,
    at_most,
    books,
    counted,
    execute,
    none,
    running,
    scalar,
)
from steelyard.store import chain, tables


def kills(kind: str, count: int, seeded: random.Random) -> Found:
    """4, 6, 7, 33: kill the server again and again under load."""
    acknowledged: set[str] = set()
    answered: dict[str, tuple[int, int]] = {}
    operations = 0
    lock = threading.Lock()

    def busy(server: Server, ending: threading.Event, number: int) -> None:
        nonlocal operations
        own = random.Random(seeded.random() + number)
        client = server.sdk()
        while not ending.is_set():
            try:
                if own.random() < 0.15:
                    with server.http() as http:
                        made = http.post("/organization/projects", json={"name": f"p{own.random()}"})
                    made.raise_for_status()
                    with lock:
                        acknowledged.add(made.json()["id"])
                elif own.random() < 0.5:
                    answer = client.chat.completions.create(
                        model=NAME, messages=HELLO, max_tokens=own.randint(1, 40), seed=own.choice([0, 5])
                    )
                    assert answer.usage is not None
                    with lock:
                        answered[answer.id] = answer.usage.prompt_tokens, answer.usage.completion_tokens
                else:
                    stream = client.chat.completions.create(
                        model=NAME,
                        messages=HELLO,
                        max_tokens=40,
                        seed=own.choice([0, 5, 20]),
                        stream=True,
                        stream_options={"include_usage": True},
                    )
                    leave = own.randint(1, 60)
                    with stream:
                        for place, chunk in enumerate(stream):
                            if chunk.usage is not None:
                                with lock:
                                    answered[chunk.id] = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
                            if place >= leave:
                                break
                with lock:
                    operations += 1
            except (openai.OpenAIError, httpx.HTTPError):
                time.sleep(0.05)

    with running(kind) as server:
        began = time.monotonic()
        for _ in range(count):
            ending = threading.Event()
            workers = [threading.Thread(target=busy, args=(server, ending, number)) for number in range(8)]
            for worker in workers:
                worker.start()
            time.sleep(seeded.uniform(0.3, 1.5))
            server.kill()
            ending.set()
            for worker in workers:
                worker.join()
            server.start()
        seconds = time.monotonic() - began
        server.stop()
        found = books(server)
        with server.opened() as (database, _):
            there = set(
                database.read_now(lambda connection: connection.execute(select(tables.projects.c.id)).scalars().all())
            )
    settled = found.pop("settled")
    wrong = [
        name
        for name, (prompt, generated) in answered.items()
        if name not in settled or (settled[name]["input_tokens"], settled[name]["output_tokens"]) != (prompt, generated)
    ]
    return {
        "kills": count,
        "operations": operations,
        "acknowledged": len(acknowledged),
        "acknowledged_lost": len(acknowledged - there),
        "answers": len(answered),
        "answers_not_in_the_ledger": len(wrong),
        "settlements": len(settled),
        **{**found, "chain": len(found["chain"])},
        "minutes": seconds / 60,
    }


def race(kind: str, count: int, seeded: random.Random) -> Found:
    """8: 64 at once, of which the budget covers a few."""
    over = 0
    admitted: list[int] = []
    with running(kind) as server, server.http() as http:
        for _ in range(max(1, count // 10)):
            project = http.post("/organization/projects", json={"name": "race"}).json()["id"]
            key = http.post(f"/organization/projects/{project}/api_keys", json={"name": "x"}).json()["value"]
            client = server.sdk(api_key=key)
            usage = client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=1).usage
            assert usage is not None
            each, spent = usage.prompt_tokens * 100 + 50 * 400, usage.prompt_tokens * 100 + 400
            limit = spent + seeded.randint(1, 30) * each + seeded.randint(0, each - 1)
            with server.opened() as (database, _):
                change = update(tables.projects).where(tables.projects.c.id == project).values(monthly_limit=limit)
                database.write_now(partial(execute, statement=change))
            results: list[bool] = []

            def ask(client: openai.OpenAI = client, results: list[bool] = results) -> None:
                try:
                    client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=50, seed=10)
                    results.append(True)
                except openai.RateLimitError:
                    results.append(False)

            threads = [threading.Thread(target=ask) for _ in range(64)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            admitted.append(sum(results))
            with server.opened() as (database, _):
                spending = select(func.sum(tables.ledger.c.amount)).where(tables.ledger.c.project_id == project)
                total = database.read_now(partial(scalar, query=spending))
            over += max(0, int(total) - limit)
    return {"rounds": len(admitted), "admitted": admitted, "overshoot_nano_dollars": over}


def leave(kind: str, count: int, seeded: random.Random) -> Found:
    """7, 9: clients leave at random tokens; what is billed is what the engine generated, at once."""
    late: list[float] = []
    with running(kind) as server:
        for number in range(count):
            body = {"max_tokens": 400, "seed": 5, "stream": number % 2 == 0}
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(server.request(body))
                time.sleep(seeded.uniform(0.01, 0.3))
            left = time.monotonic()
            while server.open_reservations():
                assert time.monotonic() - left < 10, "never settled"
                time.sleep(0.01)
            late.append(time.monotonic() - left)
        with server.http() as http:
            text = http.get(server.url.removesuffix("/v1") + "/metrics").text
        found = books(server)
    generated = counted(text, "steelyard:generation_tokens_total{")
    return {
        "left": count,
        "settled_after_ms_max": max(late) * 1e3,
        "engine_tokens": generated,
        "ledger_tokens": found["tokens"],
        "difference": generated - found["tokens"],
        "never_settled": found["never_settled"],
    }


def tamper(kind: str, count: int, seeded: random.Random) -> Found:
    """30: change, add, remove and cut rows off; one who has the key and an exported head finds every one."""
    tried = found = 0
    with running(kind) as server:
        client = server.sdk()
        for _ in range(30):
            client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=2)
        server.stop()
        with server.opened() as (database, key), database.engine.connect() as connection:
            head = database.read_now(_ledger_head)
            connection.rollback()
            columns = [column for column in tables.ledger.columns if column.name not in ("sequence", "mac")]
            for number in range(max(20, count * 3)):
                with connection.begin() as transaction:
                    place = seeded.randint(1, head.sequence)
                    here = tables.ledger.c.sequence == place
                    if number % 3 == 0:
                        column = seeded.choice(columns)
                        old = connection.execute(select(column).where(here)).scalar()
                        new: Any = not old if isinstance(old, bool) else (old or 0) + 1 if isinstance(old, int) else "x"
                        connection.execute(update(tables.ledger).where(here).values({column.name: new}))
                    elif number % 3 == 1:
                        connection.execute(delete(tables.ledger).where(here))
                    else:
                        connection.execute(delete(tables.ledger).where(tables.ledger.c.sequence >= place))
                        last = connection.execute(
                            select(tables.ledger.c.sequence, tables.ledger.c.mac).order_by(
                                tables.ledger.c.sequence.desc()
                            )
                        ).first()
                        sequence, mac = (0, chain.ORIGIN) if last is None else (last.sequence, last.mac)
                        connection.execute(
                            update(tables.chains)
                            .where(tables.chains.c.name == "ledger")
                            .values(sequence=sequence, mac=mac)
                        )
                    tried += 1
                    found += bool(chain.verify(connection, key, tables.ledger, [head]))
                    transaction.rollback()
    return {"tried": tried, "found": found}


def _ledger_head(connection: Any) -> chain.Head:
    row = connection.execute(
        select(tables.chains.c.sequence, tables.chains.c.mac).where(tables.chains.c.name == "ledger")
    ).one()
    return chain.Head(row.sequence, row.mac)


PARTS = {
    "kills": Part(
        kills,
        True,
        none(
            "acknowledged_lost",
            "answers_not_in_the_ledger",
            "chain",
            "balance_off",
            "twice",
            "open",
            "never_settled",
        ),
    ),
    "race": Part(race, True, none("overshoot_nano_dollars")),
    "leave": Part(leave, True, (*none("difference"), at_most("settled_after_ms_max", 1000))),
    "tamper": Part(
        tamper,
        True,
        (Target("found", lambda found: found["tried"] - found["found"], "== 0", lambda value: value == 0),),
    ),
}
