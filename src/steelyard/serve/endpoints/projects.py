"""`/v1/organization/projects`: projects, their keys, service accounts, limits and alerts."""

from __future__ import annotations

from functools import partial

import msgspec
from sqlalchemy import Connection, false, select
from starlette.requests import Request
from starlette.responses import Response

from steelyard.errors import NotFoundError, RequestError
from steelyard.serve.auth import PROJECT_SCOPES
from steelyard.serve.billing.prices import NANO
from steelyard.serve.organization import keys, limits, projects
from steelyard.serve.protocol import organization as shapes
from steelyard.serve.protocol.errors import json_response, once
from steelyard.serve.protocol.fields import parse
from steelyard.serve.protocol.lists import allow, boolean, page_of, paged, read_page, wanted
from steelyard.serve.protocol.parameters import BOOLEAN, Parameter, one_of
from steelyard.serve.rate_limits import RateLimit
from steelyard.serve.service import Service
from steelyard.store import tables

LISTED = (*paged(), Parameter("include_archived", BOOLEAN))
ACCESS = ("active", "inactive", "any")
LISTED_KEYS = (*paged(), Parameter("owner_project_access", one_of(*ACCESS)))


async def create(service: Service, request: Request) -> Response:
    """A new project."""
    body = parse(shapes.ProjectRequest, await request.body())
    actor = service.actor(request)
    row = await service.change(lambda connection: projects.create(connection, actor, body.name))
    return json_response(shapes.Project.of(row))


async def list_projects(service: Service, request: Request) -> Response:
    """Every project; archived ones only with `include_archived`."""
    asked = wanted(request, "include_archived")
    archived = boolean(dict(request.query_params), "include_archived")
    rules = [] if archived else [tables.projects.c.archived_at.is_(None)]
    page = await service.database.read(
        lambda connection: read_page(connection, tables.projects, rules, asked, shapes.Project.of)
    )
    return json_response(page)


async def retrieve(service: Service, request: Request) -> Response:
    """One project."""
    allow(request)
    project = _project(request)
    return json_response(shapes.Project.of(await service.database.read(partial(projects.get, project_id=project))))


async def update(service: Service, request: Request) -> Response:
    """Another name."""
    body = parse(shapes.ProjectRequest, await request.body())
    actor, project = service.actor(request), _project(request)
    row = await service.change(lambda connection: projects.rename(connection, actor, project, body.name))
    return json_response(shapes.Project.of(row))


async def archive(service: Service, request: Request) -> Response:
    """Close a project for good."""
    actor, project = service.actor(request), _project(request)
    row = await service.change(lambda connection: projects.archive(connection, actor, project))
    return json_response(shapes.Project.of(row))


async def create_service_account(service: Service, request: Request) -> Response:
    """A service account and its key."""
    body = parse(shapes.ServiceAccountRequest, await request.body())
    actor, project = service.actor(request), _project(request)
    row, key = await service.change(
        lambda connection: projects.create_service_account(
            connection,
            actor,
            service.secrets.pepper,
            project,
            body.name,
            with_key=not body.create_service_account_only,
        )
    )
    made = None if key is None else shapes.MadeKey.of(key)
    account = shapes.MadeServiceAccount(row["id"], row["name"], row["role"], row["created_at"], api_key=made)
    return once(request, account, msgspec.structs.replace(account, api_key=None))


async def list_service_accounts(service: Service, request: Request) -> Response:
    """A project's service accounts."""
    asked, project = wanted(request), _project(request)
    rules = [tables.service_accounts.c.project_id == project]

    def read(connection: Connection) -> msgspec.Struct:
        projects.get(connection, project)
        return read_page(connection, tables.service_accounts, rules, asked, shapes.ServiceAccount.of)

    return json_response(await service.database.read(read))


async def retrieve_service_account(service: Service, request: Request) -> Response:
    """One service account."""
    allow(request)
    project, account = _project(request), request.path_params["account_id"]
    row = await service.database.read(lambda connection: projects.service_account(connection, project, account))
    return json_response(shapes.ServiceAccount.of(row))


async def delete_service_account(service: Service, request: Request) -> Response:
    """Remove a service account and its keys."""
    actor, project, account = service.actor(request), _project(request), request.path_params["account_id"]
    await service.change(lambda connection: projects.delete_service_account(connection, actor, project, account))
    return json_response(shapes.Deleted(account, "organization.project.service_account.deleted"))


async def create_key(service: Service, request: Request) -> Response:
    """A key of the project that belongs to no service account."""
    body = parse(shapes.KeyRequest, await request.body())
    actor, project = service.actor(request), _project(request)
    expires = None if body.expires_in_seconds is None else service.now() + body.expires_in_seconds

    def make(connection: Connection) -> keys.NewKey:
        projects.active(connection, project)
        return keys.create_key(
            connection,
            actor,
            service.secrets.pepper,
            body.name,
            PROJECT_SCOPES if body.scopes is None else body.scopes,
            project_id=project,
            expires_at=expires,
        )

    key = await service.change(make)
    return once(request, shapes.ProjectKey.of(key.row, value=key.value), shapes.ProjectKey.of(key.row))


async def list_keys(service: Service, request: Request) -> Response:
    """A project's keys, without their values."""
    asked, project = wanted(request, "owner_project_access"), _project(request)
    access = request.query_params.get("owner_project_access", "any")
    if access not in ACCESS:
        raise RequestError(f"'owner_project_access' must be one of {', '.join(ACCESS)}", param="owner_project_access")
    rules = [tables.api_keys.c.project_id == project]
    if access == "inactive":  # whoever has lost access has lost his keys too
        rules.append(false())

    def read(connection: Connection) -> msgspec.Struct:
        projects.get(connection, project)
        accounts = connection.execute(
            select(tables.service_accounts).where(tables.service_accounts.c.project_id == project)
        )
        owners = {row["id"]: dict(row) for row in accounts.mappings()}
        return read_page(
            connection,
            tables.api_keys,
            rules,
            asked,
            lambda row: shapes.ProjectKey.of(row, owners.get(row["service_account_id"])),
        )

    return json_response(await service.database.read(read))


async def retrieve_key(service: Service, request: Request) -> Response:
    """One key, without its value."""
    allow(request)
    project, key = _project(request), request.path_params["key_id"]

    def read(connection: Connection) -> shapes.ProjectKey:
        row = keys.get_key(connection, key, project)
        owner = row["service_account_id"]
        account = None if owner is None else projects.service_account(connection, project, owner)
        return shapes.ProjectKey.of(row, account)

    return json_response(await service.database.read(read))


async def delete_key(service: Service, request: Request) -> Response:
    """Take a key back: it stops working at once."""
    actor, project, key = service.actor(request), _project(request), request.path_params["key_id"]
    await service.change(lambda connection: keys.delete_key(connection, actor, key, project))
    return json_response(shapes.Deleted(key, "organization.project.api_key.deleted"))


async def list_rate_limits(service: Service, request: Request) -> Response:
    """What a project may ask of each model."""
    asked, project = wanted(request), _project(request)
    await service.database.read(partial(projects.get, project_id=project))
    found = [
        shapes.ProjectRateLimit.of(model, service.limits.limit(project, model)) for model in service.visible(project)
    ]
    ids = [limit.id for limit in found]
    if asked.after is not None and asked.after not in ids:
        raise NotFoundError("'after' names nothing of this list", param="after")
    begin = 0 if asked.after is None else ids.index(asked.after) + 1
    shown = found[begin : begin + asked.limit]
    return json_response(page_of(shown, ids[begin:], asked.limit))


async def update_rate_limit(service: Service, request: Request) -> Response:
    """Change what a project may ask of a model."""
    body = parse(shapes.RateLimitRequest, await request.body())
    actor, project = service.actor(request), _project(request)
    model = request.path_params["limit_id"].removeprefix("rl-")
    if model not in service.visible(project):
        raise NotFoundError(f"no rate limit 'rl-{model[:80]}' here", param="rate_limit_id")
    now = service.limits.limit(project, model)
    given = (body.max_requests_per_1_minute, body.max_tokens_per_1_minute, body.max_concurrent_requests)
    kept = (now.requests_per_minute, now.tokens_per_minute, now.concurrency)
    limit = RateLimit(*(old if new is None else new for new, old in zip(given, kept, strict=True)))
    await service.change(lambda connection: limits.set_rate_limit(connection, actor, project, model, limit))
    return json_response(shapes.ProjectRateLimit.of(model, limit))


async def retrieve_spend_limit(service: Service, request: Request) -> Response:
    """What a project may spend in a month."""
    allow(request)
    return json_response(await _spend_limit(service, _project(request)))


async def update_spend_limit(service: Service, request: Request) -> Response:
    """Set what a project may spend in a month: what may cost more is refused."""
    body = parse(shapes.SpendLimitRequest, await request.body())
    actor, project = service.actor(request), _project(request)
    amount = body.threshold_amount * NANO
    await service.change(lambda connection: limits.set_spend_limit(connection, actor, project, amount))
    return json_response(await _spend_limit(service, project))


async def delete_spend_limit(service: Service, request: Request) -> Response:
    """Let a project spend without a limit."""
    actor, project = service.actor(request), _project(request)
    await service.change(lambda connection: limits.set_spend_limit(connection, actor, project, None))
    return json_response(shapes.SpendLimitDeleted())


async def list_alerts(service: Service, request: Request) -> Response:
    """A project's alerts."""
    asked, project = wanted(request), _project(request)
    rows = await service.database.read(partial(limits.alerts, project_id=project))
    ids = [row["id"] for row in rows]
    if asked.after is not None and asked.after not in ids:
        raise NotFoundError("'after' names nothing of this list", param="after")
    begin = 0 if asked.after is None else ids.index(asked.after) + 1
    shown = [shapes.SpendAlert.of(row) for row in rows[begin : begin + asked.limit]]
    return json_response(page_of(shown, ids[begin:], asked.limit))


async def put_alert(service: Service, request: Request) -> Response:
    """A new alert, or another form of one."""
    body = parse(shapes.SpendAlertRequest, await request.body())
    actor, project, alert = service.actor(request), _project(request), request.path_params.get("alert_id")
    channel, amount = body.notification_channel, body.threshold_amount * NANO
    row = await service.change(
        lambda connection: limits.put_alert(
            connection, actor, project, amount, channel.recipients, channel.subject_prefix, alert
        )
    )
    return json_response(shapes.SpendAlert.of(row))


async def retrieve_alert(service: Service, request: Request) -> Response:
    """One alert."""
    allow(request)
    project, alert = _project(request), request.path_params["alert_id"]
    row = await service.database.read(lambda connection: limits.alert(connection, project, alert))
    return json_response(shapes.SpendAlert.of(row))


async def delete_alert(service: Service, request: Request) -> Response:
    """Remove an alert."""
    actor, project, alert = service.actor(request), _project(request), request.path_params["alert_id"]
    await service.change(lambda connection: limits.delete_alert(connection, actor, project, alert))
    return json_response(shapes.Deleted(alert, "project.spend_alert.deleted"))


async def _spend_limit(service: Service, project: str) -> shapes.SpendLimit:
    limit = await service.database.read(partial(limits.spend_limit, project_id=project))
    if limit is None:
        raise NotFoundError("this project has no spend limit", param="project_id", code="spend_limit_not_found")
    spent = await service.database.read(partial(limits.spent, project_id=project, month=service.ledger.month()))
    status = shapes.Enforcement("enforcing" if spent >= limit else "inactive")
    return shapes.SpendLimit(limit // NANO, status)


def _project(request: Request) -> str:
    project: str = request.path_params["project_id"]
    if not project.isprintable() or len(project) > 128:
        raise RequestError("no such project", param="project_id")
    return project
