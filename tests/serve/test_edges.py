"""The edges of HTTP: unknown paths, methods, headers, sizes, deadlines, faults of our own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from running_service import Service, eventually, serving
from starlette.routing import Route

from steelyard.serve.access_log import JsonLines
from steelyard.serve.limits import BodyLimit, DeadlineProtocol

BODY = {"model": "tiny", "prompt": "Hello", "max_tokens": 2}


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    with service.http() as client:
        yield client


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
        ("GET", "/v1/models/a%2Fb", 404, "model_not_found"),
        ("POST", "/v1/completions/", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("PUT", "/v1/models/tiny", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
def test_unknown_paths_and_methods(http: httpx.Client, method: str, path: str, status: int, code: str) -> None:
    response = http.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["code"], error["type"]) == (code, "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"}
    assert ("allow" in response.headers) == (status == 405)


def test_a_missing_model_is_not_found_by_the_sdk(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="use one of tiny, tuned"):
        client.models.retrieve("none")


def test_headers_of_every_answer(http: httpx.Client) -> None:
    seen = set()
    for response in (
        http.get("/live"),
        http.get("/v1/models"),
        http.get("/v1/nothing"),
        http.post("/v1/completions", json=BODY),
        http.post("/v1/completions", json={**BODY, "stream": True}),
        http.post("/v1/completions", json={**BODY, "x": 1}),
        http.get("/v1/models", headers={"authorization": "no"}),
    ):
        seen.add(response.headers["x-request-id"])
        assert int(response.headers["openai-processing-ms"]) >= 0
        assert "x-client-request-id" not in response.headers
        assert "server" not in response.headers
    assert len(seen) == 7
    mine = http.get("/live", headers={"x-client-request-id": "my own", "x-request-id": "forged"})
    assert mine.headers["x-client-request-id"] == "my own"
    assert mine.headers["x-request-id"] != "forged"
    assert "x-client-request-id" not in http.get("/live", headers={"x-client-request-id": "a" * 513}).headers


def test_health(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ready", "engines": 1, "ready": 1}
    assert http.get("/ready").status_code == http.get("/live").status_code == 200
    assert set(http.get("/version").json()) == {"version"}
    assert http.head("/health").status_code == 200


def test_one_line_of_log_without_secrets(
    service: Service, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "steelyard"):
        http.post("/v1/completions?key=query-secret", json={**BODY, "prompt": "body secret"})
        http.get("/v1/forged%0Aline")
        eventually(lambda: "/v1/forged%0Aline" in caplog.text and "/v1/completions" in caplog.text)
    first, second = caplog.messages[-2:]  # one of a test before may come late
    assert first.startswith("POST /v1/completions 200 ")
    assert second.startswith("GET /v1/forged%0Aline 404 ")
    assert not any(word in caplog.text for word in (service.key, service.key[6:36], "secret"))


def test_a_body_over_the_limit(service: Service, http: httpx.Client) -> None:
    count = len(service.received())
    for content in (b" " * ((4 << 20) + 1), (b" " * (1 << 20) for _ in range(6))):  # the second without a length
        response = http.post("/v1/completions", content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "payload_too_large"
    assert len(service.received()) == count
    assert http.post("/v1/completions", content=b" " * (4 << 20)).status_code == 400  # read, and no JSON
    with pytest.raises(openai.APIStatusError) as caught:
        service.sdk().completions.create(model="tiny", prompt="a" * (5 << 20))
    assert caught.value.status_code == 413


def raw(service: Service, content: bytes) -> socket.socket:
    host, port = service.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(content)
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    content = b""
    while piece := connection.recv(65536):
        content += piece
    return content


def head(service: Service, length: int) -> bytes:
    return (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {service.key}\r\n"
        f"content-length: {length}\r\n\r\n"
    ).encode()


def test_a_length_that_lies_is_refused_before_the_body(service: Service) -> None:
    with raw(service, head(service, 1 << 40)) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_slow_headers_and_slow_bodies_are_cut(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeadlineProtocol, "header_seconds", 0.3)
    began = time.monotonic()
    whole = b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n"
    with raw(service, whole[:13]) as silent, raw(service, whole[:20]) as dripping, raw(service, whole) as second:
        assert second.recv(1000).startswith(b"HTTP/1.1 200 ")
        second.sendall(b"GET /li")  # a second request on the same connection is no way round
        for connection in (silent, dripping, second):
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                while time.monotonic() - began < 5:
                    if connection is dripping:
                        connection.sendall(b"x: y\r\n")
                        time.sleep(0.02)
                    elif not connection.recv(1000):
                        break
            assert time.monotonic() - began < 3


def test_a_request_under_way_is_not_cut_by_the_header_deadline(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeadlineProtocol, "header_seconds", 0.2)
    answer = service.sdk().completions.create(model="tiny", prompt="a", max_tokens=10, seed=50)
    assert answer.usage.completion_tokens == 10


def test_a_slow_body_is_refused() -> None:
    async def app(scope, receive, send):  # type: ignore[no-untyped-def]
        while (await receive())["more_body"]:
            pass

    async def receive() -> dict[str, object]:
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def main() -> None:
        limited = BodyLimit(app, seconds=0.3)
        began = time.monotonic()
        with pytest.raises(Exception, match="not sent within") as caught:
            await limited({"type": "http", "path": "/", "headers": []}, receive, None)  # type: ignore[arg-type]
        assert getattr(caught.value, "code", None) == "request_timeout"
        assert 0.25 < time.monotonic() - began < 2

    asyncio.run(main())


def test_a_fault_of_our_own_tells_its_id_only(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(request: object) -> None:
        raise ZeroDivisionError("the secret detail")

    route = Route("/broken", broken)
    service.app.router.routes.append(route)
    try:
        with service.http() as http:
            response = http.get("/broken")
    finally:
        service.app.router.routes.remove(route)
    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert response.headers["x-request-id"] in error["message"]
    assert "secret" not in response.text
    eventually(lambda: response.headers["x-request-id"] in caplog.text and "the secret detail" in caplog.text)


@pytest.mark.parametrize("stream", [True, False])
def test_a_stalled_reader_is_cut_and_what_it_came_to_is_paid(
    make_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Soon: the system does not take megabytes for him first. An answer that has ended holds no connection either."""
    monkeypatch.setattr(DeadlineProtocol, "stall_seconds", 0.3)
    body = {"model": "stalled", "prompt": "a", "n": 4, "max_tokens": 250, "logprobs": 5, "seed": 20 if stream else 0}
    content = json.dumps({**body, "stream": stream}).encode()
    with serving(make_checkpoint("stalled")) as service, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", int(service.url.rpartition(":")[2])))
        connection.sendall(head(service, len(content)) + content)
        request = eventually(lambda: [m for m in service.received() if m["type"] == "request"])[0]
        eventually(lambda: service.aborted(request) or not stream, 10)
        eventually(lambda: not service.behind.metering.open)
        time.sleep(1)
        connection.settimeout(5)
        header, _, rest = read_to_end(connection).partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", header)
        assert len(rest) < int(length[1]) if length else not rest.endswith(b"0\r\n\r\n")
        with service.admin_http() as http:
            entries = http.get("/v1/organization/ledger").json()["data"]
        tokens = [entry["output_tokens"] for entry in entries if entry["kind"] == "settle"]
        assert len(tokens) == 1
        assert 0 < tokens[0] < 1000 if stream else tokens == [1000]


def test_a_thousand_streams_small(service: Service) -> None:
    """200 at once: each gets everything, and none waits for another's end."""

    async def all_of_them() -> list[tuple[int, float]]:
        async with httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=None)) as http:
            return await asyncio.gather(*(one(http) for _ in range(200)))

    async def one(http: httpx.AsyncClient) -> tuple[int, float]:
        pieces, first = 0, 0.0
        body = {**BODY, "max_tokens": 10, "seed": 200, "stream": True}
        headers = {"authorization": f"Bearer {service.key}"}
        async with http.stream("POST", f"{service.url}/v1/completions", json=body, headers=headers) as answer:
            async for line in answer.aiter_lines():
                first = first or time.monotonic() - began
                pieces += line.startswith("data: ")
        return pieces, first

    began = time.monotonic()
    answers = asyncio.run(all_of_them())
    assert len({pieces for pieces, _ in answers}) == 1
    assert answers[0][0] >= 10
    assert max(first for _, first in answers) < time.monotonic() - began - 1


def test_the_log_as_json(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "steelyard.access"), service.http() as http:
        request_id = http.get("/v1/models", params={"secret": "s3cret"}).headers["x-request-id"]
        eventually(lambda: request_id in caplog.text)  # the line follows the answer
    record = next(record for record in caplog.records if request_id in record.getMessage())
    line = json.loads(JsonLines().format(record))
    assert (line["method"], line["path"], line["status"], line["request_id"]) == ("GET", "/v1/models", 200, request_id)
    assert line["project"].startswith("proj_")
    assert "s3cret" not in json.dumps(line)
