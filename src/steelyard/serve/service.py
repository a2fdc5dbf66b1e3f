"""What endpoints work with: models, the database, keys, money, limits. Opened once, handed to every route.

Knows no route and no shape of a request.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection
from starlette.requests import Request

from steelyard.errors import ModelNotFoundError
from steelyard.serve import aliases, idempotency, rate_limits, stored_responses
from steelyard.serve.aliases import Names
from steelyard.serve.auth import ADMIN_SCOPES, KEY_VARIABLE, PROJECT_SCOPES, Caller, KeyRing, fixed_keys
from steelyard.serve.batches.runner import BatchRunner
from steelyard.serve.billing import prices, storage
from steelyard.serve.billing.bill import BatchLine, Payer
from steelyard.serve.billing.ledger import Clock, Ledger
from steelyard.serve.billing.metering import Metering
from steelyard.serve.billing.prices import PriceList
from steelyard.serve.energy import Energy
from steelyard.serve.engine_client import EngineClient
from steelyard.serve.examples import Showing
from steelyard.serve.files import Files
from steelyard.serve.jobs.compression import Compression
from steelyard.serve.jobs.fine_tuning import FineTuning
from steelyard.serve.jobs.runner import JobRunner
from steelyard.serve.meters import RequestMeters
from steelyard.serve.models import ServedModel
from steelyard.serve.organization import limits, projects
from steelyard.serve.organization.audit import Actor
from steelyard.serve.organization.keys import create_key
from steelyard.serve.pictures import Pictures
from steelyard.serve.rate_limits import Admission, RateLimits
from steelyard.serve.sounds import Sounds
from steelyard.serve.stored import StoredCompletions
from steelyard.serve.stored_responses import StoredResponses
from steelyard.serve.tuned import TunedModels
from steelyard.serve.turns import Turns
from steelyard.store.artifacts import Artifacts
from steelyard.store.database import Database
from steelyard.store.secrets import Secrets

Result = TypeVar("Result")
CHECKS = 2
"""Forms of answers that are checked at once."""


@dataclass
class Service:
    """Everything behind the routes."""

    models: dict[str, ServedModel]
    database: Database
    secrets: Secrets
    keys: KeyRing
    metering: Metering
    limits: RateLimits
    prices: PriceList
    clock: Clock
    files: Files
    tuned: TunedModels
    jobs: JobRunner
    batches: BatchRunner
    stored: StoredCompletions
    responses: StoredResponses
    names: Names
    sounds: Sounds
    pictures: Pictures = field(default_factory=Pictures)
    checks: Turns = field(default_factory=lambda: Turns(CHECKS))
    meters: RequestMeters = field(default_factory=RequestMeters)
    energy: Energy = field(default_factory=Energy)
    first_keys: dict[str, str] = field(default_factory=dict)
    """Keys that were made at the first start, by what they are for: to be shown once."""

    @property
    def showing(self) -> Showing:
        """What classifiers are shown."""
        return Showing(self.pictures, self.sounds)

    @property
    def ledger(self) -> Ledger:
        """Where money is."""
        return self.metering.ledger

    async def checked(self, project: str, form: Callable[[], str | None]) -> str | None:
        """The form that an answer is held to, made and checked by a thread; whose it is that comes next goes by turns.

        Raises:
            RequestError: it is none.
        """
        async with self.checks.place(project):
            checking = asyncio.ensure_future(asyncio.to_thread(form))
            try:
                return await asyncio.shield(checking)
            finally:  # a thread cannot be stopped: the place is its own until it ends, whoever has left
                await asyncio.gather(checking, return_exceptions=True)

    def now(self) -> int:
        """Unix seconds."""
        return int(self.clock())

    def visible(self, project: str | None) -> dict[str, ServedModel]:
        """The models that a project may ask; all of them, for an administrator."""
        return {
            name: served for name, served in self.models.items() if project is None or served.project in (None, project)
        }

    def find(self, name: str, project: str, who: str = "") -> ServedModel:
        """The model that a project calls by this name; an alias that is tried out gives `who` asks one or the other.

        Raises:
            ModelNotFoundError: there is none that it may ask; those that it may are named.
        """
        model = self.names.resolve(name, who)
        self.names.check_open(model, self.now())
        served = self.models.get(model)
        if served is None or served.project not in (None, project):
            raise ModelNotFoundError(
                f"the model '{name[:80]}' does not exist here: use one of {', '.join(self.visible(project))}",
                param="model",
                code="model_not_found",
            )
        return served

    async def found(self, name: str, project: str, who: str = "") -> ServedModel:
        """`find`, for a model too that another process has just made: it is served from now on."""
        try:
            return self.find(name, project, who)
        except ModelNotFoundError:
            if ":" not in name or not await self.tuned.serve_named(project, name):
                raise
            return self.find(name, project, who)

    async def ask(self, request: Request, model: str, user: str | None = None) -> tuple[ServedModel, Payer]:
        """Let a request to a model in, within the limits of its project; the response's headers tell of those.

        Raises:
            ModelNotFoundError: the project has no such model.
            EngineUnavailableError: its engine is not ready.
            RateLimitError: too many requests in a minute, or at once.
        """
        caller: Caller = request.state.caller
        served = await self.found(model, caller.project, user or caller.key_id)
        served.ready()
        line: BatchLine | None = getattr(request.state, "line", None)
        money = (self.metering, self.limits, self.prices, self.meters)
        if line is not None:
            return served, Payer(caller.project, caller.key_id, Admission.free(), *money, line.id, line.paid)
        try:
            admission = self.limits.admit(caller.project, served.id)
        finally:
            request.state.headers = self.limits.headers(caller.project, served.id)
        request.state.at_end = [*getattr(request.state, "at_end", ()), admission.close]
        trace = getattr(request.state, "trace", None)
        return served, Payer(caller.project, caller.key_id, admission, *money, trace=trace)

    def actor(self, request: Request) -> Actor:
        """Who changes something, for the audit log."""
        caller: Caller = request.state.caller
        return Actor(caller.key_id, self.now(), self.secrets.chain)

    async def change(self, operation: Callable[[Connection], Result]) -> Result:
        """Change something that keys or limits depend on: it holds from now on. Raises what `operation` raises."""
        result = await self.database.write(operation)
        self.keys.forget()
        await self.reload()
        return result

    async def reload(self) -> None:
        """Take up limits and prices that were changed, here or by another process."""
        self.limits.take_up(await self.database.read(rate_limits.read))
        self.prices = await self.database.read(prices.newest)
        self.names = await self.database.read(aliases.read)

    async def tidy(self) -> None:
        """What is done now and then: sound alerts, remove what has expired, charge what is stored."""
        await self.database.write(lambda connection: limits.sound(connection, self.ledger.month()))
        await self.database.write(lambda connection: idempotency.expire(connection, self.now()))
        await self.database.write(lambda connection: stored_responses.expire(connection, self.now()))
        await asyncio.to_thread(self.files.expire, self.now())
        for charge in await self.database.read(lambda connection: storage.due(connection, self.prices, self.now())):
            await asyncio.wrap_future(self.ledger.charge(charge))


def open_service(
    models: dict[str, ServedModel],
    database: Database,
    secrets: Secrets,
    state: Path,
    *,
    artifacts: str | None = None,
    job_slots: int = 1,
    job_threads: int | None = None,
    new_engine: Callable[[str, Path], EngineClient] = EngineClient,
    environment: Mapping[str, str] = os.environ,
    clock: Clock = time.time,
) -> Service:
    """The service on a database: makes the first project, settles what a server that died left open.

    The first project gets a key, and administrators do, unless the environment names one.

    Args:
        models: what is served; gains and loses what jobs make.
        database: this process is its server.
        secrets: the server's own.
        state: the folder for what is not in the database.
        artifacts: URL of the stored contents; None: a folder in `state`.
        job_slots: runs of jobs at once; 0 leaves jobs to `steelyard worker`.
        job_threads: of a run; None: half of the processor's, for all slots together.
        new_engine: makes the engines of whole models that jobs make.
        environment: may name keys.
        clock: Unix seconds.

    Raises:
        ConfigError: a key in the environment that cannot be one.
        StorageError: the database cannot be used.
    """
    actor = Actor("server", int(clock()), secrets.chain)
    first_keys: dict[str, str] = {}

    def begin(connection: Connection) -> str:
        project = projects.first(connection)
        if project is None:
            project = projects.create(connection, actor, projects.FIRST_PROJECT)
            wanted = [("project", project["id"], PROJECT_SCOPES), ("admin", None, ADMIN_SCOPES)]
            for use, owner, scopes in wanted if not environment.get(KEY_VARIABLE) else []:
                first_keys[use] = create_key(
                    connection, actor, secrets.pepper, "first key", scopes, project_id=owner
                ).value
        identity: str = project["id"]
        return identity

    first = database.write_now(begin)
    ledger = Ledger(database, secrets.chain, clock)
    ledger.settle_abandoned()
    metering, listed = Metering(ledger), database.read_now(prices.newest)
    stored = Artifacts(artifacts or str(state / "artifacts"), secrets.serving_root, database)
    files = Files(database, stored, state / "clear")
    tuned = TunedModels(database, stored, state / "models", models, new_engine)
    service: Service
    jobs = JobRunner(
        database,
        {"fine_tuning": FineTuning(files, tuned), "compression": Compression(files, tuned)},
        ledger,
        lambda: service.prices,
        state / "jobs",
        clock,
        knows=tuned.knows,
        serve=tuned.serve,
        drop=tuned.remove,
        slots=job_slots,
        threads=job_threads,
    )
    service = Service(
        models,
        database,
        secrets,
        KeyRing(database, secrets.pepper, fixed_keys(secrets.pepper, first, environment)),
        metering,
        RateLimits(database.read_now(rate_limits.read)),
        listed,
        clock,
        files,
        tuned,
        jobs,
        BatchRunner(files, clock),
        StoredCompletions(files),
        StoredResponses(database, stored),
        database.read_now(aliases.read),
        Sounds(state / "clear"),
        first_keys=first_keys,
    )
    return service


def export_head(service: Service, folder: Path) -> None:
    """Write the ledger's head beside the database, so that a ledger that was cut off is found out."""
    head = service.ledger.head()
    with (folder / "ledger-heads.jsonl").open("a") as file:
        file.write(f'{{"sequence": {head.sequence}, "mac": "{head.mac.hex()}", "at": {service.now()}}}\n')
        file.flush()
        os.fsync(file.fileno())
