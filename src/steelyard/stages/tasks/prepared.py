"""What every task's data become before a run begins; and how conversations are read, which several tasks share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import numpy as np
import torch

from steelyard import __version__
from steelyard.atomic import sweep
from steelyard.checkpoint import manifest
from steelyard.data import chat, readers
from steelyard.data.rows import Conversation, TokenRow
from steelyard.data.split import Mask, first_of_each, held_out, parted, remove_duplicates, split
from steelyard.data.token_rows import TokenRows
from steelyard.errors import ConfigError, DataError
from steelyard.evaluate import classification
from steelyard.runs import Run
from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.task import Task

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
METRICS: dict[str, Callable[[torch.Tensor], float]] = {
    "validation_accuracy": classification.accuracy,
    "validation_mcc": classification.matthews,
}
"""Of a classifier's counts."""


LARGE = 256 << 20
"""Bytes of a file whose rows are kept in mapped files as tokens, not in memory."""
PACKED = 4
"""Bytes of text to one of Parquet, about."""
DIGEST = "S16"
ORIGIN = "data.json"
"""Written beside rows that were made ready."""


class Origin(msgspec.Struct, frozen=True):
    """Where rows are from: files with their sha256."""

    sources: dict[str, str]
    files: dict[str, str]


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A run whose data have been read."""

    config: TrainConfig
    """With what the data said: their labels."""
    counts: dict[str, int]
    """Of the data."""
    parent: str | None
    """Id of the base; None: it begins from nothing."""
    build: Callable[[Run], Task]
    """Opens the network. May leave what it learnt of the data, such as a tokenizer, in the run's folder."""
    digests: dict[str, str]
    """Of the data, by name: what the run's checkpoints say of their origin."""


def file_digests(config: TrainConfig) -> dict[str, str]:
    """Of the files that a run's rows stand in, and of those that they were made from, as far as `data.json` says."""
    files = [Path(config.data.train)] + ([Path(config.data.validation)] if config.data.validation else [])
    train, *validation = (manifest.sha256_file(path) for path in files)
    digests = named(config, train, validation[0] if validation else None)
    for path in files:
        digests |= {f"{path.name} from {name}": digest for name, digest in origin_of(path).items()}
    return digests


def origin_of(file: Path) -> dict[str, str]:
    """The sources that `data.json` beside a file names; none, if the file was changed since."""
    try:
        said = msgspec.json.decode((file.parent / ORIGIN).read_bytes(), type=Origin)
    except (OSError, msgspec.MsgspecError, ValueError):
        return {}
    return said.sources if said.files.get(file.name) == manifest.sha256_file(file) else {}


def digest_of(named: Iterable[tuple[str, str]]) -> str:
    """One digest of many files: over their names, relative to their folder, and their digests."""
    together = hashlib.sha256()
    for name, digest in sorted(named):
        together.update(f"{digest}  {name}\n".encode())
    return together.hexdigest()


def conversations(config: TrainConfig) -> tuple[TrainConfig, list[Conversation], list[Conversation]]:
    """The rows to learn from and to validate on; and the configuration with the data's labels spelt out, so that the
    validation file is asked the same question, and the checkpoint knows what it can answer.
    """
    rows = chat.read(Path(config.data.train), config.data)
    data = config.data
    if rows[0].label is not None and not data.labels:
        data = msgspec.structs.replace(data, labels=classification.labels_of(rows))
        config = msgspec.structs.replace(config, data=data)
    if data.deduplicate:
        rows = remove_duplicates(rows)
    if data.validation is None:
        return (config, *split(rows, data.holdout, config.seed))
    check_one_way(config)
    held = chat.read(Path(data.validation), data)
    learnt = {row.prompt_key: row for row in rows}
    for row in held:
        if row.prompt_key in learnt:
            raise _in_both(row, learnt[row.prompt_key])
    return config, rows, held


class Kept:
    """Rows of a file, read again each time instead of being held.

    Args:
        path: the file.
        data: how it is read.
        kept: `[N]`, which of its rows these are.
        mark: of the file, when that was decided.

    Raises:
        DataError: while they are read: the file is another one by now.
    """

    def __init__(self, path: Path, data: DataConfig, kept: Mask, mark: Mark) -> None:
        self.path, self._data, self._kept, self._mark = path, data, kept, mark

    def __len__(self) -> int:
        return int(self._kept.sum())

    def __iter__(self) -> Iterator[Conversation]:
        number = -1
        for number, row in enumerate(chat.iterate(self.path, self._data)):
            if number >= len(self._kept):
                break
            if self._kept[number]:
                yield row
        if number != len(self._kept) - 1 or _mark(self.path) != self._mark:
            raise DataError("the file was changed while it was read: begin again", file=self.path)


Mark = tuple[int, int, int]


def _mark(path: Path) -> Mark:
    """What changes when a file does."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def streamed(config: TrainConfig) -> tuple[TrainConfig, Kept, list[Conversation]]:
    """As `conversations`, of more rows than memory holds: those to learn from are in the order of their file.

    A first pass keeps two digests of each row, which decide on duplicates, the split and leaks.
    """
    data, path = config.data, Path(config.data.train)
    wholes, asked = bytearray(), bytearray()
    labels: set[str] = set()
    count, unlabelled = 0, None
    readers.check_file(path)
    mark = _mark(path)
    for row in chat.iterate(path, data):
        count += 1
        if row.label is None:
            unlabelled = unlabelled or row
        else:
            labels.add(row.label)
        wholes += _digest(row.key) if data.deduplicate else b""
        asked += _digest(row.prompt_key)
    if labels and unlabelled is not None:
        reason = "has no label; classification needs labelled rows"
        raise DataError(reason, file=unlabelled.file, line=unlabelled.line)
    if labels and not data.labels:
        data = msgspec.structs.replace(data, labels=tuple(sorted(labels)))
        config = msgspec.structs.replace(config, data=data)
    texts = np.frombuffer(asked, DIGEST)
    kept = first_of_each(np.frombuffer(wholes, DIGEST)) if data.deduplicate else np.ones(count, np.bool_)
    if data.validation is None:
        held = np.zeros(count, np.bool_)
        held[kept] = held_out(texts[kept], data.holdout, config.seed)
        validation = list(Kept(path, data, held, mark)) if held.any() else []
        return config, Kept(path, data, kept & ~held, mark), validation
    check_one_way(config)
    learnt, validation = Kept(path, data, kept, mark), chat.read(Path(data.validation), data)
    there = np.isin(np.array([_digest(row.prompt_key) for row in validation], DIGEST), texts[kept])
    for row in (row for row, twice in zip(validation, there, strict=True) if twice):
        raise _in_both(row, [twin for twin in learnt if twin.prompt_key == row.prompt_key][-1])
    return config, learnt, validation


def _digest(key: Hashable) -> bytes:
    return hashlib.blake2b(repr(key).encode(errors="surrogatepass"), digest_size=16).digest()


def is_large(file: str) -> bool:
    """Whether the tokens of a file's rows are to stand in mapped files."""
    path = Path(file)
    return path.stat().st_size * (PACKED if path.suffix.lower() == readers.PARQUET else 1) >= LARGE


def mapped_rows(run: Run, config: TrainConfig, rows: Iterable[TokenRow], *made_with: str) -> TokenRows:
    """Token rows in files of the run's folder, where a run that goes on finds them again.

    Args:
        run: the run, whose folder nobody else writes to.
        config: its configuration.
        rows: read if they are not there already.
        made_with: what decides how they are, besides file and configuration.
    """
    parts = [__version__, manifest.sha256_file(Path(config.data.train)), *made_with]
    said = msgspec.json.encode([parts, config.data, config.seed])
    sweep(run.folder)
    return TokenRows.mapped(run.folder / "prepared", hashlib.sha256(said).hexdigest(), rows)


def _in_both(row: Conversation, twin: Conversation) -> DataError:
    reason = f"the same text is in the training file, line {twin.line}: the validation would be too kind"
    return DataError(reason, file=row.file, line=row.line)


class Placed(Protocol):
    """A row that knows where it stands."""

    @property
    def file(self) -> Path | None:
        """The file that it stands in."""
        ...

    @property
    def line(self) -> int | None:
        """Its line there."""
        ...


Row = TypeVar("Row")


def parts(
    config: TrainConfig,
    rows: Sequence[Row],
    read: Callable[[Path], list[Row]],
    key: Callable[[Row], Hashable],
    place: Callable[[Row], Placed],
) -> tuple[list[Row], list[Row]]:
    """Rows to learn from and rows to validate on: held out, or a file's of their own.

    Args:
        config: says which.
        rows: of the training file.
        read: reads the validation file.
        key: what makes two rows the same example.
        place: where a row stands.

    Raises:
        ConfigError: both ways at once, or more to hold out than there is.
        DataError: an example that is in both.
    """
    if config.data.validation is None:
        return parted(rows, key, config.data.holdout, config.seed)
    check_one_way(config)
    held = read(Path(config.data.validation))
    learnt = {key(row): row for row in rows}
    for row in held:
        if (twin := learnt.get(key(row))) is not None:
            where = f"line {place(twin).line}" if place(twin).line else f"'{place(twin).file}'"
            reason = f"the same is in the training data, {where}: the validation would be too kind"
            raise DataError(reason, file=place(row).file, line=place(row).line)
    return list(rows), held


def named(config: TrainConfig, train: str, validation: str | None) -> dict[str, str]:
    """Digests of both places by their names, which tell them apart."""
    data = config.data
    if validation is None or data.validation is None:
        return {Path(data.train).name: train}
    first, second = Path(data.train).name, Path(data.validation).name
    if first == second:
        first, second = f"train: {first}", f"validation: {second}"
    return {first: train, second: validation}


def check_one_way(config: TrainConfig) -> None:
    """Rows to validate on come from a file, or are held out. Raises ConfigError: both."""
    if config.data.holdout and config.data.validation is not None:
        raise ConfigError("data.holdout and data.validation exclude each other: leave one out")
