"""`store: true`: kept, listed, changed, deleted, exported; by the SDK."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from running_service import Service, serving
from sqlalchemy import select

from steelyard.store import tables

SECRET = "the codeword is steelyard"


@pytest.fixture(scope="module")
def service(make_checkpoint: Callable[[str], Path]) -> Iterator[Service]:
    with serving(make_checkpoint("tiny")) as service:
        yield service


@pytest.fixture
def client(service: Service) -> openai.OpenAI:
    return service.sdk(_strict_response_validation=True)


def ask(client: openai.OpenAI, text: str = SECRET, **options: Any) -> Any:
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    return client.chat.completions.create(
        **{"model": "tiny", "messages": messages, "max_tokens": 6, "store": True, **options}
    )


def test_kept_listed_changed_and_deleted(service: Service, client: openai.OpenAI) -> None:
    answer = ask(client, metadata={"topic": "a"})
    kept = client.chat.completions.retrieve(answer.id)
    assert kept.choices == answer.choices
    assert kept.usage == answer.usage
    assert [one.id for one in client.chat.completions.list(metadata={"topic": "a"})] == [answer.id]
    assert not list(client.chat.completions.list(metadata={"topic": "b"}))
    assert client.chat.completions.update(answer.id, metadata={"topic": "b"}).id == answer.id
    assert [one.id for one in client.chat.completions.list(metadata={"topic": "b"}, model="tiny")] == [answer.id]
    loose = service.sdk()  # the SDK's type of such a message has the assistant's role alone
    said = list(loose.chat.completions.messages.list(answer.id, order="asc", limit=1))
    assert [(one.content, one.id) for one in said] == [
        ("Be brief.", f"{answer.id}-0"),
        (SECRET, f"{answer.id}-1"),
    ]
    stored = service.behind.database.read_now(
        lambda connection: b"".join(connection.execute(select(tables.stored_completions.c.content)).scalars())
    )
    assert SECRET.encode() not in stored
    assert client.chat.completions.delete(answer.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve(answer.id)


def test_a_stream_is_kept_whole(client: openai.OpenAI) -> None:
    chunks = list(ask(client, n=2, stream=True))
    kept = client.chat.completions.retrieve(chunks[0].id)
    for choice in kept.choices:
        text = "".join(
            part.delta.content or "" for chunk in chunks for part in chunk.choices if part.index == choice.index
        )
        assert choice.message.content == text
    assert kept.usage is not None
    assert kept.usage.completion_tokens == 12


def test_without_it_nothing_is_kept(client: openai.OpenAI) -> None:
    answer = ask(client, store=False)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve(answer.id)
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, store=False, metadata={"a": "b"})
    assert error.value.param == "metadata"


def test_exported_as_a_training_file(client: openai.OpenAI) -> None:
    answers = [ask(client, f"question {number}", metadata={"run": "x"}) for number in range(3)]
    file = client.post("/chat/completions/export", cast_to=object, body={"metadata": {"run": "x"}})
    rows = [json.loads(line) for line in client.files.content(file["id"]).text.splitlines()]  # type: ignore[index]
    assert {row["messages"][1]["content"] for row in rows} == {f"question {number}" for number in range(3)}
    assert {row["messages"][2]["content"] for row in rows} == {one.choices[0].message.content for one in answers}
    with pytest.raises(openai.BadRequestError):
        client.post("/chat/completions/export", cast_to=object, body={"metadata": {"run": "none"}})
