"""A real server on 127.0.0.1 over a stand-in engine process, and the unmodified SDK to talk to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
from starlette.applications import Starlette

from steelyard.app import configure, create_app
from steelyard.serve.adapters import AdapterFolder
from steelyard.serve.auth import ADMIN_VARIABLE, KEY_VARIABLE
from steelyard.serve.engine_client import Command, EngineClient
from steelyard.serve.keys import new_key
from steelyard.serve.models import ServedModel, load_models
from steelyard.serve.service import Service as Behind
from steelyard.serve.service import open_service
from steelyard.store.database import opened, sqlite_url
from steelyard.store.secrets import Secrets

STAND_IN = Path(__file__).with_name("stand_in_engine.py")


def stand_in_command(checkpoint: Path, model: str, adapters: Mapping[str, Path], descriptor: int) -> list[str]:
    worn = [part for name, path in adapters.items() for part in ("--adapter", f"{name}={path}")]
    command = [sys.executable, str(STAND_IN), str(checkpoint), "--model", model, "--socket", str(descriptor)]
    return command + worn


def eventually(condition: Callable[[], Any], seconds: float = 5.0) -> Any:
    """The first true value of `condition`, asked again and again."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)
    return value


@dataclass
class Service:
    url: str
    key: str
    checkpoint: Path
    models: dict[str, ServedModel]
    app: Starlette
    admin_key: str
    behind: Behind

    @property
    def engine(self) -> Any:
        return next(iter(self.models.values())).engine

    def received(self) -> list[dict[str, Any]]:
        file = self.checkpoint / "received"
        messages = [json.loads(line) for line in file.read_bytes().splitlines()] if file.exists() else []
        return [message for message in messages if not message.get("id", "").startswith("canary-")]

    def aborted(self, request: Mapping[str, Any]) -> bool:
        return any(message["type"] == "abort" and message["id"] == request["id"] for message in self.received())

    def sdk(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": self.key, "max_retries": 0, **options})

    def admin_http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {self.admin_key}"}, timeout=10)

    def admin(self, **options: Any) -> openai.OpenAI:
        return self.sdk(**{"admin_api_key": self.admin_key, **options})

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {self.key}"}, timeout=10, **options)


@contextlib.contextmanager
def serving(
    checkpoint: Path,
    adapters: tuple[str, ...] = (),
    command: Command = stand_in_command,
    seconds: float = 20,
    adapter_folder: Path | None = None,
    database: str | None = None,
    secrets: Secrets | None = None,
    state: Path | None = None,
    job_slots: int = 1,
    tracing: Any = None,
    clock: Callable[[], float] = time.time,
) -> Iterator[Service]:
    """A running service, ready within `seconds`."""
    models = load_models([checkpoint], adapters, command=command)
    key, admin_key = new_key(), new_key()
    changing = None if adapter_folder is None else AdapterFolder(adapter_folder, models)
    with contextlib.ExitStack() as stack:
        if database is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            database = sqlite_url(Path(folder) / "steelyard.db")
        store = stack.enter_context(opened(database, role="server"))
        environment = {KEY_VARIABLE: key, ADMIN_VARIABLE: admin_key}
        if state is None:
            state = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        behind = open_service(
            models,
            store,
            secrets or Secrets.make(),
            state,
            job_slots=job_slots,
            new_engine=partial(EngineClient, command=command),
            environment=environment,
            clock=clock,
        )
        app = create_app(behind, adapters=changing, tracing=tracing)
        with running(app, models, seconds) as url:
            yield Service(url, key, checkpoint, models, app, admin_key, behind)


@contextlib.contextmanager
def running(app: Starlette, models: dict[str, ServedModel], seconds: float) -> Iterator[str]:
    """An application that serves, once its first engine is ready: its URL."""
    server = configure(app)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    server.config.port = 0
    thread.start()
    try:
        eventually(lambda: server.started and next(iter(models.values())).engine.ready, seconds)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        server.hang_up()
        thread.join(20)
        assert not thread.is_alive()
