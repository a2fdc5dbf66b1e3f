"""What OpenTelemetry is told: a span for every HTTP request, and below it where the engine's time went.

Names are those of its semantic conventions for HTTP and GenAI. Never a prompt, an answer, a key, a query, nor a path:
the route's template stands for it. Spans wait in a bounded queue for a thread that sends them; what finds no room there
is dropped. Imported only where `tracing.py` finds it configured.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Iterable

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steelyard import __version__
from steelyard.infer.request import Output, Timeline
from steelyard.serve.access_log import CLIENT_LEFT

NAME = "steelyard"
OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/score": "embeddings",
    "/v1/rerank": "embeddings",
    "/v1/classify": "classification",
    "/v1/tag": "tagging",
    "/v1/explain": "explanation",
    "/v1/audio/transcriptions": "transcription",
}
"""What is asked of a model, by route, in the conventions' words where they have one; else it is a chat."""
FLUSH_SECONDS = 5.0
"""How long the end of the server waits for the last spans to be sent."""


class Tracing:
    """Makes spans and sends them, from a thread of its own, as the environment says.

    Raises:
        ValueError: the environment says what cannot be.
    """

    def __init__(self) -> None:
        ours = Resource.create({SERVICE_NAME: NAME, SERVICE_VERSION: __version__})
        self._provider = TracerProvider(
            resource=ours.merge(OTELResourceDetector().detect()),  # what the operator says goes first
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer(NAME, __version__)

    def around(self, app: ASGIApp) -> ASGIApp:
        """The application, with a span for each of its requests."""
        return RequestSpans(app, self._tracer)

    async def close(self) -> None:
        """Send what has not been sent, within `FLUSH_SECONDS`."""
        sending = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        sending.start()
        await asyncio.to_thread(sending.join, FLUSH_SECONDS)


class RequestSpans:
    """ASGI middleware: a span for each request, under the client's own where it names one (W3C's `traceparent`).

    What it finds in the state when all is over, the request's id and its caller, is told of it; what stands behind it
    finds a `RequestTrace` there as `trace`, where the span is sampled.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self.app, self.tracer = app, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request within its span."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method, route, status = scope["method"], _template(scope), CLIENT_LEFT
        span = self.tracer.start_span(
            f"{method} {route}" if route else method,
            _parent(scope),
            SpanKind.SERVER,
            {"http.request.method": method, "url.scheme": scope["scheme"], **({"http.route": route} if route else {})},
        )
        state = scope.setdefault("state", {})
        if span.is_recording():
            operation = OPERATIONS.get(route or "", "chat")
            state["trace"] = RequestTrace(self.tracer, set_span_in_context(span, Context()), operation)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        failure = ""
        try:
            await self.app(scope, receive, watched)
        except Exception as error:  # its message may say what was asked
            failure = type(error).__name__
            raise
        finally:
            caller = state.get("caller")
            span.set_attribute("http.response.status_code", status)
            span.set_attribute("steelyard.request_id", state.get("request_id", ""))
            if caller is not None and caller.project_id is not None:
                span.set_attribute("steelyard.project_id", caller.project_id)
            if failure or status >= 500:
                span.set_attribute("error.type", failure or str(status))
                span.set_status(StatusCode.ERROR)
            span.end()


class RequestTrace:
    """The span of a request, for what the engine does for it.

    Args:
        tracer: makes the spans below it.
        context: has it as the current one.
        operation: what is asked of models, in the words of the conventions.
    """

    def __init__(self, tracer: Tracer, context: Context, operation: str) -> None:
        self.tracer, self.context, self.operation = tracer, context, operation

    def generation(self, model: str, answer_id: str) -> GenerationTrace:
        """For the spans of one answer of a model."""
        return GenerationTrace(self, model, answer_id)


class GenerationTrace:
    """A span for each prompt of an answer once its last choice has ended, with the engine's phases below it."""

    def __init__(self, request: RequestTrace, model: str, answer_id: str) -> None:
        self.request, self.model, self.answer_id = request, model, answer_id
        self._ended: defaultdict[str, list[Output]] = defaultdict(list)

    def take(self, outputs: Iterable[Output]) -> None:
        """Outputs have come."""
        for output in outputs:
            if output.finish_reason is not None:
                self._ended[output.id].append(output)
                if output.timeline is not None:
                    self._tell(self._ended.pop(output.id), output.timeline)

    def _tell(self, choices: list[Output], timeline: Timeline) -> None:
        choices.sort(key=lambda output: output.choice)
        operation, tracer = self.request.operation, self.request.tracer
        epoch = time.time_ns() - time.monotonic_ns()
        arrived, scheduled, first, last = (
            epoch + int(moment * 1e9)
            for moment in (timeline.arrived, timeline.scheduled, timeline.first_token, timeline.last_token)
        )
        whole = tracer.start_span(
            f"{operation} {self.model}",
            self.request.context,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": NAME,
                "gen_ai.request.model": self.model,
                "gen_ai.request.choice.count": len(choices),
                "gen_ai.response.id": self.answer_id,
                "gen_ai.response.finish_reasons": [output.finish_reason or "" for output in choices],
                "gen_ai.usage.input_tokens": choices[0].prompt_tokens,
                "gen_ai.usage.output_tokens": sum(output.completion_tokens for output in choices),
                "gen_ai.usage.cache_read.input_tokens": choices[0].cached_tokens,
            },
            start_time=arrived,
        )
        below = set_span_in_context(whole, self.request.context)
        for phase, begin, end in (
            ("queue", arrived, scheduled),
            ("prefill", scheduled, first),
            ("decode", first, last),
        ):
            tracer.start_span(phase, below, start_time=begin).end(end)
        whole.end(last)


def _template(scope: Scope) -> str | None:
    """The path of the route that a request is for, with the names of its parameters; None: of none."""
    routes: list[Route] = scope["app"].routes
    matches = [(route.matches(scope)[0].value, route.path_format) for route in routes]
    match, template = max(matches, key=lambda found: found[0])
    return template if match != Match.NONE.value else None


def _parent(scope: Scope) -> Context:
    """The client's span, if it names one."""
    headers = Headers(scope=scope)
    carrier = {name: headers.getlist(name) for name in ("traceparent", "tracestate")}
    return TraceContextTextMapPropagator().extract(carrier, Context())
