"""One file over HTTP into a blob: streamed, bounded, resumed, and verified by its digest before it has its name.

Knows nothing of indexes or packages.
"""

from __future__ import annotations

import hashlib
import os
import re
import ssl
from pathlib import Path

import httpx

from steelyard.checkpoint.sources.cache import Report
from steelyard.errors import ArtifactError, SourceError

ATTEMPTS = 3
TIMEOUT = httpx.Timeout(60.0, connect=20.0)
# The first of these that is set names the certificates to trust, as pip, requests and curl read them.
CERTIFICATES = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def client() -> httpx.Client:
    """An HTTP client that follows redirects, honours proxy variables and the certificate variables above.

    Raises:
        SourceError: a variable names certificates that cannot be read.
    """
    for name in CERTIFICATES:
        if chosen := os.environ.get(name):
            try:
                folder = Path(chosen).is_dir()
                verify = ssl.create_default_context(
                    cafile=None if folder else chosen, capath=chosen if folder else None
                )
            except (OSError, ssl.SSLError) as error:
                raise SourceError(f"{name} names '{chosen}', which holds no certificates: {error}") from None
            return httpx.Client(verify=verify, timeout=TIMEOUT, follow_redirects=True)
    return httpx.Client(timeout=TIMEOUT, follow_redirects=True)


def download(
    http: httpx.Client,
    url: str,
    blob: Path,
    *,
    sha256: str = "",
    sha512: str = "",
    limit: int,
    report: Report,
    what: str,
    auth: tuple[str, str] | None = None,
) -> None:
    """Bring `url` to `blob`, which appears only when its digest is right.

    What an interrupted download left in `<blob>.part` is continued if the server answers a Range request with 206,
    else fetched anew. The caller holds the lock of this blob.

    Args:
        http: from `client()`.
        url: http or https.
        blob: where the file will be.
        sha256: 64 hex digits that the file must have.
        sha512: or 128 of that kind.
        limit: most bytes that are accepted.
        report: see `Report`.
        what: the file's name, for messages.
        auth: user and password for the server, if it asks for them.

    Raises:
        SourceError: unreachable, refused, or broken off; says that the next try goes on from there.
        ArtifactError: more bytes than `limit`, or another digest.
    """
    kind, wanted = ("sha512", sha512) if sha512 else ("sha256", sha256)
    assert wanted, "what is fetched is verified"
    if blob.is_file() and _digest(blob, kind) == wanted:
        report(what, blob.stat().st_size, blob.stat().st_size)
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    part = blob.with_name(blob.name + ".part")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _continue(http, url, part, limit, report, what, auth)
            break
        except httpx.TransportError as error:
            if attempt == ATTEMPTS:
                reason = str(error) or type(error).__name__
                raise SourceError(f"download of {what} broke off ({reason}): run it again, it will go on") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SourceError(f"{what} cannot be downloaded: {error}") from None
    found = _digest(part, kind)
    if found != wanted:
        part.unlink()
        raise ArtifactError(f"{what} has {kind} {found} where {wanted} was promised: it is damaged or not that file")
    part.replace(blob)


def _digest(path: Path, kind: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _continue(
    http: httpx.Client, url: str, part: Path, limit: int, report: Report, what: str, auth: tuple[str, str] | None
) -> None:
    have = part.stat().st_size if part.is_file() else 0
    if have > limit:
        part.unlink()
        have = 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with http.stream("GET", url, headers=headers, auth=auth) as response:
        if have and response.status_code == 416:
            # Nothing is left to send: the part is whole, or not of this file; its digest tells.
            return
        if response.status_code not in (200, 206):
            raise SourceError(f"{what} cannot be downloaded: the server answered {response.status_code}")
        resumed = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
        if response.status_code == 200:
            have = 0
        elif not have or resumed is None or int(resumed[1]) != have:
            raise SourceError(f"{what} cannot be downloaded: the server answered with another range than asked for")
        length = response.headers.get("content-length", "")
        total = have + int(length) if length.isdecimal() and "content-encoding" not in response.headers else None
        if total is not None and total > limit:
            raise ArtifactError(f"{what} would be {total} bytes where at most {limit} were promised")
        with part.open("ab" if have else "wb") as file:
            # Chunks as they arrive: collecting them to a size would lose the last ones when the connection breaks.
            for chunk in response.iter_bytes():
                have += len(chunk)
                if have > limit:
                    raise ArtifactError(f"{what} is larger than the {limit} bytes that were promised")
                file.write(chunk)
                report(what, have, total)
            file.flush()
            os.fsync(file.fileno())


def read_bounded(http: httpx.Client, url: str, headers: dict[str, str], limit: int) -> httpx.Response:
    """GET a small document, read up to `limit` bytes.

    Raises:
        SourceError: unreachable or too large. The status is the caller's to judge.
    """
    shown = httpx.URL(url).copy_with(userinfo=b"")
    try:
        with http.stream("GET", url, headers=headers) as response:
            body = bytearray()
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > limit:
                    raise SourceError(f"the answer of {shown} is over {limit >> 20} MB: this is no package index")
            decoded = {key: value for key, value in response.headers.items() if key.lower() != "content-encoding"}
            return httpx.Response(response.status_code, headers=decoded, content=bytes(body), request=response.request)
    except httpx.HTTPError as error:
        raise SourceError(f"{shown} cannot be reached: {str(error) or type(error).__name__}") from None
