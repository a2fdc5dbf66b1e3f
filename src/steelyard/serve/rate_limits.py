"""How much a project may ask of a model: requests and tokens a minute, requests at once.

Buckets in memory, by the monotonic clock: a wall clock that jumps neither gives nor takes. Several servers on one
database each allow the whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from sqlalchemy import Connection, select

from steelyard.errors import RateLimitError
from steelyard.store import tables

MINUTE = 60.0


class RateLimit(msgspec.Struct, frozen=True):
    """What one project may ask of one model."""

    requests_per_minute: int = 100_000
    tokens_per_minute: int = 100_000_000
    concurrency: int = 2_000


DEFAULT = RateLimit()


@dataclass
class Bucket:
    """Fills up to `size` within a minute."""

    size: int
    level: float
    at: float

    def fill(self, now: float, size: int) -> None:
        """Bring it up to now; its size may have changed."""
        self.level = min(size, self.level + (now - self.at) * size / MINUTE + max(0, size - self.size))
        self.size, self.at = size, now

    def wait(self, amount: float) -> float:
        """Seconds until it holds `amount`; 0 if it does."""
        return max(0.0, (amount - self.level) / self.size * MINUTE) if self.size else MINUTE

    def reset(self) -> float:
        """Seconds until it is full."""
        return (self.size - self.level) / self.size * MINUTE if self.size else MINUTE


@dataclass
class Account:
    """What a project has asked of a model lately."""

    requests: Bucket
    tokens: Bucket
    running: int = 0


@dataclass
class Admission:
    """A request that was let in; it has to be closed."""

    account: Account
    unused: int = 0
    """Tokens that were taken and not come to."""
    closed: bool = False

    @classmethod
    def free(cls) -> Admission:
        """Of what no limit holds for."""
        return cls(Account(Bucket(0, 0, 0), Bucket(0, 0, 0)))

    def close(self) -> None:
        """It is over: what it has not come to is given back."""
        if not self.closed:
            self.closed = True
            self.account.running -= 1
            self.account.tokens.level = min(self.account.tokens.size, self.account.tokens.level + self.unused)


@dataclass
class RateLimits:
    """Lets requests in, or says when to come again.

    Args:
        limits: those that are set, by project and model (`*` is every model).
        clock: seconds that never go back.
    """

    limits: dict[tuple[str, str], RateLimit]
    clock: Callable[[], float] = time.monotonic
    _accounts: dict[tuple[str, str], Account] = field(default_factory=dict)

    def take_up(self, limits: dict[tuple[str, str], RateLimit]) -> None:
        """Let other limits hold."""
        self.limits = limits

    def limit(self, project: str, model: str) -> RateLimit:
        """What holds for a project and a model."""
        return self.limits.get((project, model)) or self.limits.get((project, "*")) or DEFAULT

    def admit(self, project: str, model: str) -> Admission:
        """Let a request in, before anything is known of its size.

        Raises:
            RateLimitError: too many in a minute, or at once.
        """
        limit, account = self.limit(project, model), self._account(project, model)
        if account.running >= limit.concurrency:
            raise RateLimitError(f"{limit.concurrency} requests at once are the limit for '{model}': wait for one")
        self._take(account.requests, 1, f"{limit.requests_per_minute} requests a minute", model)
        account.running += 1
        return Admission(account)

    def take(self, admission: Admission, project: str, model: str, tokens: int) -> None:
        """Take the tokens that an admitted request may come to.

        Raises:
            RateLimitError: too many in a minute.
        """
        limit, account = self.limit(project, model), self._account(project, model)
        self._take(account.tokens, tokens, f"{limit.tokens_per_minute} tokens a minute", model)
        admission.unused += tokens

    def headers(self, project: str, model: str) -> dict[str, str]:
        """OpenAI's headers that say how much is left."""
        account = self._account(project, model)
        found: dict[str, str] = {}
        for name, bucket in (("requests", account.requests), ("tokens", account.tokens)):
            found[f"x-ratelimit-limit-{name}"] = str(bucket.size)
            found[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level)))
            found[f"x-ratelimit-reset-{name}"] = _duration(bucket.reset())
        return found

    def _account(self, project: str, model: str) -> Account:
        limit, now = self.limit(project, model), self.clock()
        account = self._accounts.get((project, model))
        if account is None:
            account = self._accounts[project, model] = Account(
                Bucket(limit.requests_per_minute, limit.requests_per_minute, now),
                Bucket(limit.tokens_per_minute, limit.tokens_per_minute, now),
            )
        account.requests.fill(now, limit.requests_per_minute)
        account.tokens.fill(now, limit.tokens_per_minute)
        return account

    def _take(self, bucket: Bucket, amount: int, what: str, model: str) -> None:
        if amount > bucket.size:
            raise RateLimitError(
                f"{what} are the limit for '{model}', and this is {amount} at once: ask for less", retry_after=MINUTE
            )
        wait = bucket.wait(amount)
        if wait > 0:
            raise RateLimitError(f"{what} are the limit for '{model}': try again in {wait:.1f} s", retry_after=wait)
        bucket.level -= amount


def read(connection: Connection) -> dict[tuple[str, str], RateLimit]:
    """Every limit that is set."""
    rows = connection.execute(select(tables.rate_limits))
    return {
        (row.project_id, row.model): RateLimit(row.requests_per_minute, row.tokens_per_minute, row.concurrency)
        for row in rows
    }


def _duration(seconds: float) -> str:
    """Go's way of writing a time, as OpenAI does: 6m0s, 1.5s, 12ms."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes:.0f}m{rest:.0f}s" if minutes else f"{rest:.3g}s"
