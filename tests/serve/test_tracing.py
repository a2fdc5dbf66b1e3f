"""OpenTelemetry's spans, as a receiver of OTLP over HTTP gets them from a running service."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from running_service import Service, serving

from steelyard.app import run
from steelyard.errors import ConfigError
from steelyard.serve import spans
from steelyard.serve.tracing import open_tracing

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "the-prompt-is-nobodys-business"


@dataclass
class Receiver:
    """A little collector."""

    delay: float = 0.0
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""

    def take(self, handler: BaseHTTPRequestHandler) -> None:
        time.sleep(self.delay)
        assert handler.path == "/v1/traces"
        assert handler.headers["content-type"] == "application/x-protobuf"
        self.headers.append({name.lower(): value for name, value in handler.headers.items()})
        self.bodies.append(handler.rfile.read(int(handler.headers["content-length"])))
        with contextlib.suppress(ConnectionError):
            handler.send_response(200)
            handler.send_header("content-length", "0")
            handler.end_headers()

    @property
    def resources(self) -> list[Any]:
        return [one for body in self.bodies for one in ExportTraceServiceRequest.FromString(body).resource_spans]

    @property
    def spans(self) -> list[Span]:
        return [span for one in self.resources for scope in one.scope_spans for span in scope.spans]


@contextlib.contextmanager
def receiving(delay: float = 0.0) -> Iterator[Receiver]:
    receiver = Receiver(delay)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            receiver.take(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def traced(checkpoint: Path, url: str, **settings: str) -> Iterator[Service]:
    """A service that sends its spans there when it ends, and not before."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        for name, value in {"OTEL_BSP_SCHEDULE_DELAY": "600000", **settings}.items():
            environment.setenv(name, value)
        tracing = open_tracing()
        assert tracing is not None
        with serving(checkpoint, tracing=tracing) as service:
            yield service


def attributes(span: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in span.attributes:
        kind = one.value.WhichOneof("value")
        value = getattr(one.value, kind)
        found[one.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return found


@dataclass
class Told:
    """What was asked of a service, and what its receiver was told."""

    receiver: Receiver
    responses: dict[str, httpx.Response]
    project: str
    key: str

    def of(self, name: str) -> Span:
        """The server's span of a request."""
        wanted = self.responses[name].headers["x-request-id"]
        [span] = [one for one in self.receiver.spans if attributes(one).get("steelyard.request_id") == wanted]
        return span

    def below(self, span: Span) -> list[Span]:
        return [one for one in self.receiver.spans if one.parent_span_id == span.span_id]


@pytest.fixture(scope="module")
def told(make_checkpoint: Callable[[str], Path]) -> Iterator[Told]:
    body = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": SECRET}]}
    prompts = {"model": "tiny", "max_tokens": 4, "prompt": [SECRET, "b"], "n": 2, "seed": 10}
    parent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    headers = {"OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=mine"}
    with receiving() as receiver:
        with traced(make_checkpoint("tiny"), receiver.url, **headers) as service, service.http() as http:
            responses = {
                "chat": http.post("/v1/chat/completions", json=body, headers=parent),
                "stream": http.post("/v1/chat/completions", json={**body, "stream": True}),
                "prompts": http.post("/v1/completions", json=prompts),
                "model": http.get("/v1/models/tiny?secret=in-the-query"),
                "no key": http.post("/v1/chat/completions", json=body, headers={"authorization": ""}),
                "no path": http.get("/v1/in-the-path"),
                "no model": http.post("/v1/completions", json={"model": "in-the-model", "prompt": "x"}),
                "no answer": http.delete("/v1/chat/completions/export"),
                "broken": http.post("/v1/completions", json={"model": "tiny", "prompt": [8, 8, 8]}),
                "public": http.get("/live"),
                "not sampled": http.get("/live", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}),
                "no parent": http.get("/live", headers={"traceparent": "00-0-0-01"}),
            }
            project = next(iter(service.behind.keys.fixed.values())).project_id
            assert not receiver.bodies
        yield Told(receiver, responses, project or "", service.key)


def test_a_request_has_one_span_under_the_clients(told: Told) -> None:
    span = told.of("chat")
    assert (span.name, span.kind) == ("POST /v1/chat/completions", Span.SPAN_KIND_SERVER)
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.trace_state) == (TRACE, PARENT, "vendor=1")
    assert attributes(span) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "url.scheme": "http",
        "steelyard.request_id": told.responses["chat"].headers["x-request-id"],
        "steelyard.project_id": told.project,
    }
    assert span.status.code == Status.STATUS_CODE_UNSET
    server = [one for one in told.receiver.spans if one.kind == Span.SPAN_KIND_SERVER]
    assert len(server) == len(told.responses) - 1, "one was not sampled"
    assert told.of("no parent").parent_span_id == b""


def test_what_the_engine_did_is_below_it(told: Told) -> None:
    usage = told.responses["chat"].json()["usage"]
    server = told.of("chat")
    [generation] = told.below(server)
    assert generation.name == "chat tiny"
    assert attributes(generation) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "steelyard",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.choice.count": 1,
        "gen_ai.response.id": told.responses["chat"].json()["id"],
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 0,
    }
    queue, prefill, decode = told.below(generation)
    assert [queue.name, prefill.name, decode.name] == ["queue", "prefill", "decode"]
    slack = 5_000_000  # nanoseconds: the wall clock may be corrected meanwhile
    assert server.start_time_unix_nano <= generation.start_time_unix_nano + slack
    assert generation.start_time_unix_nano == queue.start_time_unix_nano
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert decode.end_time_unix_nano == generation.end_time_unix_nano
    assert generation.end_time_unix_nano <= server.end_time_unix_nano + slack
    assert {one.trace_id.hex() for one in (generation, queue, prefill, decode)} == {TRACE}


def test_a_stream_is_told_like_a_whole_answer(told: Told) -> None:
    [generation] = told.below(told.of("stream"))
    assert attributes(generation)["gen_ai.usage.output_tokens"] == 5
    assert len(told.below(generation)) == 3


def test_every_prompt_has_its_own(told: Told) -> None:
    generations = told.below(told.of("prompts"))
    assert [one.name for one in generations] == ["text_completion tiny"] * 2
    found = [attributes(one) for one in generations]
    assert (
        sum(one["gen_ai.usage.input_tokens"] for one in found)
        == (told.responses["prompts"].json()["usage"]["prompt_tokens"])
    )
    for generation, told_of_it in zip(generations, found, strict=True):
        assert told_of_it["gen_ai.usage.output_tokens"] == 8
        assert told_of_it["gen_ai.response.finish_reasons"] == ["length", "length"]
        decode = told.below(generation)[2]
        assert decode.end_time_unix_nano - decode.start_time_unix_nano >= 3 * 10_000_000, "10 ms from token to token"


def test_what_is_refused_is_told_too(told: Told) -> None:
    for name, status, span_name in (
        ("no key", 401, "POST /v1/chat/completions"),
        ("no path", 404, "GET"),
        ("no model", 404, "POST /v1/completions"),
        ("no answer", 404, "DELETE /v1/chat/completions/{completion_id}"),
        ("broken", 503, "POST /v1/completions"),
        ("public", 200, "GET /live"),
        ("model", 200, "GET /v1/models/{model_id}"),
    ):
        span, told_of_it = told.of(name), attributes(told.of(name))
        assert told.responses[name].status_code == told_of_it["http.response.status_code"] == status
        assert span.name == span_name
        assert f"{told_of_it['http.request.method']} {told_of_it.get('http.route', '')}".rstrip() == span_name
        assert told.below(span) == []
        assert (span.status.code == Status.STATUS_CODE_ERROR) == (status >= 500)
        assert ("error.type" in told_of_it) == (status >= 500)
        assert ("steelyard.project_id" in told_of_it) == (name not in ("no key", "public"))


def test_nothing_of_it_is_confidential(told: Told) -> None:
    everything = b"".join(told.receiver.bodies).decode("latin-1")
    for part in (SECRET, told.key, "in-the-query", "in-the-path", "in-the-model", "authorization", "steelyard weighs"):
        assert part not in everything


def test_the_operators_words_are_used(told: Told, make_checkpoint: Callable[[str], Path]) -> None:
    assert all(headers["x-tenant"] == "mine" for headers in told.receiver.headers)
    for resource in told.receiver.resources:
        assert attributes(resource.resource)["service.name"] == "steelyard"
        assert attributes(resource.resource)["telemetry.sdk.language"] == "python"
    names = {"OTEL_SERVICE_NAME": "house", "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test"}
    with receiving() as receiver:
        with traced(make_checkpoint("tiny"), receiver.url, **names) as service, service.http() as http:
            http.get("/live")
        resource = attributes(receiver.resources[0].resource)
    assert resource["service.name"] == "house"
    assert resource["deployment.environment.name"] == "test"


@pytest.mark.parametrize("receiver", ["gone", "slow"])
def test_no_receiver_holds_up_or_fails_a_request(
    receiver: str, make_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue holds four spans and is sent at once: the others are dropped, and the end does not wait for it."""
    monkeypatch.setattr(spans, "FLUSH_SECONDS", 0.5)
    sizes = {"OTEL_BSP_MAX_QUEUE_SIZE": "4", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "1", "OTEL_BSP_SCHEDULE_DELAY": "1"}
    with receiving(delay=3) as slow, contextlib.ExitStack() as stack:
        url = slow.url if receiver == "slow" else "http://127.0.0.1:9"
        service = stack.enter_context(traced(make_checkpoint("tiny"), url, **sizes))
        with service.http() as http:
            began = time.monotonic()
            body = {"model": "tiny", "prompt": "x", "max_tokens": 2}
            for _ in range(20):
                assert http.post("/v1/completions", json=body).status_code == 200
            assert time.monotonic() - began < 3
            began = time.monotonic()
        stack.close()
        assert time.monotonic() - began < 3


def test_without_an_endpoint_or_turned_off_there_is_none() -> None:
    named = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9/v1/traces"}
    for environment in (
        {},
        {"OTEL_SERVICE_NAME": "house"},
        {**named, "OTEL_SDK_DISABLED": "true"},
        {**named, "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
    ):
        assert open_tracing(environment) is None


def test_settings_that_cannot_be_honoured_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    with pytest.raises(ConfigError, match="'grpc': spans are sent by 'http/protobuf' alone"):
        open_tracing({**named, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
    with pytest.raises(ConfigError, match="OTEL_TRACES_EXPORTER is 'zipkin'"):
        open_tracing({**named, "OTEL_TRACES_EXPORTER": "zipkin"})
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
    with pytest.raises(ConfigError, match="refuses a setting of the environment: max_export_batch_size"):
        open_tracing(named)


def test_a_missing_extra_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "steelyard.serve.spans", raising=False)
    for name in [name for name in sys.modules if name.startswith("opentelemetry.sdk")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    with pytest.raises(ConfigError, match=r"opentelemetry\.sdk.* is not installed: pip install 'steelyard\[otel\]'"):
        run([Path("missing")], environment={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})


def test_every_model_that_is_asked_has_a_word() -> None:
    """By the route table: what is no conversation is not called one."""
    from steelyard.app import ENDPOINTS
    from steelyard.serve.spans import OPERATIONS

    asking = {
        one.path for one in ENDPOINTS if one.method == "POST" and one.permission == "inference" and "{" not in one.path
    }
    chats = {"/v1/chat/completions", "/v1/responses"}
    others = {path for path in asking if path.startswith((*chats, "/v1/batches"))}
    assert asking - others == OPERATIONS.keys()
