"""Names that stand for models: moved, tried out on a sticky share, promoted, rolled back; and models that end."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from running_service import Service, serving

from steelyard.checkpoint import manifest

ALIASES = "/v1/organization/model_aliases"


@pytest.fixture(scope="module")
def service(make_checkpoint: Callable[[str], Path], make_adapter: Callable[[str], Path]) -> Iterator[Service]:
    adapters = tuple(f"{name}={make_adapter(name)}" for name in ("old", "new"))
    with serving(make_checkpoint("tiny"), adapters) as service:
        yield service


@pytest.fixture
def admin(service: Service) -> Iterator[httpx.Client]:
    with service.admin_http() as http:
        yield http
        for alias in http.get(ALIASES).json()["data"]:
            http.delete(f"{ALIASES}/{alias['id']}").raise_for_status()


def ask(service: Service, model: str = "latest", **options: Any) -> str:
    messages: Any = [{"role": "user", "content": "x"}]
    answer = service.sdk().chat.completions.create(model=model, messages=messages, max_tokens=1, **options)
    return answer.model


def test_moved_and_rolled_back(service: Service, admin: httpx.Client) -> None:
    made = admin.post(ALIASES, json={"name": "latest", "model": "old"}).json()
    assert (made["model"], made["history"]) == ("old", [])
    assert ask(service) == "old"
    assert "latest" in [model.id for model in service.sdk().models.list()]
    assert service.sdk().models.retrieve("latest").id == "old"
    assert admin.post(ALIASES, json={"name": "latest", "model": "new"}).json()["history"] == ["old"]
    assert ask(service) == "new"
    assert admin.post(f"{ALIASES}/latest/roll_back").json()["model"] == "old"
    assert ask(service) == "old"
    assert admin.post(f"{ALIASES}/latest/roll_back").status_code == 409
    assert admin.delete(f"{ALIASES}/latest").json()["deleted"]
    with pytest.raises(openai.NotFoundError):
        ask(service)


def test_a_canary_is_sticky_and_grows(service: Service, admin: httpx.Client) -> None:
    admin.post(ALIASES, json={"name": "latest", "model": "old"})
    users = [f"user-{number}" for number in range(60)]
    seen: dict[int, set[str]] = {}
    for percentage in (0, 30, 60, 100):
        admin.post(f"{ALIASES}/latest/canary", json={"model": "new", "percentage": percentage}).raise_for_status()
        got = {user: ask(service, user=user) for user in users}
        assert got == {user: ask(service, safety_identifier=user) for user in users[:60]}
        seen[percentage] = {user for user, model in got.items() if model == "new"}
    assert not seen[0]
    assert seen[30] < seen[60] < seen[100] == set(users)
    assert 5 <= len(seen[30]) <= 32
    assert len(Counter(ask(service) for _ in range(5))) == 1, "without a user, by the key"
    assert admin.post(f"{ALIASES}/latest/promote").json()["history"] == ["old"]
    assert {ask(service, user=user) for user in users[:5]} == {"new"}
    assert admin.post(f"{ALIASES}/latest/promote").status_code == 409
    admin.post(f"{ALIASES}/latest/canary", json={"model": "old", "percentage": 100})
    assert ask(service) == "old"
    admin.post(f"{ALIASES}/latest/canary", json={"model": None})
    assert ask(service) == "new"


def test_a_failing_certificate_is_not_promoted(service: Service, admin: httpx.Client) -> None:
    admin.post(ALIASES, json={"name": "latest", "model": "old"})
    admin.post(f"{ALIASES}/latest/canary", json={"model": "tiny", "percentage": 10})
    values = {"id": "sha256:x", "kind": "model", "files": {}}
    path = service.checkpoint / manifest.MANIFEST
    for passed, status in ((False, 409), (True, 200)):
        certificate = {"passed": passed, "bits_per_byte_change": 0.5}
        path.write_text(json.dumps({**values, "certificate": certificate}))
        answer = admin.post(f"{ALIASES}/latest/promote")
        assert answer.status_code == status, answer.text
        assert passed or "+50.00%" in answer.json()["error"]["message"]
    told: Any = service.sdk().models.retrieve("tiny")
    assert told.certificate["passed"]
    assert told.lineage["checkpoint"] == "sha256:x"
    assert told.price["input"] == 0
    path.unlink()


def test_a_model_that_ends(service: Service, admin: httpx.Client) -> None:
    path = "/v1/organization/models/old/shutdown"
    later = int(time.time()) + 3600
    admin.post(path, json={"shutdown_date": later}).raise_for_status()
    assert ask(service, "old") == "old"
    told: Any = service.sdk().models.retrieve("old")
    assert told.shutdown_date == later
    admin.post(path, json={"shutdown_date": later - 7200})
    with pytest.raises(openai.NotFoundError, match="was shut down"):
        ask(service, "old")
    admin.post(path, json={"shutdown_date": None})
    assert ask(service, "old") == "old"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "tiny", "model": "old"}, "name"),
        ({"name": "a b", "model": "old"}, "name"),
        ({"name": "x", "model": "none"}, "model"),
    ],
)
def test_what_is_wrong_is_named(admin: httpx.Client, body: dict[str, str], param: str) -> None:
    answer = admin.post(ALIASES, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert admin.post(f"{ALIASES}/none/promote").status_code == 404
