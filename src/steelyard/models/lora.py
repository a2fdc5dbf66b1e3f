"""LoRA adapters: y + (alpha / rank) * B A x (Hu et al. 2021, section 4.1), in PEFT's layout on disk.

An adapter is passed along with the tokens and never changes the model's modules, so that training, evaluation and
the engine run the very same line. Merging adds it to the weights, once, in float32.
"""

# T tokens  R rank

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from steelyard.checkpoint.manifest import kind_of, read_json
from steelyard.errors import CheckpointError, ConfigError
from steelyard.models import smoothing
from steelyard.models.decoder import Decoder
from steelyard.models.dropout import dropout

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
MAX_RANK = 1024
# Fields of adapter_config.json that change the arithmetic, and the only values that we compute.
HONOURED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    # The others (PiSSA, OLoRA, CorDA, LoftQ) change the base's weights when they begin.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


class Adapter:
    """One adapter worn by every token of a pack.

    Args:
        pairs: by full layer name (`model.layers.0.self_attn.q_proj`), A `[R, in]` and B `[out, R]`.
        alpha: numerator of the scale alpha / rank.
        dropout: probability of dropping an input of A while training.
    """

    def __init__(
        self, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], alpha: float, dropout: float = 0.0
    ) -> None:
        self.pairs, self.alpha, self.dropout = dict(pairs), alpha, dropout
        self.training = False

    @classmethod
    def create(
        cls,
        decoder: Decoder,
        *,
        rank: int,
        alpha: float,
        targets: Sequence[str],
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Adapter:
        """A fresh adapter: A by Kaiming's uniform rule, B zero, so that it changes nothing yet.

        Args:
            decoder: the base model; its linear layers whose last name is in `targets` get a pair.
            rank: R, at most the layer's sides.
            alpha: numerator of the scale.
            targets: last names such as `q_proj`.
            dropout: see the class.
            generator: draws A.

        Raises:
            ConfigError: a target that is no layer of this model.
        """
        pairs = {}
        sizes = linear_sizes(decoder)
        known = sorted({name.rsplit(".", 1)[-1] for name in sizes})
        for target in targets:
            if target not in known:
                raise ConfigError(f"no layer called '{target}' can have an adapter; this model has: {', '.join(known)}")
        for name, (outputs, inputs) in sizes.items():
            if name.rsplit(".", 1)[-1] in targets:
                bound = 1 / math.sqrt(inputs)  # kaiming_uniform(a=sqrt(5)), as the paper's code and PEFT
                a = (torch.rand(rank, inputs, generator=generator) * 2 - 1) * bound
                pairs[name] = (a.to(decoder.dtype), torch.zeros(outputs, rank, dtype=decoder.dtype))
        return cls(pairs, alpha, dropout)

    def add(self, name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """`[T, in]`, `[T, out]` -> `[T, out]` with the layer's correction added."""
        pair = self.pairs.get(name)
        if pair is None:
            return outputs
        if self.training and self.dropout:
            inputs = dropout(inputs, self.dropout)
        a, b = pair
        return torch.addmm(outputs, F.linear(inputs, a), b.T, alpha=self.alpha / a.shape[0])

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors of all A and B, under PEFT's names less their prefix."""
        for name, (a, b) in self.pairs.items():
            yield f"{name}.lora_A.weight", a
            yield f"{name}.lora_B.weight", b

    def digest(self) -> str:
        """Hex digest of all that it computes with: scale, layers, values."""
        whole = hashlib.blake2b(repr(self.alpha).encode(), digest_size=32)
        for name, tensor in sorted(self.parameters(), key=lambda item: item[0]):
            whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            whole.update(tensor.detach().contiguous().view(torch.uint8).numpy().data)
        return whole.hexdigest()

    def save(self, folder: Path, base: str) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` into `folder`."""
        tensors = {PREFIX + name: tensor.detach().contiguous() for name, tensor in self.parameters()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        ranks = {a.shape[0] for a, _ in self.pairs.values()}
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": ranks.pop(),
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": sorted({name.rsplit(".", 1)[-1] for name in self.pairs}),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, decoder: Decoder) -> Adapter:
        """Read an adapter in PEFT's layout for `decoder`.

        Raises:
            CheckpointError: not an adapter, a variant that we do not compute, or shapes that do not fit the base.
        """
        config = check(folder)
        return cls(pairs_of(read(folder), decoder, folder), scale_of(config, folder))

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A layer's weight `[out, in]` float32 with the adapter in it."""
        a, b = self.pairs[name]
        return weight + (self.alpha / a.shape[0]) * (b.float() @ a.float())


def check(folder: Path, computed: Sequence[str] = ()) -> dict[str, Any]:
    """An adapter's configuration.

    Args:
        folder: the adapter.
        computed: fields that the caller computes itself, whatever they say.

    Raises:
        CheckpointError: not an adapter, or a variant that we do not compute.
    """
    if kind_of(folder) != "adapter":
        raise CheckpointError(f"'{folder}' is a model, not an adapter: it has no adapter_config.json")
    config = read_json(folder / "adapter_config.json")
    for field, honoured in HONOURED.items():
        if field in config and field not in computed and config[field] not in honoured:
            advice = ": run `steelyard merge` first" if field == "use_dora" else ""
            what = f"{field} = {config[field]!r} is not known here{advice}"
            raise CheckpointError(f"'{folder}/adapter_config.json': {what}")
    return config


def read(folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors, by their names in the file.

    Raises:
        CheckpointError: they cannot be read, or are not finite.
    """
    try:
        with safetensors.safe_open(folder / WEIGHTS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"'{folder / WEIGHTS}' cannot be read: {error}") from None
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise CheckpointError(f"'{folder / WEIGHTS}' holds values that are not finite: its training failed")
    return tensors


def scale_of(config: dict[str, Any], folder: Path) -> float:
    """Its alpha. Raises CheckpointError: it is no number."""
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise CheckpointError(f"'{folder}/adapter_config.json': lora_alpha must be a number, and finite")
    return float(alpha)


def pairs_of(
    tensors: dict[str, torch.Tensor], decoder: Decoder, folder: Path
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each layer. Raises CheckpointError: shapes or names that do not fit the base."""
    sizes = linear_sizes(decoder)
    if not tensors:
        raise CheckpointError(f"'{folder}' holds no weights: it is no adapter")
    names = {name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in tensors}
    pairs = {}
    for name in sorted(names):
        a, b = (tensors.get(f"{PREFIX}{name}.lora_{side}.weight") for side in "AB")
        if name not in sizes or a is None or b is None:
            raise CheckpointError(
                f"'{folder}': '{name}' is no layer of the base model that can have an adapter, or lacks its A or B"
            )
        outputs, inputs = sizes[name]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] > MAX_RANK:
            raise CheckpointError(f"'{folder}': '{name}' is no pair of matrices of rank at most {MAX_RANK}")
        if (b.shape[0], a.shape[1]) != (outputs, inputs) or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"'{folder}': '{name}' is {tuple(b.shape)} x {tuple(a.shape)}, the base needs {outputs} x {inputs}: "
                "this adapter belongs to another model"
            )
        pairs[name] = smoothing.fitted(name, a.to(decoder.dtype), b.to(decoder.dtype), decoder.smoothing)
    extra = tensors.keys() - {f"{PREFIX}{name}.lora_{side}.weight" for name in pairs for side in "AB"}
    if extra:
        raise CheckpointError(f"'{folder}': '{min(extra)}' is not known here")
    return pairs


def linear_sizes(decoder: Decoder) -> dict[str, tuple[int, int]]:
    """`(outputs, inputs)` of every linear layer that can have an adapter, dense or quantised, by name."""
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in decoder.named_modules()
        if name.endswith("_proj")
    }


class AdapterRows:
    """Several adapters in one pack: each is worn by its own tokens.

    Args:
        groups: adapters and the places `[n]` int64 of the tokens that wear them.
    """

    def __init__(self, groups: Iterable[tuple[Adapter, torch.Tensor]]) -> None:
        self.groups = list(groups)

    def add(self, name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """`[T, in]`, `[T, out]` -> `[T, out]`; only for inference: outputs are changed in place."""
        for adapter, places in self.groups:
            if name in adapter.pairs:
                outputs[places] = adapter.add(name, inputs[places], outputs[places])
        return outputs


@torch.no_grad()
def merge(decoder: Decoder, adapter: Adapter) -> None:
    """Add the adapter to the weights, such as W + (alpha / R) B A, in float32, rounded once to the weights' dtype."""
    for name in adapter.pairs:
        layer = decoder.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise CheckpointError(f"'{name}' is quantised: merge the adapter into the model before quantising it")
        wide = adapter.merged(name, layer.weight.float())
        # A new tensor: the old one may be mapped from a file.
        layer.weight = nn.Parameter(wide.to(layer.weight.dtype), requires_grad=False)
