"""What a file is, by its name and first bytes, and what is said of a pickle. Opens nothing further."""

from __future__ import annotations

import zipfile
from pathlib import Path

from steelyard.errors import UnsafeArtifactError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
PICKLE_PROTOCOLS = range(2, 6)
PICKLE_ADVICE = (
    "is a pickle, which runs code when it is read, so it is never opened: "
    "take the model's safetensors, or convert it to safetensors on a machine that may be lost"
)
ZIP_MAGIC = b"PK"
TAIL_BYTES = 1 << 20


def refuse_pickle(path: Path) -> None:
    """Refuse a file that is a pickle by its name, its first bytes, or, in a zip, its `data.pkl`.

    Raises:
        UnsafeArtifactError: it is one.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UnsafeArtifactError(f"'{path}' {PICKLE_ADVICE}")
    with path.open("rb") as file:
        start = file.read(4)
        pickled = len(start) > 1 and start[0] == 0x80 and start[1] in PICKLE_PROTOCOLS
        if start.startswith(ZIP_MAGIC):
            # torch writes its pickle as `<name>/data.pkl`; every entry's name stands in the directory at the end.
            size = file.seek(0, 2)
            file.seek(max(size - TAIL_BYTES, 0))
            pickled = b"/data.pkl" in file.read() and zipfile.is_zipfile(path)
    if pickled:
        raise UnsafeArtifactError(f"'{path}' {PICKLE_ADVICE}")
