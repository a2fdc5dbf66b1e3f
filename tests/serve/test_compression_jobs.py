"""Compression over HTTP: a job makes a whole model, which has an engine of its own and is called at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from running_service import Service, eventually, serving
from test_fine_tuning import SECRETS, job_when, rows, upload

from steelyard.checkpoint import manifest
from steelyard.serve import tuned
from steelyard.serve.engine_client import worker_command
from steelyard.serve.jobs import runner
from steelyard.store.database import sqlite_url

JOBS = "/v1/compression/jobs"
HELLO: list[Any] = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def checkpoint(make_model: Callable[[str], Path]) -> Path:
    return make_model("small")


@pytest.fixture(scope="module")
def options(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    state = tmp_path_factory.mktemp("state")
    return {
        "command": worker_command,
        "seconds": 60,
        "secrets": SECRETS,
        "state": state,
        "database": sqlite_url(state / "db"),
    }


@pytest.fixture(scope="module")
def service(checkpoint: Path, options: dict[str, Any]) -> Iterator[Service]:
    with serving(checkpoint, **options) as service:
        yield service


def compress(service: Service, **asked: Any) -> Any:
    with service.http() as http:
        answer = http.post(JOBS, json={"model": "small", "method": LOOSE, **asked})
    assert answer.status_code == 200, answer.text
    return answer.json()


LOOSE = {"type": "quantize", "quantize": {"max_bits_per_byte": 1.0}}
"""A tiny model of random weights loses more than a real one."""


def test_smoothed_by_a_file_of_ones_own(service: Service) -> None:
    client = service.sdk()
    file = upload(client, rows(8))
    made = {"type": "quantize", "quantize": {"max_bits_per_byte": 1.0, "calibration_file": file}}
    job = done(service, compress(service, suffix="smooth", method=made)["id"])
    assert job["status"] == "succeeded", job
    assert job["method"]["quantize"]["calibration_file"] == file
    checkpoint = service.models[job["compressed_model"]].engine.checkpoint
    found = manifest.read(checkpoint)
    assert found.recipe["compress"]["strength"] == 0.5
    assert "calibration: calibration.jsonl" in found.data
    answer = client.chat.completions.create(model=job["compressed_model"], messages=HELLO, max_tokens=3, seed=1)
    assert answer.usage is not None
    client.models.delete(job["compressed_model"])
    with service.http() as http:
        made["quantize"] = {"calibration_file": "file-none"}
        refused = http.post(JOBS, json={"model": "small", "method": made})
    assert refused.status_code in (400, 404)
    assert refused.json()["error"]["param"] == "method.quantize.calibration_file"
    turn = {"role": "assistant", "content": "y"}
    preferred = {
        "input": {"messages": HELLO},
        "preferred_output": [turn],
        "non_preferred_output": [turn | {"content": "z"}],
    }
    pairs = client.files.create(file=("pairs.jsonl", (json.dumps(preferred) + "\n").encode() * 2), purpose="fine-tune")
    failed = done(
        service, compress(service, method={"type": "quantize", "quantize": {"calibration_file": pairs.id}})["id"]
    )
    assert failed["status"] == "failed"
    assert failed["error"]["param"] == "method.quantize.calibration_file"
    assert failed["error"]["message"].startswith("pairs.jsonl:1: ")


def test_four_bits_judged_by_a_file(service: Service) -> None:
    client = service.sdk()
    settings = {"scheme": "int4", "group": 16, "method": "gptq", "calibration_file": upload(client, rows(8))}
    method = {"type": "quantize", "quantize": {"max_bits_per_byte": 1.0, **settings}}
    job = done(service, compress(service, suffix="small", method=method)["id"])
    assert job["status"] == "succeeded", job
    assert job["compressed_model"].startswith("int4:")
    found = manifest.read(service.models[job["compressed_model"]].engine.checkpoint).recipe["compress"]
    assert (found["bits"], found["group"], found["method"]) == (4, 16, "gptq")
    answer = client.chat.completions.create(model=job["compressed_model"], messages=HELLO, max_tokens=3, seed=1)
    assert answer.usage is not None
    client.models.delete(job["compressed_model"])


@pytest.mark.parametrize(
    ("kind", "settings", "called"),
    [
        ("prune", {"method": "magnitude", "rate": 0.2}, "pruned"),
        ("prune", {}, "pruned"),
        ("prune", {"structure": "blocks", "rate": 0.5}, "pruned"),
        ("distill", {"rate": 0.5, "max_bits_per_byte": 50.0}, "distilled"),
    ],
)
def test_other_methods(service: Service, kind: str, settings: dict[str, Any], called: str) -> None:
    client = service.sdk()
    asked = {"max_bits_per_byte": 50.0, **settings}
    if kind == "distill":
        asked["training_file"] = upload(client, rows(8))
    elif settings.get("method") != "magnitude":
        asked["calibration_file"] = upload(client, rows(8))
    job = done(service, compress(service, suffix="few", method={"type": kind, kind: asked})["id"])
    assert job["status"] == "succeeded", job
    assert job["method"]["type"] == kind
    assert job["compressed_model"].startswith(f"{called}:small:default:few:")
    engine = service.models[job["compressed_model"]].engine
    layers = manifest.read_json(engine.checkpoint / "config.json")["num_hidden_layers"]
    assert layers == (2 if "blocks" in settings.values() or kind == "distill" else 3)
    answer = client.chat.completions.create(model=job["compressed_model"], messages=HELLO, max_tokens=3, seed=1)
    assert answer.usage is not None
    client.models.delete(job["compressed_model"])


def test_what_meets_a_target(service: Service) -> None:
    client = service.sdk()
    file = upload(client, rows(16))
    target = {"size": "<=0.9x", "max_loss": "100%"}
    with service.http() as http:
        asked = http.post(JOBS, json={"model": "small", "target": target, "calibration_file": file}).json()
    job = done(service, asked["id"])
    assert job["status"] == "succeeded", job
    assert (job["target"], job["method"]) == (target, None)
    assert job["compressed_model"].startswith("searched:small:")
    answer = client.chat.completions.create(model=job["compressed_model"], messages=HELLO, max_tokens=3, seed=1)
    assert answer.usage is not None
    client.models.delete(job["compressed_model"])
    with service.http() as http:
        asked = http.post(JOBS, json={"model": "small", "target": {"size": "<=1%"}, "calibration_file": file}).json()
    failed = done(service, asked["id"])
    assert failed["status"] == "failed"
    assert "misses it least" in failed["error"]["message"]


def done(service: Service, job: str, *statuses: str) -> Any:
    with service.http() as http:

        def reached() -> Any:
            found = http.get(f"{JOBS}/{job}").json()
            return found if found["status"] in (*statuses, "failed", "succeeded", "cancelled") else None

        return eventually(reached, 90)


def models(service: Service) -> list[str]:
    return [model.id for model in service.sdk().models.list()]


def test_a_model_of_its_own(service: Service) -> None:
    asked = compress(service, suffix="lean", metadata={"team": "a"})
    assert (asked["status"], asked["object"]) == ("validating_files", "compression.job")
    job = done(service, asked["id"])
    assert job["status"] == "succeeded", job
    assert job["method"]["quantize"]["scheme"] == "int8"
    name = job["compressed_model"]
    assert name.startswith("int8:small:default:lean:")
    client = service.sdk(_strict_response_validation=True)
    answer = client.chat.completions.create(model=name, messages=HELLO, max_tokens=3, seed=1)
    assert answer.model == name
    engine = service.models[name].engine
    assert engine is not service.engine
    assert engine.ready is not None
    with service.http() as http:
        shown = http.get(f"/v1/models/{name}").json()
        assert shown["certificate"]["bytes_after"] < shown["certificate"]["bytes_before"]
        parent = http.get("/v1/models/small").json()["lineage"]["checkpoint"]
        assert shown["lineage"]["parent"] == parent
        events = http.get(f"{JOBS}/{job['id']}/events").json()["data"]
        assert {event["object"] for event in events} == {"compression.job.event"}
        assert any(name in event["message"] for event in events)
        assert [one["id"] for one in http.get(JOBS, params={"metadata[team]": "a"}).json()["data"]] == [job["id"]]
        assert http.get(f"/v1/fine_tuning/jobs/{job['id']}").status_code == 404
    assert all(one.id != job["id"] for one in client.fine_tuning.jobs.list())
    with service.admin_http() as http:
        entries = http.get("/v1/organization/ledger", params={"reference": job["id"]}).json()["data"]
    assert [(entry["kind"], entry["service"], entry["cost"]) for entry in entries] == [
        ("settle", "compression", 0),
        ("reserve", "compression", 0),
    ]
    with pytest.raises(openai.BadRequestError, match="compressed"):
        client.fine_tuning.jobs.create(model=name, training_file=upload(client, rows(8)))
    again = done(service, compress(service, model=name)["id"])
    assert again["status"] == "failed"
    assert "compressed already" in again["error"]["message"]
    pid = engine.pid
    assert client.models.delete(name).deleted
    assert name not in models(service)
    eventually(lambda: not Path(f"/proc/{pid}").exists(), 20)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=name, messages=HELLO)


def test_what_was_tuned_and_the_next_server(checkpoint: Path, options: dict[str, Any], service: Service) -> None:
    client = service.sdk()
    made = job_when(
        service,
        client.fine_tuning.jobs.create(
            model="small", training_file=upload(client, rows(16)), suffix="pets", hyperparameters={"n_epochs": 1}
        ).id,
        "succeeded",
    ).fine_tuned_model
    job = done(service, compress(service, model=made)["id"])
    assert job["status"] == "succeeded", job
    name = job["compressed_model"]
    assert name.startswith("int8:small:default:pets:")
    said = [
        one.chat.completions.create(model=name, messages=HELLO, max_tokens=8, seed=3).choices[0].message.content
        for one in (client, client)
    ]
    assert said[0] == said[1]
    row = service.behind.database.read_now(
        lambda connection: (
            connection.exec_driver_sql(f"select base, form from models where id = '{name}'").mappings().one()
        )
    )
    assert dict(row) == {"base": "small", "form": "model"}


def test_the_next_server_serves_it_again(checkpoint: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "command": worker_command,
        "seconds": 60,
        "secrets": SECRETS,
        "state": tmp_path,
        "database": sqlite_url(tmp_path / "db"),
    }
    with serving(checkpoint, **options) as first:
        job = done(first, compress(first)["id"])
        name = job["compressed_model"]
    with serving(checkpoint, **options) as second:  # asked before it came round to it
        answer = second.sdk().chat.completions.create(model=name, messages=HELLO, max_tokens=1)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 1
        pid = second.models[name].engine.pid
    assert not Path(f"/proc/{pid}").exists()


def test_a_job_that_loses_too_much_fails(service: Service) -> None:
    strict = {"type": "quantize", "quantize": {"max_bits_per_byte": 0.0, "max_kl": 0.0}}
    job = done(service, compress(service, method=strict)["id"])
    assert job["status"] == "failed"
    assert "KL" in job["error"]["message"]
    assert job["compressed_model"] is None


def test_cancel_and_pause(service: Service) -> None:
    with service.http() as http:
        job = compress(service)["id"]
        eventually(lambda: http.get(f"{JOBS}/{job}").json()["status"] == "running", 30)
        assert http.post(f"{JOBS}/{job}/pause").json()["status"] == "paused"
        eventually(lambda: not service.behind.jobs.processes, 40)
        assert http.post(f"{JOBS}/{job}/resume").json()["status"] == "queued"
        assert done(service, job)["status"] == "succeeded"
        job = compress(service)["id"]
        assert http.post(f"{JOBS}/{job}/cancel").json()["status"] == "cancelled"
        assert http.post(f"{JOBS}/{job}/cancel").status_code == 409
        eventually(lambda: _settled(service, job), 20)


def _settled(service: Service, job: str) -> bool:
    with service.admin_http() as http:
        entries = http.get("/v1/organization/ledger", params={"reference": job}).json()["data"]
    return not entries or entries[0]["kind"] == "settle"


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"model": "other"}, "model"),
        ({"method": {"type": "prune"}}, "method.prune.calibration_file"),
        ({"method": {"type": "prune", "prune": {"rate": 1.5}}}, "method.prune.rate"),
        ({"method": {"type": "prune", "prune": {"rate": 0.5, "pattern": "2:4"}}}, "method.prune.pattern"),
        ({"method": {"type": "prune", "prune": {"method": "even"}}}, "method.prune.method"),
        (
            {"method": {"type": "prune", "prune": {"method": "activation", "calibration_file": "f"}}},
            "method.prune.method",
        ),
        ({"method": {"type": "prune", "prune": {"structure": "heads", "method": "magnitude"}}}, "method.prune.method"),
        ({"method": {"type": "prune", "quantize": {}}}, "method.quantize"),
        ({"method": {"type": "shrink"}}, "method.type"),
        ({"method": {"type": "quantize", "quantize": {"scheme": "int2"}}}, "method.quantize.scheme"),
        ({"method": {"type": "quantize", "quantize": {"group": 8}}}, "method.quantize.group"),
        ({"method": {"type": "quantize", "quantize": {"method": "gptq"}}}, "method.quantize.calibration_file"),
        ({"method": {"type": "quantize", "quantize": {"group": 16, "portable": True}}}, "method.quantize.group"),
        ({"method": {"type": "distill"}}, "method.distill.training_file"),
        ({"method": {"type": "distill", "distill": {"training_file": "file-none"}}}, "method.distill.training_file"),
        ({"target": {"bytes": "1/2"}, "calibration_file": "file-none"}, "target"),
        ({"target": {}, "calibration_file": "file-none"}, "target"),
        ({"target": {"size": "<=0.5x"}}, "calibration_file"),
        ({"target": {"size": "<=0.5x"}, "calibration_file": "file-none"}, "calibration_file"),
        ({"target": {"size": "<=0.5x"}, "method": {"type": "quantize"}}, "target"),
        ({"calibration_file": "file-none"}, "calibration_file"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_what_is_wrong_is_named(service: Service, wrong: dict[str, Any], param: str) -> None:
    with service.http() as http:
        answer: httpx.Response = http.post(JOBS, json={"model": "small", **wrong})
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_another_projects_model(service: Service) -> None:
    job = done(service, compress(service)["id"])
    with service.admin_http() as http:
        project = http.post("/v1/organization/projects", json={"name": "other"}).json()["id"]
        key = http.post(f"/v1/organization/projects/{project}/api_keys", json={"name": "k"}).json()["value"]
    other = httpx.Client(base_url=service.url, headers={"authorization": f"Bearer {key}"}, timeout=20)
    name = job["compressed_model"]
    assert other.get(f"{JOBS}/{job['id']}").status_code == 404
    assert other.get(f"/v1/models/{name}").status_code == 404
    assert other.delete(f"/v1/models/{name}").status_code == 404
    assert other.post("/v1/chat/completions", json={"model": name, "messages": HELLO}).status_code == 404
    assert other.post(JOBS, json={"model": name}).status_code == 404
    assert name in models(service)


def test_a_model_without_room_for_its_engine_is_no_model(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "ENGINE_BYTES", 1 << 60)
    monkeypatch.setattr(runner, "SERVE_SECONDS", 1)
    job = done(service, compress(service)["id"])
    assert (job["status"], job["compressed_model"]) == ("failed", None)
    assert "no memory for the engine" in job["error"]["message"]
    rows_of = service.behind.database.read_now(
        lambda connection: connection.exec_driver_sql("select job_id from models").scalars().all()
    )
    assert job["id"] not in rows_of


def test_an_alias_is_its_model(service: Service) -> None:
    with service.admin_http() as http:
        assert http.post("/v1/organization/model_aliases", json={"name": "best", "model": "small"}).status_code == 200
    job = done(service, compress(service, model="best")["id"])
    assert (job["status"], job["model"]) == ("succeeded", "small")
