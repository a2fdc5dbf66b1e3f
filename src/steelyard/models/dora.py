"""DoRA adapters: a weight's direction learnt by a low-rank pair, its size by a number for each output.

W' = m * V / |V|, V = W + (alpha / rank) B A, |V| of each output's row, taken as a constant by the gradient
(Liu et al. 2024, equations 5 and 11). In PEFT's layout on disk. Merged, it is a plain weight.
"""

# T tokens  R rank

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from steelyard.errors import CheckpointError
from steelyard.models.decoder import Decoder
from steelyard.models.dropout import dropout
from steelyard.models.lora import Adapter, check, pairs_of, read, scale_of

MAGNITUDE = "lora_magnitude_vector"


class DoraAdapter(Adapter):
    """See the module.

    Args:
        pairs: as `Adapter`'s.
        alpha: numerator of the scale alpha / rank.
        dropout: as `Adapter`'s; the base's own output is left whole.
        magnitudes: m of each layer, `[out]` float32; None: the base's sizes, so that nothing is changed yet.
        decoder: the base, which is looked at and left alone.

    Raises:
        CheckpointError: a layer that is quantised: it has no rows to take the size of.
    """

    def __init__(
        self,
        pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        alpha: float,
        dropout: float,
        magnitudes: Mapping[str, torch.Tensor] | None,
        decoder: Decoder,
    ) -> None:
        super().__init__(pairs, alpha, dropout)
        self.layers = {name: _dense(decoder, name) for name in pairs}
        self.magnitudes = dict(
            magnitudes or {name: layer.weight.detach().float().norm(dim=1) for name, layer in self.layers.items()}
        )

    @classmethod
    def begin(cls, adapter: Adapter, decoder: Decoder) -> DoraAdapter:
        """Of a fresh LoRA adapter's pairs."""
        return cls(adapter.pairs, adapter.alpha, adapter.dropout, None, decoder)

    def add(self, name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """`[T, in]`, `[T, out]` -> `[T, out]` with the layer's direction and size changed."""
        pair = self.pairs.get(name)
        if pair is None:
            return outputs
        layer, (a, b) = self.layers[name], pair
        factor = self._factor(name).to(outputs.dtype)
        if layer.bias is not None:
            outputs = outputs - layer.bias
        dropped = dropout(inputs, self.dropout) if self.training and self.dropout else inputs
        turned = torch.addmm(outputs, F.linear(dropped, a), b.T, alpha=self.alpha / a.shape[0]) * factor
        return turned if layer.bias is None else turned + layer.bias

    def _factor(self, name: str) -> torch.Tensor:
        """Size over |V|, `[out]` float32."""
        with torch.no_grad():
            size: torch.Tensor = super().merged(name, self.layers[name].weight.float()).norm(dim=1)
        factor: torch.Tensor = self.magnitudes[name] / size
        return factor

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A layer's weight `[out, in]` float32 with the adapter in it."""
        return super().merged(name, weight) * self._factor(name)[:, None]

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors of all A, B and m."""
        yield from super().parameters()
        for name, magnitude in self.magnitudes.items():
            yield f"{name}.{MAGNITUDE}", magnitude

    def save(self, folder: Path, base: str) -> None:
        """As `Adapter.save`; the configuration says that it is DoRA."""
        super().save(folder, base)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}, indent=2) + "\n")


def load(folder: Path, decoder: Decoder) -> Adapter:
    """Read a LoRA or DoRA adapter in PEFT's layout for `decoder`. Raises as `Adapter.load` does."""
    config = check(folder, ("use_dora",))
    if not config.get("use_dora"):
        return Adapter.load(folder, decoder)
    tensors = read(folder)
    sizes = {name: tensors.pop(name) for name in list(tensors) if name.endswith(f".{MAGNITUDE}")}
    pairs = pairs_of(tensors, decoder, folder)
    magnitudes = {}
    for name, (_, b) in pairs.items():
        found = sizes.pop(f"base_model.model.{name}.{MAGNITUDE}", None)
        if found is None or found.shape != (b.shape[0],):
            raise CheckpointError(f"'{folder}': '{name}' lacks a magnitude of {b.shape[0]} numbers")
        magnitudes[name] = found.float()
    if sizes:
        raise CheckpointError(f"'{folder}': '{min(sizes)}' is not known here")
    return DoraAdapter(pairs, scale_of(config, folder), 0.0, magnitudes, decoder)


def _dense(decoder: Decoder, name: str) -> nn.Linear:
    layer = decoder.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise CheckpointError(f"'{name}' is quantised: a DoRA adapter needs its base's plain weights")
    return layer
