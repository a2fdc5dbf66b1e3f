"""Batches by the SDK: answers in the input's order, errors per line, half the price, and no line twice."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from running_service import Service, eventually, serving
from sqlalchemy import select, update

from steelyard.errors import StorageError
from steelyard.serve.billing.prices import Price, newest, publish
from steelyard.store import tables
from steelyard.store.database import opened, sqlite_url
from steelyard.store.secrets import Secrets

PRICE = Price(input=1001, output=2001)
CHAT = "/v1/chat/completions"


def line(number: int, url: str = CHAT, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Hello {number}"}]
    asked = {"model": "tiny", "messages": messages, "max_tokens": 4, **body}
    return {"custom_id": f"line-{number}", "method": "POST", "url": url, "body": asked}


def upload(client: openai.OpenAI, lines: list[Any]) -> str:
    content = "".join(json.dumps(one) + "\n" for one in lines).encode()
    return client.files.create(file=("batch.jsonl", io.BytesIO(content)), purpose="batch").id


def run(client: openai.OpenAI, lines: list[Any], endpoint: Any = CHAT, **options: Any) -> Any:
    return client.batches.create(
        input_file_id=upload(client, lines), endpoint=endpoint, completion_window="24h", **options
    )


def ended(client: openai.OpenAI, batch: Any, seconds: float = 20) -> Any:
    def over() -> Any:
        now = client.batches.retrieve(batch.id)
        return now if now.status in ("completed", "failed", "cancelled", "expired") else None

    return eventually(over, seconds)


def rows(client: openai.OpenAI, file: str | None) -> list[Any]:
    return [] if file is None else [json.loads(one) for one in client.files.content(file).text.splitlines()]


@pytest.fixture(scope="module")
def service(make_checkpoint: Callable[[str], Path]) -> Iterator[Service]:
    with serving(make_checkpoint("tiny")) as service:
        service.behind.database.write_now(lambda connection: publish(connection, {"*": PRICE}, 1))
        service.behind.prices = service.behind.database.read_now(newest)
        yield service


@pytest.fixture
def client(service: Service) -> openai.OpenAI:
    return service.sdk(_strict_response_validation=True)


def entries(service: Service, batch: str) -> list[Any]:
    found = tables.ledger.c
    rows = service.behind.database.read_now(
        lambda connection: connection.execute(
            select(tables.ledger).where(found.reference.like(f"{batch}%"), found.kind == "settle")
        ).all()
    )
    return list(rows)


def test_every_line_is_answered(service: Service, client: openai.OpenAI) -> None:
    lines = [line(number) for number in range(1, 31)]
    lines[6] = line(7, temperature=9)
    lines[11] = line(12, model="none")
    lines[12] = line(13, stream=True)
    batch = run(client, lines, metadata={"run": "a"})
    assert batch.status == "validating"
    done = ended(client, batch)
    assert done.status == "completed"
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (30, 27, 3)
    assert done.completed_at >= done.finalizing_at >= done.in_progress_at >= done.created_at
    assert done.metadata == {"run": "a"}
    answers, errors = rows(client, done.output_file_id), rows(client, done.error_file_id)
    assert [one["custom_id"] for one in answers] == [
        f"line-{number}" for number in range(1, 31) if number not in (7, 12, 13)
    ]
    assert [one["custom_id"] for one in errors] == ["line-7", "line-12", "line-13"]
    assert [one["response"]["status_code"] for one in errors] == [400, 404, 400]
    assert [one["response"]["body"]["error"]["param"] for one in errors] == ["temperature", "model", "stream"]
    cost = 0
    for one in answers:
        body = one["response"]["body"]
        assert body["object"] == "chat.completion"
        usage = body["usage"]
        cost += (usage["prompt_tokens"] * 1001 + usage["completion_tokens"] * 2001 + 1) // 2
    paid = entries(service, batch.id)
    assert len(paid) == 27
    assert all(entry.batch for entry in paid)
    assert sum(entry.cost for entry in paid) == cost
    received = [message for message in service.received() if message["type"] == "request"]
    assert {message["priority"] for message in received} == {"batch"}
    assert client.files.retrieve(done.output_file_id).purpose == "batch_output"
    assert batch.id in [one.id for one in client.batches.list(limit=5)]


def test_completions_too(client: openai.OpenAI) -> None:
    lines = [{"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"model": "tiny", "prompt": "a"}}]
    done = ended(client, run(client, lines, "/v1/completions"))
    assert rows(client, done.output_file_id)[0]["response"]["body"]["object"] == "text_completion"


def test_what_is_wrong_with_the_file_is_said_by_line(client: openai.OpenAI) -> None:
    wrong = [line(1), line(1), {**line(2), "method": "GET"}, {**line(3), "url": "/v1/files"}, {**line(4), "body": 1}]
    wrong += [{**line(5), "custom_id": ""}, {**line(6), "extra": 1}]
    failed = ended(client, run(client, wrong))
    assert failed.status == "failed"
    assert [(error.line, error.code) for error in failed.errors.data] == [
        (2, "duplicate_custom_id"),
        (3, "invalid_method"),
        (4, "mismatched_url"),
        (5, "invalid_body"),
        (6, "invalid_custom_id"),
        (7, "unknown_field"),
    ]
    file = client.files.create(file=("x", io.BytesIO(b"{}")), purpose="user_data").id
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.BadRequestError):
        client.batches.create(input_file_id="file-none", endpoint=CHAT, completion_window="24h")
    for broken in (b"{", b"[]\n", b"\xff\n"):
        file = client.files.create(file=("b.jsonl", io.BytesIO(broken)), purpose="batch").id
        batch = client.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")
        assert ended(client, batch).errors.data[0].line == 1


def test_cancelled_it_keeps_what_was_done(client: openai.OpenAI) -> None:
    batch = run(client, [line(number, max_tokens=20, seed=25) for number in range(1, 60)])
    eventually(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0)
    assert client.batches.cancel(batch.id).status == "cancelling"
    done = ended(client, batch)
    assert done.status == "cancelled"
    assert 0 < done.request_counts.completed < 59
    assert len(rows(client, done.output_file_id)) == done.request_counts.completed
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


def test_the_next_server_goes_on_and_nothing_is_paid_twice(
    make_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint, secrets = make_checkpoint("tiny"), Secrets.make()
    options: Any = {"secrets": secrets, "state": tmp_path, "database": sqlite_url(tmp_path / "db")}
    lines = [line(number, max_tokens=10, seed=30) for number in range(1, 81)]
    with serving(checkpoint, **options) as first:
        first.behind.database.write_now(lambda connection: publish(connection, {"*": PRICE}, 1))
        first.behind.prices = first.behind.database.read_now(newest)
        batch = run(first.sdk(), lines)
        eventually(lambda: first.sdk().batches.retrieve(batch.id).request_counts.completed > 10)
        first.engine._process.kill()  # its lines are asked again
        time.sleep(1)
    with opened(options["database"]) as database:  # an answer that is lost after its settlement
        gone = database.write_now(
            lambda connection: connection.execute(tables.batch_lines.delete().where(tables.batch_lines.c.number == 1))
        )
        assert gone.rowcount == 1
        database.write_now(
            lambda connection: connection.execute(
                tables.batches.update().values(completed=tables.batches.c.completed - 1)
            )
        )
    with serving(checkpoint, **options) as second:
        client = second.sdk()
        done = ended(client, batch, 60)
        assert done.status == "completed"
        answers = rows(client, done.output_file_id)
        assert [one["custom_id"] for one in answers] == [f"line-{number}" for number in range(1, 81)]
        paid = [entry for entry in entries(second, batch.id) if entry.cost]
        names = [entry.reference.partition(".")[0] for entry in paid]
        assert sorted(names) == sorted(f"{batch.id}_{number}" for number in range(1, 81)), "each line is paid once"
        assert done.request_counts.completed == 80
        stored = b"".join(file.read_bytes() for file in (tmp_path / "artifacts").rglob("*") if file.is_file())
        assert b"Hello 7" not in stored
        assert b"Hello 7" not in (tmp_path / "db").read_bytes()


def artifact(service: Service, file: str) -> Path:
    row = service.behind.database.read_now(
        lambda connection: connection.execute(select(tables.files).where(tables.files.c.id == file)).one()
    )
    artifacts: Any = service.behind.files.artifacts
    return Path(artifacts._folder) / row.project_id / row.artifact


def test_a_fault_of_ours_costs_one_line(
    service: Service, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = service.behind.batches.answer

    async def faulty(batch: Any, one: Any, attempt: str, paid: bool) -> Any:
        if one.custom_id == "line-2":
            raise ValueError("a secret of ours")
        return await answer(batch, one, attempt, paid)

    monkeypatch.setattr(service.behind.batches, "answer", faulty)
    done = ended(client, run(client, [line(number) for number in range(1, 4)]))
    assert (done.status, done.request_counts.completed, done.request_counts.failed) == ("completed", 2, 1)
    (failed,) = rows(client, done.error_file_id)
    assert failed["custom_id"] == "line-2"
    assert failed["response"]["status_code"] == 500
    assert failed["response"]["body"]["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(failed)
    monkeypatch.setattr(service.behind.batches, "_run", lambda *_: 1 / 0)
    broken = ended(client, run(client, [line(1)]))
    assert (broken.status, broken.errors.data[0].code) == ("failed", "internal_error")
    monkeypatch.undo()
    assert ended(client, run(client, [line(1)])).status == "completed", "the next one runs"


def test_while_the_store_is_away_a_batch_waits(
    service: Service, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, times = service.behind.batches, 0
    read = runner._read

    def away(batch: Any) -> Any:
        nonlocal times
        times += 1
        if times in (1, 3):  # while it is checked, and while it runs
            raise StorageError("not just now")
        return read(batch)

    monkeypatch.setattr(runner, "_read", away)
    done = ended(client, run(client, [line(number) for number in range(1, 4)]))
    assert (done.status, done.request_counts.completed) == ("completed", 3)
    assert times >= 4


@pytest.mark.parametrize("damage", ["altered", "deleted"])
def test_a_damaged_input_ends_its_batch(
    service: Service, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    runner = service.behind.batches
    begin = runner._begin
    made: list[str] = []

    async def then_damaged(batch: Any, lines: Any, errors: Any) -> None:
        await begin(batch, lines, errors)
        path = artifact(service, batch["input_file_id"])
        if damage == "altered":
            path.write_bytes(path.read_bytes()[:-1] + b"!")
        else:
            path.unlink()
        made.append(batch["id"])

    monkeypatch.setattr(runner, "_begin", then_damaged)
    done = ended(client, run(client, [line(number, user=damage) for number in range(1, 6)]))
    assert made == [done.id]
    assert done.status == "failed"
    assert done.errors.data[0].param == "input_file_id"
    monkeypatch.undo()
    assert ended(client, run(client, [line(1)])).status == "completed"


def test_responses_in_a_batch(service: Service, client: openai.OpenAI) -> None:
    """They are kept as others are, and go on from those that are."""
    path = "/v1/responses"
    first = client.responses.create(model="tiny", input="Hello", max_output_tokens=2)
    asked = {"model": "tiny", "input": "more", "previous_response_id": first.id, "max_output_tokens": 4}
    lines = [{"custom_id": f"{number}", "method": "POST", "url": path, "body": asked} for number in range(2)]
    lines.append({**lines[0], "custom_id": "2", "body": {**asked, "previous_response_id": "resp_none"}})
    batch = ended(client, run(client, lines, path))
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
    (error,) = rows(client, batch.error_file_id)
    assert error["response"]["body"]["error"]["code"] == "previous_response_not_found"
    for one in rows(client, batch.output_file_id):
        body = one["response"]["body"]
        assert client.responses.retrieve(body["id"]).to_dict() == body
    paid = entries(service, batch.id)
    assert [(entry.batch, entry.output_tokens) for entry in paid] == [(True, 4)] * 2


def test_batches_of_two_projects_run_beside_each_other(
    service: Service, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service.admin_http() as http:
        project = http.post("/v1/organization/projects", json={"name": "other"}).json()["id"]
        key = http.post(f"/v1/organization/projects/{project}/api_keys", json={"name": "k"}).json()["value"]
    other = service.sdk(api_key=key)
    answer, held = service.behind.batches.answer, asyncio.Event()

    async def slow(batch: Any, one: Any, attempt: str, paid: bool) -> Any:
        if batch["project_id"] != project:
            await held.wait()
        return await answer(batch, one, attempt, paid)

    monkeypatch.setattr(service.behind.batches, "answer", slow)
    first, second = (run(client, [line(1)]) for _ in range(2))
    quick = ended(other, run(other, [line(1)]))
    assert quick.status == "completed", "a batch of another project does not wait for ours"
    assert client.batches.retrieve(second.id).status == "validating", "one at a time of each project"
    held.set()
    service.behind.batches.wake()
    assert {ended(client, one).status for one in (first, second)} == {"completed"}


def test_a_batch_of_another_server_is_left_alone(
    service: Service, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, found = service.behind.database, tables.batches
    holders = {12345: True}
    monkeypatch.setattr(database, "is_held", lambda connection, holder: holders.get(holder, holder == database.holder))
    begin = service.behind.batches._begin_some
    monkeypatch.setattr(service.behind.batches, "_begin_some", lambda: asyncio.sleep(0))
    batch = run(client, [line(1)])
    database.write_now(lambda connection: connection.execute(update(found).values(holder=12345)))
    monkeypatch.setattr(service.behind.batches, "_begin_some", begin)
    time.sleep(1.5)
    assert client.batches.retrieve(batch.id).status == "validating"
    holders[12345] = False  # it has died
    assert ended(client, batch).status == "completed"
