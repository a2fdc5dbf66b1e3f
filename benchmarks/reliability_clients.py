"""Clients that are many, slow, hostile or refused: parts of `reliability.py`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import selectors
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

import gateway
import load
from reliability_server import (
    HELLO,
    NAME,
    QUICK,
    Found,
    Part,
    Server,
    Target,
    at_most,
    books,
    counted,
    none,
    quantile,
    running,
)
from steelyard.serve.keys import new_key

STALLED_AFTER = 35
"""Seconds: `STALL_SECONDS`, and what it takes to fill what a reader's system takes without him."""
STREAMS = Path(gateway.PEERS) / "streams.py"


def streams(kind: str, count: int, seeded: random.Random) -> Found:
    """14: a thousand streams at once through our transport alone, beside bare uvicorn and Starlette in turns."""
    number, rounds = (100, 1) if count < QUICK else (1000, 3)
    key, first = new_key(), dict[str, list[Found]]()
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for name in ("ours", "bare"):
                port = gateway.free_port()
                command = [sys.executable, STREAMS, name, port]
                log = Path(folder) / f"{name}{turn}.log"
                with gateway.process(command, port, log, STEELYARD_API_KEY=key) as url:
                    _many(url, key, number)  # warm
                    first.setdefault(name, []).append(_many(url, key, number))
    found: Found = {"asked": number, "rounds": rounds}
    for name, turns in first.items():
        found[f"{name}_missing"] = sum(number - turn["answered"] for turn in turns)
        for share in (50, 99):
            values = [turn["first"][share] * 1e3 for turn in turns]
            found[f"{name}_first_ms_p{share}"] = statistics.median(values)
            found[f"{name}_first_ms_p{share}_all"] = values
    return found


def _many(url: str, key: str, number: int) -> Found:
    """So many streams at once, from this one thread: how many are whole, and seconds to the first byte.

    It shares two cores with the server, so it does little: sockets and a selector, no loop of tasks.
    """
    place = urlsplit(url)
    content = json.dumps({"model": "stub", "messages": HELLO, "stream": True}).encode()
    request = (
        f"POST {place.path}/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    ).encode() + content
    began, first, ends = dict[int, float](), dict[int, float](), dict[int, bytes]()
    with selectors.DefaultSelector() as selector:

        def take(seconds: float) -> None:
            for found, _ in selector.select(seconds):
                connection: Any = found.fileobj
                piece = b""
                with contextlib.suppress(ConnectionError):  # it is not whole then
                    piece = connection.recv(1 << 16)
                first.setdefault(found.data, time.perf_counter())
                ends[found.data] = (ends.get(found.data, b"") + piece)[-200:]
                if not piece:
                    selector.unregister(connection)
                    connection.close()

        for one in range(number):
            began[one] = time.perf_counter()
            connection = socket.create_connection((place.hostname, place.port))
            connection.sendall(request)
            selector.register(connection, selectors.EVENT_READ, one)
            if one % 10 == 0:
                take(0)
        while selector.get_map():
            take(1)
    times = [first[one] - began[one] for one in range(number)]
    whole = sum(b"data: [DONE]" in end for end in ends.values())
    return {"answered": whole, "first": {share: quantile(times, share / 100) for share in (50, 99)}}


def whole_path(kind: str, count: int, seeded: random.Random) -> Found:
    """As many streams through all of it: template, tokeniser, reservation, engine, settlement. No target of its own."""
    number = 100 if count < QUICK else 1000

    async def all_of_them(server: Server) -> list[load.Answer]:
        body = {"model": NAME, "messages": HELLO, "max_tokens": 20, "seed": 250, "stream": True}
        body["stream_options"] = {"include_usage": True}
        return await asyncio.gather(*(load.ask(server.url, server.key, body) for _ in range(number)))

    with running(kind) as server:
        answers = asyncio.run(all_of_them(server))
    first = [answer.pieces[0] - answer.started for answer in answers if answer.pieces]
    return {
        "asked": number,
        "missing": number - sum(answer.error is None and answer.tokens == 20 for answer in answers),
        "first_ms_p50": quantile(first, 0.5) * 1e3,
        "first_ms_p99": quantile(first, 0.99) * 1e3,
    }


def readers(kind: str, count: int, seeded: random.Random) -> Found:
    """16: readers that stop reading long streams: what each holds of our memory, when it is cut, what is billed."""
    number = 20 if count < QUICK else 100
    body = {"max_tokens": 8000, "seed": 20, "stream": True}
    with running(kind) as server:
        _one_after_another(server, 20)  # its memory is in use
        before = server.watched.memory_info().rss
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(socket.socket()) for _ in range(number)]
            for connection in connections:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.connect(("127.0.0.1", server.port))
                connection.sendall(server.request(body))
            began = time.monotonic()
            most, cut = before, list[float]()
            while server.open_reservations() < number:
                assert time.monotonic() - began < 30, "they were not let in"
            while left := server.open_reservations():
                most = max(most, server.watched.memory_info().rss)
                cut += [time.monotonic() - began] * (number - left - len(cut))
                assert time.monotonic() - began < 170, f"{left} readers are not cut"
                time.sleep(0.25)
            cut += [time.monotonic() - began] * (number - len(cut))
        _one_after_another(server, 1)
        with server.http() as http:
            text = http.get(server.url.removesuffix("/v1") + "/metrics").text
        server.stop()
        found = books(server)
    generated = counted(text, "steelyard:generation_tokens_total{")
    return {
        "readers": number,
        "tokens_each": found["tokens"] / number,
        "held_mb_each": (most - before) / number / (1 << 20),
        "cut_after_s": [min(cut), max(cut)],
        "cut_after_s_max": max(cut),
        "difference": generated - found["tokens"],
        "never_settled": found["never_settled"],
    }


def _one_after_another(server: Server, number: int) -> None:
    with server.http(server.key) as http:
        for _ in range(number):
            http.post("/completions", json={"model": NAME, "prompt": "x", "max_tokens": 200}).raise_for_status()


def loris(kind: str, count: int, seeded: random.Random) -> Found:
    """15: many connections whose headers never end; others are served as before."""
    number = 50 if count < QUICK else 500

    def normal(server: Server) -> float:
        times = []
        for _ in range(100):
            began = time.monotonic()
            httpx.get(server.url.removesuffix("/v1") + "/live").raise_for_status()
            times.append(time.monotonic() - began)
        return sorted(times)[98]

    with running(kind) as server:
        before = normal(server)
        attackers = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(number)]
        opened_at = time.monotonic()
        for attacker in attackers:
            attacker.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nx-slow:")
        during = normal(server)
        for attacker in attackers:
            attacker.settimeout(20)
            with contextlib.suppress(ConnectionResetError):
                while attacker.recv(1000):
                    pass
            attacker.close()
        closed = time.monotonic() - opened_at
    return {"attackers": number, "closed_after_s_max": closed, "p99_ms": [before * 1e3, during * 1e3]}


def refused(kind: str, count: int, seeded: random.Random) -> Found:
    """35: what the server computes before it refuses."""
    with running(kind) as server, server.http() as admin:
        process = server.watched
        project = admin.post("/organization/projects", json={"name": "limited"}).json()["id"]
        key = admin.post(f"/organization/projects/{project}/api_keys", json={"name": "x"}).json()["value"]
        limit = {"max_requests_per_1_minute": 0}
        admin.post(f"/organization/projects/{project}/rate_limits/rl-{NAME}", json=limit).raise_for_status()
        body = json.dumps({"model": NAME, "messages": HELLO}).encode()
        cases: dict[str, tuple[str, int, dict[str, Any]]] = {
            "wrong key": (new_key(), 401, {"content": body}),
            "mistyped key": ("sk-sy-x", 401, {"content": body}),
            "over a limit": (key, 429, {"content": body}),
            "too large": (server.key, 413, {"content": b"x" * (4 << 20) + b"xx"}),
            "not JSON": (server.key, 400, {"content": b"{" * 100_000}),
        }
        found: dict[str, float] = {}
        for name, (used, status, options) in cases.items():
            with server.http(used) as http:
                asked = 20 if name == "too large" else 300
                began = sum(process.cpu_times()[:2])
                for _ in range(asked):
                    try:
                        assert http.post("/chat/completions", **options).status_code == status, name
                    except httpx.TransportError:  # it was closed before all was sent
                        assert name == "too large"
                found[name] = (sum(process.cpu_times()[:2]) - began) / asked * 1e3
    return {"cpu_ms": found, "cpu_ms_max": max(found.values())}


PARTS = {
    "streams": Part(streams, targets=(*none("ours_missing"), at_most("ours_first_ms_p99", 250))),
    "whole_path": Part(whole_path),
    "readers": Part(
        readers,
        targets=(
            at_most("held_mb_each", 1),
            at_most("cut_after_s_max", STALLED_AFTER),
            *none("difference", "never_settled"),
        ),
    ),
    "loris": Part(
        loris,
        targets=(
            at_most("closed_after_s_max", 12),
            Target("p99", lambda found: found["p99_ms"][1] / found["p99_ms"][0], "<= 2", lambda value: value <= 2),
        ),
    ),
    "refused": Part(refused, targets=(at_most("cpu_ms_max", 5),)),
}
