"""The document says what the server does: every route is in it, and what it forbids is refused by name."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
import schemathesis
from running_service import Service, serving

from steelyard.app import ENDPOINTS, Endpoint
from steelyard.serve.auth import ADMIN_SCOPES
from steelyard.serve.endpoint import Form
from steelyard.serve.openapi import document
from steelyard.serve.protocol.fields import NEUTRAL

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from fuzz import fuzz, make_adapter

CASES, VISIT = 150, 2
DOCUMENT = document(ENDPOINTS)
SCHEMAS = DOCUMENT["components"]["schemas"]
NAMES = {
    "project_id": "proj_x",
    "alert_id": "alert_x",
    "limit_id": "rl-tiny",
    "completion_id": "chatcmpl-x",
    "response_id": "resp_x",
    "alias": "latest",
    "model_id": "tiny",
}
SPENDING = {"threshold_amount": 1, "currency": "USD", "interval": "month"}
RIGHT: dict[str, dict[str, Any]] = {
    "EmbeddingsRequest": {"model": "tiny", "input": "Hello"},
    "ScoreRequest": {"model": "tiny", "text_1": "Hello", "text_2": ["Hello", "there"]},
    "RerankRequest": {"model": "tiny", "query": "Hello", "documents": ["Hello", "there"]},
    "ClassifyRequest": {"model": "tiny", "input": "Hello"},
    "TagRequest": {"model": "tiny", "input": "Hello"},
    "ExplainRequest": {"model": "tiny", "input": "Hello"},
    "ChatRequest": {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]},
    "ResponseRequest": {"model": "tiny", "input": "Hello"},
    "InputTokensRequest": {"model": "tiny", "input": "Hello"},
    "CompletionRequest": {"model": "tiny", "prompt": "Hello"},
    "JobRequest": {"model": "tiny", "training_file": "file-x"},
    "CompressionRequest": {"model": "tiny"},
    "BatchRequest": {"input_file_id": "file-x", "endpoint": "/v1/completions", "completion_window": "24h"},
    "ProjectRequest": {"name": "x"},
    "ServiceAccountRequest": {"name": "x"},
    "KeyRequest": {"name": "x"},
    "RateLimitRequest": {},
    "SpendLimitRequest": SPENDING,
    "SpendAlertRequest": {**SPENDING, "notification_channel": {"type": "email", "recipients": ["a@b.c"]}},
    "AliasRequest": {"name": "latest", "model": "tiny"},
    "CanaryRequest": {"model": "tiny", "percentage": 10},
    "ShutdownRequest": {"shutdown_date": None},
    "ExportRequest": {},
    "ChangeRequest": {"metadata": {}},
    "PricesRequest": {"prices": {"*": {"input": 1}}},
}
"""A body of each kind that nothing is wrong with."""
VALUES: tuple[Any, ...] = (None, True, -1.5, 1 << 70, "wrong", [None], {"wrong": None})


def bodies() -> Iterator[tuple[Endpoint, str, str]]:
    """Every field of every body: its route, the schema's name, the field's."""
    for endpoint in ENDPOINTS:
        if isinstance(endpoint.takes, type):
            name = endpoint.takes.__name__
            for field in SCHEMAS[name]["properties"]:
                yield endpoint, name, field


def forbids(schema: str, body: dict[str, Any]) -> bool:
    """Whether the document has no such body."""
    whole = {"$ref": f"#/components/schemas/{schema}", "components": DOCUMENT["components"]}
    return not jsonschema_rs.is_valid(whole, body)


def path_of(endpoint: Endpoint) -> str:
    return re.sub(r"\{(\w+)(:path)?\}", lambda match: NAMES[match[1]], endpoint.path)


@pytest.fixture(scope="module")
def clients(service: Service) -> Iterator[Callable[[Endpoint], httpx.Client]]:
    """The client whose key a route needs."""
    with service.http() as http, service.admin_http() as admin:
        yield lambda endpoint: admin if endpoint.permission in ADMIN_SCOPES else http


def test_the_document_is_valid_openapi() -> None:
    schemathesis.openapi.from_dict(DOCUMENT).validate()
    for name, schema in SCHEMAS.items():
        jsonschema_rs.validator_for({**schema, "components": DOCUMENT["components"]}), name
    broken = json.loads(json.dumps(DOCUMENT).replace('"operationId"', '"operationID"'))
    with pytest.raises(Exception, match="operationID"):
        schemathesis.openapi.from_dict(broken).validate()


def test_the_document_has_every_route_and_no_other() -> None:
    described = {
        (method.upper(), path): operation["security"]
        for path, methods in DOCUMENT["paths"].items()
        for method, operation in methods.items()
    }
    assert described == {
        (endpoint.method, endpoint.path.replace(":path", "")): (
            [] if endpoint.permission is None else [{"key": [endpoint.permission]}]
        )
        for endpoint in ENDPOINTS
    }
    names = [operation["operationId"] for methods in DOCUMENT["paths"].values() for operation in methods.values()]
    assert len(set(names)) == len(names)
    assert all(operation["summary"] for methods in DOCUMENT["paths"].values() for operation in methods.values())


def test_anybody_may_read_it_and_it_has_what_this_server_serves(service: Service) -> None:
    served = httpx.get(f"{service.url}/openapi.json")
    assert (served.status_code, served.headers["content-type"]) == (200, "application/json")
    paths = served.json()["paths"]
    adapters = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}  # this one has a folder for them
    assert paths.keys() == DOCUMENT["paths"].keys() | adapters
    assert {path: paths[path] for path in DOCUMENT["paths"]} == DOCUMENT["paths"]
    assert service.key not in served.text


def test_what_is_no_json_is_described_as_what_it_is() -> None:
    def content(path: str, method: str = "get") -> dict[str, Any]:
        answer: dict[str, Any] = DOCUMENT["paths"][path][method]["responses"]["200"]["content"]
        return answer

    assert content("/v1/chat/completions", "post").keys() == {"application/json", "text/event-stream"}
    assert content("/v1/fine_tuning/jobs/{job_id}/events").keys() == {"application/json", "text/event-stream"}
    assert content("/v1/files/{file_id}/content").keys() == {"application/octet-stream"}
    assert [kind.split(";")[0] for kind in content("/metrics")] == ["text/plain"]
    kinds = {"application/json", "text/event-stream", "text/plain", "application/x-subrip", "text/vtt"}
    assert content("/v1/audio/transcriptions", "post").keys() == kinds
    assert DOCUMENT["paths"]["/v1/files"]["post"]["requestBody"]["content"].keys() == {"multipart/form-data"}


@pytest.mark.parametrize(
    ("endpoint", "schema", "field"),
    bodies(),
    ids=[f"{endpoint.path} {field}" for endpoint, _, field in bodies()],
)
def test_what_a_field_may_not_be_is_refused_by_its_name(
    clients: Callable[[Endpoint], httpx.Client], endpoint: Endpoint, schema: str, field: str
) -> None:
    right = RIGHT[schema]
    assert not forbids(schema, right)
    wrong = [value for value in VALUES if forbids(schema, {**right, field: value})]
    assert wrong
    for value in wrong:
        answer = clients(endpoint).post(path_of(endpoint), json={**right, field: value})
        assert answer.status_code == 400, (value, answer.text)
        param = answer.json()["error"]["param"]
        assert re.split(r"[.\[]", param)[0] == field, (value, answer.text)


@pytest.mark.parametrize("schema", ["ChatRequest", "CompletionRequest"])
def test_a_neutral_value_is_one_that_the_document_has(schema: str) -> None:
    own = SCHEMAS[schema]["properties"]
    for field in NEUTRAL:
        for value in (None, *NEUTRAL[field]):
            assert not forbids(schema, {**RIGHT[schema], field: value}), field
        assert field in own


def test_a_form_is_refused_by_the_field_that_is_wrong(service: Service) -> None:
    form = next(endpoint.takes for endpoint in ENDPOINTS if endpoint.path == "/v1/files")
    assert isinstance(form, Form)
    right = {"purpose": "user_data", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    assert form.schema["properties"].keys() == {"file", *right}
    with service.http() as http:
        for field in right:
            data = {**right, field: "wrong"}
            answer = http.post("/v1/files", data=data, files={"file": ("x", b"x")})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
        answer = http.post("/v1/files", files={name: (None, value) for name, value in right.items()})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "file")


def test_a_form_of_a_recording_is_refused_by_the_field_that_is_wrong(service: Service) -> None:
    """Every field of it, before anything is heard."""
    form = next(endpoint.takes for endpoint in ENDPOINTS if endpoint.path == "/v1/audio/transcriptions")
    assert isinstance(form, Form)
    wrong = {"language": "x" * 17, "prompt": "x" * 4097, "model": ""}
    with service.http() as http:
        for field in form.schema["properties"].keys() - {"file"}:
            data = {"model": "tiny", field: wrong.get(field, "wrong")}
            answer = http.post("/v1/audio/transcriptions", data=data, files={"file": ("x", b"x")})
            assert answer.status_code == 400, field
            assert answer.json()["error"]["param"].split("[")[0] == field.removesuffix("[]"), answer.text
        answer = http.post("/v1/audio/transcriptions", data={"model": "tiny"}, files={"file": ("x", b"x")})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


def test_made_up_requests_get_answers_that_the_document_has(
    make_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    make_adapter(tmp_path)
    with serving(make_checkpoint("tiny"), adapter_folder=tmp_path) as service:
        found = fuzz(service.url, service.key, service.admin_key, CASES, VISIT)
    assert [wrong for one in found.values() for wrong in one.wrong] == []
    assert sum(one.cases for one in found.values()) >= CASES
    assert sum(1 for one in found.values() if one.statuses[200]) > len(found) / 3
