"""A checkpoint's id, and every way in which it is no longer what it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from steelyard.checkpoint import manifest
from steelyard.errors import CheckpointError, ConfigError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    with manifest.writing(tmp_path / "model", parent="sha256:0", source="file:x", recipe={"seed": 1}) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(bytes(range(256)))
    return tmp_path / "model"


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[100] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def test_lineage_is_written_and_verified(checkpoint: Path) -> None:
    found = manifest.verify(checkpoint)
    assert found == manifest.read(checkpoint)
    assert (found.kind, found.parent, found.source, found.recipe) == ("model", "sha256:0", "file:x", {"seed": 1})
    assert found.files.keys() == {"config.json", "model.safetensors"}
    assert found.id == manifest.digest(dict(reversed(found.files.items())))


def test_the_id_is_that_of_the_files_and_not_of_the_manifest(checkpoint: Path) -> None:
    found = manifest.read(checkpoint)
    found.metrics = {"loss": 1.0}
    manifest.write(checkpoint, found)
    assert manifest.verify(checkpoint).metrics == {"loss": 1.0}
    (checkpoint / manifest.MANIFEST).unlink()
    assert manifest.read(checkpoint).id == found.id


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (flip_a_bit, r"model\.safetensors' is altered"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors' is missing"),
        (lambda folder: (folder / "extra.json").write_text("{}"), r"extra\.json' is not in the manifest"),
    ],
)
def test_verify_names_the_file_that_changed(checkpoint: Path, change: Callable[[Path], None], complaint: str) -> None:
    change(checkpoint)
    with pytest.raises(CheckpointError, match=complaint):
        manifest.verify(checkpoint)


def test_a_manifest_with_another_id_is_refused(checkpoint: Path) -> None:
    found = manifest.read(checkpoint)
    found.id = "sha256:1"
    manifest.write(checkpoint, found)
    with pytest.raises(CheckpointError, match="names an id that its files do not have"):
        manifest.verify(checkpoint)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"id": 1}', b"\xff", b"[" * 100_000])
def test_a_manifest_that_does_not_parse(checkpoint: Path, content: bytes) -> None:
    (checkpoint / manifest.MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match="does not parse"):
        manifest.read(checkpoint)


def test_what_is_no_checkpoint_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*`steelyard pull SOURCE`"):
        manifest.read(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"neither config\.json nor adapter_config\.json"):
        manifest.read(tmp_path)


def test_a_checkpoint_may_replace_a_checkpoint_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    manifest.check_output(tmp_path / "none")
    manifest.check_output(checkpoint)
    for path in (checkpoint, tmp_path):
        with pytest.raises(ConfigError, match="which is still needed"):
            manifest.check_output(path, checkpoint)
    with pytest.raises(ConfigError, match="is no checkpoint"):
        manifest.check_output(tmp_path)
