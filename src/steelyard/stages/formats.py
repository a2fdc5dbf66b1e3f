"""How rows are read for a checkpoint: as it was trained on, unless told otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from steelyard.checkpoint import manifest
from steelyard.data.chat import FormatConfig


def trained_format(checkpoint: Path, **overrides: Any) -> FormatConfig:
    """The row format in a checkpoint's lineage, or the defaults, with every override that is not None.

    Columns and the kind of file are not taken over: they belong to the file, not to the model.
    """
    recorded = manifest.read(checkpoint).recipe.get("train", {}).get("data", {})
    fields = {field.name for field in msgspec.structs.fields(FormatConfig)} - {"columns", "format"}
    taken = {key: value for key, value in recorded.items() if key in fields}
    taken |= {key: value for key, value in overrides.items() if value is not None}
    return msgspec.convert(taken, FormatConfig)
