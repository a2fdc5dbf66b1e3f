"""A checkpoint in another program's format: a decoder as GGUF, for llama.cpp and what is built on it."""

# N rows  M columns  G groups of columns

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from steelyard.checkpoint import gguf_encode, gguf_metadata, gguf_vocabulary, gguf_write, manifest, safetensors
from steelyard.checkpoint.gguf_config import ARCHITECTURES
from steelyard.checkpoint.gguf_places import Place, permute, places
from steelyard.checkpoint.gguf_write import Tensor
from steelyard.errors import CheckpointError, ConfigError
from steelyard.models import classifiers, lora, weights
from steelyard.models.decoder import Decoder
from steelyard.models.linear import QuantizedEmbedding, QuantizedWeight
from steelyard.models.opening import Opened, open_checkpoint

Kind = Literal["q8_0", "q4_0", "bf16", "f16", "f32"]
Report = Callable[[int, int], None]
PIECE_VALUES = 1 << 22
"""Values rounded at a time, about."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    checkpoint: str
    """The id of what it was made of; the file names it as `steelyard.checkpoint`."""
    kind: str
    bytes: int
    kept: int
    """Tensors whose integers are the checkpoint's own."""


def gguf(source: Path, output: Path, kind: Kind = "q8_0", report: Report = lambda done, of: None) -> Exported:
    """Write a decoder (an adapter is merged into its base first) as one GGUF file.

    Matrices are rounded to `kind` as llama.cpp does it, vectors are float32. Where rows are no multiple of 32 a type of
    integers gives way to float16; embedding and head have 8 bits in a file of 4. Integers that the checkpoint has are
    kept as they are wherever the type holds them: all that is rounded then are their scales, to float16.

    Args:
        source: the checkpoint.
        output: the file, whole or not there; `.gguf`.
        kind: the type.
        report: told how many values are done, of how many.

    Raises:
        ConfigError: no decoder, an output of another name, or a type that does not hold the weights.
        CheckpointError: missing or broken, a setting or a tokenizer that GGUF cannot say, or an adapter on a quantised
            base.
        OSError: the output cannot be written.
    """
    check_output(output, ".gguf")
    if manifest.kind_of(source) == "model" and classifiers.architecture(source) not in ("", *weights.ARCHITECTURES):
        raise ConfigError(
            f"'{source}' is a {classifiers.architecture(source)}: GGUF is for language models "
            f"({', '.join(weights.ARCHITECTURES)}); encoders and classifiers are written by `steelyard export onnx`"
        )
    opened = open_checkpoint(source, _dtype(manifest.base_of(source)))
    if opened.adapter is not None:
        lora.merge(opened.decoder, opened.adapter)
    config, identity = _config(opened), manifest.read(source).id
    if config["model_type"] not in ARCHITECTURES:
        raise ConfigError(f"'{source}' is a {config['model_type']}, which is read out of GGUF here and not written")
    metadata = gguf_metadata.hyperparameters(config, source.resolve().name, kind.upper())
    metadata |= gguf_vocabulary.vocabulary(opened.base, opened.tokenizer, config["vocab_size"])
    if opened.template is not None:
        metadata["tokenizer.chat_template"] = opened.template.source
    metadata["steelyard.checkpoint"] = identity
    stored = [_Stored(opened.decoder, name, place, kind.upper()) for name, place in places(config).items()]
    total = sum(one.rows * one.columns for one in stored)
    done = 0

    def content(one: _Stored) -> Iterator[NDArray[Any]]:
        nonlocal done
        for piece, values in one.pieces():
            yield piece
            done += values
            report(done, total)

    tensors = [Tensor(one.name, one.kind, one.place.shape, functools.partial(content, one)) for one in stored]
    factors = gguf_metadata.rope_factors(config)
    if factors is not None:
        tensors.insert(0, Tensor("rope_freqs.weight", "F32", factors.shape, lambda: [factors]))
    gguf_write.write(output, metadata, tensors)
    return Exported(output, identity, kind, output.stat().st_size, sum(one.kept for one in stored))


def check_output(output: Path, suffix: str) -> None:
    """Refuse to write over a file of another kind. Raises ConfigError: it is called otherwise."""
    if output.suffix != suffix:
        raise ConfigError(f"the output '{output}' is to be a {suffix} file: end its name in {suffix}")


def _dtype(folder: Path) -> torch.dtype:
    """What holds a model's weights as they are: bfloat16 if that is what they are stored in, else float32."""
    stored = {
        info.dtype
        for path in folder.glob("model*.safetensors")
        for name, info in safetensors.read_header(path).items()
        if not name.endswith("_scale")
    }
    return torch.float32 if stored & {"F32", "F16", "F64"} else torch.bfloat16


def _config(opened: Opened) -> dict[str, Any]:
    """The model's config as `gguf_config.read_config` would make it.

    llama.cpp attends to all that came before. So a model with a window has that for its context: up to there both see
    the same.
    """
    config = opened.decoder.config
    if config.feed_forward_bias:
        raise CheckpointError(f"'{opened.base}' has biases in its feed-forward layers, for which GGUF has no place")
    scaling = {"rope_type": config.rope.kind, **config.rope.scaling}
    if config.rope.kind == "yarn":
        original = int(scaling.get("original_max_position_embeddings") or config.context)
        scaling["original_max_position_embeddings"] = original
        scaling["factor"] = scaling.get("factor") or config.context / original
    return {
        "model_type": "llama" if config.model_type == "mistral" else config.model_type,
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": min([config.context, *(size for size in config.windows if size is not None)]),
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope.theta,
        "rope_scaling": scaling,
        "attention_bias": config.output_bias,
        "tie_word_embeddings": config.tied and not _columns(opened.decoder.model.embed_tokens),
    }


def _columns(layer: object) -> bool:
    """Whether a layer's columns have scales of their own: of an embedding whose head is smoothed, and so another."""
    return isinstance(layer, QuantizedEmbedding) and layer.column_scale is not None


class _Stored:
    """A tensor of a decoder on its way into the file.

    Args:
        decoder: whose.
        name: its name in the file.
        place: what it is there.
        kind: the type that was asked for.
    """

    def __init__(self, decoder: Decoder, name: str, place: Place, kind: str) -> None:
        self.name, self.place = name, place
        path, _, self.leaf = place.name.rpartition(".")
        self.layer = decoder.get_submodule(path)
        self.rows, self.columns = place.shape if len(place.shape) > 1 else (*place.shape, 1)
        self.kind = self._kind(kind)
        self.kept = (
            self.leaf == "weight"
            and isinstance(self.layer, QuantizedWeight)
            and not _columns(self.layer)
            and gguf_encode.fits(self.layer.bits, self.layer.group, self.kind)
        )

    def _kind(self, kind: str) -> str:
        if len(self.place.shape) == 1:
            return "F32"
        if kind in gguf_encode.LEAST_BITS and self.columns % gguf_encode.BLOCK:
            return "F16"
        return "Q8_0" if kind == "Q4_0" and self.name in ("token_embd.weight", "output.weight") else kind

    def pieces(self) -> Iterator[tuple[NDArray[Any], int]]:
        """Blocks, and of how many values they are. Raises as `gguf_encode.encode`, naming the tensor."""
        order = np.arange(self.rows)
        if self.place.heads:
            order = permute(order, self.place.heads)
        step = max(PIECE_VALUES // self.columns, 1)
        for start in range(0, self.rows, step):
            rows = torch.from_numpy(order[start : start + step])
            try:
                yield self._blocks(rows), len(rows) * self.columns
            except (CheckpointError, ConfigError) as error:
                raise type(error)(f"'{self.place.name}' {error}") from None

    def _blocks(self, rows: torch.Tensor) -> NDArray[Any]:
        layer = self.layer
        if self.leaf != "weight" or not isinstance(layer, QuantizedWeight):
            return gguf_encode.encode(getattr(layer, self.leaf)[rows].float().numpy(), self.kind)
        if self.kept:
            scales = layer.weight_scale[rows].float()
            return gguf_encode.keep(layer.values(rows).numpy(), scales.numpy(), self.kind)
        return gguf_encode.encode(layer.numbers(rows).numpy(), self.kind)
