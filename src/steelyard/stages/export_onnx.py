"""An encoder or a classifier as one ONNX file, whose graph takes any number of rows, and of tokens up to the context.

Inputs are called as Hugging Face calls them. Rows of texts are padded on the right; pixels are bytes: what the network
does to them first is in the graph. Sums are made in float32, whatever the checkpoint is stored in.
"""

# B rows  L longest row  N words of all rows  C classes  D width  H hidden  S side of an image

from __future__ import annotations

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steelyard.atomic import write_file
from steelyard.checkpoint import manifest
from steelyard.errors import ConfigError
from steelyard.models import classifiers, quantized
from steelyard.models.encoder import Encoder
from steelyard.models.inputs import ImageInputs, TextInputs, WordInputs
from steelyard.stages.export import check_output

OPSET = 18
"""Of the operators: read by every runtime since 2023."""
MAX_BYTES = (1 << 31) - (1 << 20)
"""Protocol buffers hold no more; a graph takes less than what is left of their 2 GB."""
BATCH, LENGTH, WORDS = "batch", "length", "words"
ROWS: dict[str, tuple[str, ...]] = {"input_ids": (BATCH, LENGTH), "attention_mask": (BATCH, LENGTH)}


@dataclass(frozen=True)
class ExportedOnnx:
    """What was written."""

    path: Path
    checkpoint: str
    """The id of what it was made of; the file names it as `steelyard.checkpoint`."""
    inputs: dict[str, tuple[str | int, ...]]
    """Sizes by name; those that may be any number by what they are."""
    output: str
    labels: tuple[str, ...]
    """Of a classifier; the file has them as `steelyard.labels`, in JSON."""
    bytes: int
    restored: bool
    """Whether the checkpoint's integers were written as the numbers that they stand for."""


@dataclass(frozen=True)
class _Graph:
    """A network and how its graph is called."""

    network: nn.Module
    example: dict[str, torch.Tensor]
    """Arguments by name; no size that may be another is 0 or 1."""
    axes: dict[str, tuple[str, ...]]
    """Of each argument: what its first sizes are, which may be any number."""
    output: str


def onnx(source: Path, output: Path) -> ExportedOnnx:
    """Write an encoder (of sentences), a classifier of texts or images, or a tagger as one ONNX file.

    The graph's inputs, int64 where nothing else is said: `input_ids` and `attention_mask` `[B, L]`; or `images`
    `[B, C, S, S]` uint8; of a tagger also `word_shapes` `[B, L]` and `word_places` `[N]`, see `WordInputs`. Its output,
    float32: `sentence_embedding` `[B, D]`, of length 1; or `logits` `[B, C]`, of a tagger `[N, C]`.

    Args:
        source: the checkpoint. What is quantised in it is written as the numbers that the integers stand for.
        output: the file, whole or not there; `.onnx`.

    Raises:
        ConfigError: another kind of model, more than 2 GB, an output of another name, or a library is missing.
        CheckpointError: missing or broken.
        OSError: the output cannot be written.
    """
    check_output(output, ".onnx")
    _check_libraries()
    graph, context, labels = _opened(source)
    network, restored = _plain(graph.network)
    size = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    if size > MAX_BYTES:
        raise ConfigError(f"'{source}' has {size >> 20} MB of weights: one ONNX file holds 2 GB")
    identity = manifest.read(source).id
    metadata = {"steelyard.checkpoint": identity}
    if labels:
        metadata["steelyard.labels"] = json.dumps(labels, ensure_ascii=False)
    if context is not None:
        metadata["steelyard.context"] = str(context)
    write_file(output, _written(network, graph, metadata))
    inputs = {
        name: (*graph.axes[name], *tensor.shape[len(graph.axes[name]) :]) for name, tensor in graph.example.items()
    }
    return ExportedOnnx(output, identity, inputs, graph.output, labels, output.stat().st_size, restored)


def _check_libraries() -> None:
    try:
        import onnxscript  # noqa: F401  # which torch.onnx writes with
    except ImportError:
        raise ConfigError("to write ONNX libraries are needed: pip install 'steelyard[onnx]'") from None


def _opened(source: Path) -> tuple[_Graph, int | None, tuple[str, ...]]:
    """A checkpoint's graph, most tokens of a row, and labels."""
    kind = classifiers.architecture(source) if manifest.kind_of(source) == "model" else "adapter"
    if kind in classifiers.ENCODERS:
        encoder = classifiers.load_encoder(source)
        graph = _Graph(_Sentences(encoder), _rows(), ROWS, "sentence_embedding")
        return graph, encoder.config.max_position_embeddings, ()
    if kind not in classifiers.ARCHITECTURES:
        raise ConfigError(
            f"'{source}' is no encoder or classifier ({kind or 'no architecture in config.json'}): "
            "language models are written by `steelyard export gguf`"
        )
    classifier = classifiers.load(source)
    network, inputs = classifier.network, classifier.inputs
    if isinstance(inputs, TextInputs):
        return _Graph(_Texts(network), _rows(), ROWS, "logits"), inputs.window or inputs.context, classifier.labels
    if isinstance(inputs, ImageInputs):
        images = torch.zeros(2, inputs.channels, inputs.side, inputs.side, dtype=torch.uint8)
        return _Graph(network, {"images": images}, {"images": (BATCH,)}, "logits"), None, classifier.labels
    if isinstance(inputs, WordInputs):
        if classifiers.chain_of(classifier) is not None:
            raise ConfigError(f"'{source}' finds a sentence's tags together, which is not written as ONNX")
        example = {**_rows(), "word_shapes": torch.ones(2, 3, dtype=torch.int64), "word_places": torch.arange(4)}
        axes = {**ROWS, "word_shapes": (BATCH, LENGTH), "word_places": (WORDS,)}
        return _Graph(_Words(network), example, axes, "logits"), inputs.context, classifier.labels
    raise ConfigError(f"'{source}' reads several kinds of things at once, which is not written as ONNX")


def _rows() -> dict[str, torch.Tensor]:
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    return {"input_ids": torch.zeros_like(mask), "attention_mask": mask}


def _written(network: nn.Module, graph: _Graph, metadata: Mapping[str, str]) -> bytes:
    """The file."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    names = {name for axes in graph.axes.values() for name in axes}
    sizes = {name: torch.export.Dim(name) for name in names}
    with _quiet():
        program = torch.onnx.export(
            network,
            tuple(graph.example.values()),
            input_names=list(graph.example),
            output_names=[graph.output],
            dynamic_shapes=tuple(
                {place: sizes[name] for place, name in enumerate(graph.axes[argument])} for argument in graph.example
            ),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # where in whose files each operator comes from
    program.model.metadata_props.update(metadata)
    proto = program.model_proto
    found = {one.name: tuple(size.dim_param for size in one.type.tensor_type.shape.dim) for one in proto.graph.input}
    assert all(found[name][: len(axes)] == axes for name, axes in graph.axes.items()), "a size became a constant"
    raw: bytes = proto.SerializeToString()
    return raw


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks on libraries that it does not need, and on its own future, are nobody's business here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _plain(network: nn.Module) -> tuple[nn.Module, bool]:
    """A copy in float32 of what ONNX has operators for, and whether it had layers of integers."""
    network = copy.deepcopy(network)
    restored = quantized.restore(network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.LSTM):
            network.set_submodule(name, _Lstm(layer))
    return network.float().eval().requires_grad_(False), restored


class _Sentences(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.encoder.embed(input_ids, _lengths(attention_mask))


class _Texts(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(input_ids, _lengths(attention_mask))
        return logits


class _Words(_Texts):
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        word_shapes: torch.Tensor,
        word_places: torch.Tensor,
    ) -> torch.Tensor:
        logits: torch.Tensor = self.network(input_ids, _lengths(attention_mask), word_shapes, word_places)
        return logits


def _lengths(attention_mask: torch.Tensor) -> torch.Tensor:
    """`[B]`, at least 1: a row without tokens is read as its padding."""
    return attention_mask.sum(1).clamp(min=1)


class _Lstm(nn.Module):
    """An LSTM as the one operator that ONNX has for it: torch.export would unroll it at the length of its example."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.hidden = lstm.hidden_size
        weights: dict[str, Any] = dict(lstm.named_parameters())
        self.inputs = nn.Parameter(_gates(weights["weight_ih_l0"])[None])
        self.states = nn.Parameter(_gates(weights["weight_hh_l0"])[None])
        biases = [_gates(weights["bias_ih_l0"]), _gates(weights["bias_hh_l0"])]
        self.bias = nn.Parameter(torch.cat(biases)[None])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """`[B, L, E]` -> `[B, L, H]`."""
        rows, length, _ = x.shape
        states = torch.onnx.ops.symbolic(
            "LSTM",
            (x.transpose(0, 1), self.inputs, self.states, self.bias),
            {"hidden_size": self.hidden},
            dtype=x.dtype,
            shape=(length, 1, rows, self.hidden),
            version=OPSET,
        )
        return states.squeeze(1).transpose(0, 1), None


def _gates(weight: torch.Tensor) -> torch.Tensor:
    """`[4 H, ...]`: PyTorch has input, forget, cell and output gate, ONNX input, output, forget and cell."""
    entry, forget, cell, out = weight.detach().chunk(4)
    return torch.cat([entry, out, forget, cell])
