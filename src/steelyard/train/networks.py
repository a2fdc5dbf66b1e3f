"""Networks that begin from nothing, as a run's `[network]` describes them. Knows no torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from steelyard.errors import ConfigError


class LstmNetwork(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="lstm"):
    """Texts: Embedding, LSTM, LSTM, Dense ReLU, Dense softmax, with a tokenizer learnt from the training rows."""

    vocabulary: int = 2000
    """Most tokens of its tokenizer."""
    lowercase: bool = True
    embedding: int = 64
    hidden: int = 64
    dense: int = 64
    dropout: float = 0.2


class ConvNetwork(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="convnet"):
    """Images: a residual convolutional network."""

    image_size: int = 64
    """Pixels of the square that images are fitted into."""
    channels: int = 3
    """1: images are read as grey. 3: in colour."""
    widths: tuple[int, ...] = (32, 64, 128)
    """Channels of each stage."""
    blocks: int = 2
    """Residual blocks of a stage."""
    dropout: float = 0.1


class VitNetwork(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="vit"):
    """Images: a transformer over patches."""

    image_size: int = 64
    channels: int = 3
    patch: int = 8
    """Pixels of a patch's side."""
    hidden: int = 128
    layers: int = 6
    heads: int = 4
    dropout: float = 0.1


class SpeechNetwork(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="speech"):
    """Recordings: Whisper's encoder, smaller, with a character or none at each fiftieth of a second."""

    hidden: int = 144
    layers: int = 4
    heads: int = 4
    dropout: float = 0.1


class DecoderNetwork(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="decoder"):
    """Texts, to go on with: a Llama, with a tokenizer learnt from the training rows."""

    vocabulary: int = 4096
    """Most tokens of its tokenizer."""
    hidden: int = 320
    layers: int = 8
    heads: int = 5
    kv_heads: int = 5
    context: int = 1024
    """Most tokens that it sees."""


class EncoderNetwork(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="encoder"):
    """Texts, read from both sides: a BERT, with a tokenizer learnt from the training rows."""

    vocabulary: int = 8000
    lowercase: bool = True
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    context: int = 128
    dropout: float = 0.1


class FusionNetwork(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="fusion"):
    """Texts, images and recordings together: a tower for each, and how these are joined."""

    modalities: tuple[Literal["text", "image", "audio"], ...] = ("text", "image")
    """Which of them, in this order; a row may lack some."""
    how: Literal["late", "gated", "cross-attention"] = "gated"
    width: int = 128
    heads: int = 4
    text_model: str | None = None
    """A trained encoder for texts (a folder, or a source); none: a new one with a tokenizer learnt from the rows."""
    vocabulary: int = 4000
    text_layers: int = 2
    image_size: int = 64
    channels: int = 3
    widths: tuple[int, ...] = (32, 64, 128)
    blocks: int = 1
    audio_layers: int = 2
    dropout: float = 0.1
    drop_modality: float = 0.1
    """Share of the rows that learn without one of their modalities."""
    alone: float = 0.5
    """Share of the loss that the modalities bear each on its own: learning jointly alone, the quicker one leaves the
    others little to learn from (Wang et al. 2020)."""


Network = LstmNetwork | ConvNetwork | VitNetwork | SpeechNetwork | DecoderNetwork | EncoderNetwork | FusionNetwork
IMAGES = (ConvNetwork, VitNetwork)
OF_TASK: dict[str, tuple[type[Network], ...]] = {
    "generation": (DecoderNetwork,),
    "classification": (LstmNetwork, ConvNetwork, VitNetwork, FusionNetwork),
    "masked": (EncoderNetwork,),
    "transcription": (SpeechNetwork,),
}
"""Which kinds each task knows; the others begin from a model."""

MOST = {
    "vocabulary": 1 << 18,
    "embedding": 4096,
    "hidden": 4096,
    "dense": 4096,
    "image_size": 1024,
    "patch": 256,
    "layers": 64,
    "heads": 64,
    "kv_heads": 64,
    "context": 1 << 20,
    "width": 4096,
    "text_layers": 64,
    "audio_layers": 64,
    "blocks": 32,
}
"""The largest size that a field may have; the least is 1."""


def kind_of(network: Network) -> str:
    """What `network.kind` is."""
    return str(network.__struct_config__.tag)


def check(network: Network) -> None:
    """Refuse sizes that cannot be.

    Raises:
        ConfigError: the key and what it should be.
    """
    for key, value in ((field, getattr(network, field)) for field in network.__struct_fields__):
        if key in MOST and not 1 <= value <= MOST[key]:
            raise ConfigError(f"network.{key} must be 1 to {MOST[key]}, not {value}")
        if key in ("dropout", "drop_modality") and not 0 <= value < 1:
            raise ConfigError(f"network.{key} must be at least 0 and below 1, not {value}")
        if key == "alone" and not 0 <= value <= 1:
            raise ConfigError(f"network.alone must be 0 to 1, not {value}")
        if key == "channels" and value not in (1, 3):
            raise ConfigError(f"network.channels must be 1 (grey) or 3 (colour), not {value}")
        if key == "widths" and not (value and 1 <= min(value) <= max(value) <= 4096 and len(value) <= 8):
            raise ConfigError(f"network.widths must be one to eight numbers of channels up to 4096, not {value}")
    if isinstance(network, VitNetwork) and network.image_size % network.patch:
        raise ConfigError(f"network.patch {network.patch} must divide network.image_size {network.image_size}")
    if isinstance(network, DecoderNetwork) and network.heads % network.kv_heads:
        raise ConfigError(f"network.kv_heads {network.kv_heads} must divide network.heads {network.heads}")
    if isinstance(network, DecoderNetwork) and network.hidden % (2 * network.heads):
        raise ConfigError(f"twice network.heads {network.heads} must divide network.hidden {network.hidden}")
    if isinstance(network, FusionNetwork):
        if list(network.modalities) != [name for name in ("text", "image", "audio") if name in network.modalities]:
            raise ConfigError("network.modalities must be some of text, image, audio, each once, in this order")
        if not network.modalities or network.width % network.heads:
            raise ConfigError("network.modalities must not be empty, and network.heads must divide network.width")
        if network.alone == 1 and network.how != "late":
            raise ConfigError('network.alone must be below 1, unless network.how is "late": nothing would be joined')
    if isinstance(network, VitNetwork | SpeechNetwork | EncoderNetwork) and network.hidden % network.heads:
        raise ConfigError(f"network.heads {network.heads} must divide network.hidden {network.hidden}")
