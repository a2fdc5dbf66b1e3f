"""Every policy over the whole route table, generated: who may come in, whose things he sees, how much he may send."""

from __future__ import annotations

import io
import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from running_service import Service, serving

from steelyard.app import ENDPOINTS, LARGER, Endpoint
from steelyard.serve.auth import ADMIN_SCOPES, PROJECT_SCOPES, PUBLIC_ROUTES
from steelyard.serve.endpoint import Form
from steelyard.serve.limits import MAX_BODY_BYTES

IDS = [f"{endpoint.method} {endpoint.path}" for endpoint in ENDPOINTS]
PARAMETER = re.compile(r"\{(\w+)(:path)?\}")


@pytest.fixture(scope="module")
def two(make_checkpoint: Callable[[str], Path]) -> Iterator[Service]:
    """A service with two projects, each with something of every kind."""
    with serving(make_checkpoint("tiny")) as service:
        yield service


def project(service: Service, name: str) -> tuple[str, dict[str, str]]:
    """A project's key, and the ids of what it has, by the path parameter that names such a thing."""
    with service.admin_http() as admin:
        made = admin.post("/v1/organization/projects", json={"name": name}).json()
        account = admin.post(f"/v1/organization/projects/{made['id']}/service_accounts", json={"name": "app"}).json()
        alert = admin.post(
            f"/v1/organization/projects/{made['id']}/spend_alerts",
            json={
                "threshold_amount": 1,
                "currency": "USD",
                "interval": "month",
                "notification_channel": {"type": "email", "recipients": ["a@b.c"]},
            },
        ).json()
    key = account["api_key"]["value"]
    with client(service, key) as http:
        row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": name}]}
        content = io.BytesIO(json.dumps(row).encode())
        file = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("r.jsonl", content)}).json()
        job = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file["id"]}).json()
        compression = http.post("/v1/compression/jobs", json={"model": "tiny"}).json()
        stored = {"model": "tiny", "messages": row["messages"][:1], "max_tokens": 2, "store": True}
        completion = http.post("/v1/chat/completions", json=stored).json()
        response = http.post("/v1/responses", json={"model": "tiny", "input": "q", "max_output_tokens": 2}).json()
        asked = {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"model": "tiny", "prompt": "x"}}
        lines = io.BytesIO(json.dumps(asked).encode())
        listed = http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("b.jsonl", lines)}).json()
        window = {"endpoint": "/v1/completions", "completion_window": "24h"}
        batch = http.post("/v1/batches", json={"input_file_id": listed["id"], **window}).json()
    return key, {
        "project_id": made["id"],
        "account_id": account["id"],
        "key_id": account["api_key"]["id"],
        "alert_id": alert["id"],
        "file_id": file["id"],
        "job_id": job["id"],
        "compression_id": compression["id"],
        "batch_id": batch["id"],
        "completion_id": completion["id"],
        "response_id": response["id"],
        "limit_id": "rl-tiny",
        "alias": "latest",
        "model_id": "tiny",
        "kind": "completions",
    }


def client(service: Service, key: str | None) -> httpx.Client:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.Client(base_url=service.url, headers=headers, timeout=10)


def filled(endpoint: Endpoint, names: dict[str, str]) -> str:
    return PARAMETER.sub(lambda match: names[parameter(endpoint, match[1])], endpoint.path)


def parameter(endpoint: Endpoint, name: str) -> str:
    """What a route's parameter is called among the things of a project: jobs are of two kinds."""
    return "compression_id" if name == "job_id" and "/compression/" in endpoint.path else name


def send(http: httpx.Client, endpoint: Endpoint, path: str, **options: Any) -> httpx.Response:
    return http.request(endpoint.method, path, **options)


@pytest.fixture(scope="module")
def mine(two: Service) -> tuple[str, dict[str, str]]:
    return project(two, "mine")


@pytest.fixture(scope="module")
def theirs(two: Service) -> tuple[str, dict[str, str]]:
    return project(two, "theirs")


def scoped(service: Service, project_id: str, *scopes: str) -> str:
    """A key with these scopes alone."""
    with service.admin_http() as admin:
        admins = set(scopes) <= set(ADMIN_SCOPES)
        path = "admin_api_keys" if admins else f"projects/{project_id}/api_keys"
        answer = admin.post(f"/v1/organization/{path}", json={"name": "x", "scopes": list(scopes)})
        value: str = answer.json()["value"]
        return value


def test_the_table_has_every_route_of_the_application(two: Service) -> None:
    served = {(method, route.path) for route in two.app.routes for method in route.methods - {"HEAD"}}  # type: ignore[attr-defined]
    assert served == {(endpoint.method, endpoint.path) for endpoint in ENDPOINTS}
    public = {endpoint.path for endpoint in ENDPOINTS if endpoint.permission is None}
    assert public == PUBLIC_ROUTES


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=IDS)
def test_no_key_no_entry(two: Service, mine: tuple[str, dict[str, str]], endpoint: Endpoint) -> None:
    with client(two, None) as http:
        status = send(http, endpoint, filled(endpoint, mine[1]), content=b"{").status_code
    assert status == (200 if endpoint.permission is None else 401)


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=IDS)
def test_every_other_scope_is_refused(two: Service, mine: tuple[str, dict[str, str]], endpoint: Endpoint) -> None:
    if endpoint.permission is None:
        return
    for kind in (PROJECT_SCOPES, ADMIN_SCOPES):
        others = [scope for scope in kind if scope != endpoint.permission]
        with client(two, scoped(two, mine[1]["project_id"], *others)) as http:
            answer = send(http, endpoint, filled(endpoint, mine[1]), content=b"{")
        assert answer.status_code == 403, answer.text
        assert answer.json()["error"]["code"] == "insufficient_permissions"


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=IDS)
def test_another_projects_things_are_not_there(
    two: Service, mine: tuple[str, dict[str, str]], theirs: tuple[str, dict[str, str]], endpoint: Endpoint
) -> None:
    """With my key and their ids: as if they did not exist, to the letter."""
    things = {"file_id", "job_id", "compression_id", "batch_id", "completion_id", "response_id"} & {
        parameter(endpoint, match[1]) for match in PARAMETER.finditer(endpoint.path)
    }
    if not things or endpoint.permission in ADMIN_SCOPES:
        return
    key, names = mine
    foreign = {**names, **{name: theirs[1][name] for name in things}}
    nothing = {**names, **{name: theirs[1][name][:-4] + "0000" for name in things}}
    body = {"metadata": {}} if endpoint.path.endswith("{completion_id}") else None
    with client(two, key) as http:
        answers = [send(http, endpoint, filled(endpoint, ids), json=body) for ids in (foreign, nothing)]
    for answer, ids in zip(answers, (foreign, nothing), strict=True):
        assert answer.status_code == 404, answer.text
        for name in things:
            assert ids[name] in answer.json()["error"]["message"]
    bodies = [
        answer.text.replace(ids[name], "ID")
        for answer, ids in zip(answers, (foreign, nothing), strict=True)
        for name in things
    ]
    assert len(set(bodies)) == 1
    with client(two, theirs[0]) as http:  # and it is all still there
        for path in (f"/v1/files/{theirs[1]['file_id']}", f"/v1/fine_tuning/jobs/{theirs[1]['job_id']}"):
            assert http.get(path).status_code == 200


def test_lists_show_ones_own(
    two: Service, mine: tuple[str, dict[str, str]], theirs: tuple[str, dict[str, str]]
) -> None:
    for (key, own), (_, other) in ((mine, theirs), (theirs, mine)):
        with client(two, key) as http:
            for path, name in (
                ("/v1/files", "file_id"),
                ("/v1/fine_tuning/jobs", "job_id"),
                ("/v1/compression/jobs", "compression_id"),
                ("/v1/batches", "batch_id"),
                ("/v1/chat/completions", "completion_id"),
            ):
                ids = [item["id"] for item in http.get(path).json()["data"]]
                assert own[name] in ids
                assert other[name] not in ids
            answer = http.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": other["file_id"]})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "training_file")


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=IDS)
def test_too_large_a_body_is_refused_before_it_is_sent(
    two: Service, mine: tuple[str, dict[str, str]], endpoint: Endpoint
) -> None:
    if endpoint.permission is None:
        return
    key = two.admin_key if endpoint.permission in ADMIN_SCOPES else mine[0]
    most = LARGER[endpoint.path][0] if endpoint.path in LARGER else MAX_BODY_BYTES
    host, port = two.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            f"{endpoint.method} {filled(endpoint, mine[1])} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
            f"content-type: multipart/form-data; boundary=x\r\ncontent-length: {most + 1}\r\n\r\n".encode()
        )
        assert connection.recv(12) == b"HTTP/1.1 413"


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=IDS)
def test_nul_is_refused_before_a_database_meets_it(
    two: Service, mine: tuple[str, dict[str, str]], endpoint: Endpoint
) -> None:
    """PostgreSQL has no such character in texts."""
    if endpoint.permission is None:
        return
    key = two.admin_key if endpoint.permission in ADMIN_SCOPES else mine[0]
    nul = {"after": "a\0", "a\0": "x"}
    with client(two, key) as http:
        for name in (match[1] for match in PARAMETER.finditer(endpoint.path)):
            answer = send(http, endpoint, filled(endpoint, {**mine[1], parameter(endpoint, name): "a%00b"}))
            assert answer.status_code == 404, answer.text
        for name, value in nul.items():
            answer = send(http, endpoint, filled(endpoint, mine[1]), params={name: value})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
        if isinstance(endpoint.takes, type) and endpoint.takes.stored:
            field = next(iter(endpoint.takes.model_fields))
            for body, param in (
                ({field: "a\0"}, field),
                ({field: [{"x": "\0"}]}, f"{field}[0].x"),
                ({field: {"\0": 1}}, f"{field}.\0"),
            ):
                answer = send(http, endpoint, filled(endpoint, mine[1]), json=body)
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=IDS)
def test_what_is_not_known_is_refused_by_name(
    two: Service, mine: tuple[str, dict[str, str]], endpoint: Endpoint
) -> None:
    """An unknown field of a body, an unknown parameter of a query."""
    key = two.admin_key if endpoint.permission in ADMIN_SCOPES else mine[0]
    path = filled(endpoint, mine[1])
    bodiless = ("/archive", "/cancel", "/pause", "/resume", "/promote", "/roll_back")
    with client(two, key) as http:
        if isinstance(endpoint.takes, Form):
            form = {"nonsense_field": "1"}
            answer = send(http, endpoint, path, data=form, files={"file": ("x", b"x")})
        elif endpoint.method == "POST" and not endpoint.path.endswith(bodiless):
            answer = send(http, endpoint, path, json={"nonsense_field": 1})
        elif endpoint.method == "GET" and endpoint.path.startswith("/v1/") and "models" not in endpoint.path:
            answer = send(http, endpoint, path, params={"nonsense_field": 1, "start_time": 1})
        else:
            return
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "nonsense_field"
    assert answer.json()["error"]["code"] == "unknown_parameter"
