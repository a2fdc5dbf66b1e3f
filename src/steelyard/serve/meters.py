"""What the server measures of requests, for Prometheus: how many, how fast, what they cost. Knows no route.

Names follow vLLM's under our prefix. What engines count comes from them (`endpoints/metrics.py`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram

from steelyard.infer.request import Output

FIRST_TOKEN = (0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240)
"""Upper bounds in seconds."""


class RequestMeters:
    """The server's own series, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ended = self._counter("request_success", "Choices that ended, by why.", "finished_reason")
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's admission to its first token.", FIRST_TOKEN
        )
        self.between_tokens = self._histogram(
            "inter_token_latency_seconds", "From one output of a choice to its next.", BETWEEN_TOKENS
        )
        self.whole = self._histogram(
            "e2e_request_latency_seconds", "From a request's admission to its settlement.", WHOLE
        )
        self.queue = self._histogram(
            "request_queue_time_seconds", "From a prompt's arrival in the engine until it is let in.", FIRST_TOKEN
        )
        self.prefill = self._histogram(
            "request_prefill_time_seconds", "From a prompt's being let in until its first token.", FIRST_TOKEN
        )
        self.decode = self._histogram(
            "request_decode_time_seconds", "From a prompt's first token until its last.", WHOLE
        )
        self.cost = self._counter("cost_usd", "What answers cost, in dollars.")
        self.without_usage = self._counter(
            "requests_without_usage",
            "Requests that ended without the engine's count of their tokens: must stay 0.",
        )

    def timing(self, model: str) -> Timing:
        """A clock for one request."""
        return Timing(self, model)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, ["model_name", *labels], namespace="steelyard", registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, meaning, ["model_name"], namespace="steelyard", registry=self.registry, buckets=buckets)


@dataclass
class Timing:
    """The moments of one request."""

    meters: RequestMeters
    model: str
    began: float = field(default_factory=time.perf_counter)
    last: dict[int, float] = field(default_factory=dict)
    """By choice, when its latest output came."""

    def take(self, outputs: Iterable[tuple[int, Output]]) -> None:
        """Outputs have come, each with the number of its choice."""
        now, meters = time.perf_counter(), self.meters
        for number, output in outputs:
            if output.tokens:
                if not self.last:
                    meters.first_token.labels(self.model).observe(now - self.began)
                elif number in self.last:
                    meters.between_tokens.labels(self.model).observe(now - self.last[number])
                self.last[number] = now
            if output.finish_reason is not None:
                meters.ended.labels(self.model, output.finish_reason).inc()
            if output.timeline is not None:
                meters.queue.labels(self.model).observe(output.timeline.queue_seconds)
                meters.prefill.labels(self.model).observe(output.timeline.prefill_seconds)
                meters.decode.labels(self.model).observe(output.timeline.decode_seconds)

    def end(self, dollars: float, prompt_tokens: int) -> None:
        """It is settled."""
        self.meters.whole.labels(self.model).observe(time.perf_counter() - self.began)
        self.meters.cost.labels(self.model).inc(dollars)
        self.meters.without_usage.labels(self.model).inc(0 if prompt_tokens else 1)
