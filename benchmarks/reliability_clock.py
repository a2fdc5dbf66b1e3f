"""A clock that jumps by a day, forth and back: a part of `reliability.py`.

The application runs in this process on a clock that jumps at random; its engine is a stub. Rate limits run on a second
clock, which only goes on, as the system's monotonic one does.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import func, select

import gateway
from reliability_server import HELLO, NAME, QUICK, Found, Part, none
from steelyard.app import create_app
from steelyard.checkpoint.sources import pull
from steelyard.checkpoint.sources.cache import default_cache
from steelyard.demo.lifecycle import MODEL
from steelyard.serve.auth import ADMIN_VARIABLE, KEY_VARIABLE
from steelyard.serve.keys import new_key
from steelyard.serve.models import load_models
from steelyard.serve.service import Service, open_service
from steelyard.store import tables
from steelyard.store.database import opened, sqlite_url
from steelyard.store.secrets import Secrets

DAY = 86400.0
START = 1_764_374_400.0
"""29 November 2025: a day forth is the last of its month, two are the next."""
MONTH_LIMIT = 1
"""Dollars."""
PER_MINUTE = 30
DEAR = {"*": {"input": 100_000, "cached_input": 50_000, "output": 2_000_000, "storage": 10**12}}
"""Nano-dollars: a month's dollar buys some 50 answers."""


def clock(kind: str, count: int, seeded: random.Random) -> Found:
    """29: jumps of up to a day; no budget, no minute and no day's storage is there twice, and none is negative."""
    return asyncio.run(_jump(50 if count < QUICK else 1000, seeded))


async def _jump(jumps: int, seeded: random.Random) -> Found:
    key, admin = new_key(), new_key()
    moment, steady = [START], [0.0]
    models = load_models([pull(MODEL, cache=default_cache())], command=gateway.stub_command)
    with tempfile.TemporaryDirectory() as name, opened(sqlite_url(Path(name) / "db"), role="server") as database:
        service = open_service(
            models,
            database,
            Secrets.make(),
            Path(name),
            environment={KEY_VARIABLE: key, ADMIN_VARIABLE: admin},
            clock=lambda: moment[0],
        )
        service.limits.clock = lambda: steady[0]
        app = create_app(service)
        async with app.router.lifespan_context(app):
            await next(iter(models.values())).engine.wait_ready()
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x/v1", timeout=30) as http:
                return await _measure(service, http, admin, jumps, seeded, moment, steady)


async def _measure(
    service: Service,
    http: httpx.AsyncClient,
    admin: str,
    jumps: int,
    seeded: random.Random,
    moment: list[float],
    steady: list[float],
) -> Found:
    """One project is asked beyond its month's dollar, another beyond its requests a minute."""
    ruling = {"authorization": f"Bearer {admin}"}

    async def rule(path: str, **body: Any) -> Any:
        answer = await http.post(f"/organization/{path}", json=body, headers=ruling)
        return answer.raise_for_status().json()

    await rule("prices", prices=DEAR)
    keys: dict[str, str] = {}
    for name in ("budget", "rate"):
        keys[name] = (await rule("projects", name=name))["id"]
    await rule(f"projects/{keys['budget']}/spend_limit", threshold_amount=MONTH_LIMIT, currency="USD", interval="month")
    await rule(f"projects/{keys['rate']}/rate_limits/rl-{NAME}", max_requests_per_1_minute=PER_MINUTE)
    headers = {
        name: {"authorization": f"Bearer {(await rule(f'projects/{id}/api_keys', name='x'))['value']}"}
        for name, id in keys.items()
    }
    form: Any = {"data": {"purpose": "user_data"}, "files": {"file": ("x.bin", b"x" * 1000)}}
    (await http.post("/files", headers=headers["rate"], **form)).raise_for_status()
    statuses: Counter[str] = Counter()
    negative = 0

    async def ask(name: str) -> None:
        nonlocal negative
        body = {"model": NAME, "messages": HELLO, "max_tokens": 8, "stream": seeded.random() < 0.5}
        answer = await http.post("/chat/completions", json=body, headers=headers[name])
        assert answer.status_code in (200, 429), answer.text
        statuses[f"{name} {answer.status_code}"] += 1
        negative += sum(
            int(value) < 0 for header, value in answer.headers.items() if header.startswith("x-ratelimit-remaining")
        )

    first, months, days = steady[0], set[str](), set[str]()
    for _ in range(jumps):
        moment[0] = max(START - 2 * DAY, moment[0] + seeded.uniform(-DAY, DAY) + seeded.choice([0, 0, 0, DAY, -DAY]))
        months.add(time.strftime("%Y-%m", time.gmtime(moment[0])))
        days.add(time.strftime("%Y-%m-%d", time.gmtime(moment[0])))
        await service.reload()
        await service.tidy()
        await asyncio.gather(*(ask(name) for name in keys for _ in range(3)))
        steady[0] += seeded.uniform(0, 3)
        balances = await service.database.read(
            lambda connection: [tuple(row) for row in connection.execute(select(tables.balances))]
        )
        negative += sum(row[2] < 0 for row in balances)
    assert not await service.database.read(_open)
    spent = {(project, month): amount for project, month, amount in balances}
    entries = tables.ledger.c
    storage = select(entries.reference).where(entries.kind == "storage")
    charged = await service.database.read(lambda connection: connection.execute(storage).scalars().all())
    allowed = PER_MINUTE + (steady[0] - first) * PER_MINUTE / 60
    over = {
        month: amount - MONTH_LIMIT * 10**9
        for (project, month), amount in spent.items()
        if project == keys["budget"] and amount > MONTH_LIMIT * 10**9
    }
    return {
        "jumps": jumps,
        "months": len(months),
        "months_paid": sorted({month for project, month in spent if project == keys["budget"]}),
        "statuses": dict(sorted(statuses.items())),
        "negative": negative,
        "over_a_months_budget": len(over),
        "over_a_minutes_rate": max(0, statuses["rate 200"] - int(allowed)),
        "rate_left_unused": max(0, int(allowed) - PER_MINUTE - statuses["rate 200"]),
        "days": len(days),
        "storage_charged": len(charged),
        "storage_charged_twice": len(charged) - len(set(charged)) + max(0, len(charged) - len(days)),
    }


def _open(connection: Any) -> int:
    return int(connection.execute(select(func.count()).select_from(tables.reservations)).scalar_one())


PARTS = {
    "clock": Part(
        clock, targets=none("negative", "over_a_months_budget", "over_a_minutes_rate", "storage_charged_twice")
    )
}
