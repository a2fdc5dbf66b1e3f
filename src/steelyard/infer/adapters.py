"""The adapters of an engine: what each name means now, which of them have a place, and which rows wear which.

A name may be given to another adapter, or dropped, at any time: a request wears the version that its name meant when
it came, to its end. Versions are known by the digest of their tensors. `MOST_ADAPTERS` of them have a place; where one
more is asked for, the one longest unused that no row wears gives its place up, and is read again when it is named.
Reading is a thread's work, so that running rows go on meanwhile. Knows nothing of requests or the cache.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from steelyard.errors import CheckpointError, ModelNotFoundError, SteelyardError
from steelyard.kernels import library
from steelyard.kernels.steps import MOST_ADAPTERS
from steelyard.models.lora import Adapter


class Wearer(Protocol):
    """Computes rows that wear adapters."""

    def prepare(self, adapter: Adapter) -> object:
        """The adapter in the form that is computed; any thread may call this."""
        ...

    def wear(self, digest: str, weights: object) -> int:
        """Take a prepared adapter in; returns its place, one of `MOST_ADAPTERS`."""
        ...

    def take_off(self, place: int) -> None:
        """Free a place."""
        ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """An adapter that was read."""

    digest: str
    path: Path | None
    """Where it can be read again; None: it is kept in memory."""
    weights: object
    """As `Wearer.prepare` makes them."""


@dataclass(eq=False, slots=True)
class Version:
    """An adapter that some name means, or that some sequence began with."""

    digest: str
    path: Path | None
    weights: object | None
    """None: to be read again."""
    place: int | None = None
    names: int = 0
    """How many names mean it."""
    holders: int = 0
    """How many sequences were asked of it and have not ended."""
    rows: int = 0
    """How many of them run: its place is theirs."""


class Adapters:
    """Names, versions and places.

    Args:
        wearer: computes with them.
        read: a folder to an adapter; raises `CheckpointError`.
    """

    def __init__(self, wearer: Wearer, read: Callable[[Path], Adapter]) -> None:
        self._wearer, self._read = wearer, read
        self._names: dict[str, Version] = {}
        self._versions: dict[str, Version] = {}  # by digest
        self._placed: OrderedDict[Version, None] = OrderedDict()  # the longest unused first
        self._reading: dict[Version, futures.Future[Prepared]] = {}
        self._thread = futures.ThreadPoolExecutor(1, "adapters", initializer=use_one_core)

    def prepare(self, source: Path | Adapter) -> Prepared:
        """Read an adapter, or take one as it is; any thread may call this.

        Raises:
            CheckpointError: it cannot be read or does not fit the base.
        """
        path, adapter = (None, source) if isinstance(source, Adapter) else (source, self._read(source))
        if type(adapter) is not Adapter:  # another arithmetic than that of low-rank pairs
            raise CheckpointError("the engine wears LoRA adapters: run `steelyard merge` on this one first")
        return Prepared(adapter.digest(), path, self._wearer.prepare(adapter))

    def begin(self, path: Path) -> futures.Future[Prepared]:
        """`prepare` in the background, one after the other."""
        return self._thread.submit(self.prepare, path)

    def put(self, name: str, prepared: Prepared) -> str:
        """Let `name` mean this adapter from now on; returns its digest."""
        version = self._versions.get(prepared.digest)
        if version is None:
            version = self._versions[prepared.digest] = Version(prepared.digest, prepared.path, prepared.weights)
        version.path = prepared.path or version.path
        version.weights = version.weights or prepared.weights
        version.names += 1
        self._unname(name)
        self._names[name] = version
        self._find_place(version)
        self._tidy(version)
        return version.digest

    def drop(self, name: str) -> None:
        """Forget a name; who wears its adapter wears it to his end.

        Raises:
            ModelNotFoundError: there is no such name.
        """
        self.find(name)
        self._unname(name)

    def find(self, name: str) -> Version:
        """What `name` means now.

        Raises:
            ModelNotFoundError: there is no such name.
        """
        if name not in self._names:
            raise ModelNotFoundError(f"adapter '{name}' is not loaded", param="model", code="model_not_found")
        return self._names[name]

    def hold(self, version: Version | None) -> None:
        """A sequence was asked of it."""
        if version is not None:
            version.holders += 1

    def release(self, version: Version | None) -> None:
        """A sequence of it has ended."""
        if version is not None:
            version.holders -= 1
            self._tidy(version)

    def seat(self, version: Version | None) -> bool:
        """Whether one more row can wear it now, which then does; False: it is being read, or rows wear all places."""
        if version is None:
            return True
        if version.weights is None:
            if version not in self._reading:
                assert version.path is not None, "an adapter without a file was let go"
                self._reading[version] = self.begin(version.path)
            return False
        if not self._find_place(version):
            return False
        version.rows += 1
        return True

    def leave(self, version: Version | None) -> None:
        """A row wears it no more, for now or for ever."""
        if version is not None:
            version.rows -= 1

    def settle(self) -> list[tuple[Version, str]]:
        """Take in what has been read; returns what could not be, and why."""
        failed = []
        for version, reading in [item for item in self._reading.items() if item[1].done()]:
            del self._reading[version]
            try:
                prepared = reading.result()
                if prepared.digest != version.digest:
                    raise CheckpointError(f"the adapter at '{version.path}' is another one now: load it again")
                version.weights = version.weights or prepared.weights
            except SteelyardError as error:
                if version.weights is None:
                    failed.append((version, str(error)))
            self._tidy(version)
        return failed

    def wait(self) -> None:
        """Wait until something has been read, if anything is being read."""
        futures.wait(self._reading.values(), return_when=futures.FIRST_COMPLETED)

    def check_integrity(self, running: Iterable[Version | None], held: Iterable[Version | None]) -> None:
        """Every count is that of the sequences."""
        rows, holders = Counter(running), Counter(held)
        assert len(self._placed) <= MOST_ADAPTERS
        assert {*rows, *holders} - {None} <= set(self._versions.values()), "an adapter that is worn was forgotten"
        for version in self._versions.values():
            assert (version.rows, version.holders) == (rows[version], holders[version]), "an adapter was miscounted"
            assert (version.place is not None) == (version in self._placed)
            assert version.names or version.holders, "an adapter is kept for nobody"

    def _unname(self, name: str) -> None:
        version = self._names.pop(name, None)
        if version is not None:
            version.names -= 1
            self._tidy(version)

    def _find_place(self, version: Version) -> bool:
        if version.place is None:
            if len(self._placed) == MOST_ADAPTERS:
                idle = next((other for other in self._placed if not other.rows), None)
                if idle is None:
                    return False
                self._take_off(idle)
                self._tidy(idle)
            assert version.weights is not None
            version.place = self._wearer.wear(version.digest, version.weights)
            self._placed[version] = None
        self._placed.move_to_end(version)
        return True

    def _take_off(self, version: Version) -> None:
        assert version.place is not None
        assert not version.rows, "a row wears it"
        self._wearer.take_off(version.place)
        version.place = None
        del self._placed[version]

    def _tidy(self, version: Version) -> None:
        """Let go of what nobody needs."""
        if not version.holders and not version.names:
            if version.place is not None:
                self._take_off(version)
            if self._versions.get(version.digest) is version:
                del self._versions[version.digest]
        if version.place is None and not version.holders and version.path is not None:
            version.weights = None


def use_one_core() -> None:
    """Let the reading thread start no threads of its own: they would spin beside those that compute."""
    with contextlib.suppress(OSError):  # torch has another runtime here: it costs speed alone
        ctypes.CDLL(library.openmp_runtime()).omp_set_num_threads(1)
