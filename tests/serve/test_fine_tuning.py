"""Fine-tuning by the SDK alone: upload, job, events, pause, resume, a model that is called at once."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from running_service import Service, eventually, serving

from steelyard.serve.engine_client import worker_command
from steelyard.store.database import sqlite_url
from steelyard.store.secrets import Secrets

ASK = "Is it a cat or a dog? "
SECRETS = Secrets.make()
TRAINING_PRICE = 3000


def rows(count: int, first: int = 0) -> bytes:
    found = []
    for number in range(first, first + count):
        word, answer = (("meow", "cat"), ("woof", "dog"))[number % 2]
        messages = [{"role": "user", "content": f"{ASK}{word} {number}"}, {"role": "assistant", "content": answer}]
        found.append(json.dumps({"messages": messages}) + "\n")
    return "".join(found).encode()


@pytest.fixture(scope="module")
def service(make_model: Callable[[str], Path]) -> Iterator[Service]:
    with serving(make_model("tiny"), command=worker_command, seconds=60, secrets=SECRETS) as service:
        with service.admin_http() as http:
            http.post("/v1/organization/prices", json={"prices": {"*": {"training": TRAINING_PRICE}}})
        yield service


@pytest.fixture
def client(service: Service) -> openai.OpenAI:
    return service.sdk(_strict_response_validation=True)


def upload(client: openai.OpenAI, content: bytes, purpose: Any = "fine-tune", name: str = "rows.jsonl") -> str:
    return client.files.create(file=(name, io.BytesIO(content)), purpose=purpose).id


def job_when(service: Service, job_id: str, *statuses: str, seconds: float = 90) -> Any:
    def reached() -> Any:
        # `paused` is a status that the SDK has verbs for and its type lacks.
        job = service.sdk().fine_tuning.jobs.retrieve(job_id)
        assert job.status in statuses or job.status not in ("failed", "cancelled", "succeeded"), job
        return job if job.status in statuses else None

    return eventually(reached, seconds)


def settlement(service: Service, reference: str) -> Any:
    with service.admin_http() as http:
        entries = http.get("/v1/organization/ledger", params={"reference": reference}).json()["data"]
    assert [entry["kind"] for entry in entries] == ["settle", "reserve"], entries
    return entries[0]


def test_a_job_from_upload_to_answer(service: Service, client: openai.OpenAI) -> None:
    training, validation = upload(client, rows(32)), upload(client, rows(8, 100))
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training,
        validation_file=validation,
        suffix="pets",
        seed=7,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
    )
    assert job.status == "validating_files"
    assert job.seed == 7
    done = job_when(service, job.id, "succeeded")
    assert done.hyperparameters.n_epochs == 2
    assert done.hyperparameters.batch_size == 4
    assert done.hyperparameters.learning_rate_multiplier == 1.0
    assert done.fine_tuned_model.startswith("ft:tiny:default:pets:")
    assert done.finished_at >= done.created_at
    answer = client.chat.completions.create(
        model=done.fine_tuned_model, messages=[{"role": "user", "content": f"{ASK}woof 3"}], max_tokens=4, temperature=0
    )
    assert answer.model == done.fine_tuned_model
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))
    messages = [event.message for event in reversed(events)]
    assert messages[0] == f"Created fine-tuning job: {job.id}"
    assert messages[-1] == "The job has successfully completed"
    metrics: list[Any] = [event.data for event in reversed(events) if event.type == "metrics"]
    assert [data["step"] for data in metrics] == list(range(1, 17))
    assert {data["total_steps"] for data in metrics} == {16}
    assert metrics[-1]["train_loss"] < metrics[0]["train_loss"]
    assert "full_valid_loss" in metrics[-1]
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert [one.step_number for one in checkpoints] == [16, 8]
    for one in checkpoints:
        assert one.fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-{one.step_number}"
        assert one.metrics.full_valid_loss is not None
        client.chat.completions.create(
            model=one.fine_tuned_model_checkpoint, messages=[{"role": "user", "content": "x"}], max_tokens=1
        )
    result = client.files.content(done.result_files[0]).read()
    assert result.splitlines()[0] == b"step,train_loss,valid_loss"
    assert len(result.splitlines()) == 17
    assert b"\r" not in result
    assert client.files.retrieve(done.result_files[0]).purpose == "fine-tune-results"
    entry = settlement(service, job.id)
    assert entry["training_tokens"] == done.trained_tokens > 0
    assert entry["cost"] == done.trained_tokens * TRAINING_PRICE
    assert entry["service"] == "fine_tuning"
    assert [one.id for one in client.fine_tuning.jobs.list(metadata={"team": "a"})] == [job.id]
    assert not list(client.fine_tuning.jobs.list(metadata={"team": "b"}))
    assert done.fine_tuned_model in [model.id for model in client.models.list()]
    followed = [
        json.loads(line.removeprefix("data: "))
        for line in service.http().get(f"/v1/fine_tuning/jobs/{job.id}/events?stream=true").text.split("\n\n")
        if line.startswith("data: {")
    ]
    assert [event["message"] for event in followed] == messages
    assert client.models.delete(done.fine_tuned_model).deleted
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=done.fine_tuned_model, messages=[{"role": "user", "content": "x"}])


def test_paused_resumed_and_killed_it_learns_the_same(service: Service, client: openai.OpenAI) -> None:
    training = upload(client, rows(64))
    options: Any = {
        "model": "tiny",
        "training_file": training,
        "seed": 3,
        "hyperparameters": {"n_epochs": 4, "batch_size": 2},
    }
    whole = client.fine_tuning.jobs.create(**options)
    straight = job_when(service, whole.id, "succeeded")
    loose = service.sdk()
    job = loose.fine_tuning.jobs.create(**options)

    def steps() -> int:
        return sum(event.type == "metrics" for event in loose.fine_tuning.jobs.list_events(job.id, limit=100))

    eventually(lambda: steps() >= 12, 60)
    assert loose.fine_tuning.jobs.pause(job.id).status == "paused"
    with pytest.raises(openai.ConflictError):
        loose.fine_tuning.jobs.pause(job.id)
    eventually(lambda: not service.behind.jobs.processes, 40)
    paused = steps()
    time.sleep(1)
    assert steps() == paused < 128
    assert loose.fine_tuning.jobs.resume(job.id).status == "queued"
    eventually(lambda: steps() >= paused + 15, 60)
    os.kill(service.behind.jobs.processes[job.id].pid, signal.SIGKILL)
    done = job_when(service, job.id, "succeeded")
    assert done.trained_tokens == straight.trained_tokens, "repeated steps are not paid twice"
    assert settlement(service, job.id)["training_tokens"] == straight.trained_tokens
    messages = [event.message for event in loose.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert any("goes on from its last checkpoint" in message for message in messages)
    losses = [client.files.content(one.result_files[0]).read() for one in (straight, done)]
    assert losses[0] == losses[1]
    rows_of = service.behind.database.read_now(
        lambda connection: {
            row.id: row.checkpoint
            for row in connection.exec_driver_sql("select id, checkpoint from models where step is null")
        }
    )
    assert rows_of[straight.fine_tuned_model] != "", "kept"


def test_a_cancelled_job_pays_for_its_steps(service: Service, client: openai.OpenAI) -> None:
    training = upload(client, rows(64))
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=training, hyperparameters={"n_epochs": 50, "batch_size": 2}
    )
    eventually(
        lambda: sum(event.type == "metrics" for event in client.fine_tuning.jobs.list_events(job.id, limit=100)) > 3, 60
    )
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    eventually(lambda: not service.behind.jobs.processes, 40)
    entry = eventually(lambda: _settled(service, job.id), 10)
    assert entry["training_tokens"] > 0
    assert entry["amount"] < 0, "what was not trained is released"
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(job.id)
    queued = client.fine_tuning.jobs.create(model="tiny", training_file=training)
    client.fine_tuning.jobs.cancel(queued.id)
    eventually(lambda: client.fine_tuning.jobs.retrieve(queued.id).status == "cancelled", 10)


def _settled(service: Service, reference: str) -> Any:
    with service.admin_http() as http:
        entries = http.get("/v1/organization/ledger", params={"reference": reference}).json()["data"]
    return entries[0] if entries and entries[0]["kind"] == "settle" else None


def test_the_next_server_goes_on(make_model: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint, url = make_model("again"), sqlite_url(tmp_path / "db")
    options: Any = {"command": worker_command, "seconds": 60, "secrets": SECRETS, "state": tmp_path, "database": url}
    with serving(checkpoint, **options) as first:
        client = first.sdk()
        training = upload(client, rows(64))
        job = client.fine_tuning.jobs.create(
            model="again", training_file=training, hyperparameters={"n_epochs": 3, "batch_size": 2}
        )
        eventually(lambda: len(list(client.fine_tuning.jobs.list_events(job.id, limit=100))) > 20, 60)
    with serving(checkpoint, **options) as second:
        client = second.sdk()
        done = job_when(second, job.id, "succeeded")
        client.chat.completions.create(
            model=done.fine_tuned_model, messages=[{"role": "user", "content": "x"}], max_tokens=1
        )
    with serving(checkpoint, **options) as third:  # it is served again after a restart
        client = third.sdk()
        eventually(lambda: done.fine_tuned_model in [model.id for model in client.models.list()], 20)
        stored = list((tmp_path / "artifacts").rglob("*"))
        assert stored
        assert not any(ASK.encode() in file.read_bytes() for file in stored if file.is_file()), "encrypted at rest"
        assert not list((tmp_path / "clear").iterdir())
        assert not list((tmp_path / "jobs").iterdir())


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"model": "other"}, "model"),
        ({"training_file": "file-none"}, "training_file"),
        ({"validation_file": "file-none"}, "validation_file"),
        ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, "method.dpo.hyperparameters.beta"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
        ({"method": {"type": "reinforcement"}}, "method.type"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
        ({"suffix": "a/b"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_what_is_wrong_is_named(client: openai.OpenAI, wrong: dict[str, Any], param: str) -> None:
    training = upload(client, rows(4))
    with pytest.raises(openai.APIStatusError) as error:
        client.post("/fine_tuning/jobs", cast_to=object, body={"model": "tiny", "training_file": training, **wrong})
    assert error.value.status_code in (400, 404)
    assert str(error.value.param).startswith(param)


def test_a_row_that_does_not_fit_is_named(service: Service, client: openai.OpenAI) -> None:
    message = [{"role": "user", "content": "x " * 2000}, {"role": "assistant", "content": "a"}]
    long = upload(client, rows(2) + json.dumps({"messages": message}).encode(), name="long.jsonl")
    fine = upload(client, rows(4), name="fine.jsonl")
    for files, reason in (
        ({"training_file": long}, r"long\.jsonl:3: \d+ tokens, at most 1024 fit: shorten it$"),
        ({"training_file": fine, "validation_file": fine}, r"fine\.jsonl:1: the training file asks the same$"),
    ):
        job = client.fine_tuning.jobs.create(model="tiny", **files)
        failed = eventually(lambda job=job: _failed(client, job.id), 20)
        param = list(files)[-1]
        assert (failed.error.code, failed.error.param) == (f"invalid_{param}", param)
        assert re.search(reason, failed.error.message)


def _failed(client: openai.OpenAI, job_id: str) -> Any:
    job = client.fine_tuning.jobs.retrieve(job_id)
    return job if job.status == "failed" else None


def pairs(count: int, first: int = 0) -> bytes:
    found = []
    for number in range(first, first + count):
        row = {
            "input": {"messages": [{"role": "user", "content": f"{ASK}meow {number}"}]},
            "preferred_output": [{"role": "assistant", "content": "cat"}],
            "non_preferred_output": [{"role": "assistant", "content": "dog"}],
        }
        found.append(json.dumps(row) + "\n")
    return "".join(found).encode()


def test_a_job_on_preferences(service: Service, client: openai.OpenAI) -> None:
    hyperparameters: Any = {"beta": 0.2, "n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 20}
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=upload(client, pairs(16)),
        validation_file=upload(client, pairs(4, 50)),
        method={"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
    )
    done = job_when(service, job.id, "succeeded")
    assert done.method.type == "dpo"
    assert done.method.dpo.hyperparameters.beta == 0.2
    assert done.method.dpo.hyperparameters.n_epochs == 2
    strict = client.fine_tuning.jobs.retrieve(job.id)
    assert strict.method is not None
    assert strict.method.supervised is None
    client.chat.completions.create(
        model=done.fine_tuned_model, messages=[{"role": "user", "content": "x"}], max_tokens=1
    )
    metrics: list[Any] = [
        event.data for event in client.fine_tuning.jobs.list_events(job.id) if event.type == "metrics"
    ]
    assert metrics[0]["full_valid_loss"] < metrics[-1]["train_loss"], "newest first: it has learnt"
    assert settlement(service, job.id)["training_tokens"] == done.trained_tokens > 0
    plain: Any = {"method": {"type": "dpo"}, "hyperparameters": {"n_epochs": 1}}  # where they stood before methods
    other = client.fine_tuning.jobs.create(model="tiny", training_file=upload(client, pairs(8)), **plain)
    assert job_when(service, other.id, "succeeded").method.dpo.hyperparameters.beta == 0.1
    for content, asked in ((pairs(8), {}), (rows(8), {"method": {"type": "dpo"}})):
        swapped: Any = {"model": "tiny", "training_file": upload(client, content), **asked}
        wrong = client.fine_tuning.jobs.create(**swapped).id
        failed = eventually(lambda wrong=wrong: _failed(client, wrong), 20)
        assert failed.error.param == "training_file"
    with pytest.raises(openai.BadRequestError, match=r"bad\.jsonl:2: field 'preferred_output'"):
        upload(client, pairs(1) + b'{"input": {"messages": [{"role": "user", "content": "x"}]}}\n', name="bad.jsonl")


def test_a_bad_row_is_refused_when_it_is_uploaded(client: openai.OpenAI, service: Service) -> None:
    content = rows(3) + b'{"messages": [{"role": "robot", "content": "x"}]}\n'
    with pytest.raises(openai.BadRequestError, match=r"bad\.jsonl:4: field 'messages\[0\]\.role'"):
        upload(client, content, name="bad.jsonl")
    with pytest.raises(openai.BadRequestError, match="empty"):
        upload(client, b"")


def test_metadata_is_looked_for_by_a_key(service: Service) -> None:
    with service.http() as http:
        answer = http.get("/v1/fine_tuning/jobs", params={"metadata[]": "x"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "metadata[]")
        assert http.get("/v1/fine_tuning/jobs", params={"metadata[a]": "x"}).json()["data"] == []


def test_files(client: openai.OpenAI) -> None:
    content = os.urandom(3 << 20)
    made = client.files.create(file=("../etc/ü.bin", io.BytesIO(content)), purpose="user_data")
    assert (made.filename, made.bytes, made.purpose) == ("ü.bin", len(content), "user_data")
    assert client.files.content(made.id).read() == content
    twin = client.files.create(file=("twin.bin", io.BytesIO(content)), purpose="user_data")
    assert client.files.delete(made.id).deleted
    assert client.files.content(twin.id).read() == content, "the same content, listed twice"
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    assert twin.id in [file.id for file in client.files.list(purpose="user_data", limit=1)]
    assert client.files.delete(twin.id).deleted
    for purpose in ("vision", "batch_output"):
        with pytest.raises(openai.BadRequestError) as error:
            upload(client, b"x", purpose)
        assert error.value.param == "purpose"


def test_what_a_model_learnt_from_is_found_for_its_project_alone(service: Service, client: openai.OpenAI) -> None:
    """The rows that are most like a question, by line; of no model of nobody, nor of one whose file is gone."""
    long = {"messages": [{"role": "user", "content": "so " * 600}, {"role": "assistant", "content": "on"}]}
    training = upload(client, rows(12) + json.dumps(long).encode() + b"\n")
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4}}},
    )
    model = job_when(service, job.id, "succeeded").fine_tuned_model
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"{ASK}woof 3"}],
        "target": "dog",
        "faithfulness": False,
        "nearest": 4,
    }
    with service.http() as http:
        told = http.post("/v1/explain", json={"model": model, **asked})
        assert told.status_code == 200, told.text
        near = told.json()["nearest"]
        assert len(near) == 4
        assert near[0]["line"] == 4, "the very question"
        assert near[0]["file"] == training
        assert "woof 3" in near[0]["text"]
        assert near[0]["cosine"] == max(row["cosine"] for row in near)
        assert told.json()["usage"]["computed_tokens"] > 12 * 10
        refused = http.post("/v1/explain", json={"model": "tiny", **asked})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "nearest")
        client.files.delete(training)
        gone = http.post("/v1/explain", json={"model": model, **asked})
        assert gone.status_code == 400
        assert "is gone" in gone.json()["error"]["message"]
