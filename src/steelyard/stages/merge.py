"""An adapter added to its base: a whole model, as every tool reads it."""

from __future__ import annotations

from pathlib import Path

from steelyard.checkpoint import manifest
from steelyard.errors import ConfigError
from steelyard.models import lora, weights
from steelyard.models.opening import open_checkpoint


def merge(adapter: Path, output: Path) -> str:
    """Write the model that an adapter and its base make to `output`; returns its id.

    Raises:
        ConfigError: no adapter, or an output that is the source or no checkpoint.
        CheckpointError: the adapter or its base is missing or broken, or the base is quantised.
    """
    if manifest.kind_of(adapter) != "adapter":
        raise ConfigError(f"'{adapter}' is a model already: there is nothing to merge")
    manifest.check_output(output, adapter, manifest.base_of(adapter))
    parent = manifest.read(adapter)
    opened = open_checkpoint(adapter)
    assert opened.adapter is not None, "it is one"
    lora.merge(opened.decoder, opened.adapter)
    recipe = {**parent.recipe, "merge": {}}
    with manifest.writing(output, parent=parent.id, data=parent.data, recipe=recipe, metrics=parent.metrics) as folder:
        weights.save(opened.decoder, folder, opened.base)
    return manifest.read(output).id
