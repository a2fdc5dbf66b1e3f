"""Workers beside a server: a job of a killed one goes on at the next; and what goes wrong costs one job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running_service import Service, eventually, serving
from sqlalchemy import update
from test_fine_tuning import job_when, rows, settlement, upload

from steelyard import memory
from steelyard.errors import StorageError
from steelyard.serve.engine_client import worker_command
from steelyard.serve.jobs import process, records
from steelyard.store import tables
from steelyard.store.database import sqlite_url
from steelyard.store.secrets import open_secrets


@pytest.fixture(scope="module")
def checkpoint(make_model: Callable[[str], Path]) -> Path:
    return make_model("tiny")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def service(checkpoint: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A server that leaves its jobs to others."""
    secrets = open_secrets({"STEELYARD_HOME": str(state)})
    with serving(
        checkpoint,
        command=worker_command,
        seconds=60,
        secrets=secrets,
        state=state,
        database=sqlite_url(state / "steelyard.db"),
        job_slots=0,
    ) as service:
        yield service


class Worker:
    def __init__(self, checkpoint: Path, state: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "steelyard", "worker", str(checkpoint), "--json"],
            env={**os.environ, "STEELYARD_HOME": str(state)},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert json.loads(self.process.stdout.readline()) == {"models": ["tiny"]}

    def end(self, number: int) -> int:
        if self.process.poll() is None:
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)
        return self.process.wait(40)


def test_the_next_worker_goes_on(service: Service, checkpoint: Path, state: Path) -> None:
    client = service.sdk()
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=upload(client, rows(64)), hyperparameters={"n_epochs": 4, "batch_size": 2}
    )

    def steps() -> int:
        return sum(event.type == "metrics" for event in client.fine_tuning.jobs.list_events(job.id, limit=100))

    time.sleep(1)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "validating_files", "nobody works on it"
    first = Worker(checkpoint, state)
    second = None
    try:
        eventually(lambda: steps() >= 15, 60)
        first.end(signal.SIGKILL)
        second = Worker(checkpoint, state)
        done = job_when(service, job.id, "succeeded")
        answer = client.chat.completions.create(  # at once: nobody has told the server
            model=done.fine_tuned_model, messages=[{"role": "user", "content": "x"}], max_tokens=1
        )
        assert answer.model == done.fine_tuned_model
        messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
        assert "Its server stopped; it goes on" in messages
        assert steps() == 128, "no step is told twice"
        assert settlement(service, job.id)["training_tokens"] == done.trained_tokens > 0
        assert second.end(signal.SIGTERM) == 0
        holders = list((state / "steelyard.db.holders").iterdir())
        assert len(holders) == 2, "the server's, and that of the worker that was killed"
    finally:
        for one in (first, second):
            if one is not None:
                one.end(signal.SIGKILL)


@pytest.fixture
def own(checkpoint: Path) -> Iterator[Service]:
    with serving(checkpoint, command=worker_command, seconds=60) as service:
        yield service


@pytest.mark.parametrize("where", ["_check", "_run"])
def test_while_the_store_is_away_a_job_waits(own: Service, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    runner, times = own.behind.jobs, 0
    work = runner.kinds["fine_tuning"].check if where == "_check" else runner._run

    def away(*arguments: Any) -> Any:
        nonlocal times
        times += 1
        if times == 1:
            raise StorageError("not just now")
        return work(*arguments)

    if where == "_check":
        monkeypatch.setattr(runner.kinds["fine_tuning"], "check", away)
    else:
        monkeypatch.setattr(runner, "_run", away)
    client = own.sdk()
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=upload(client, rows(8)), hyperparameters={"n_epochs": 1}
    )
    job_when(own, job.id, "succeeded")
    assert times == 2
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert messages.count("Its server stopped; it goes on") == (where == "_run")


@pytest.mark.parametrize("where", ["check", "prepare", "publish"])
def test_a_fault_of_ours_fails_one_job(own: Service, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def faulty(*_: Any) -> Any:
        raise ValueError("a secret of ours")

    client = own.sdk()
    training = upload(client, rows(8))
    options: Any = {"model": "tiny", "training_file": training, "hyperparameters": {"n_epochs": 1}}
    with monkeypatch.context() as patched:
        patched.setattr(own.behind.jobs.kinds["fine_tuning"], where, faulty)
        job = client.fine_tuning.jobs.create(**options)
        failed = eventually(lambda: _over(client, job.id), 60)
    assert failed.status == "failed"
    assert "internal error" in failed.error.message
    assert "secret" not in failed.error.message
    job_when(own, client.fine_tuning.jobs.create(**options).id, "succeeded")


def _over(client: Any, job_id: str) -> Any:
    job = client.fine_tuning.jobs.retrieve(job_id)
    return job if job.status in ("failed", "succeeded") else None


def test_a_job_waits_for_memory(own: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    client, free = own.sdk(), 1_000_000
    monkeypatch.setattr(memory, "available", lambda: free)
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=upload(client, rows(8)), hyperparameters={"n_epochs": 1}
    )

    def waits() -> list[str]:
        events = client.fine_tuning.jobs.list_events(job.id, limit=100)
        return [event.message for event in events if "waits for memory" in event.message]

    eventually(waits, 30)
    time.sleep(1.5)
    assert len(waits()) == 1, "said once"
    assert client.fine_tuning.jobs.retrieve(job.id).status == "queued"
    free = 1 << 40
    job_when(own, job.id, "succeeded")
    monkeypatch.setattr(memory, "total", lambda: 1_000_000)
    large = client.fine_tuning.jobs.create(model="tiny", training_file=upload(client, rows(8, 50)))
    failed = eventually(lambda: _over(client, large.id), 30)
    assert (failed.status, failed.error.code) == ("failed", "not_enough_memory")
    assert "smaller" in failed.error.message


def test_memory_is_promised_once() -> None:
    gigabyte = 1 << 30
    assert memory.fits(gigabyte, (), None)
    assert memory.fits(gigabyte, [], 2 * gigabyte)
    assert not memory.fits(gigabyte + 1, [], 2 * gigabyte)
    assert not memory.fits(gigabyte, [(3 * gigabyte, gigabyte)], 3 * gigabyte), "two are still to be taken"
    assert memory.fits(gigabyte, [(3 * gigabyte, 4 * gigabyte)], 2 * gigabyte), "what is taken is not free any more"
    assert (memory.available() or 1) > 0
    assert memory.resident(os.getpid()) > 1 << 20
    assert memory.resident(1 << 22) == 0


def test_the_project_that_runs_fewest_is_next(own: Service) -> None:
    with own.admin_http() as http:
        other = http.post("/v1/organization/projects", json={"name": "other"}).json()["id"]
    database = own.behind.database
    first = database.read_now(lambda connection: connection.exec_driver_sql("select id from projects").scalar())

    def make(connection: Any, project: str, now: int, status: str) -> str:
        asked = {"key_id": "k", "model": "elsewhere", "suffix": None, "metadata": None, "settings": {}, "seed": 0}
        job = records.create(connection, "compression", {"project_id": project, **asked}, now)["id"]
        connection.execute(
            update(tables.jobs).where(tables.jobs.c.id == job).values(status=status, holder=database.holder)
        )
        return str(job)

    def order(connection: Any) -> list[str]:
        return [job["id"] for job in records.waiting(connection, "queued")]

    ours = [database.write_now(lambda c, now=now: make(c, first, now, "queued")) for now in (1, 2)]
    theirs = database.write_now(lambda connection: make(connection, other, 3, "queued"))
    assert database.read_now(order) == [*ours, theirs]

    def run_one(connection: Any) -> list[str]:
        make(connection, first, 0, "running")
        found = order(connection)
        connection.execute(update(tables.jobs).where(tables.jobs.c.status == "running").values(status="failed"))
        return found

    assert database.write_now(run_one) == [theirs, *ours]


def test_a_cancelled_job_of_another_process_is_not_settled_here(own: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run may just be saving its state; whoever holds it settles what it has come to."""
    client, runner = own.sdk(), own.behind.jobs
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=upload(client, rows(64)), hyperparameters={"n_epochs": 50, "batch_size": 2}
    )
    eventually(lambda: runner.processes, 60)
    eventually(lambda: len(list(client.fine_tuning.jobs.list_events(job.id, limit=100))) > 8, 60)
    client.fine_tuning.jobs.pause(job.id)
    eventually(lambda: not runner.processes, 40)
    found = tables.jobs
    own.behind.database.write_now(
        lambda connection: connection.execute(update(found).where(found.c.id == job.id).values(holder=12345))
    )
    monkeypatch.setattr(own.behind.database, "is_held", lambda connection, holder: True)
    client.fine_tuning.jobs.cancel(job.id)
    time.sleep(1.5)
    open_ = own.behind.database.read_now(
        lambda connection: connection.exec_driver_sql("select count(*) from reservations").scalar()
    )
    assert open_ == 1
    monkeypatch.undo()
    entry = eventually(lambda: _last(own, job.id), 20)
    assert entry["training_tokens"] > 0


def _last(service: Service, reference: str) -> Any:
    with service.admin_http() as http:
        entries = http.get("/v1/organization/ledger", params={"reference": reference}).json()["data"]
    return entries[0] if entries[0]["kind"] == "settle" else None


def test_what_a_run_does_not_explain_is_logged_without_its_texts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "process.log").write_text(
        'Traceback (most recent call last):\n  File "x.py", line 3, in y\n    z("a secret")\nValueError: a secret\n'
    )
    assert "not yours" in str(process._complaint(b"", tmp_path))
    assert "ValueError" in caplog.text
    assert 'File "x.py", line 3, in y' in caplog.text
    assert "secret" not in caplog.text
