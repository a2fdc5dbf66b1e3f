"""Clients that leave and engines that die: what runs for nobody is aborted, and nobody waits for what is gone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from running_service import Service, eventually

from steelyard.serve import engine_client, generation

HELLO = [{"role": "user", "content": "Hello"}]


def post(service: Service, path: str, body: dict[str, object]) -> socket.socket:
    host, port = service.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {service.key}\r\n"
        f"content-length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_client_that_leaves_is_not_worked_for(service: Service, path: str, stream: bool) -> None:
    question = {"messages": HELLO} if "chat" in path else {"prompt": ["a", "b"]}
    before = len(service.received())
    body = {"model": "tiny", "max_tokens": 200, "seed": 20, "stream": stream, **question}
    wanted = 1 if "chat" in path else 2
    with post(service, path, body) as connection:
        eventually(lambda: len(service.received()) == before + wanted)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        time.sleep(0.1)
        assert not any(service.aborted(message) for message in service.received()[before:])
    began = time.monotonic()
    eventually(lambda: all(service.aborted(m) for m in service.received()[before:] if m["type"] == "request"))
    assert time.monotonic() - began < 1
    eventually(lambda: service.engine._inboxes == {})


def test_the_async_sdk_that_breaks_off_is_noticed(service: Service) -> None:
    before = len(service.received())

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=service.key, max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="tiny", messages=HELLO, max_tokens=200, seed=20, stream=True
            )
            async with stream:
                async for _ in stream:
                    break
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=200, seed=20)

    asyncio.run(leave())
    requests = [message for message in service.received()[before:] if message["type"] == "request"]
    assert len(requests) == 2
    eventually(lambda: all(map(service.aborted, requests)))


def test_a_request_that_ends_is_not_aborted(service: Service) -> None:
    before = len(service.received())
    service.sdk().completions.create(model="tiny", prompt=["a", "b"], n=3, max_tokens=20)
    list(service.sdk().completions.create(model="tiny", prompt="a", n=3, max_tokens=20, stream=True))
    service.sdk().models.list()
    assert {message["type"] for message in service.received()[before:]} == {"request"}


def test_a_killed_engine(fragile: Service) -> None:
    """Everybody gets an error within 2 s, health says so, and it serves again within 10 s."""
    client = fragile.sdk()
    pid = fragile.engine.pid

    def stream() -> Exception | None:
        try:
            for _ in client.chat.completions.create(
                model="fragile", messages=HELLO, max_tokens=200, seed=20, stream=True
            ):
                pass
        except openai.APIError as error:
            return error
        return None

    def whole() -> Exception | None:
        try:
            client.completions.create(model="fragile", prompt="a", max_tokens=200, seed=20)
        except openai.APIError as error:
            return error
        return None

    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(stream) for _ in range(4)]
        wholes = [pool.submit(whole) for _ in range(4)]
        eventually(lambda: len(fragile.received()) == 8)
        time.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        errors = [future.result(timeout=5) for future in streams + wholes]
        assert time.monotonic() - killed < 2
    for error in errors[:4]:  # the stream had begun: an error event
        assert isinstance(error, openai.APIError)
        assert not isinstance(error, openai.APIStatusError)
        assert "stopped while it worked" in error.message
    for error in errors[4:]:
        assert isinstance(error, openai.InternalServerError)
        assert error.status_code == 503
        assert error.code == "engine_unavailable"
        assert int(error.response.headers["retry-after"]) >= 1
    eventually(lambda: httpx.get(f"{fragile.url}/health").status_code == 200, 10)
    assert fragile.engine.pid != pid
    assert fragile.sdk().completions.create(model="fragile", prompt="a", max_tokens=3).usage.completion_tokens == 3


def test_while_there_is_no_engine(fragile: Service) -> None:
    """Held down: 503 with retry-after for those who ask, `/live` goes on, and the SDK's own retries get through."""
    command = fragile.engine._command
    fragile.engine._command = lambda *_: ["false"]
    os.kill(fragile.engine.pid, signal.SIGKILL)
    eventually(lambda: fragile.engine.ready is None)
    with fragile.http() as http:
        for path in ("/health", "/ready"):
            response = http.get(path)
            assert response.status_code == 503
            assert response.json() == {"status": "restarting", "engines": 1, "ready": 0}
        assert http.get("/live").status_code == 200
        assert http.get("/v1/models").status_code == 200
        for stream in (False, True):
            body = {"model": "fragile", "messages": HELLO, "stream": stream}
            response = http.post("/v1/chat/completions", json=body)
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["type"] == "server_error"
    fragile.engine._command = command
    answer = fragile.sdk(max_retries=8).completions.create(model="fragile", prompt="a", max_tokens=3)
    assert answer.usage.completion_tokens == 3


def test_a_request_that_kills_the_engine(fragile: Service) -> None:
    with pytest.raises(openai.InternalServerError):
        fragile.sdk().completions.create(model="fragile", prompt=[9, 9, 9])
    eventually(lambda: fragile.engine.ready, 10)
    with pytest.raises(openai.InternalServerError):
        fragile.sdk().completions.create(model="fragile", prompt=[8, 8, 8])
    assert fragile.engine.ready


def test_an_engine_that_stalls_is_not_ready(fragile: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped, not dead: its process is there and says nothing."""
    monkeypatch.setattr(engine_client, "CANARY_SECONDS", 0.1)
    monkeypatch.setattr(engine_client, "STALL_SECONDS", 0.4)
    time.sleep(2.1)  # the watch has taken the shorter times up
    assert httpx.get(f"{fragile.url}/ready").status_code == 200
    os.kill(fragile.engine.pid, signal.SIGSTOP)
    answer = eventually(lambda: refused(httpx.get(f"{fragile.url}/ready")))
    assert answer.json()["status"] == "stalled"
    assert httpx.get(f"{fragile.url}/live").status_code == 200
    os.kill(fragile.engine.pid, signal.SIGCONT)
    eventually(lambda: httpx.get(f"{fragile.url}/ready").status_code == 200)


def refused(answer: httpx.Response) -> httpx.Response | None:
    return answer if answer.status_code == 503 else None


def test_an_answer_that_does_not_come_in_time(fragile: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "FIRST_TOKEN_SECONDS", 0.3)
    monkeypatch.setattr(generation, "TOTAL_SECONDS", 1.0)
    client = fragile.sdk()
    assert client.completions.create(model="fragile", prompt="a", max_tokens=3).usage.completion_tokens == 3
    began = time.monotonic()
    with pytest.raises(openai.InternalServerError, match="the end did not come in time"):
        client.completions.create(model="fragile", prompt="a", max_tokens=200, seed=20)
    assert 0.9 < time.monotonic() - began < 2
    os.kill(fragile.engine.pid, signal.SIGSTOP)
    with pytest.raises(openai.InternalServerError, match="the first token did not come in time"):
        client.completions.create(model="fragile", prompt="a", max_tokens=200, seed=20)
    os.kill(fragile.engine.pid, signal.SIGCONT)
    eventually(lambda: all(map(fragile.aborted, fragile.received()[1:2])))
    eventually(lambda: fragile.behind.metering.open == 0)


def test_a_full_engine_says_so(fragile: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "MOST_OPEN", 2)
    client = fragile.sdk()
    with client.completions.create(model="fragile", prompt="a", max_tokens=99, seed=30, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.InternalServerError, match="is full") as error:
            client.completions.create(model="fragile", prompt=["a", "b"], max_tokens=3)
    assert error.value.status_code == 503
    assert error.value.response.headers["retry-after"] == "1"
