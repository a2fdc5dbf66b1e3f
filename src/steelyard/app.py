"""The server, composed in one place: routes, what stands before them, engines behind them, and how it starts and ends.

What each part does is in `serve/`; nothing here knows a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from steelyard.errors import ConfigError, EngineUnavailableError
from steelyard.infer.request import CacheKind
from steelyard.serve.access_log import AccessLog
from steelyard.serve.adapters import AdapterFolder
from steelyard.serve.auth import Authentication, Keys, key_file, open_keys
from steelyard.serve.endpoints import adapters as adapter_endpoints
from steelyard.serve.endpoints import chat, completions, health, metrics
from steelyard.serve.endpoints import models as model_endpoints
from steelyard.serve.engine_client import Command, worker_command
from steelyard.serve.limits import MAX_BODY_BYTES, BodyLimit, DeadlineProtocol
from steelyard.serve.models import Models, engines, load_models
from steelyard.serve.protocol.errors import refuse_path

DRAIN_SECONDS = 30
"""How long requests may go on after SIGTERM."""
KEEP_ALIVE_SECONDS = 75


def create_app(
    models: Models, keys: Keys, *, adapters: AdapterFolder | None = None, max_body_bytes: int = MAX_BODY_BYTES
) -> Starlette:
    """The application; its lifespan is that of the engines.

    Args:
        models: what is served.
        keys: who may ask.
        adapters: where adapters may be loaded from while the server runs; None: they may not.
        max_body_bytes: the largest request.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        running = engines(models)
        try:
            for engine in running:
                await engine.start()
            yield
        finally:
            await asyncio.gather(*(engine.stop() for engine in running))
            for model in models.values():
                if model.template is not None:
                    model.template.close()

    changing = []
    if adapters is not None:
        changing = [
            Route("/v1/load_lora_adapter", partial(adapter_endpoints.load, adapters), methods=["POST"]),
            Route("/v1/unload_lora_adapter", partial(adapter_endpoints.unload, adapters), methods=["POST"]),
        ]
    app = Starlette(
        routes=[
            *changing,
            Route("/v1/chat/completions", partial(chat.create, models), methods=["POST"]),
            Route("/v1/completions", partial(completions.create, models), methods=["POST"]),
            Route("/v1/models", partial(model_endpoints.list_models, models), methods=["GET"]),
            Route("/v1/models/{model_id:path}", partial(model_endpoints.retrieve, models), methods=["GET"]),
            Route("/health", partial(health.ready, models), methods=["GET"]),
            Route("/ready", partial(health.ready, models), methods=["GET"]),
            Route("/metrics", partial(metrics.read, models), methods=["GET"]),
            Route("/live", health.live, methods=["GET"]),
            Route("/version", health.version, methods=["GET"]),
        ],
        middleware=[
            Middleware(AccessLog),
            Middleware(Authentication, keys=keys),
            Middleware(BodyLimit, max_bytes=max_body_bytes),
        ],
        exception_handlers={HTTPException: refuse_path},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


class Server(uvicorn.Server):
    """uvicorn's server, whose signals are `run`'s to handle."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    def hang_up(self) -> None:
        """Close every connection at once; what they waited for is aborted."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def configure(app: Starlette) -> Server:
    """A server for `app` with our deadlines and our log."""
    return Server(
        uvicorn.Config(
            app,
            http=DeadlineProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
    )


def run(
    checkpoints: Sequence[Path],
    adapters: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    drafts: Sequence[str] = (),
    adapter_folder: Path | None = None,
    kv_cache: CacheKind = "bfloat16",
    announce: Callable[[str, list[str]], None] = lambda url, models: None,
    command: Command = worker_command,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Serve checkpoints until SIGTERM or SIGINT; requests under way are finished first, for `DRAIN_SECONDS` at most.

    Args:
        checkpoints: folders of models; each is called as its folder.
        adapters: `NAME=PATH`, or `NAME=PATH@MODEL` where there are several models.
        host: the address to listen on.
        port: the port; 0 takes a free one.
        drafts: `PATH`, or `PATH@MODEL` where there are several models.
        adapter_folder: adapters inside it may be loaded and unloaded over HTTP; None: they may not.
        kv_cache: how engines keep keys and values.
        announce: told the base URL and the models' names once all are ready.
        command: makes the command line of an engine process.
        environment: where the API key or the state folder is named.

    Raises:
        CheckpointError: a folder is missing, no checkpoint, or broken.
        ConfigError: a wrong adapter or draft, an address that is not free, a state folder that cannot be used.
        EngineUnavailableError: an engine cannot start; it said why.
    """
    models = load_models(checkpoints, adapters, drafts, kv_cache=kv_cache, command=command)
    changing = None if adapter_folder is None else AdapterFolder(adapter_folder, models)
    with _listen(host, port) as listener:
        keys, new_key = open_keys(environment)  # after the port is ours: a key that is made is also shown
        if new_key is not None:
            print(f"Your API key, shown this once: {new_key}", flush=True)
            print(f"(kept as a hash in {key_file(environment)}: remove that file, and the next start makes a new key)")
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger("steelyard").setLevel(logging.INFO)
        asyncio.run(_serve(configure(create_app(models, keys, adapters=changing)), listener, models, announce))


async def _serve(
    server: Server, listener: socket.socket, models: Models, announce: Callable[[str, list[str]], None]
) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if server.should_exit:  # asked twice: requests under way end with their connections
            server.hang_up()
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    waiting = asyncio.create_task(_all_ready(models))
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    failure: EngineUnavailableError | None = None
    if waiting.done():
        try:
            await waiting
            announce(f"{_address(listener)}/v1", list(models))
        except EngineUnavailableError as error:
            failure = error
            server.should_exit = True
    waiting.cancel()
    await serving
    if failure is not None:
        raise failure


async def _all_ready(models: Models) -> None:
    await asyncio.gather(*(engine.wait_ready() for engine in engines(models)))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}, port {port} ({error.strerror}): choose another --port") from None
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
