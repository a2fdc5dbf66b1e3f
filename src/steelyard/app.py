"""The server, composed in one place: routes, what stands before them, engines behind them, and how it starts and ends.

What each part does is in `serve/`; nothing here knows a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from steelyard.errors import ConfigError, EngineUnavailableError, StorageError
from steelyard.infer.request import CacheKind
from steelyard.serve import sounds
from steelyard.serve.access_log import AccessLog, JsonLines
from steelyard.serve.adapters import AdapterFolder
from steelyard.serve.auth import Authentication, allowed
from steelyard.serve.batches.line import answer_line
from steelyard.serve.endpoint import Endpoint
from steelyard.serve.endpoints import adapters as adapter_endpoints
from steelyard.serve.endpoints import (
    admin_keys,
    aliases,
    audit_logs,
    batches,
    chat,
    completions,
    embeddings,
    explain,
    files,
    health,
    jobs,
    labels,
    ledger,
    metrics,
    openapi,
    projects,
    responses,
    transcriptions,
    usage,
)
from steelyard.serve.endpoints import models as model_endpoints
from steelyard.serve.endpoints import stored_completions as kept
from steelyard.serve.endpoints.aliases import Alias
from steelyard.serve.endpoints.audit_logs import AuditLog
from steelyard.serve.endpoints.health import Health, Live, Version
from steelyard.serve.endpoints.models import Model, ModelDeleted, ModelList
from steelyard.serve.engine_client import Command, EngineClient, worker_command
from steelyard.serve.files import MOST_BYTES
from steelyard.serve.idempotency import Idempotency
from steelyard.serve.limits import MAX_BODY_BYTES, BodyLimit, DeadlineProtocol
from steelyard.serve.models import Models, engines, load_models
from steelyard.serve.openapi import document
from steelyard.serve.protocol.adapters import AdapterStatus, LoadRequest, UnloadRequest
from steelyard.serve.protocol.batches import Batch, BatchRequest
from steelyard.serve.protocol.billing import BucketPage, LedgerPage, Prices, PricesRequest
from steelyard.serve.protocol.chat import ChatChunk, ChatCompletion, ChatRequest
from steelyard.serve.protocol.completions import Completion, CompletionRequest
from steelyard.serve.protocol.compression import CompressionJob, CompressionRequest
from steelyard.serve.protocol.errors import refuse_path
from steelyard.serve.protocol.explain import ExplainRequest, Explanation
from steelyard.serve.protocol.files import FileDeleted, FileObject
from steelyard.serve.protocol.fine_tuning import FineTuningJob, JobCheckpoint, JobRequest
from steelyard.serve.protocol.jobs import JobEvent
from steelyard.serve.protocol.lists import Page, limit_and_after, paged
from steelyard.serve.protocol.organization import (
    AdminKey,
    Deleted,
    KeyRequest,
    MadeServiceAccount,
    Project,
    ProjectKey,
    ProjectRateLimit,
    ProjectRequest,
    RateLimitRequest,
    ServiceAccount,
    ServiceAccountRequest,
    SpendAlert,
    SpendAlertRequest,
    SpendLimit,
    SpendLimitDeleted,
    SpendLimitRequest,
)
from steelyard.serve.protocol.parameters import storable
from steelyard.serve.protocol.reading import (
    Classes,
    ClassifyRequest,
    Embeddings,
    EmbeddingsRequest,
    Ranking,
    Readings,
    RerankRequest,
    Score,
    ScoreRequest,
    TaggedText,
    TagRequest,
)
from steelyard.serve.protocol.response_events import ResponseEvent
from steelyard.serve.protocol.response_object import InputTokens, ResponseDeleted, ResponseObject
from steelyard.serve.protocol.response_request import InputTokensRequest, ResponseRequest
from steelyard.serve.protocol.transcriptions import TextDelta, TextDone, Transcription
from steelyard.serve.service import Service, export_head, open_service
from steelyard.serve.tracing import open_tracing
from steelyard.store.database import opened, sqlite_url
from steelyard.store.secrets import home, open_secrets

if TYPE_CHECKING:
    from steelyard.serve.spans import Tracing

DRAIN_SECONDS = 30
"""How long requests may go on after SIGTERM."""
SETTLE_SECONDS = 5
"""How long their settlements may take then."""
KEEP_ALIVE_SECONDS = 75
UPLOAD_BYTES = MOST_BYTES + (1 << 20)
"""Of a file and the form around it."""
UPLOAD_SECONDS = 900.0
EXAMPLE_BYTES = 24 << 20
"""Of images and sounds in a body."""
LARGER = {
    "/v1/files": (UPLOAD_BYTES, UPLOAD_SECONDS),
    "/v1/audio/transcriptions": (sounds.MOST_BYTES + (1 << 20), 300.0),
    "/v1/classify": (EXAMPLE_BYTES, 60.0),
    "/v1/explain": (EXAMPLE_BYTES, 60.0),
}
"""Paths of bodies that may be larger, and slower."""
RELOAD_SECONDS = 2.0
"""How soon limits and prices that another process changed hold here."""
SWITCH_SECONDS = 0.0005
"""How long a thread computes while others wait: the writer and the templates' threads answer small things often."""
HEAD_SECONDS = 60.0
"""How often the ledger's head is written down outside the database."""

log = logging.getLogger("steelyard.serve")

ORGANIZATION = "/v1/organization"
CHAT, RESPONSES, TRANSCRIPTIONS = "/v1/chat/completions", "/v1/responses", "/v1/audio/transcriptions"
RESPONSE = f"{RESPONSES}/{{response_id}}"
FINE_TUNING, COMPRESSION = "/v1/fine_tuning/jobs", "/v1/compression/jobs"
ALIASES = f"{ORGANIZATION}/model_aliases"
PROJECTS, ADMIN_KEYS, PRICES = (f"{ORGANIZATION}/{things}" for things in ("projects", "admin_api_keys", "prices"))
PROJECT = f"{PROJECTS}/{{project_id}}"
ACCOUNTS, KEYS, RATES, SPEND_LIMIT, ALERTS = (
    f"{PROJECT}/{things}" for things in ("service_accounts", "api_keys", "rate_limits", "spend_limit", "spend_alerts")
)
PAGE = paged()


def _job_routes(path: str, kind: jobs.Jobs, shape: type[Any], page: Any) -> list[Endpoint]:
    """Those that every kind of job has."""
    one = f"{path}/{{job_id}}"
    return [
        Endpoint("GET", path, kind.listed, "fine_tuning", page, jobs.LISTED),
        Endpoint("GET", one, kind.retrieve, "fine_tuning", shape),
        *(Endpoint("POST", f"{one}/{verb}", kind.change, "fine_tuning", shape) for verb in jobs.VERBS),
        Endpoint("GET", f"{one}/events", kind.events, "fine_tuning", Page[JobEvent], jobs.EVENTS, events=JobEvent),
    ]


ENDPOINTS = (
    Endpoint("POST", CHAT, chat.create, "inference", ChatCompletion, ChatRequest, events=ChatChunk),
    Endpoint("GET", CHAT, kept.list_completions, "inference", Page[Any], kept.LISTED),
    Endpoint("POST", f"{CHAT}/export", kept.export, "inference", FileObject, kept.ExportRequest),
    Endpoint("GET", f"{CHAT}/{{completion_id}}", kept.retrieve, "inference", ChatCompletion),
    Endpoint("POST", f"{CHAT}/{{completion_id}}", kept.change, "inference", ChatCompletion, kept.ChangeRequest),
    Endpoint("DELETE", f"{CHAT}/{{completion_id}}", kept.delete, "inference", kept.CompletionDeleted),
    Endpoint("GET", f"{CHAT}/{{completion_id}}/messages", kept.messages, "inference", Page[Any], PAGE),
    Endpoint(
        "POST", "/v1/completions", completions.create, "inference", Completion, CompletionRequest, events=Completion
    ),
    Endpoint("POST", RESPONSES, responses.create, "inference", ResponseObject, ResponseRequest, events=ResponseEvent),
    Endpoint("POST", f"{RESPONSES}/input_tokens", responses.input_tokens, "inference", InputTokens, InputTokensRequest),
    Endpoint("GET", RESPONSE, responses.retrieve, "inference", ResponseObject, responses.RETRIEVED),
    Endpoint("DELETE", RESPONSE, responses.delete, "inference", ResponseDeleted),
    Endpoint("POST", f"{RESPONSE}/cancel", responses.cancel, "inference", ResponseObject),
    Endpoint("GET", f"{RESPONSE}/input_items", responses.input_items, "inference", Page[Any], PAGE),
    Endpoint("POST", "/v1/embeddings", embeddings.create, "inference", Embeddings, EmbeddingsRequest),
    Endpoint("POST", "/v1/score", embeddings.score, "inference", Readings[Score], ScoreRequest),
    Endpoint("POST", "/v1/rerank", embeddings.rerank, "inference", Ranking, RerankRequest),
    Endpoint("POST", "/v1/classify", labels.classify, "inference", Classes, ClassifyRequest),
    Endpoint("POST", "/v1/tag", labels.tag, "inference", Readings[TaggedText], TagRequest),
    Endpoint("POST", "/v1/explain", explain.create, "inference", Explanation, ExplainRequest),
    Endpoint(
        "POST",
        TRANSCRIPTIONS,
        transcriptions.create,
        "inference",
        Transcription,
        transcriptions.TAKES,
        events=TextDelta | TextDone,
        media=tuple(transcriptions.MEDIA.values()),
    ),
    Endpoint("GET", "/v1/models", model_endpoints.list_models, "inference", ModelList),
    Endpoint("GET", "/v1/models/{model_id:path}", model_endpoints.retrieve, "inference", Model),
    Endpoint("DELETE", "/v1/models/{model_id:path}", model_endpoints.delete, "fine_tuning", ModelDeleted),
    Endpoint("POST", "/v1/files", files.create, "files", FileObject, files.FORM),
    Endpoint("GET", "/v1/files", files.list_files, "files", Page[FileObject], files.LISTED),
    Endpoint("GET", "/v1/files/{file_id}", files.retrieve, "files", FileObject),
    Endpoint("GET", "/v1/files/{file_id}/content", files.content, "files", files.CONTENT),
    Endpoint("DELETE", "/v1/files/{file_id}", files.delete, "files", FileDeleted),
    Endpoint("POST", FINE_TUNING, jobs.fine_tune, "fine_tuning", FineTuningJob, JobRequest),
    *_job_routes(FINE_TUNING, jobs.FINE_TUNING, FineTuningJob, Page[FineTuningJob]),
    Endpoint(
        "GET",
        f"{FINE_TUNING}/{{job_id}}/checkpoints",
        jobs.FINE_TUNING.checkpoints,
        "fine_tuning",
        Page[JobCheckpoint],
        PAGE,
    ),
    Endpoint("POST", COMPRESSION, jobs.compress, "fine_tuning", CompressionJob, CompressionRequest),
    *_job_routes(COMPRESSION, jobs.COMPRESSION, CompressionJob, Page[CompressionJob]),
    Endpoint("POST", "/v1/batches", batches.create, "inference", Batch, BatchRequest),
    Endpoint("GET", "/v1/batches", batches.list_batches, "inference", Page[Batch], PAGE),
    Endpoint("GET", "/v1/batches/{batch_id}", batches.retrieve, "inference", Batch),
    Endpoint("POST", "/v1/batches/{batch_id}/cancel", batches.cancel, "inference", Batch),
    Endpoint("POST", PROJECTS, projects.create, "admin.write", Project, ProjectRequest),
    Endpoint("GET", PROJECTS, projects.list_projects, "admin.read", Page[Project], projects.LISTED),
    Endpoint("GET", PROJECT, projects.retrieve, "admin.read", Project),
    Endpoint("POST", PROJECT, projects.update, "admin.write", Project, ProjectRequest),
    Endpoint("POST", f"{PROJECT}/archive", projects.archive, "admin.write", Project),
    Endpoint(
        "POST", ACCOUNTS, projects.create_service_account, "admin.write", MadeServiceAccount, ServiceAccountRequest
    ),
    Endpoint("GET", ACCOUNTS, projects.list_service_accounts, "admin.read", Page[ServiceAccount], PAGE),
    Endpoint("GET", f"{ACCOUNTS}/{{account_id}}", projects.retrieve_service_account, "admin.read", ServiceAccount),
    Endpoint("DELETE", f"{ACCOUNTS}/{{account_id}}", projects.delete_service_account, "admin.write", Deleted),
    Endpoint("POST", KEYS, projects.create_key, "admin.write", ProjectKey, KeyRequest),
    Endpoint("GET", KEYS, projects.list_keys, "admin.read", Page[ProjectKey], projects.LISTED_KEYS),
    Endpoint("GET", f"{KEYS}/{{key_id}}", projects.retrieve_key, "admin.read", ProjectKey),
    Endpoint("DELETE", f"{KEYS}/{{key_id}}", projects.delete_key, "admin.write", Deleted),
    Endpoint("GET", RATES, projects.list_rate_limits, "admin.read", Page[ProjectRateLimit], PAGE),
    Endpoint(
        "POST",
        f"{RATES}/{{limit_id:path}}",
        projects.update_rate_limit,
        "admin.write",
        ProjectRateLimit,
        RateLimitRequest,
    ),
    Endpoint("GET", SPEND_LIMIT, projects.retrieve_spend_limit, "admin.read", SpendLimit),
    Endpoint("POST", SPEND_LIMIT, projects.update_spend_limit, "admin.write", SpendLimit, SpendLimitRequest),
    Endpoint("DELETE", SPEND_LIMIT, projects.delete_spend_limit, "admin.write", SpendLimitDeleted),
    Endpoint("GET", ALERTS, projects.list_alerts, "admin.read", Page[SpendAlert], PAGE),
    Endpoint("POST", ALERTS, projects.put_alert, "admin.write", SpendAlert, SpendAlertRequest),
    Endpoint("GET", f"{ALERTS}/{{alert_id}}", projects.retrieve_alert, "admin.read", SpendAlert),
    Endpoint("POST", f"{ALERTS}/{{alert_id}}", projects.put_alert, "admin.write", SpendAlert, SpendAlertRequest),
    Endpoint("DELETE", f"{ALERTS}/{{alert_id}}", projects.delete_alert, "admin.write", Deleted),
    Endpoint("POST", ADMIN_KEYS, admin_keys.create, "admin.write", AdminKey, KeyRequest),
    Endpoint("GET", ADMIN_KEYS, admin_keys.list_keys, "admin.read", Page[AdminKey], PAGE),
    Endpoint("GET", f"{ADMIN_KEYS}/{{key_id}}", admin_keys.retrieve, "admin.read", AdminKey),
    Endpoint("DELETE", f"{ADMIN_KEYS}/{{key_id}}", admin_keys.delete, "admin.write", Deleted),
    Endpoint("GET", f"{ORGANIZATION}/usage/{{kind}}", usage.usage, "admin.read", BucketPage, usage.USAGE_PARAMETERS),
    Endpoint("GET", f"{ORGANIZATION}/costs", usage.costs, "admin.read", BucketPage, usage.COST_PARAMETERS),
    Endpoint("GET", f"{ORGANIZATION}/ledger", ledger.entries, "admin.read", LedgerPage, ledger.PARAMETERS),
    Endpoint("GET", PRICES, ledger.retrieve_prices, "admin.read", Prices),
    Endpoint("POST", PRICES, ledger.publish_prices, "admin.write", Prices, PricesRequest),
    Endpoint("POST", ALIASES, aliases.put, "admin.write", Alias, aliases.AliasRequest),
    Endpoint("GET", ALIASES, aliases.list_aliases, "admin.read", Page[Alias]),
    Endpoint("POST", f"{ALIASES}/{{alias}}/canary", aliases.canary, "admin.write", Alias, aliases.CanaryRequest),
    Endpoint("POST", f"{ALIASES}/{{alias}}/promote", aliases.promote, "admin.write", Alias),
    Endpoint("POST", f"{ALIASES}/{{alias}}/roll_back", aliases.roll_back, "admin.write", Alias),
    Endpoint("GET", f"{ALIASES}/{{alias}}", aliases.retrieve, "admin.read", Alias),
    Endpoint("DELETE", f"{ALIASES}/{{alias}}", aliases.delete, "admin.write", aliases.AliasDeleted),
    Endpoint(
        "POST",
        f"{ORGANIZATION}/models/{{model_id}}/shutdown",
        aliases.shut_down,
        "admin.write",
        aliases.Shutdown,
        aliases.ShutdownRequest,
    ),
    Endpoint(
        "GET", f"{ORGANIZATION}/audit_logs", audit_logs.list_logs, "admin.read", Page[AuditLog], limit_and_after()
    ),
    Endpoint("GET", "/metrics", metrics.read, "admin.read", metrics.MEDIA_TYPE),
    Endpoint("GET", "/health", health.ready, None, Health, statuses=(200, 503)),
    Endpoint("GET", "/ready", health.ready, None, Health, statuses=(200, 503)),
    Endpoint("GET", "/live", health.live, None, Live),
    Endpoint("GET", "/version", health.version, None, Version),
    Endpoint("GET", "/openapi.json", openapi.read, None, openapi.Document),
)
"""Every route. Tests go through this table for every policy."""


def create_app(
    service: Service,
    *,
    adapters: AdapterFolder | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    heads: Path | None = None,
    tracing: Tracing | None = None,
) -> Starlette:
    """The application; its lifespan is that of the engines.

    Args:
        service: what is behind the routes.
        adapters: where adapters may be loaded from while the server runs; None: they may not.
        max_body_bytes: the largest request.
        heads: the folder in which the ledger's heads are written down; None: nowhere.
        tracing: tells OpenTelemetry of requests, and ends with the application; None: nobody is told.
    """
    models = service.models

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        chores = [asyncio.create_task(work) for work in _chores(service, heads)]
        service.batches.answer = partial(answer_line, app.router)
        working = [asyncio.create_task(work) for work in (service.jobs.work(), service.batches.work())]
        try:
            for engine in engines(models):
                await engine.start()
            yield
        finally:
            for work in working:
                work.cancel()
            await asyncio.gather(*working, return_exceptions=True)  # a run saves its state
            *making, persisting = chores
            for chore in making:
                chore.cancel()
            await asyncio.gather(*making, return_exceptions=True)  # a model that is just being served has an engine
            await asyncio.gather(*(engine.stop() for engine in engines(models)))
            await service.metering.drained(SETTLE_SECONDS)
            persisting.cancel()
            for model in models.values():
                if model.template is not None:
                    model.template.close()
            if tracing is not None:
                await tracing.close()

    routes = [*ENDPOINTS]
    if adapters is not None:
        load, unload = partial(adapter_endpoints.load, adapters), partial(adapter_endpoints.unload, adapters)
        routes += [
            Endpoint("POST", "/v1/load_lora_adapter", load, "admin.write", AdapterStatus, LoadRequest),
            Endpoint("POST", "/v1/unload_lora_adapter", unload, "admin.write", AdapterStatus, UnloadRequest),
        ]
    app = Starlette(
        routes=[_route(endpoint, service) for endpoint in routes],
        middleware=[
            *([] if tracing is None else [Middleware(tracing.around)]),
            Middleware(AccessLog),
            Middleware(Authentication, keys=service.keys),
            Middleware(BodyLimit, max_bytes=max_body_bytes, larger=LARGER),
            Middleware(Idempotency, database=service.database, root=service.secrets.root, now=service.now),
        ],
        exception_handlers={HTTPException: refuse_path},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.openapi = json.dumps(document(routes)).encode()
    return app


def _route(endpoint: Endpoint, service: Service) -> Route:
    handler = partial(endpoint.handler, service)
    guarded = handler if endpoint.permission is None else allowed(endpoint.permission, storable(handler))
    return Route(endpoint.path, guarded, methods=[endpoint.method])


async def _tried(chore: Awaitable[None]) -> None:
    """Do a chore; one that fails is done again the next time."""
    try:
        await chore
    except StorageError:
        pass
    except Exception:
        log.exception("a chore failed")


def _chores(service: Service, heads: Path | None) -> list[Any]:
    """What is done again and again while the server runs; the last of it until all is settled."""

    async def reload() -> None:
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            await _tried(service.reload())

    async def tidy() -> None:
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            await _tried(service.tidy())

    async def serve_made() -> None:
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            await _tried(service.tuned.serve_all())

    async def write_heads(folder: Path) -> None:
        while True:
            await _tried(asyncio.to_thread(export_head, service, folder))
            await asyncio.sleep(HEAD_SECONDS)

    heading = [] if heads is None else [write_heads(heads)]
    return [reload(), tidy(), serve_made(), *heading, service.energy.watch(), service.metering.persist()]


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
    names: Mapping[Path, str] | None = None,
    drafts: Sequence[str] = (),
    adapter_folder: Path | None = None,
    kv_cache: CacheKind = "bfloat16",
    database: str | None = None,
    artifacts: str | None = None,
    job_slots: int = 1,
    job_threads: int | None = None,
    json_log: bool = False,
    announce: Callable[[str, list[str]], None] = lambda url, models: None,
    command: Command = worker_command,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Serve checkpoints until SIGTERM or SIGINT; requests under way are finished first, for `DRAIN_SECONDS` at most.

    Args:
        checkpoints: folders of models.
        adapters: `NAME=PATH`, or `NAME=PATH@MODEL` where there are several models.
        host: the address to listen on.
        port: the port; 0 takes a free one.
        names: of some of the models; the others are called by their folders.
        drafts: `PATH`, or `PATH@MODEL` where there are several models.
        adapter_folder: adapters inside it may be loaded and unloaded over HTTP; None: they may not.
        kv_cache: how engines keep keys and values.
        database: its URL; None: `steelyard.db` in the state folder.
        artifacts: where files and models are kept; None: in the state folder.
        job_slots: runs of jobs at once; 0 leaves jobs to `steelyard worker`.
        job_threads: of a run; None: half of the processor's, for all slots together.
        json_log: whether the log is JSON, an object a line.
        announce: told the base URL and the models' names once all are ready.
        command: makes the command line of an engine process.
        environment: where keys and the state folder are named.

    Raises:
        CheckpointError: a folder is missing, no checkpoint, or broken.
        ConfigError: a wrong adapter or draft, an address that is not free, a state folder that cannot be used, a wrong
            setting of OpenTelemetry.
        EngineUnavailableError: an engine cannot start; it said why.
    """
    tracing = open_tracing(environment)
    models = load_models(checkpoints, adapters, drafts, names=names, kv_cache=kv_cache, command=command)
    changing = None if adapter_folder is None else AdapterFolder(adapter_folder, models)
    state = home(environment)
    with _listen(host, port) as listener:
        secrets = open_secrets(environment)
        with opened(database or sqlite_url(state / "steelyard.db"), role="server") as store:
            service = open_service(
                models,
                store,
                secrets,
                state,
                artifacts=artifacts,
                job_slots=job_slots,
                job_threads=job_threads,
                new_engine=partial(EngineClient, kv_cache=kv_cache, command=command),
                environment=environment,
            )
            _show(service.first_keys)
            handler = logging.StreamHandler()
            plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
            handler.setFormatter(JsonLines() if json_log else plain)
            logging.basicConfig(handlers=[handler])
            logging.getLogger("steelyard").setLevel(logging.INFO)
            app = create_app(service, adapters=changing, heads=state, tracing=tracing)
            sys.setswitchinterval(SWITCH_SECONDS)
            asyncio.run(_serve(configure(app), listener, models, announce))


def _show(keys: Mapping[str, str]) -> None:
    """Keys that were just made: the database has only hashes of them."""
    if keys:
        print("The first keys, shown this once:", flush=True)
        print(f"  {keys['project']}  for requests (project 'default')", flush=True)
        print(f"  {keys['admin']}  for administration", flush=True)


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
            gc.collect()
            gc.freeze()  # vocabularies, models, routes: what stays is not looked through again and again
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
