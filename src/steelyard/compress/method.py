"""What a compression method is, and all that there are."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from steelyard.compress.quantize import int8
from steelyard.compress.quantize.smoothing import Smoothed
from steelyard.models.decoder import Decoder


class Method(Protocol):
    """Writes a compressed form of a model."""

    def write(
        self, decoder: Decoder, folder: Path, parent: Path, portable: bool = False, smoothed: Smoothed | None = None
    ) -> None:
        """Write the compressed model into `folder`, with the tokenizer and configuration of `parent`.

        Args:
            decoder: the dense model.
            folder: exists and is empty.
            parent: folder of the model that it was loaded from.
            portable: prefer a layout that more readers know to a smaller one.
            smoothed: what has moved into the decoder's weights.
        """
        ...


METHODS: dict[str, Method] = {"int8": int8}
