"""A running Steelyard server as its customers see it, over HTTP. Knows no export.

What is refused for now (too many requests, an engine that starts) is asked again; errors come back as those of
`errors.py`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from steelyard.errors import (
    AuthenticationError,
    ConfigError,
    ConflictError,
    EngineUnavailableError,
    NotFoundError,
    PayloadTooLargeError,
    PermissionDeniedError,
    QuotaError,
    RateLimitError,
    RequestError,
    SourceError,
    SteelyardError,
)

TIMEOUT = httpx.Timeout(30, read=900, write=120)
ATTEMPTS = 6
MOST_WAIT = 30.0
"""Seconds between two attempts."""
PAGE = 100
KINDS: dict[int, type[RequestError]] = {
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: PayloadTooLargeError,
}

Row = dict[str, Any]


class Server:
    """A server and one of its projects.

    Args:
        base_url: as the SDK takes it, with `/v1`.
        api_key: a key of the project.

    Raises:
        ConfigError: the URL or the key cannot be one, or the URL is OpenAI's own.
    """

    def __init__(self, base_url: str, api_key: str) -> None:
        try:
            url = httpx.URL(base_url.strip())
        except httpx.InvalidURL as error:
            raise ConfigError(f"'{base_url}' is no URL: {error}") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(f"'{base_url}' is no URL of a server: write it as http://127.0.0.1:8000/v1")
        if url.host == "openai.com" or url.host.endswith(".openai.com"):
            raise ConfigError(f"'{base_url}' is OpenAI itself: --base-url names the Steelyard server to import to")
        key = api_key.strip()
        if not key or not (key.isascii() and key.isprintable()):
            raise ConfigError("the API key is empty or has characters that no key has: see `steelyard keys create`")
        self._url = str(url).rstrip("/")
        self._http = httpx.Client(headers={"authorization": f"Bearer {key}"}, timeout=TIMEOUT)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """Ids of the models that this project may ask.

        Raises:
            SourceError: there is no such API there.
        """
        try:
            return [model["id"] for model in self._get("/models")["data"]]
        except NotFoundError:
            raise SourceError(f"there is no API at {self._url}: the base URL ends in /v1") from None

    def jobs(self) -> Iterator[Row]:
        """The project's fine-tuning jobs, newest first."""
        query: Row = {"limit": PAGE}
        while True:
            page = self._get("/fine_tuning/jobs", query)
            yield from page["data"]
            if not page["has_more"]:
                return
            query["after"] = page["last_id"]

    def holds(self, file_id: str, sha256: str) -> bool:
        """Whether the project has this file, with this content."""
        digest = hashlib.sha256()
        try:
            with self._http.stream("GET", f"{self._url}/files/{file_id}/content") as response:
                if response.is_error:
                    response.read()
                    raise _error(response)
                for piece in response.iter_bytes():
                    digest.update(piece)
        except NotFoundError:
            return False
        except httpx.TransportError as error:
            raise self._unreachable(error) from None
        return digest.hexdigest() == sha256

    def upload(self, path: Path, filename: str, sha256: str) -> str:
        """Upload a file to learn from, once: what was uploaded a while ago and is still there is not sent again.

        Args:
            path: the file.
            filename: what it is called there.
            sha256: of its content.

        Returns:
            Its id.
        """
        with path.open("rb") as file:

            def request(headers: Row) -> httpx.Request:
                file.seek(0)
                form = {"file": (filename, file, "application/jsonl")}
                data = {"purpose": "fine-tune"}
                return self._http.build_request("POST", f"{self._url}/files", files=form, data=data, headers=headers)

            name = hashlib.sha256(filename.encode()).hexdigest()
            response = self._post(request, f"import-file-{sha256}-{name[:16]}")
            made: str = response.json()["id"]
            if _is_replay(response) and not self.holds(made, sha256):  # deleted since
                made = self._ask(lambda: request({})).json()["id"]
        return made

    def create(self, body: Row, name: str) -> str:
        """Create a fine-tuning job; returns its id.

        Args:
            body: the request.
            name: what the job was called elsewhere: the same job is not made twice.

        Raises:
            RequestError: the server refuses it.
        """
        digest = hashlib.sha256(json.dumps([name, body], sort_keys=True).encode()).hexdigest()
        url = f"{self._url}/fine_tuning/jobs"
        response = self._post(
            lambda headers: self._http.build_request("POST", url, json=body, headers=headers), f"import-job-{digest}"
        )
        made: str = response.json()["id"]
        return made

    def _get(self, path: str, query: Row | None = None) -> Row:
        found: Row = self._ask(lambda: self._http.build_request("GET", self._url + path, params=query)).json()
        return found

    def _post(self, request: Callable[[Row], httpx.Request], key: str) -> httpx.Response:
        try:
            return self._ask(lambda: request({"idempotency-key": key}))
        except _ReplayedError:  # refused a while ago; it may be well by now
            return self._ask(lambda: request({}))

    def _ask(self, request: Callable[[], httpx.Request]) -> httpx.Response:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                response = self._http.send(request())
            except httpx.TransportError as error:
                raise self._unreachable(error) from None
            if not response.is_error:
                return response
            failure = _error(response)
            wait = _wait(response, failure)
            if wait is None or attempt == ATTEMPTS:
                raise failure
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _unreachable(self, error: httpx.TransportError) -> SourceError:
        why = str(error) or type(error).__name__
        return SourceError(f"no answer from {self._url}: {why}; does the server run there?")


class _ReplayedError(RequestError):
    """A refusal that was kept under an Idempotency-Key and is given again."""


def _is_replay(response: httpx.Response) -> bool:
    replayed: str | None = response.headers.get("idempotent-replayed")
    return replayed == "true"


def _wait(response: httpx.Response, failure: SteelyardError) -> float | None:
    """Seconds after which the same request may be answered; None: it will not be."""
    again = isinstance(failure, RateLimitError) or getattr(failure, "code", None) == "idempotency_in_progress"
    if not again and response.status_code != 503:
        return None
    given = response.headers.get("retry-after", "1")
    return min(float(given), MOST_WAIT) if given.isascii() and given.isdigit() else 1.0


def _error(response: httpx.Response) -> SteelyardError:
    status, url = response.status_code, response.request.url
    try:
        error = response.json()["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, TypeError, KeyError, AttributeError):
        return SourceError(f"{url} answered {status} with no error of this API: is the base URL right?")
    if status >= 500:
        return EngineUnavailableError(f"the server answered {status}: {message}")
    if _is_replay(response):
        return _ReplayedError(message, code=code)
    if status == 429:
        return QuotaError(message, code=code) if code == "insufficient_quota" else RateLimitError(message)
    return KINDS.get(status, RequestError)(message, param=error.get("param"), code=code)
