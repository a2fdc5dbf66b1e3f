"""An export of OpenAI's fine-tuning: its job objects, and the folder with the files they name. Knows no server."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from steelyard.checkpoint.manifest import sha256_file
from steelyard.data import chat
from steelyard.data.readers import check_file, json_kind, json_rows
from steelyard.errors import DataError

LISTING = "files.jsonl"
"""In the folder of the files, if it is there: OpenAI's file objects, which say what each was called."""
SUPERVISED = "supervised"
GIVEN_UP = {"failed": "it failed at OpenAI", "cancelled": "it was cancelled at OpenAI"}
SUFFIX_PART, PARTS = 3, 5
"""Of `ft:BASE:ORGANIZATION:SUFFIX:ID`."""

Row = dict[str, Any]


class Supervised(msgspec.Struct, frozen=True):
    """How a supervised job trained."""

    hyperparameters: Row | None = None


class Method(msgspec.Struct, frozen=True):
    """What a job learnt by."""

    type: str
    supervised: Supervised | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A fine-tuning job as OpenAI gives it, as far as it matters for making it again."""

    id: str
    model: str
    training_file: str
    created_at: int | float = 0
    status: str | None = None
    validation_file: str | None = None
    hyperparameters: Row | None = None
    method: Method | None = None
    seed: int | None = None
    metadata: dict[str, str] | None = None
    integrations: list[Any] | None = None
    user_provided_suffix: str | None = None
    fine_tuned_model: str | None = None

    @property
    def given_up(self) -> str | None:
        """Why there is nothing to make again: it made nothing."""
        return GIVEN_UP.get(self.status or "")

    @property
    def refusal(self) -> str | None:
        """Why it cannot be made again, whatever is served."""
        if self.model.startswith("ft:") or ":ft-" in self.model:
            return f"its base is a fine-tuned model, '{self.model}': fine-tune what stands for it"
        if self.method is not None and self.method.type != SUPERVISED:
            return f"its method is {self.method.type}: only {SUPERVISED} jobs can be imported"
        if self.integrations:
            kinds = [str(one.get("type")) if isinstance(one, dict) else "unknown" for one in self.integrations]
            return f"it has integrations ({', '.join(kinds)}), which are not supported here"
        return None

    @property
    def files(self) -> list[str]:
        """Ids of its files."""
        return [name for name in (self.training_file, self.validation_file) if name is not None]

    @property
    def asked(self) -> Row:
        """What it trained with; what OpenAI left open is left out."""
        nested = self.method.supervised if self.method is not None else None
        found = (nested.hyperparameters if nested is not None else None) or self.hyperparameters or {}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def suffix(self) -> str | None:
        """What its owner called its model."""
        if self.user_provided_suffix:
            return self.user_provided_suffix
        parts = (self.fine_tuned_model or "").split(":")
        return parts[SUFFIX_PART] or None if len(parts) == PARTS else None


class Export(msgspec.Struct, frozen=True):
    """Jobs in the order in which they were made."""

    jobs: list[Job]
    more: bool
    """Whether a page says that there are jobs which the file lacks."""


def read(path: Path) -> Export:
    """The jobs of a file: a page, a list, or one object a line. One that is there twice counts once.

    Raises:
        DataError: it holds something else.
    """
    found: dict[str, Job] = {}
    pages: list[Row] = []
    for line, field, item in _items(path, pages):
        if not isinstance(item, dict):
            raise DataError(f"a job object is needed, not {json_kind(item)}", file=path, line=line, field=field)
        try:
            job = msgspec.convert(item, Job)
        except msgspec.ValidationError as error:
            raise DataError(f"no fine-tuning job of OpenAI's: {error}", file=path, line=line, field=field) from None
        found.setdefault(job.id, job)
    if not found:
        raise DataError("there are no jobs in it", file=path)
    jobs = list(found.values())[::-1]  # OpenAI lists the newest first
    jobs.sort(key=lambda job: job.created_at)
    return Export(jobs, any(page.get("has_more") is True for page in pages[-1:]))


def _items(path: Path, pages: list[Row]) -> Iterator[tuple[int | None, str | None, Any]]:
    """Line, field and value of whatever should be a job; pages are noted."""
    check_file(path)
    try:
        whole = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        numbered: Iterator[tuple[int | None, Any]] = iter(json_rows(path))
    else:
        numbered = iter([(None, whole)])
    for line, value in numbered:
        page = isinstance(value, dict) and isinstance(value.get("data"), list)
        if page:
            pages.append(value)
        if page or isinstance(value, list):
            name = "data" if page else ""
            for index, item in enumerate(value["data"] if page else value):
                yield line, f"{name}[{index}]", item
        else:
            yield line, None, value


@dataclass(frozen=True)
class LocalFile:
    """A file that a job learnt from, here on disk."""

    path: Path
    filename: str
    """What its owner called it."""

    @functools.cached_property
    def sha256(self) -> str:
        """Of its content."""
        return sha256_file(self.path)

    def problems(self) -> list[DataError]:
        """What is wrong with its rows."""
        return chat.problems(self.path)


class Folder:
    """The folder with an export's files.

    Args:
        path: the folder.

    Raises:
        DataError: its listing is wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: dict[str, str] = {}
        self._sizes: dict[str, Any] = {}
        listing = path / LISTING
        if listing.is_file():
            for line, row in json_rows(listing):
                identity, name = row.get("id"), row.get("filename")
                if not isinstance(identity, str) or not isinstance(name, str):
                    raise DataError("no file object of OpenAI's: it needs id and filename", file=listing, line=line)
                self._names[identity], self._sizes[identity] = name, row.get("bytes")

    def find(self, file_id: str) -> LocalFile | None:
        """A file by its id, its id and `.jsonl`, or, if the listing has it, its name there and that many bytes."""
        name = self._names.get(file_id)
        for called in (file_id, f"{file_id}.jsonl"):
            path = self._inside(called)
            if path is not None:
                return LocalFile(path, name or path.name)
        path = None if name is None else self._inside(name)
        if path is None or self._sizes[file_id] not in (None, path.stat().st_size):
            return None
        return LocalFile(path, path.name)

    def _inside(self, name: str) -> Path | None:
        """A file of the folder itself: what an export says names nothing outside."""
        path = self.path / name
        return path if Path(name).name == name and path.is_file() else None
