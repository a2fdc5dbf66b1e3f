"""The shapes of OpenAI's Administration API: projects, keys, limits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field

from steelyard.serve.auth import ADMIN_SCOPES, PROJECT_SCOPES
from steelyard.serve.billing.prices import NANO
from steelyard.serve.organization.keys import MOST_NAME, NewKey
from steelyard.serve.protocol.fields import Fields
from steelyard.serve.rate_limits import RateLimit

Row = dict[str, Any]
Dollars = Annotated[int, Field(ge=0, le=1 << 30)]
Name = Annotated[str, Field(json_schema_extra={"minLength": 1, "maxLength": MOST_NAME})]
Scope = Annotated[str, Field(json_schema_extra={"enum": [*PROJECT_SCOPES, *ADMIN_SCOPES]})]


class ProjectRequest(Fields):
    """Make or rename a project."""

    name: Name


class ServiceAccountRequest(Fields):
    """Make a service account, and a key for it unless told otherwise."""

    name: Name
    create_service_account_only: bool | None = None


class KeyRequest(Fields):
    """Make a key."""

    name: Name
    scopes: list[Scope] | None = None
    expires_in_seconds: Annotated[int, Field(ge=1, le=10 * 366 * 86400)] | None = None


class RateLimitRequest(Fields):
    """Change a rate limit; what is not named stays."""

    max_requests_per_1_minute: Annotated[int, Field(ge=0, le=1 << 40)] | None = None
    max_tokens_per_1_minute: Annotated[int, Field(ge=0, le=1 << 40)] | None = None
    max_concurrent_requests: Annotated[int, Field(ge=0, le=1 << 40)] | None = None


class SpendLimitRequest(Fields):
    """Set the month's limit."""

    threshold_amount: Dollars
    currency: Literal["USD"]
    interval: Literal["month"]


class Channel(Fields):
    """Who is told."""

    type: Literal["email"]
    recipients: Annotated[list[Annotated[str, Field(min_length=3, max_length=320)]], Field(min_length=1, max_length=20)]
    subject_prefix: Annotated[str, Field(max_length=100)] | None = None


class SpendAlertRequest(Fields):
    """Make or change an alert."""

    threshold_amount: Dollars
    currency: Literal["USD"]
    interval: Literal["month"]
    notification_channel: Channel


class Project(msgspec.Struct, frozen=True):
    """A project."""

    id: str
    name: str
    created_at: int
    archived_at: int | None
    status: Literal["active", "archived"]
    object: Literal["organization.project"] = "organization.project"

    @classmethod
    def of(cls, row: Row) -> Project:
        """Of a row of the table."""
        status: Literal["active", "archived"] = "active" if row["archived_at"] is None else "archived"
        return cls(row["id"], row["name"], row["created_at"], row["archived_at"], status)


class ServiceAccount(msgspec.Struct, frozen=True):
    """A service account."""

    id: str
    name: str
    role: str
    created_at: int
    object: Literal["organization.project.service_account"] = "organization.project.service_account"

    @classmethod
    def of(cls, row: Row) -> ServiceAccount:
        """Of a row of the table."""
        return cls(row["id"], row["name"], row["role"], row["created_at"])


class MadeKey(msgspec.Struct, frozen=True):
    """A key that was just made: the only time that its value is shown."""

    id: str
    name: str
    created_at: int
    value: str
    object: Literal["organization.project.service_account.api_key"] = "organization.project.service_account.api_key"

    @classmethod
    def of(cls, key: NewKey) -> MadeKey:
        """Of a new key."""
        return cls(key.row["id"], key.row["name"], key.row["created_at"], key.value)


class MadeServiceAccount(ServiceAccount, frozen=True, kw_only=True):
    """A service account that was just made."""

    api_key: MadeKey | None


class KeyOwner(msgspec.Struct, frozen=True):
    """Whose key it is: a service account's, or nobody's in particular."""

    type: Literal["service_account", "user"] | None
    service_account: ServiceAccount | None = None


class ProjectKey(msgspec.Struct, frozen=True, kw_only=True):
    """A project's key, as it is listed."""

    id: str
    name: str
    redacted_value: str
    created_at: int
    last_used_at: int | None
    expires_at: int | None
    scopes: list[str]
    owner: KeyOwner
    owner_project_access: Literal["active", "inactive"] = "active"
    object: Literal["organization.project.api_key"] = "organization.project.api_key"
    value: str | msgspec.UnsetType = msgspec.UNSET
    """Only where it was just made."""

    @classmethod
    def of(cls, row: Row, account: Row | None = None, value: str | msgspec.UnsetType = msgspec.UNSET) -> ProjectKey:
        """Of a row of the table and its owner's."""
        owner = KeyOwner(None) if account is None else KeyOwner("service_account", ServiceAccount.of(account))
        return cls(
            id=row["id"],
            name=row["name"],
            redacted_value=row["redacted"],
            created_at=row["created_at"],
            last_used_at=row["last_used_at"],
            expires_at=row["expires_at"],
            scopes=row["scopes"],
            owner=owner,
            value=value,
        )


class AdminOwner(msgspec.Struct, frozen=True):
    """Whose an admin key is: the organisation's."""

    type: str = "user"
    object: str = "organization.user"
    id: str = "user_operator"
    name: str = "operator"
    created_at: int = 0
    role: str = "owner"


class AdminKey(msgspec.Struct, frozen=True, kw_only=True):
    """An administrators' key."""

    id: str
    name: str
    redacted_value: str
    created_at: int
    last_used_at: int | None
    expires_at: int | None
    scopes: list[str]
    owner: AdminOwner = AdminOwner()
    object: Literal["organization.admin_api_key"] = "organization.admin_api_key"
    value: str | msgspec.UnsetType = msgspec.UNSET
    """Only where it was just made."""

    @classmethod
    def of(cls, row: Row, value: str | msgspec.UnsetType = msgspec.UNSET) -> AdminKey:
        """Of a row of the table."""
        return cls(
            id=row["id"],
            name=row["name"],
            redacted_value=row["redacted"],
            created_at=row["created_at"],
            last_used_at=row["last_used_at"],
            expires_at=row["expires_at"],
            scopes=row["scopes"],
            value=value,
        )


class Deleted(msgspec.Struct, frozen=True):
    """Something is gone."""

    id: str
    object: str
    deleted: bool = True


class ProjectRateLimit(msgspec.Struct, frozen=True):
    """What a project may ask of a model."""

    id: str
    model: str
    max_requests_per_1_minute: int
    max_tokens_per_1_minute: int
    max_concurrent_requests: int
    object: Literal["project.rate_limit"] = "project.rate_limit"

    @classmethod
    def of(cls, model: str, limit: RateLimit) -> ProjectRateLimit:
        """Of a limit; a model's id is the limit's."""
        return cls(f"rl-{model}", model, limit.requests_per_minute, limit.tokens_per_minute, limit.concurrency)


class Enforcement(msgspec.Struct, frozen=True):
    """Whether requests are refused now."""

    status: Literal["inactive", "enforcing"]


class SpendLimit(msgspec.Struct, frozen=True):
    """What a project may spend in a month, in whole dollars."""

    threshold_amount: int
    enforcement: Enforcement
    currency: Literal["USD"] = "USD"
    interval: Literal["month"] = "month"
    object: Literal["project.spend_limit"] = "project.spend_limit"


class SpendLimitDeleted(msgspec.Struct, frozen=True):
    """There is no limit."""

    deleted: bool = True
    object: Literal["project.spend_limit.deleted"] = "project.spend_limit.deleted"


class NotificationChannel(msgspec.Struct, frozen=True):
    """Who is told."""

    recipients: list[str]
    subject_prefix: str | None
    type: Literal["email"] = "email"


class SpendAlert(msgspec.Struct, frozen=True):
    """At what a project's month somebody is told."""

    id: str
    threshold_amount: int
    notification_channel: NotificationChannel
    currency: Literal["USD"] = "USD"
    interval: Literal["month"] = "month"
    object: Literal["project.spend_alert"] = "project.spend_alert"

    @classmethod
    def of(cls, row: Row) -> SpendAlert:
        """Of a row of the table."""
        channel = NotificationChannel(row["recipients"], row["subject_prefix"])
        return cls(row["id"], row["threshold"] // NANO, channel)
