"""Structured pruning of a decoder: whole blocks, groups of heads or feed-forward neurons go, and what is left is a
smaller decoder of the same kind, which is faster wherever it runs.

How much each matters is judged by activations (of a block how far it turns what passes through it: Men et al. 2024,
equation 2; of the others the mean length of what they add) or by gradients: the first-order change of the loss if it
were not there, |sum of a dL/da| over what it adds (Molchanov et al. 2019, equation 8).
"""

# T tokens  D model width  F feed-forward width  K key-value heads  E head width

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import nn

from steelyard.data.packing import Pack
from steelyard.errors import ConfigError
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Block, Decoder

Structure = Literal["blocks", "heads", "neurons"]
Importance = Literal["activation", "gradient"]
NEURONS = 64
"""What is left of them is a multiple of it."""


def scores(decoder: Decoder, structure: Structure, importance: Importance, batches: Sequence[Pack]) -> torch.Tensor:
    """How much each part matters: of blocks `[layers]`, of heads `[layers, K]`, of neurons `[layers, F]`, float32.

    Args:
        decoder: dense; stays as it is.
        structure: what may go.
        importance: how it is judged.
        batches: calibration data.
    """
    total: torch.Tensor | None = None
    for batch in batches:
        with _seen(decoder, structure) as seen, torch.set_grad_enabled(importance == "gradient"):
            states = decoder(batch.token_ids, batch.positions, PackedAttention(batch.lengths))
            if importance == "gradient":
                logits = decoder.logits(states[batch.places]).float()
                F.cross_entropy(logits, batch.targets, reduction="sum").backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            blocks = [block for block in decoder.model.layers if isinstance(block, Block)]
            found = torch.stack(
                [_score(decoder, structure, importance, block, *seen[number]) for number, block in enumerate(blocks)]
            )
        total = found if total is None else total + found
    if total is None:
        raise ConfigError("structured pruning judges by what passes through: calibration data are needed")
    return total.abs() if importance == "gradient" else total


@contextlib.contextmanager
def _seen(decoder: Decoder, structure: Structure) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """What passes through each block while the decoder runs: in and out of it, or into its last layer."""
    seen: list[tuple[torch.Tensor, ...]] = []

    def keep(*tensors: torch.Tensor) -> None:
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.retain_grad()
        seen.append(tensors)

    def began(layer: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_(torch.is_grad_enabled())

    handles = [decoder.model.embed_tokens.register_forward_hook(began)]
    for block in decoder.model.layers:
        assert isinstance(block, Block)
        if structure == "blocks":
            handles.append(block.register_forward_hook(lambda layer, inputs, output: keep(inputs[0], output)))
            continue
        last = block.self_attn.o_proj if structure == "heads" else block.mlp.down_proj
        handles.append(last.register_forward_pre_hook(lambda layer, inputs: keep(inputs[0])))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _score(
    decoder: Decoder, structure: Structure, importance: Importance, block: Block, *tensors: torch.Tensor
) -> torch.Tensor:
    """Of one block: a number, `[K]` or `[F]`; summed over the tokens."""
    if importance == "gradient":
        last = tensors[-1]
        assert last.grad is not None
        added = last - tensors[0] if structure == "blocks" else last
        change: torch.Tensor = (added.float() * last.grad.float()).sum(0)  # [D], [K * share * E] or [F]
        if structure == "blocks":
            change = change.sum()
        elif structure == "heads":
            change = change.view(decoder.config.kv_heads, -1).sum(1)
        return change
    if structure == "blocks":
        turned: torch.Tensor = (1 - F.cosine_similarity(tensors[0].float(), tensors[1].float(), dim=-1)).sum()
        return turned
    x = tensors[0].float()
    if structure == "neurons":
        lengths: torch.Tensor = block.mlp.down_proj.weight.float().norm(dim=0)
        return x.abs().sum(0) * lengths
    weight = block.self_attn.o_proj.weight.float()
    groups = zip(x.chunk(decoder.config.kv_heads, 1), weight.chunk(decoder.config.kv_heads, 1), strict=True)
    return torch.stack([(part @ columns.T).norm(dim=1).sum() for part, columns in groups])


def even(layers: int, left: int) -> torch.Tensor:
    """Scores `[layers]` by which the first block, the last and some between them stay, `left` altogether."""
    kept = torch.linspace(0, layers - 1, left).round().long()
    return torch.zeros(layers).index_fill_(0, kept, 1.0)


def cut(decoder: Decoder, structure: Structure, rate: float, found: torch.Tensor) -> tuple[Decoder, dict[str, Any]]:
    """A decoder without those that matter least.

    Args:
        decoder: dense; stays as it is.
        structure: what goes.
        rate: what share of it; of heads and neurons in every block.
        found: see `scores`.

    Returns:
        The smaller decoder, and the fields of `config.json` that are others.

    Raises:
        ConfigError: nothing would go, or nothing be left.
    """
    config = decoder.config
    if structure == "blocks":
        kept = _kept(found, _left(config.layers, rate, 1, "blocks"))
        smaller = msgspec.structs.replace(
            config, layers=len(kept), windows=tuple(config.windows[number] for number in kept.tolist())
        )
        kinds = ["full_attention" if window is None else "sliding_attention" for window in smaller.windows]
        fields: dict[str, Any] = {"num_hidden_layers": len(kept)}
        if config.model_type in ("qwen2", "qwen3", "gemma3_text"):
            fields["layer_types"] = kinds
        numbers = {str(old): str(new) for new, old in enumerate(kept.tolist())}
        return _filled(smaller, decoder, lambda name, tensor: tensor, numbers), fields
    if structure == "neurons":
        left = _left(config.feed_forward, rate, NEURONS if config.feed_forward > NEURONS else 16, "neurons")
        smaller = msgspec.structs.replace(config, feed_forward=left)
        places = [_kept(row, left) for row in found]
        rows, columns = ("gate_proj", "up_proj"), ("down_proj",)
        return _filled(smaller, decoder, _cutting(places, places, rows, columns)), {"intermediate_size": left}
    left = _left(config.kv_heads, rate, 1, "key-value heads")
    share = config.heads // config.kv_heads
    smaller = msgspec.structs.replace(config, heads=left * share, kv_heads=left)
    groups = [_kept(row, left) for row in found]
    keys = [_spread(kept, config.head_width) for kept in groups]
    queries = [_spread(kept, share * config.head_width) for kept in groups]
    change = _cutting(queries, queries, ("q_proj",), ("o_proj",))
    also = _cutting(keys, keys, ("k_proj", "v_proj"), ())
    fields = {
        "num_attention_heads": left * share,
        "num_key_value_heads": left,
        "head_dim": config.head_width,
    }
    return _filled(smaller, decoder, lambda name, tensor: also(name, change(name, tensor))), fields


def _left(size: int, rate: float, multiple: int, what: str) -> int:
    """How many are left of `size`."""
    left = round(size * (1 - rate) / multiple) * multiple
    if not 0 < left < size:
        raise ConfigError(f"rate {rate} of {size} {what} leaves {left}: fewer than all have to stay, and some")
    return left


def _kept(row: torch.Tensor, left: int) -> torch.Tensor:
    """The places of the `left` largest, in order."""
    return row.topk(left).indices.sort().values


def _spread(groups: torch.Tensor, width: int) -> torch.Tensor:
    """Places of groups -> those of their members."""
    return (groups[:, None] * width + torch.arange(width)).flatten()


Change = Callable[[str, torch.Tensor], torch.Tensor]


def _cutting(
    row_places: Sequence[torch.Tensor],
    column_places: Sequence[torch.Tensor],
    rows: Sequence[str],
    columns: Sequence[str],
) -> Change:
    """Takes the places of each block out of the outputs of some layers, and out of the inputs of others."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        parts = name.split(".")
        if len(parts) < 3 or parts[1] != "layers":
            return tensor
        block, layer = int(parts[2]), parts[-2]
        if layer in rows:
            return tensor[row_places[block]]
        return tensor[:, column_places[block]] if layer in columns and tensor.dim() == 2 else tensor

    return change


def _filled(config: Any, decoder: Decoder, change: Change, numbers: Mapping[str, str] | None = None) -> Decoder:
    """A decoder of `config` with what `change` leaves of another's parameters, blocks by their new numbers."""
    with torch.device("meta"):
        made = Decoder(config)
    for name, parameter in decoder.named_parameters():
        parts = name.split(".")
        if numbers is not None and parts[1] == "layers":
            if parts[2] not in numbers:
                continue
            parts[2] = numbers[parts[2]]
        path, _, leaf = ".".join(parts).rpartition(".")
        left = change(name, parameter.detach()).contiguous().clone()
        setattr(made.get_submodule(path), leaf, nn.Parameter(left, requires_grad=False))
    if config.tied:
        made.lm_head.weight = made.model.embed_tokens.weight
    return made.eval()
