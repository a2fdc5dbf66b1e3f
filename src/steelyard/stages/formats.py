"""How rows are read for a checkpoint: as it was trained on, unless told otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from steelyard.checkpoint import manifest
from steelyard.data.chat import FormatConfig
from steelyard.errors import CheckpointError


def trained_format(checkpoint: Path, **overrides: Any) -> FormatConfig:
    """The row format in a checkpoint's lineage, or the defaults, with every override that is not None.

    Columns and the kind of file are not taken over: they belong to the file, not to the model.

    Raises:
        CheckpointError: no checkpoint, or a lineage that holds no row format where it should.
    """
    recorded: Any = manifest.read(checkpoint).recipe
    for key in ("train", "data"):
        recorded = recorded.get(key) if isinstance(recorded, dict) else None
    fields = {field.name for field in msgspec.structs.fields(FormatConfig)} - {"columns", "format"}
    taken = {key: value for key, value in recorded.items() if key in fields} if isinstance(recorded, dict) else {}
    try:
        trained = msgspec.convert(taken, FormatConfig)
    except msgspec.ValidationError as error:
        reason = f"'{checkpoint / manifest.MANIFEST}' holds no row format in recipe.train.data: {error}"
        raise CheckpointError(f"{reason}; pull or train this checkpoint again") from None
    return msgspec.structs.replace(trained, **{key: value for key, value in overrides.items() if value is not None})
