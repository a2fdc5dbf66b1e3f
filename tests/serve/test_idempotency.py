"""`Idempotency-Key`: what is sent again is answered again, and done and paid for once."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running_service import Service, eventually, serving
from sqlalchemy import select, update
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from steelyard.errors import EngineUnavailableError
from steelyard.serve.auth import Caller
from steelyard.serve.connection import DONE, EventStream
from steelyard.serve.fingerprint import BETWEEN, FormDigest, boundary
from steelyard.serve.idempotency import Idempotency
from steelyard.store import tables

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
CHAT: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 5}


@pytest.fixture(scope="module")
def service(make_checkpoint: Callable[[str], Path]) -> Iterator[Service]:
    with serving(make_checkpoint("tiny")) as service:
        yield service


def post(service: Service, key: str, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
    with service.http() as http:
        return http.post(path, headers={"idempotency-key": key}, **options)


def settlements(service: Service) -> int:
    entries = tables.ledger.c
    rows = service.behind.database.read_now(
        lambda connection: connection.execute(select(entries.sequence).where(entries.kind == "settle")).all()
    )
    return len(rows)


@pytest.mark.parametrize("streamed", [False, True])
def test_again_is_the_same_and_paid_once(service: Service, streamed: bool) -> None:
    before = settlements(service)
    key = f"once {streamed}"
    first, again = (post(service, key, json={**CHAT, "stream": streamed}) for _ in range(2))
    assert first.status_code == again.status_code == 200
    assert first.content == again.content
    assert first.headers["content-type"] == again.headers["content-type"]
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert first.headers["x-request-id"] != again.headers["x-request-id"]
    assert settlements(service) == before + 1


def test_another_request_under_the_same_key_is_refused(service: Service) -> None:
    post(service, "a", json=CHAT).raise_for_status()
    other = post(service, "a", json={**CHAT, "max_tokens": 6})
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_mismatch")
    elsewhere = post(service, "a", "/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert elsewhere.status_code == 409


def test_at_the_same_time_one_is_done(service: Service) -> None:
    before, answers = settlements(service), list[httpx.Response]()
    slow = {**CHAT, "max_tokens": 20, "seed": 30}
    threads = [threading.Thread(target=lambda: answers.append(post(service, "race", json=slow))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 7
    assert {answer.json()["error"]["code"] for answer in answers if answer.status_code == 409} == {
        "idempotency_in_progress"
    }
    assert settlements(service) == before + 1


def test_errors_are_not_kept(service: Service) -> None:
    wrong = post(service, "wrong", json={**CHAT, "model": "other"})
    assert wrong.status_code == 404
    assert post(service, "wrong", json=CHAT).status_code == 200


def test_a_key_is_a_projects_own(service: Service) -> None:
    with service.admin_http() as admin:
        project = admin.post("/v1/organization/projects", json={"name": "other"}).json()["id"]
        key = admin.post(f"/v1/organization/projects/{project}/api_keys", json={"name": "x"}).json()["value"]
    mine = post(service, "shared", json=CHAT)
    theirs = httpx.post(
        f"{service.url}/v1/chat/completions",
        headers={"idempotency-key": "shared", "authorization": f"Bearer {key}"},
        json=CHAT,
    )
    assert mine.json()["id"] != theirs.json()["id"]


def test_a_new_keys_value_is_not_said_twice(service: Service) -> None:
    project = service.behind.keys.fixed and next(iter(service.behind.keys.fixed.values())).project
    with service.admin_http() as admin:
        for path, body in (
            (f"projects/{project}/api_keys", {"name": "x"}),
            (f"projects/{project}/service_accounts", {"name": "x"}),
            ("admin_api_keys", {"name": "x"}),
        ):
            headers = {"idempotency-key": path}
            first, again = (admin.post(f"/v1/organization/{path}", json=body, headers=headers) for _ in range(2))
            assert first.json()["id"] == again.json()["id"]
            value = first.json().get("value") or first.json()["api_key"]["value"]
            assert value.startswith("sk-sy-")
            assert value not in again.text
    stored = service.behind.database.read_now(
        lambda connection: b"".join(connection.execute(select(tables.idempotency.c.answer)).scalars())
    )
    assert b"sk-sy-" not in stored, "sealed, too"


def test_uploads(service: Service) -> None:
    """A form is the same whatever its boundary, and another if a byte of its file is."""
    content = bytes(range(256)) * 20_000

    def upload(content: bytes) -> httpx.Response:
        file = {"file": ("x", io.BytesIO(content))}
        return post(service, "upload", "/v1/files", data={"purpose": "user_data"}, files=file)

    first, again, other = upload(content), upload(content), upload(content[:-1] + b"x")
    assert first.json() == again.json()
    assert again.headers["idempotent-replayed"] == "true"
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_mismatch")
    assert post(service, "upload", json=CHAT).status_code == 409
    post(service, "no form", json=CHAT).raise_for_status()
    file = {"file": ("x", io.BytesIO(b"abc"))}
    assert post(service, "no form", "/v1/files", data={"purpose": "user_data"}, files=file).status_code == 409


def test_an_upload_that_broke_off_can_be_sent_again(service: Service) -> None:
    """Its key is free: nothing is kept of what was not read whole."""

    def leaving() -> Iterator[bytes]:
        yield b"--abc"
        raise InterruptedError

    headers = {"idempotency-key": "broken", "content-type": "multipart/form-data; boundary=abc"}
    with service.http() as http, pytest.raises(InterruptedError):
        http.post("/v1/files", headers=headers, content=leaving())
    form = {"data": {"purpose": "user_data"}, "files": {"file": ("x", io.BytesIO(b"abc"))}}
    eventually(lambda: post(service, "broken", "/v1/files", **form).status_code == 200)


@given(st.lists(st.binary(max_size=20), max_size=8), st.integers(1, 9))
def test_a_forms_digest_is_that_of_what_its_boundary_parts(pieces: list[bytes], size: int) -> None:
    """However it arrives."""
    digests = []
    for mark in (b"a\xffb", b"--another--"):
        body = mark.join(piece.replace(b"a\xffb", b"").replace(b"--another--", b"") for piece in pieces)
        parts = [body[begin : begin + size] for begin in range(0, len(body), size)] or [b""]
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        messages[-1]["more_body"] = False

        async def receive(messages: list[Message] = messages) -> Message:
            return messages.pop(0)

        digests.append(asyncio.run(FormDigest(b"here", mark, receive).rest()))
    plain = BETWEEN.join(piece.replace(b"a\xffb", b"").replace(b"--another--", b"") for piece in pieces)
    assert digests == [hashlib.sha256(b"here" + plain).hexdigest()] * 2


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_a_key_that_is_none_is_refused(service: Service, key: str) -> None:
    assert post(service, key, json=CHAT).status_code == 400


def test_after_a_day_and_after_a_crash_it_is_done_anew(service: Service) -> None:
    first = post(service, "old", json=CHAT).json()["id"]
    service.behind.database.write_now(
        lambda connection: connection.execute(update(tables.idempotency).values(created_at=1))
    )
    assert post(service, "old", json=CHAT).json()["id"] != first
    service.behind.database.write_now(
        lambda connection: connection.execute(
            update(tables.idempotency).where(tables.idempotency.c.key == "old").values(answer=None, holder=5)
        )
    )
    assert post(service, "old", json=CHAT).status_code == 200, "its server is gone"


async def stream_once(
    service: Service, key: str, events: list[bytes], send: Send, *, breaks: bool = False, leaves: bool = False
) -> None:
    """A POST with a key through the middleware to a stream of these events, which may break off; its client may leave
    before the body is there."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def streamed() -> Any:
            for one in events:
                yield one
            if breaks:
                raise EngineUnavailableError("it stopped")

        await EventStream(streamed(), "req")(scope, receive, send)

    async def receive() -> Message:
        if given and not leaves:
            await asyncio.sleep(10)
        if given:
            return {"type": "http.disconnect"}
        given.append(1)
        return {"type": "http.request", "body": b"{" if leaves else b"{}", "more_body": leaves}

    given: list[int] = []
    caller = Caller("key", "proj_streams", frozenset({"inference"}))
    scope = {"type": "http", "method": "POST", "raw_path": b"/", "query_string": b"", "state": {"caller": caller}}
    headers = [(b"idempotency-key", key.encode())]
    behind = service.behind
    once = Idempotency(app, behind.database, behind.secrets.root, behind.now)
    await once({**scope, "headers": headers}, receive, send)


def test_who_has_a_streams_end_can_ask_for_it_again(service: Service) -> None:
    """`[DONE]` is where clients leave: by then it is kept, whatever happens next."""
    kept: dict[bytes, bool] = {}

    async def send(message: Message) -> None:
        if body := message.get("body"):
            column = tables.idempotency.c
            query = select(column.answer).where(column.key == "stream")
            found = await service.behind.database.read(lambda connection: connection.execute(query).scalar())
            kept[body] = found is not None

    asyncio.run(stream_once(service, "stream", [b"data: {}\n\n", DONE], send))
    assert kept == {b"data: {}\n\n": False, DONE: True}


def test_a_stream_that_broke_off_is_not_kept(service: Service) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(stream_once(service, "broken", [b"data: {}\n\n"], send, breaks=True))
    assert b"it stopped" in b"".join(message.get("body", b"") for message in sent)
    sent.clear()
    asyncio.run(stream_once(service, "broken", [b"data: 1\n\n", DONE], send))
    assert b"".join(message.get("body", b"") for message in sent) == b"data: 1\n\n" + DONE


def test_who_leaves_before_the_body_is_sent_can_send_it_again(service: Service) -> None:
    """What came of the first body is no request: the second is not another one under the same key."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    with pytest.raises(ClientDisconnect):
        asyncio.run(stream_once(service, "early", [DONE], send, leaves=True))
    assert not sent
    asyncio.run(stream_once(service, "early", [DONE], send))
    assert b"".join(message.get("body", b"") for message in sent) == DONE


@pytest.mark.parametrize(
    "given",
    [
        "multipart/form-data",
        'multipart/form-data; a="' + ";" * 60_000,
        "multipart/form-data; boundary*=a; boundary*0=b",
        f"multipart/form-data; boundary*{'9' * 5000}=a",
        "Multipart/Form-Data; Boundary=abc",
    ],
    ids=["none", "many parts", "extended", "a long number", "capitals"],
)
def test_a_header_that_is_hard_to_read_is_read(given: str) -> None:
    """What parts a form is found by who reads the form: a type that is none is still a form, and soon read."""
    found = boundary({"headers": [(b"content-type", given.encode())]})
    assert found in (b"abc", b"multipart/form-data")


def test_a_body_that_is_no_form_is_bounded(service: Service) -> None:
    """As large as a file, it is not held."""
    content = (b"x" * (1 << 20) for _ in range(33))  # the last of which is too much
    answer = post(service, "large", "/v1/files", content=content)
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")
