"""`hf:` against a small server on 127.0.0.1 that answers as the hub does for what a pull asks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from file_server import Content, FileServer, serving

from steelyard.checkpoint import manifest, safetensors
from steelyard.checkpoint.sources import pull
from steelyard.errors import ArtifactError, SourceError, UnsafeArtifactError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def offer(server: FileServer, files: dict[str, bytes], revision: str = "main") -> None:
    siblings = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
    info = json.dumps(
        {"id": "org/Tiny-Model", "modelId": "org/Tiny-Model", "sha": COMMIT, "siblings": siblings}
    ).encode()
    tree = [{"type": "file", "path": n, "size": len(b), "oid": hashlib.sha1(b).hexdigest()} for n, b in files.items()]
    for name in {revision, COMMIT}:
        server.files[f"/api/models/org/Tiny-Model/revision/{name}"] = Content(info, "application/json")
        server.files[f"/api/models/org/Tiny-Model/tree/{name}"] = Content(json.dumps(tree).encode(), "application/json")
    server.files["/api/models/org/Tiny-Model"] = Content(info, "application/json")
    for name, body in files.items():
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        server.files[f"/org/Tiny-Model/resolve/{COMMIT}/{name}"] = Content(body, headers=headers)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    with serving({}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    safetensors.write(tmp_path / "m", [("w", "F32", (2,), np.ones(2, np.float32))], {})
    return {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "model.safetensors": (tmp_path / "m").read_bytes(),
        "consolidated.safetensors": b"a second copy",
        "pytorch_model.bin": b"\x80\x02",
        "steelyard.json": b"somebody's claims",
        "original/params.json": b"{}",
        "README.md": b"",
    }


@pytest.mark.parametrize("revision", ["", "@main", "@v1"])
def test_a_repository_becomes_a_checkpoint(
    server: FileServer, files: dict[str, bytes], tmp_path: Path, revision: str
) -> None:
    offer(server, files, revision.removeprefix("@") or "main")
    found = pull(f"hf:org/Tiny-Model{revision}", cache=tmp_path / "cache")
    assert found.name == "Tiny-Model"
    assert manifest.verify(found).files.keys() == {"config.json", "model.safetensors", "tokenizer.json"}
    assert not found.is_symlink()
    assert not any(path.is_symlink() for path in found.iterdir())
    assert list((tmp_path / "cache" / "hub").iterdir()) == []
    fetched = {path for path, _ in server.asked if "/resolve/" in path}
    assert not any(name in path for path in fetched for name in (".bin", "consolidated", "original", "README"))
    assert pull(f"hf:org/Tiny-Model{revision}", cache=tmp_path / "cache") == found


def test_pickles_only_and_nothing(server: FileServer, tmp_path: Path) -> None:
    offer(server, {"config.json": b"{}", "pytorch_model.bin": b"\x80\x02"})
    with pytest.raises(UnsafeArtifactError, match=r"pytorch_model\.bin.* runs code"):
        pull("hf:org/Tiny-Model", cache=tmp_path / "cache")
    offer(server, {"config.json": b"{}", "x/model.safetensors": b""})
    with pytest.raises(ArtifactError, match="no safetensors"):
        pull("hf:org/Tiny-Model", cache=tmp_path / "cache")
    assert not any("/resolve/" in path for path, _ in server.asked)


def test_missing_repository(server: FileServer, tmp_path: Path) -> None:
    server.files["/api/models/org/none"] = Content(b"{}", status=404, headers={"X-Error-Code": "RepoNotFound"})
    with pytest.raises(SourceError, match="does not exist, or needs a token"):
        pull("hf:org/none", cache=tmp_path / "cache")


@pytest.mark.parametrize("rest", ["name", "org/name/more", "org/na me", "org/name@", "../x/y", "org/..", "--/x"])
def test_names_that_are_no_repository(tmp_path: Path, rest: str) -> None:
    with pytest.raises(SourceError, match="is no repository"):
        pull(f"hf:{rest}", cache=tmp_path / "cache")


def test_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match=r"cannot be reached .* use a pypi: or file: source") as caught:
        pull("hf:org/Tiny-Model", cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
