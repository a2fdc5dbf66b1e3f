"""Exactly once, at its full size: a part of `reliability.py`.

Clients ask with an `Idempotency-Key`, lose patience, ask again, leave streams at random tokens; the server is killed
every 2,000 operations. Each client has an API key of its own, so the ledger's entries can be laid beside what it saw:

- an answer that a client has whole is settled once, at the tokens that its `usage` told;
- asked again, it is the same answer, and nothing is settled for it;
- a stream that a client left is settled at no fewer tokens than it had seen, unless the server was killed;
- whatever else is settled is at most one entry for each request that was broken off without an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from reliability_server import Found, Part, Server, books, none, running

CLIENTS = 48
EVERY = 2000
"""Operations from one kill to the next."""
MOST_TOKENS = 8
AGAIN_SECONDS = 0.05
AWAY, AWAY_SECONDS = -1, 0.3
"""Instead of a status: there is no server just now."""
HANGS_SECONDS = 30.0
DIED = "its server died"
DONE = b"data: [DONE]"
"""Here a client has a whole stream, and may leave."""


@dataclass
class Reply:
    """What came of a request."""

    status: int = 0
    id: str = ""
    usage: tuple[int, int] | None = None
    """None: it is not whole."""
    pieces: int = 0
    """Tokens that a stream had brought."""
    replayed: bool = False


@dataclass
class Client:
    """One that asks, and remembers what it saw."""

    server: Server
    key: str
    key_id: str
    own: random.Random
    answered: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By the answer's id, its tokens."""
    left: dict[str, int] = field(default_factory=dict)
    """Streams that it left, and the tokens that it had seen."""
    broken: int = 0
    """Requests that ended without an answer and without an id."""
    twice: int = 0
    """Answers that were another one when they were asked for again, or one that had been given before."""
    hung: int = 0
    """Requests that nothing came of for `HANGS_SECONDS`."""
    done: Counter[str] = field(default_factory=Counter)
    refused: Counter[int] = field(default_factory=Counter)

    async def operate(self) -> None:
        """Do one of the things that clients do; some take two requests."""
        way = self.own.choices(["whole", "stream", "impatient", "again", "leave"], [30, 15, 20, 20, 15])[0]
        stream = way == "stream" or (way == "again" and self.own.random() < 0.5) or way == "leave"
        tokens, pace = self.own.randint(1, MOST_TOKENS), self.own.choice([None, 0, 0, 1])
        body: dict[str, Any] = {"max_tokens": tokens, "seed": pace, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        if way == "leave":
            body |= {"max_tokens": 200, "seed": 2}
            await self._leave(self.server.request(body, key=self.key))
        else:
            request = self.server.request(body, key=self.key, idempotency_key=f"{self.key_id}-{self.own.random()}")
            early = await self._lose_patience(request) if way == "impatient" else Reply()
            first = await self._until_answered(request)
            assert first.usage is not None
            self.twice += first.id in self.answered and early.id != first.id
            self.twice += early.usage is not None and (early.id, True) != (first.id, first.replayed)
            self.answered[first.id] = first.usage
            if way == "again":
                again = await self._until_answered(request)
                self.twice += again.id != first.id or again.usage != first.usage or not again.replayed
                self.done["first"] += 1
        self.done[way] += 1

    async def _until_answered(self, request: bytes) -> Reply:
        while True:
            reply = await self._ask(request)
            if reply.usage is not None:
                return reply
            self._note(reply)
            await asyncio.sleep(AWAY_SECONDS if reply.status == AWAY else AGAIN_SECONDS)

    async def _lose_patience(self, request: bytes) -> Reply:
        reply = Reply()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.own.uniform(0, 0.03)):
                reply = await self._ask(request)
        if reply.usage is not None:
            self.answered[reply.id] = reply.usage
        else:
            self._note(reply)
        return reply

    async def _leave(self, request: bytes) -> None:
        reply = await self._ask(request, self.own.randint(1, 60))
        if reply.usage is not None:
            self.answered[reply.id] = reply.usage
        elif reply.id:
            self.left[reply.id] = reply.pieces
        else:
            self._note(reply)

    def _note(self, reply: Reply) -> None:
        """There is no answer."""
        if reply.status in (0, 200):
            self.broken += 1
        else:
            self.refused[reply.status] += 1

    async def _ask(self, request: bytes, leave_after: int | None = None) -> Reply:
        """Send it and read its answer, of a stream no more pieces than these."""
        reply, whole = Reply(), False
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
        except OSError:
            reply.status = AWAY
            return reply
        try:
            writer.write(request)
            async with asyncio.timeout(HANGS_SECONDS):
                async for line in _lines(reader):
                    if reply.status == 0:
                        reply.status = int(line.split()[1])
                    elif line.startswith(b"idempotent-replayed"):
                        reply.replayed = True
                    elif line.startswith((b"data: {", b"{")):
                        _take(reply, json.loads(line.removeprefix(b"data: ")))
                        whole = line.startswith(b"{")
                        if leave_after is not None and reply.pieces >= leave_after:
                            break
                    elif line.startswith(DONE):
                        whole = True
                        break
        except TimeoutError:
            self.hung += 1
        except (OSError, ValueError):
            whole = False
        finally:
            writer.transport.abort()
        if not whole:
            reply.usage = None
        return reply


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines of a response to its end."""
    while line := await reader.readline():
        yield line


def _take(reply: Reply, content: dict[str, Any]) -> None:
    if "error" in content:
        return
    reply.id = content["id"]
    if usage := content.get("usage"):
        reply.usage = usage["prompt_tokens"], usage["completion_tokens"]
    reply.pieces += any((choice.get("delta") or {}).get("content") for choice in content["choices"])


def once(kind: str, count: int, seeded: random.Random) -> Found:
    """6: so many operations; nothing is settled twice or not at all."""
    with running(kind) as server:
        clients = _clients(server, seeded)
        began = time.monotonic()
        kills = asyncio.run(_operate(server, clients, count, seeded))
        seconds = time.monotonic() - began
        server.stop()
        found = books(server)
    settled: dict[str, dict[str, Any]] = found.pop("settled")
    by_key = Counter(row["key_id"] for row in settled.values())
    counts: dict[str, tuple[int, int]] = {
        name: (row["input_tokens"], row["output_tokens"]) for name, row in settled.items()
    }
    answered = {name: usage for client in clients for name, usage in client.answered.items()}
    left = {name: seen for client in clients for name, seen in client.left.items()}
    died = sum(row["note"] == DIED for row in settled.values())
    unexplained = [
        by_key[client.key_id] - len(client.answered) - len(client.left) - client.broken for client in clients
    ]
    lost = [name for name, usage in answered.items() if counts.get(name) != usage]
    short = [
        name
        for name, seen in left.items()
        if name not in settled or (counts[name][1] < seen and settled[name]["note"] != DIED)
    ]
    return {
        "operations": sum(client.done.total() for client in clients),
        "by_way": dict(sum((client.done for client in clients), Counter[str]())),
        "kills": kills,
        "answers": len(answered),
        "left": len(left),
        "broken": sum(client.broken for client in clients),
        "refused": dict(sum((client.refused for client in clients), Counter[int]())),
        "hung": sum(client.hung for client in clients),
        "settlements": len(settled),
        "settled_after_a_kill": died,
        "answered_twice": sum(client.twice for client in clients)
        + sum(len(client.answered) for client in clients)
        - len(answered),
        "settled_without_a_reason": sum(max(0, number) for number in unexplained),
        "answers_not_in_the_ledger": len(lost),
        "seen_and_not_billed": len(short),
        **{**found, "chain": len(found["chain"])},
        "minutes": seconds / 60,
    }


def _clients(server: Server, seeded: random.Random) -> list[Client]:
    made = []
    with server.http() as http:
        project = http.post("/organization/projects", json={"name": "once"}).json()["id"]
        for number in range(CLIENTS):
            path = f"/organization/projects/{project}/service_accounts"
            key = http.post(path, json={"name": f"client {number}"}).json()["api_key"]
            made.append(Client(server, key["value"], key["id"], random.Random(seeded.random())))
    return made


async def _operate(server: Server, clients: list[Client], count: int, seeded: random.Random) -> int:
    """Returns how often the server was killed."""
    begun = kills = 0

    async def work(client: Client) -> None:
        nonlocal begun
        while begun < count:
            before = client.done.total()
            begun += 1
            await client.operate()
            begun += client.done.total() - before - 1

    working = asyncio.gather(*(work(client) for client in clients))
    following = seeded.randint(EVERY // 4, EVERY)
    while not working.done():
        await asyncio.sleep(0.02)
        if begun >= following and begun < count:
            following = begun + seeded.randint(EVERY // 2, EVERY * 3 // 2)
            kills += 1
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
    await working
    return kills


PARTS = {
    "once": Part(
        once,
        True,
        none(
            "hung",
            "answered_twice",
            "settled_without_a_reason",
            "answers_not_in_the_ledger",
            "seen_and_not_billed",
            "chain",
            "balance_off",
            "twice",
            "open",
            "never_settled",
        ),
        "operations",
    )
}
