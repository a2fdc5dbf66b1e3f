"""`GET /metrics`: engines, requests, energy, in Prometheus's text format. Not public: it tells how much others use."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from prometheus_client import generate_latest
from starlette.requests import Request
from starlette.responses import Response

from steelyard.infer.request import EngineStats
from steelyard.serve.models import engines
from steelyard.serve.service import Service

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

OURS = re.compile(r"(?m)^(# (?:HELP|TYPE) )?steelyard_")

METRICS: dict[str, tuple[Literal["counter", "gauge"], str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("gauge", "Requests that run.", lambda stats: stats.running),
    "num_requests_waiting": ("gauge", "Requests that wait for their turn.", lambda stats: stats.waiting),
    "kv_cache_usage_perc": (
        "gauge",
        "Share of the cache's blocks in use; 1 is full.",
        lambda stats: stats.used_blocks / max(1, stats.blocks),
    ),
    "num_preemptions_total": (
        "counter",
        "Sequences that gave their blocks up and were computed again.",
        lambda stats: stats.preemptions,
    ),
    "prefix_cache_queries": (
        "counter",
        "Prompt tokens that were looked for in the cache.",
        lambda stats: stats.looked_up_tokens,
    ),
    "prefix_cache_hits": ("counter", "Prompt tokens that were found in the cache.", lambda stats: stats.cached_tokens),
    "prompt_tokens_total": ("counter", "Prompt tokens of requests that ran.", lambda stats: stats.prompt_tokens),
    "generation_tokens_total": ("counter", "Generated tokens.", lambda stats: stats.generated_tokens),
    "spec_decode_num_draft_tokens_total": (
        "counter",
        "Tokens that were guessed ahead.",
        lambda stats: stats.drafted_tokens,
    ),
    "spec_decode_num_accepted_tokens_total": (
        "counter",
        "Guessed tokens that were right.",
        lambda stats: stats.accepted_tokens,
    ),
}
"""Kind, meaning and value, by the name that follows `steelyard:`."""

ENERGY = """\
# HELP steelyard:energy_joules_total Used by each processor since the start, for whomever. Absent if unreadable.
# TYPE steelyard:energy_joules_total counter"""


async def read(service: Service, request: Request) -> Response:
    """Every metric: of each engine, as it last said, of the requests that this process has served, and of energy."""
    lines: list[str] = []
    for name, (kind, meaning, value) in METRICS.items():
        lines += [f"# HELP steelyard:{name} {meaning}", f"# TYPE steelyard:{name} {kind}"]
        for engine in engines(service.models):
            lines.append(f'steelyard:{name}{{model_name="{_escaped(engine.model)}"}} {value(engine.stats)}')
    lines.append(ENERGY)
    for package, joules in service.energy.joules().items():
        lines.append(f'steelyard:energy_joules_total{{package="{_escaped(package)}"}} {joules}')
    own = OURS.sub(r"\1steelyard:", generate_latest(service.meters.registry).decode())
    return Response("\n".join(lines) + "\n" + own, media_type=MEDIA_TYPE)


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
