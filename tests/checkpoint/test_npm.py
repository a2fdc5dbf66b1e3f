"""`npm:` against a registry on 127.0.0.1: what is pulled, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_server import Content, FileServer, serving
from gguf_writer import tiny_model

from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import npm, pull
from steelyard.errors import ArtifactError, SourceError


def tarball(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            tar.addfile(entry)
    return buffer.getvalue()


def list_package(server: FileServer, body: bytes, integrity: str | None = None, url: str = "/files/m.tgz") -> None:
    digest = "sha512-" + base64.b64encode(hashlib.sha512(body).digest()).decode()
    dist = {"tarball": f"{server.url}{url}" if url.startswith("/") else url}
    dist["integrity"] = digest if integrity is None else integrity
    page = json.dumps({"name": "@team/model", "versions": {"1.0.0": {"dist": dist}}}).encode()
    server.files["/@team%2Fmodel"] = Content(page, "application/json")
    server.files["/files/m.tgz"] = Content(body)


@pytest.fixture
def body(tmp_path: Path) -> bytes:
    tiny_model(tmp_path / "x.gguf")
    model = (tmp_path / "x.gguf").read_bytes()
    script = b"process.exit('this ran')"
    return tarball({"package/data/Tiny.F32.gguf": model, "package/index.js": script}, {"package/link": "/etc/passwd"})


@pytest.fixture
def registry(body: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    with serving({}) as server:
        list_package(server, body)
        monkeypatch.setenv("npm_config_registry", f"{server.url}/")
        yield server


SOURCE = "npm:@team/model@1.0.0"


def test_a_package_becomes_a_checkpoint(registry: FileServer, tmp_path: Path) -> None:
    found = pull(SOURCE, cache=tmp_path / "cache")
    assert found.name == "Tiny"
    assert manifest.verify(found).source == SOURCE
    asked = len(registry.asked)
    assert pull(SOURCE, cache=tmp_path / "cache") == found
    assert len(registry.asked) == asked, "the cache answers"
    assert pull(f"{SOURCE}#data/Tiny.F32.gguf", cache=tmp_path / "cache") == found
    with pytest.raises(ArtifactError, match="no model at 'x'"):
        pull(f"{SOURCE}#x", cache=tmp_path / "cache")


@pytest.mark.parametrize(
    "rest", ["model", "model@latest", "model@^1.0.0", "@1.0.0", "UPPER@1.0.0", "a/b/c@1.0.0", "a b@1.0.0"]
)
def test_only_pinned_versions(tmp_path: Path, rest: str) -> None:
    with pytest.raises(SourceError, match="write npm:package@version"):
        pull(f"npm:{rest}", cache=tmp_path / "cache")


def test_what_there_is_not(registry: FileServer, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no @team/model 2\.0\.0; versions: 1\.0\.0"):
        pull("npm:@team/model@2.0.0", cache=tmp_path / "cache")
    with pytest.raises(SourceError, match="has no package 'other'"):
        pull("npm:other@1.0.0", cache=tmp_path / "cache")


def test_what_cannot_be_verified_is_not_fetched(registry: FileServer, body: bytes, tmp_path: Path) -> None:
    for integrity in ("", "sha1-abcd", "sha512-!!!", "sha512-YWJj"):
        list_package(registry, body, integrity)
        with pytest.raises(SourceError, match="gives no sha512"):
            pull(SOURCE, cache=tmp_path / "cache")
    list_package(registry, body)
    registry.files["/files/m.tgz"] = Content(body + b"x")
    with pytest.raises(ArtifactError, match=r"sha512 .* was promised"):
        pull(SOURCE, cache=tmp_path / "cache")
    list_package(registry, body, url="file:///etc/passwd")
    with pytest.raises(SourceError, match="not https"):
        pull(SOURCE, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"no tarball", "damaged or truncated tarball"),
        (b"", "damaged or truncated tarball"),
        (tarball({"package/a.txt": b"x"}), "no model"),
        (tarball({"package/../../x.gguf": b"x"}), "leads out"),
        (tarball({"package/zeros.gguf": bytes(200 << 20)}), "refused as a bomb"),
    ],
)
def test_what_is_no_model_is_named(registry: FileServer, tmp_path: Path, content: bytes, complaint: str) -> None:
    list_package(registry, content)
    with pytest.raises(ArtifactError, match=complaint):
        pull(SOURCE, cache=tmp_path / "cache")


def test_a_tarball_that_is_cut_off(registry: FileServer, body: bytes, tmp_path: Path) -> None:
    list_package(registry, body[: len(body) // 2])
    with pytest.raises(ArtifactError, match="damaged or truncated"):
        pull(SOURCE, cache=tmp_path / "cache")


def test_where_the_registry_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("npm_config_registry", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert npm.registry_url() == "https://registry.npmjs.org"
    (tmp_path / ".npmrc").write_text("fund=false\nregistry=https://npm.example/\n")
    assert npm.registry_url() == "https://npm.example"
