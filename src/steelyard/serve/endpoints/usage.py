"""`/v1/organization/usage/...` and `/v1/organization/costs`: what was used and what it cost, from the ledger itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from steelyard.errors import PathNotFoundError, RequestError
from steelyard.serve.billing.ledger import Service as Kind
from steelyard.serve.billing.reports import SECONDS, Query, Width, buckets
from steelyard.serve.protocol.billing import (
    Bucket,
    BucketPage,
    CompletionsUsage,
    Cost,
    EmbeddingsUsage,
    ExplanationsUsage,
    TranscriptionsUsage,
)
from steelyard.serve.protocol.errors import json_response
from steelyard.serve.protocol.lists import integer
from steelyard.serve.protocol.parameters import BOOLEAN, TEXT, Parameter, integer_from, one_of, some_of
from steelyard.serve.service import Service

LIMITS: dict[Width, tuple[int, int]] = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}
"""Buckets of a page: without `limit`, and at most."""
COST_LIMITS = (7, 180)
MOST_SECONDS = 1 << 40
MOST_VALUES = 100

KINDS: dict[str, tuple[Sequence[Kind], Callable[[dict[str, Any]], Any] | None]] = {
    "completions": (("completions",), CompletionsUsage.of),
    "embeddings": (("embeddings",), EmbeddingsUsage.of),
    "explanations": (("explanations",), ExplanationsUsage.of),
    "moderations": ((), None),
    "images": ((), None),
    "audio_speeches": ((), None),
    "audio_transcriptions": (("audio_transcriptions",), TranscriptionsUsage.of),
    "vector_stores": ((), None),
    "code_interpreter_sessions": ((), None),
}
"""What is reported; of what is not served here, that nothing was used."""
FILTERS = {"project_ids": "project_id", "api_key_ids": "api_key_id", "models": "model"}
SINGLE = {"start_time", "end_time", "bucket_width", "limit", "page", "batch"}
"""Parameters of one value; the others may be there several times."""
USAGE_GROUPS = ("project_id", "api_key_id", "model", "batch")
COST_GROUPS = ("project_id", "api_key_id", "line_item")


def _described(widths: Sequence[Width], most: int, groups: Sequence[str]) -> tuple[Parameter, ...]:
    """The parameters of both; `limit` as the width with the most buckets has it."""
    seconds, values = integer_from(0, MOST_SECONDS), some_of(TEXT, MOST_VALUES)
    return (
        Parameter("start_time", seconds, required=True),
        Parameter("end_time", seconds),
        Parameter("bucket_width", one_of(*widths)),
        Parameter("limit", integer_from(1, most)),
        Parameter("page", seconds),
        Parameter("group_by", some_of(one_of(*groups), MOST_VALUES)),
        Parameter("project_ids", values),
        Parameter("api_key_ids", values),
    )


USAGE_PARAMETERS = (
    Parameter("kind", one_of(*KINDS), required=True, place="path"),
    *_described(tuple(LIMITS), max(most for _, most in LIMITS.values()), USAGE_GROUPS),
    Parameter("models", some_of(TEXT, MOST_VALUES)),
    Parameter("batch", BOOLEAN),
)
COST_PARAMETERS = _described(("1d",), COST_LIMITS[1], COST_GROUPS)


async def usage(service: Service, request: Request) -> Response:
    """What was used, in buckets."""
    kind = request.path_params["kind"]
    if kind not in KINDS:
        raise PathNotFoundError(f"no usage of '{kind[:40]}': one of {', '.join(KINDS)}")
    services, shape = KINDS[kind]
    given = _parameters(request, "bucket_width", "batch", "models", "user_ids")
    query, limit = _query(given, services, USAGE_GROUPS, LIMITS)
    return json_response(await _page(service, query, limit, shape))


async def costs(service: Service, request: Request) -> Response:
    """What was spent, by the day."""
    given = _parameters(request, "bucket_width")
    if given.get("bucket_width", ["1d"]) != ["1d"]:
        raise RequestError("'bucket_width' of costs is 1d", param="bucket_width")
    query, limit = _query(given, None, COST_GROUPS, {"1d": COST_LIMITS})
    return json_response(await _page(service, query, limit, Cost.of))


async def _page(
    service: Service, query: Query, limit: int, shape: Callable[[dict[str, Any]], Any] | None
) -> BucketPage:
    seconds = SECONDS[query.width]
    first = query.begin - query.begin % seconds
    end = min(query.end, first + limit * seconds)
    asked = Query(query.begin, end, query.width, query.services, query.group_by, query.only)
    found = await service.database.read(lambda connection: buckets(connection, asked))
    data = [
        Bucket(begin, begin + seconds, [] if shape is None else [shape(row) for row in rows]) for begin, rows in found
    ]
    more = end < query.end
    return BucketPage(data, more, str(end) if more else None)


def _parameters(request: Request, *more: str) -> dict[str, list[str]]:
    names = {"start_time", "end_time", "limit", "page", "group_by", "project_ids", "api_key_ids", *more}
    given: dict[str, list[str]] = {}
    for name, value in request.query_params.multi_items():
        name = name.removesuffix("[]")
        if name not in names:
            raise RequestError(f"unknown parameter '{name[:80]}': remove it", param=name[:80], code="unknown_parameter")
        given.setdefault(name, []).append(value)
        if len(given[name]) > MOST_VALUES:
            raise RequestError(f"'{name}' has more than {MOST_VALUES} values", param=name)
    return given


def _query(
    given: dict[str, list[str]],
    services: Sequence[Kind] | None,
    groups: Sequence[str],
    limits: dict[Width, tuple[int, int]],
) -> tuple[Query, int]:
    single = {name: values[0] for name, values in given.items() if name in SINGLE}
    if twice := next((name for name in single if len(given[name]) > 1), None):
        raise RequestError(f"'{twice}' is given twice", param=twice)
    if "start_time" not in single:
        raise RequestError("'start_time' is missing: Unix seconds", param="start_time")
    width = single.get("bucket_width", "1d")
    if width not in limits:
        raise RequestError(f"'bucket_width' must be one of {', '.join(limits)}", param="bucket_width")
    begin = integer(single, "start_time", 0, MOST_SECONDS, 0)
    limit = integer(single, "limit", 1, limits[width][1], limits[width][0])
    end = integer(single, "end_time", begin, MOST_SECONDS, begin + limit * SECONDS[width])
    begin = integer(single, "page", begin, max(begin, end), begin)
    wanted = given.get("group_by", [])
    if any(name not in groups for name in wanted):
        raise RequestError(f"'group_by' must be some of {', '.join(groups)}", param="group_by")
    if "user_ids" in given:
        raise RequestError(
            "'user_ids' is not supported here: remove it", param="user_ids", code="unsupported_parameter"
        )
    only: dict[str, Sequence[Any]] = {FILTERS[name]: given[name] for name in FILTERS if name in given}
    if "batch" in single:
        if single["batch"] not in ("true", "false"):
            raise RequestError("'batch' must be true or false", param="batch")
        only["batch"] = [single["batch"] == "true"]
    return Query(begin, end, width, services, list(dict.fromkeys(wanted)), only), limit
