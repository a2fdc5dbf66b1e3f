"""A wall clock that jumps a day forth and back: no budget and no minute is there twice. `benchmarks/reliability.py` has
a thousand jumps.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from running_service import serving
from sqlalchemy import select

from steelyard.store import tables

DAY = 86400.0
NOVEMBER = 1_764_374_400.0  # the 29th: a day forth is its last, two are in December
BODY = {"model": "tiny", "prompt": "a", "max_tokens": 4}
DEAR = {"*": {"input": 0, "cached_input": 0, "output": 50_000_000}}  # an answer is 0.2 dollars


def test_jumps_give_nothing_twice(make_checkpoint: Callable[[str], Path]) -> None:
    now, steady, seeded = [NOVEMBER], [0.0], random.Random(29)
    statuses: Counter[tuple[str, int]] = Counter()
    with serving(make_checkpoint("tiny"), clock=lambda: now[0]) as service, service.admin_http() as admin:
        service.behind.limits.clock = lambda: steady[0]
        admin.post("/v1/organization/prices", json={"prices": DEAR}).raise_for_status()
        keys: dict[str, str] = {}
        paths: dict[str, str] = {}
        for name in ("budget", "rate"):
            made = admin.post("/v1/organization/projects", json={"name": name}).json()["id"]
            paths[name] = f"/v1/organization/projects/{made}"
            keys[name] = admin.post(f"{paths[name]}/api_keys", json={"name": "x"}).json()["value"]
        limit = {"threshold_amount": 1, "currency": "USD", "interval": "month"}
        admin.post(f"{paths['budget']}/spend_limit", json=limit).raise_for_status()
        admin.post(f"{paths['rate']}/rate_limits/rl-tiny", json={"max_requests_per_1_minute": 6}).raise_for_status()
        with service.http() as http:
            for _ in range(30):
                now[0] += seeded.choice([-DAY, DAY, seeded.uniform(-DAY, DAY)])
                for name, key in keys.items():
                    answer = http.post("/v1/completions", json=BODY, headers={"authorization": f"Bearer {key}"})
                    statuses[name, answer.status_code] += 1
                    assert int(answer.headers["x-ratelimit-remaining-requests"]) >= 0
            assert statuses["rate", 200] == 6
            steady[0] += 10  # a sixth of a minute has gone by, whatever the clock on the wall says
            answers = [
                http.post("/v1/completions", json=BODY, headers={"authorization": f"Bearer {keys['rate']}"})
                for _ in range(3)
            ]
            assert [answer.status_code for answer in answers] == [200, 429, 429]
        project = paths["budget"].rpartition("/")[2]
        balances = service.behind.database.read_now(
            lambda connection: connection.execute(
                select(tables.balances).where(tables.balances.c.project_id == project)
            ).all()
        )
    assert {row.month for row in balances} <= {"2025-11", "2025-12", "2026-01"}
    assert all(0 <= row.amount <= 10**9 for row in balances)
    assert statuses["budget", 200] == sum(row.amount for row in balances) // 200_000_000
    assert statuses["budget", 429]
