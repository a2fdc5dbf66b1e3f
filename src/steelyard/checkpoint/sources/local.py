"""`file:path`: a checkpoint folder, CTranslate2's, a GGUF, a wheel or zip, safetensors. Also how each is laid out.

Knows which files make a model and checks each before it is taken over; nothing of networks.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from steelyard.checkpoint import ctranslate2, ctranslate2_convert, gguf_convert, manifest, safetensors
from steelyard.checkpoint.gguf import GGUF
from steelyard.checkpoint.sources import archive
from steelyard.checkpoint.sources.cache import Cache, Report
from steelyard.checkpoint.sources.formats import PICKLE_ADVICE, PICKLE_SUFFIXES, refuse_pickle
from steelyard.errors import ArtifactError, CheckpointError, SourceError, UnsafeArtifactError

ARCHIVE_SUFFIXES = (".whl", ".zip")
SHARD_INDEX = "model.safetensors.index.json"
CHUNK = 16 << 20
QUANTISATION = re.compile(r"[-._](I?Q\d+(_[0-9A-Z]+)*|TQ\d_\d|B?F16|F32|FP16|FP32|MXFP4)$", re.IGNORECASE)
NAMELESS = ("model", "ggml-model", "gguf-model")


def fetch(rest: str, cache: Cache, workspace: Path, report: Report) -> Path:
    """The model file or folder that `rest` names; an archive's model is extracted to `workspace`.

    Args:
        rest: a path; for an archive `#path/inside` may follow.
        cache: not used; a local file is not copied into the blobs.
        workspace: an empty folder.
        report: see `Report`.

    Raises:
        SourceError: nothing is there.
        ArtifactError: it is no model that can be read.
        UnsafeArtifactError: it is a pickle.
    """
    path, inside = locate(rest)
    if path.is_dir():
        return path
    refuse_pickle(path)
    suffix = path.suffix.lower()
    if suffix in ARCHIVE_SUFFIXES:
        return archive.extract(path, inside, workspace, name=path.stem, report=report)
    if suffix == ".safetensors":
        safetensors.read_header(path)
        if not (path.parent / "config.json").is_file() and not (path.parent / "adapter_config.json").is_file():
            raise ArtifactError(
                f"'{path}' has no config.json beside it, which says what model it is: "
                "put the model's config.json (and tokenizer.json) there and pull the folder"
            )
        return path.parent
    if suffix == ".gguf":
        return path
    raise ArtifactError(f"'{path}' is no model: pull a folder, .gguf, .whl, .zip or .safetensors")


def locate(rest: str) -> tuple[Path, str]:
    """Split `path[#inside]` into an existing path and the rest.

    Raises:
        SourceError: neither the whole nor the part before `#` exists.
    """
    for text, inside in ((rest, ""), rest.rpartition("#")[::2]):
        path = Path(text).expanduser()
        if text and "\0" not in text and path.exists():
            return path.resolve(), inside
    raise SourceError(f"there is no file or folder '{rest}'")


def stamp(rest: str) -> str:
    """A text that changes when what lies at `rest` does: names, sizes and times of the files."""
    path, _ = locate(rest)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    states = [(file.name, file.stat()) for file in files if file.is_file()]
    return f"{path}\n" + "\n".join(f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states)


def name_of(path: Path) -> str:
    """The name of the model at `path`: the folder's, or the GGUF file's without its quantisation.

    A file name that names no model (`ggml-model-q4_0.gguf`) gives way to the GGUF's own `general.name`.
    """
    name = path.name
    if path.is_file():
        name = QUANTISATION.sub("", path.stem)
        if name.lower() in NAMELESS:
            name = str(GGUF(path).metadata.get("general.name", name))
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:100] or "model"


def lineage_of(path: Path) -> dict[str, Any]:
    """What a checkpoint folder's own manifest says of how it was made; empty for anything else.

    Raises:
        CheckpointError: the manifest does not parse.
    """
    if not (path / manifest.MANIFEST).is_file():
        return {}
    made = msgspec.structs.asdict(manifest.read(path))
    return {name: value for name, value in made.items() if name not in ("id", "kind", "files")}


def lay_out(path: Path, folder: Path, report: Report) -> None:
    """Write the checkpoint files of the model at `path` into `folder`.

    Raises:
        ArtifactError, UnsafeArtifactError, CheckpointError: it is not a whole, well-formed model.
    """
    if path.is_file():
        gguf_convert.convert(path, folder, report)
        return
    binary = path / ctranslate2_convert.MODEL
    if binary.is_file() and not list(path.glob("*.safetensors")) and ctranslate2.recognised(binary):
        ctranslate2_convert.convert(path, folder, report)
        return
    files = manifest.model_files(path)
    _check(path, files)
    total, done = sum(file.stat().st_size for file in files), 0
    for file in files:
        with file.open("rb") as source, (folder / file.name).open("xb") as target:
            while chunk := source.read(CHUNK):
                target.write(chunk)
                done += len(chunk)
                report("copy", done, total)


def _check(path: Path, files: list[Path]) -> None:
    weights = [file for file in files if file.suffix == ".safetensors"]
    if not weights:
        for file in sorted(path.iterdir()):
            if file.suffix.lower() in PICKLE_SUFFIXES:
                raise UnsafeArtifactError(f"'{file}' {PICKLE_ADVICE}")
            if file.suffix.lower() == ".gguf":
                raise ArtifactError(f"'{path}' is a folder of GGUF files: pull one of them, such as '{file}'")
    manifest.kind_of(path)
    if not weights:
        raise CheckpointError(f"'{path}' has no safetensors: the checkpoint is incomplete")
    if (path / manifest.MANIFEST).is_file():
        manifest.verify(path)
    headers = {}
    for file in weights:
        refuse_pickle(file)
        headers[file.name] = safetensors.read_header(file)
    for file in files:
        if file.suffix == ".json" and file.name in ("config.json", "adapter_config.json", SHARD_INDEX):
            manifest.read_json(file)
    if (path / SHARD_INDEX).is_file():
        _check_shards(path / SHARD_INDEX, headers)


def _check_shards(index: Path, headers: dict[str, dict[str, safetensors.TensorInfo]]) -> None:
    placed = manifest.read_json(index).get("weight_map")
    if not isinstance(placed, dict):
        raise ArtifactError(f"'{index}' has no weight_map")
    for tensor, shard in placed.items():
        if not isinstance(shard, str) or PurePosixPath(shard).name != shard or shard not in headers:
            raise ArtifactError(f"'{index}' puts '{tensor[:100]}' in {str(shard)[:100]!a}, which is not in the folder")
        if tensor not in headers[shard]:
            raise ArtifactError(f"'{index}' puts '{tensor[:100]}' in '{shard}', which does not have it")
