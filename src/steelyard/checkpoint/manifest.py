"""The checkpoint folder: which files make a model, its id, its lineage, and whether it is still what it was.

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json  chat_template.jinja  generation_config.json
    adapter_config.json + adapter_model.safetensors      (an adapter instead of a model)
    steelyard.json                                       (lineage; not part of the id)

The id is the sha256 over the sorted `(name, sha256)` of the model files. `steelyard.json` refers to that id and
is not part of it, so that certificates and sign-offs can be added later.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from steelyard import __version__, runs
from steelyard.atomic import folder_aside, write_file
from steelyard.errors import CheckpointError, ConfigError

MANIFEST = "steelyard.json"
SUFFIXES = (".json", ".safetensors", ".jinja", ".model", ".txt")
MAX_JSON_BYTES = 64 << 20
SPEECH = "SteelyardSpeechCTC"
"""The architecture of our recognisers, whose vocabulary is in their config.json."""
WITHOUT_TEXT = {SPEECH, "SteelyardConvNet", "SteelyardVisionTransformer"}
FUSED = "SteelyardFusionClassifier"
"""Architectures that read no text, and one that may."""


class Manifest(msgspec.Struct, kw_only=True):
    """Lineage of a checkpoint: where it came from and what was measured of it."""

    id: str
    """The checkpoint's id, `sha256:...`."""
    kind: str
    """`model` or `adapter`."""
    files: dict[str, str]
    """sha256 of every model file, by name."""
    parent: str | None = None
    """Id of the checkpoint that this one was made from."""
    source: str | None = None
    """Where a pulled checkpoint came from."""
    data: dict[str, str] = {}
    """sha256 of every data file that went into it, by name."""
    recipe: dict[str, Any] = {}
    """The full configuration of the step that made it."""
    metrics: dict[str, Any] = {}
    certificate: dict[str, Any] | None = None
    code: str = f"steelyard {__version__}"


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in one pass."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_files(folder: Path) -> list[Path]:
    """The files of `folder` that make the model, sorted by name."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix in SUFFIXES and path.name != MANIFEST and not path.name.startswith(".")
    )


def digest(files: dict[str, str]) -> str:
    """Checkpoint id over `(name, sha256)` pairs, independent of their order."""
    listing = "".join(f"{name} {sha}\n" for name, sha in sorted(files.items()))
    return "sha256:" + hashlib.sha256(listing.encode()).hexdigest()


def reads_text(folder: Path) -> bool:
    """Whether a model has a tokenizer: a recogniser of speech has characters, and networks of images read none.

    Raises:
        CheckpointError: its config.json is missing or broken.
    """
    config = read_json(folder / "config.json")
    named = set(config.get("architectures") or ())
    return not named & WITHOUT_TEXT and not (FUSED in named and config.get("text") is None)


def kind_of(folder: Path) -> str:
    """`model` or `adapter`, by the files that are there.

    Raises:
        CheckpointError: the folder does not exist or is neither.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"no checkpoint at '{folder}': run `steelyard pull SOURCE` or `steelyard train run.toml` first"
        )
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if (folder / "config.json").is_file():
        return "model"
    if (folder / runs.CONFIG).is_file():
        raise CheckpointError(f"'{folder}' is a run's folder: name a checkpoint in it, such as '{folder / 'best'}'")
    raise CheckpointError(f"'{folder}' is no checkpoint: it has neither config.json nor adapter_config.json")


def base_of(folder: Path) -> Path:
    """The model folder of a checkpoint: itself, or the base that an adapter names or was trained on.

    Raises:
        CheckpointError: no checkpoint, or an adapter whose base is not there.
    """
    if kind_of(folder) == "model":
        return folder
    named = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    recipe = read(folder).recipe.get("train")
    source = recipe.get("model") if isinstance(recipe, dict) else None
    for place in (named, source):
        if isinstance(place, str) and (Path(place) / "config.json").is_file():
            return Path(place)
    hint = f"steelyard pull {source} --to '{named}'" if isinstance(source, str) and ":" in source else "pull it first"
    raise CheckpointError(
        f"the adapter '{folder}' names the base '{named}', which is not there: {hint}, or change "
        "base_model_name_or_path in its adapter_config.json"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint, bounded in size.

    Raises:
        CheckpointError: missing, too large, or not a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"'{path.parent}' has no {path.name}: the checkpoint is incomplete; pull it again")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"'{path}' is over {MAX_JSON_BYTES >> 20} MB: this is no {path.name}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"'{path}' holds no JSON object")
    return value


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint; for one that others wrote, a fresh one with its digests.

    Raises:
        CheckpointError: no checkpoint, or a manifest that does not parse.
    """
    kind = kind_of(folder)
    path = folder / MANIFEST
    if not path.is_file():
        files = {file.name: sha256_file(file) for file in model_files(folder)}
        return Manifest(id=digest(files), kind=kind, files=files)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"'{path}' is over {MAX_JSON_BYTES >> 20} MB: this is no {MANIFEST}")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"'{path}' does not parse: {error}; pull or make this checkpoint again") from None


def verify(folder: Path) -> Manifest:
    """Re-hash every model file against the manifest.

    Raises:
        CheckpointError: a file is missing, added or altered; it is named.
    """
    manifest = read(folder)
    found = {file.name: sha256_file(file) for file in model_files(folder)}
    for name in sorted(manifest.files.keys() | found.keys()):
        want, have = manifest.files.get(name), found.get(name)
        if want != have:
            state = "missing" if have is None else "not in the manifest" if want is None else "altered"
            raise CheckpointError(f"'{folder / name}' is {state}: pull or train this checkpoint again")
    if digest(found) != manifest.id:
        raise CheckpointError(f"'{folder / MANIFEST}' names an id that its files do not have")
    return manifest


def check_output(path: Path, *sources: Path) -> None:
    """Refuse to put a checkpoint where it would replace something else than a checkpoint.

    Args:
        path: where the checkpoint will be: nothing, an empty folder, or a checkpoint with a manifest.
        sources: folders that are still needed; `path` may be none of them, and hold none of them.

    Raises:
        ConfigError: it may not go there.
    """
    if not path.exists():
        return
    for source in sources:
        if source.resolve().is_relative_to(path.resolve()):
            raise ConfigError(f"the output '{path}' is or holds '{source}', which is still needed: name another folder")
    if not path.is_dir() or (any(path.iterdir()) and not (path / MANIFEST).is_file()):
        raise ConfigError(f"the output '{path}' is there and is no checkpoint: name another folder, or remove it first")


def write(folder: Path, manifest: Manifest) -> None:
    """Write a changed manifest (a certificate, a metric) beside unchanged model files."""
    write_file(folder / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


@contextlib.contextmanager
def writing(path: Path, **lineage: Any) -> Iterator[Path]:
    """Yield a folder to fill; when the block ends well it gets a manifest and becomes `path`, whole.

    Args:
        path: where the checkpoint will be; an older one there is replaced.
        lineage: the manifest's fields besides id, kind and files.
    """
    with folder_aside(path) as folder:
        yield folder
        complete(folder, **lineage)


def complete(folder: Path, **lineage: Any) -> Manifest:
    """Write the manifest of a folder whose model files are all there."""
    files = {file.name: sha256_file(file) for file in model_files(folder)}
    manifest = Manifest(id=digest(files), kind=kind_of(folder), files=files, **lineage)
    write(folder, manifest)
    return manifest
