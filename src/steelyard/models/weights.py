"""From a checkpoint folder to a model and back: names, dtypes, quantised layers. Weights are mapped, not read.

Knows the safetensors files; knows nothing of training or serving.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from steelyard.checkpoint import manifest
from steelyard.errors import CheckpointError
from steelyard.models import config as decoder_config
from steelyard.models import head_tokens, quantized, smoothing, sparse
from steelyard.models.config import DecoderConfig
from steelyard.models.decoder import Decoder
from steelyard.models.linear import QuantizedEmbedding, QuantizedLinear

WEIGHTS = "model.safetensors"
# What a model derived from another keeps of it, besides the weights.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    head_tokens.FILE,
)
ARCHITECTURES = {
    "LlamaForCausalLM": Decoder,
    "MistralForCausalLM": Decoder,
    "Qwen2ForCausalLM": Decoder,
    "Qwen3ForCausalLM": Decoder,
    "Gemma3ForCausalLM": Decoder,
}


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    """Load a model checkpoint for evaluation.

    Args:
        folder: the checkpoint; dense weights, or quantised ones as `quantized` reads them.
        dtype: of dense weights and of activations.

    Raises:
        CheckpointError: missing, an adapter, an unknown architecture, or weights that do not fit `config.json`.
    """
    if manifest.kind_of(folder) == "adapter":
        raise CheckpointError(f"'{folder}' is an adapter: name its base model, and the adapter beside it")
    raw = manifest.read_json(folder / "config.json")
    architecture = next(iter(raw.get("architectures") or ["LlamaForCausalLM"]))
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"'{folder}': architecture '{architecture}' is not known here; known: {', '.join(ARCHITECTURES)}"
        )
    config = decoder_config.parse(raw)
    tensors = read_tensors(folder)
    with torch.device("meta"):
        decoder = ARCHITECTURES[architecture](config)
    if config.quantization is not None:
        quantized.check(config.quantization, folder)
        quantized.place(decoder, tensors, dtype)
        table = decoder.model.embed_tokens
        if config.tied and isinstance(table, QuantizedEmbedding):
            decoder.lm_head = QuantizedLinear(table.weight, table.weight_scale, None, dtype)  # type: ignore[assignment]
    _assign(decoder, tensors, dtype, folder)
    if raw.get(smoothing.FIELD):
        decoder.smoothing = smoothing.load(folder, _smoothed_sizes(config))
    return decoder.eval().requires_grad_(False)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's `model*.safetensors`, mapped from the files; sparse ones are made whole."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError(f"'{folder}' has no model.safetensors: the checkpoint is incomplete; pull it again")
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        try:
            with safetensors.safe_open(path, "pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"'{path}' cannot be read: {error}") from None
    return sparse.restored(tensors)


def _smoothed_sizes(config: DecoderConfig) -> dict[str, int]:
    width = {"input_layernorm": config.width, "post_attention_layernorm": config.width, "up_proj": config.feed_forward}
    return {f"model.layers.{layer}.{name}": size for layer in range(config.layers) for name, size in width.items()}


def _assign(decoder: Decoder, tensors: dict[str, torch.Tensor], dtype: torch.dtype, folder: Path) -> None:
    wanted = {name: parameter.shape for name, parameter in decoder.named_parameters()}
    if decoder.config.tied:
        tensors.pop("lm_head.weight", None)
    missing = sorted(wanted.keys() - tensors.keys())
    # Llama files of old carry buffers that are computed now.
    unknown = sorted(name for name in tensors.keys() - wanted.keys() if "rotary_emb" not in name)
    if missing or unknown:
        what = f"lacks '{missing[0]}'" if missing else f"has an unknown '{unknown[0]}'"
        raise CheckpointError(f"'{folder}' {what}: its weights do not fit its config.json")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"'{folder}': '{name}' is {tuple(tensors[name].shape)}, config.json says {tuple(shape)}"
            )
        path, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(path), leaf, nn.Parameter(tensors[name].to(dtype), requires_grad=False))
    if decoder.config.tied and isinstance(decoder.lm_head, nn.Linear):
        decoder.lm_head.weight = decoder.model.embed_tokens.weight


def fill(network: nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Put tensors into a network, by name, in the network's dtypes; layers of integers as `quantized.place` does.

    Raises:
        CheckpointError: a name that is missing or unknown, or a shape that does not fit.
    """
    dtype = next((parameter.dtype for parameter in network.parameters()), torch.float32)
    quantized.place(network, tensors, dtype)
    wanted = quantized.plain(network)
    for name in sorted(wanted.keys() ^ tensors.keys()):
        what = "lacks" if name in wanted else "has an unknown"
        raise CheckpointError(f"'{folder}' {what} '{name}': its weights do not fit its config.json")
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)}, config.json says {tuple(tensor.shape)}"
            raise CheckpointError(f"'{folder}': '{name}' is {shapes}")
    network.load_state_dict({name: tensors[name].to(wanted[name].dtype) for name in wanted}, strict=False)


def save(decoder: Decoder, folder: Path, parent: Path, *, zeros: bool | None = None) -> None:
    """Write a dense model's weights into `folder`, with the tokenizer and configuration of `parent`.

    Args:
        decoder: the model.
        folder: exists.
        parent: folder of a model of the same shape.
        zeros: store zeros like any other weight; otherwise see `sparse.stored`. None: as the parent's are.
    """
    write(dict(decoder.named_parameters()), folder, zeros=not is_sparse(parent) if zeros is None else zeros)
    copy_companions(parent, folder)


def write(tensors: Mapping[str, torch.Tensor], folder: Path, *, zeros: bool) -> None:
    """Write tensors as `folder`'s weights; see `save`."""
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(plain if zeros else sparse.stored(plain), folder / WEIGHTS, metadata={"format": "pt"})


def is_sparse(folder: Path) -> bool:
    """Whether a checkpoint's zeros are not stored."""
    path = folder / WEIGHTS
    if not path.is_file():
        return False
    with safetensors.safe_open(path, "pt") as file:
        return any(name.endswith(sparse.BITS) for name in file.keys())  # noqa: SIM118


def copy_companions(parent: Path, folder: Path) -> None:
    """Copy what a derived model keeps of its parent: configuration, tokenizer, chat template."""
    for name in COMPANIONS:
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(parent / name, folder / name)
