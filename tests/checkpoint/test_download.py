from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from file_server import Content, FileServer, serving

from steelyard.checkpoint.sources import download
from steelyard.errors import ArtifactError, SourceError

BODY = np.random.default_rng(0).bytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving({"/f": Content(BODY)}) as running:
        yield running


def fetch(server: FileServer, blob: Path, sha256: str = SHA, limit: int = 1 << 20) -> list[tuple[str, int, int | None]]:
    reports: list[tuple[str, int, int | None]] = []

    def report(what: str, done: int, total: int | None) -> None:
        reports.append((what, done, total))

    with httpx.Client() as http:
        download.download(http, f"{server.url}/f", blob, sha256=sha256, limit=limit, report=report, what="the file")
    return reports


def test_downloads_verifies_and_reports(server: FileServer, tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / SHA
    reports = fetch(server, blob)
    assert blob.read_bytes() == BODY
    assert reports[-1] == ("the file", len(BODY), len(BODY))
    assert [path.name for path in blob.parent.iterdir()] == [SHA]
    fetch(server, blob)
    assert len(server.asked) == 1  # the second finds it


@pytest.mark.parametrize("ranges", [True, False])
def test_resumes_a_part_or_starts_again(server: FileServer, tmp_path: Path, ranges: bool) -> None:
    server.files["/f"].ranges = ranges
    (tmp_path / "b.part").write_bytes(BODY[:100_000])
    reports = fetch(server, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == BODY
    assert server.asked[0][1]["range"] == "bytes=100000-"
    assert (reports[0][1] > 100_000) or not ranges
    assert reports[-1][2] == len(BODY)


@pytest.mark.parametrize("ranges", [True, False])
def test_goes_on_after_a_broken_connection(server: FileServer, tmp_path: Path, ranges: bool) -> None:
    server.files["/f"].break_at = [50_000, 60_000]
    server.files["/f"].ranges = ranges
    fetch(server, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == BODY
    assert len(server.asked) == 3


def test_gives_up_and_keeps_the_part(server: FileServer, tmp_path: Path) -> None:
    server.files["/f"].break_at = [50_000] * 3
    with pytest.raises(SourceError, match=r"the file broke off .* it will go on"):
        fetch(server, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert (tmp_path / "b.part").stat().st_size == 150_000
    fetch(server, tmp_path / "b")
    assert server.asked[-1][1]["range"] == "bytes=150000-"


def test_a_whole_part_only_needs_its_name(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "b.part").write_bytes(BODY)
    fetch(server, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == BODY


def test_a_wrong_digest_leaves_nothing(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"sha256 {SHA} where {'0' * 64}"):
        fetch(server, tmp_path / "b", "0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_something_else_is_found_out(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "b.part").write_bytes(b"x" * 1000)
    with pytest.raises(ArtifactError, match="sha256"):
        fetch(server, tmp_path / "b")
    fetch(server, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == BODY


def test_an_altered_blob_is_fetched_again(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"altered")
    fetch(server, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == BODY


def test_more_than_promised_is_refused(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="at most 1000"):
        fetch(server, tmp_path / "b", limit=1000)
    assert not (tmp_path / "b").exists()


def test_another_range_than_asked_for(server: FileServer, tmp_path: Path) -> None:
    server.files["/f"] = Content(BODY, ranges=False, status=206, headers={"Content-Range": "bytes 5-9/10"})
    (tmp_path / "b.part").write_bytes(BODY[:1000])
    with pytest.raises(SourceError, match="another range"):
        fetch(server, tmp_path / "b")


def test_refusals_and_dead_servers(tmp_path: Path) -> None:
    with serving({}) as server, pytest.raises(SourceError, match="answered 404"):
        fetch(server, tmp_path / "b")
    with pytest.raises(SourceError, match="broke off"):
        fetch(server, tmp_path / "b")


def test_certificates_by_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in download.CERTIFICATES:
        monkeypatch.delenv(name, raising=False)
    download.client().close()
    (tmp_path / "ca.pem").write_text("no certificate")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    with pytest.raises(SourceError, match="REQUESTS_CA_BUNDLE names"):
        download.client()
