"""The shapes of loading and unloading adapters, by vLLM's names."""

from __future__ import annotations

import msgspec

from steelyard.serve.protocol.fields import Fields


class LoadRequest(Fields):
    """`POST /v1/load_lora_adapter`."""

    stored = False
    lora_name: str
    lora_path: str
    base_model_name: str | None = None
    """Only needed where several base models are served."""


class UnloadRequest(Fields):
    """`POST /v1/unload_lora_adapter`."""

    stored = False
    lora_name: str


class AdapterStatus(msgspec.Struct, frozen=True):
    """What became of it."""

    lora_name: str
    loaded: bool
    digest: str | None = None
    """Of the adapter's tensors."""
