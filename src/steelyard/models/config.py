"""What a decoder's `config.json` says, in one struct: Llama 2/3, SmolLM, Mistral, Qwen 2/3, Gemma 3 (text).

Knows the Hugging Face field names and nothing of weights. What it cannot honour it refuses by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from steelyard.checkpoint.manifest import read_json
from steelyard.errors import CheckpointError

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
Activation = Literal["silu", "gelu_tanh"]
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""`hidden_act` or `hidden_activation` -> what a feed-forward's gates go through."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
MAX_LAYERS, MAX_SIZE = 1024, 1 << 24  # a file cannot make us build more


class Rope(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary position embedding (Su et al. 2021) and how it is stretched beyond the trained context."""

    theta: float = 10_000.0
    kind: str = "default"
    """One of `ROPE_TYPES`."""
    scaling: dict[str, Any] = {}
    """The scaling's own parameters under their Hugging Face names."""


class DecoderConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes and switches of a decoder."""

    model_type: str
    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    feed_forward: int
    norm_epsilon: float
    context: int
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    feed_forward_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    """What attention and feed-forward add is normalised, too."""
    norm_offset: float = 0.0
    """Norms multiply by this plus their weight."""
    activation: Activation = "silu"
    embedding_scale: float = 1.0
    """What rows of the embedding are multiplied by."""
    score_width: float | None = None
    """Attention scores are q k / sqrt of this; None: of the head width."""
    windows: tuple[int | None, ...] = ()
    """Sliding window of each layer in tokens; None attends to everything before."""
    rope: Rope = Rope()
    local_rope: Rope | None = None
    """That of layers with a window, where it is another."""
    quantization: dict[str, Any] | None = None
    """`quantization_config` as it stands in the file (compressed-tensors)."""


def _rope(raw_scaling: Mapping[str, Any] | None, theta: Any) -> Rope:
    scaling = dict(raw_scaling or {})
    kind = str(scaling.pop("rope_type", None) or scaling.pop("type", None) or "default")
    scaling.pop("type", None)
    theta = float(scaling.pop("rope_theta", None) or theta)
    if kind not in ROPE_TYPES:
        raise CheckpointError(f"config.json: rope scaling '{kind}' is not known here; known: {', '.join(ROPE_TYPES)}")
    return Rope(theta=theta, kind=kind, scaling=scaling)


def _ropes(raw: Mapping[str, Any], model_type: str) -> tuple[Rope, Rope | None]:
    """Of all layers; or of those that see everything, and of those with a window."""
    given, theta = raw.get("rope_parameters"), raw.get("rope_theta")
    if model_type != "gemma3_text":
        return _rope(given or raw.get("rope_scaling"), theta or 10_000.0), None
    by_layer = dict(given or {})
    everywhere = by_layer.get("full_attention") or raw.get("rope_scaling")
    local_theta = raw.get("rope_local_base_freq") or 10_000.0
    return _rope(everywhere, theta or 1_000_000.0), _rope(by_layer.get("sliding_attention"), local_theta)


def _windows(raw: Mapping[str, Any], model_type: str, layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    if model_type == "gemma3_text":
        window, every = int(raw.get("sliding_window", 4096)), int(raw.get("sliding_window_pattern", 6))
        pattern = ["full_attention" if layer % every == 0 else "sliding_attention" for layer in range(1, layers + 1)]
        return tuple(window if kind == "sliding_attention" else None for kind in raw.get("layer_types") or pattern)
    if window is None or model_type == "llama":
        return (None,) * layers
    kinds = raw.get("layer_types")
    if kinds is None and model_type == "mistral":
        return (int(window),) * layers
    if not raw.get("use_sliding_window", model_type == "mistral"):
        return (None,) * layers
    if kinds is None:
        first = int(raw.get("max_window_layers", layers))
        return tuple(int(window) if layer >= first else None for layer in range(layers))
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def parse(raw: Mapping[str, Any]) -> DecoderConfig:
    """Read a `config.json`'s fields.

    Raises:
        CheckpointError: an architecture, activation or scaling that is not known here, or a missing field.
    """
    model_type = str(raw.get("model_type"))
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"config.json: model_type '{model_type}' is not known here; known: {', '.join(MODEL_TYPES)}"
        )
    gemma = model_type == "gemma3_text"
    field, default = ("hidden_activation", "gelu_pytorch_tanh") if gemma else ("hidden_act", "silu")
    activation = str(raw.get(field, default))
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise CheckpointError(f"config.json: {field} '{activation}' is not known here; known: {known}")
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if raw.get(name):
            raise CheckpointError(f"config.json: '{name}' is not known here: take a model without it")
    try:
        width, layers, heads = int(raw["hidden_size"]), int(raw["num_hidden_layers"]), int(raw["num_attention_heads"])
        if not 1 <= layers <= MAX_LAYERS:
            raise ValueError(f"num_hidden_layers must be 1 to {MAX_LAYERS}, not {layers}")
        rope, local_rope = _ropes(raw, model_type)
        config = DecoderConfig(
            model_type=model_type,
            vocabulary=int(raw["vocab_size"]),
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_width=int(raw.get("head_dim") or width // max(heads, 1)),
            feed_forward=int(raw["intermediate_size"]),
            norm_epsilon=float(raw.get("rms_norm_eps", 1e-6)),
            context=int(raw.get("max_position_embeddings", 2048)),
            tied=bool(raw.get("tie_word_embeddings", gemma)),
            qkv_bias=model_type == "qwen2" or bool(raw.get("attention_bias", False)),
            output_bias=model_type != "qwen2" and bool(raw.get("attention_bias", False)),
            feed_forward_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=gemma or model_type == "qwen3",
            post_norms=gemma,
            norm_offset=1.0 if gemma else 0.0,
            activation=ACTIVATIONS[activation],
            embedding_scale=math.sqrt(width) if gemma else 1.0,
            score_width=float(raw.get("query_pre_attn_scalar", 256)) if gemma else None,
            windows=_windows(raw, model_type, layers),
            rope=rope,
            local_rope=local_rope,
            quantization=raw.get("quantization_config"),
        )
    except KeyError as error:
        raise CheckpointError(f"config.json: field {error} is missing") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"config.json: {error}") from None
    sizes = [config.vocabulary, width, heads, config.kv_heads, config.head_width, config.feed_forward, config.context]
    sizes += [window for window in config.windows if window is not None]
    if min(sizes) < 1 or max(sizes) > MAX_SIZE:
        raise CheckpointError(f"config.json: every size must be at least 1 and at most {MAX_SIZE}")
    if config.heads % config.kv_heads or config.head_width % 2 or len(config.windows) != layers:
        raise CheckpointError("config.json: heads must divide by key-value heads, and each head's width by 2")
    if config.quantization is not None and not isinstance(config.quantization, dict):
        raise CheckpointError("config.json: quantization_config must be an object")
    if config.score_width is not None and not 0 < config.score_width <= MAX_SIZE:
        raise CheckpointError(f"config.json: query_pre_attn_scalar must be above 0 and at most {MAX_SIZE}")
    for stretched in (rope, local_rope or rope):
        try:
            rotary_frequencies(config, stretched)
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            what = f"rope scaling '{stretched.kind}' lacks or has a wrong {error}"
            raise CheckpointError(f"config.json: {what}") from None
    return config


def load(folder: Path) -> DecoderConfig:
    """The decoder configuration of a checkpoint folder."""
    return parse(read_json(folder / "config.json"))


def rotary_frequencies(config: DecoderConfig, rope: Rope) -> tuple[torch.Tensor, float]:
    """Inverse frequencies `[head_width / 2]` float32 in radians per position, and the factor on cos and sin.

    `linear`: Chen et al. 2023. `yarn`: Peng et al. 2023, section 3. `llama3`: the Llama 3.1 model card's
    piecewise interpolation between wavelengths.
    """
    size = config.head_width
    frequencies = 1.0 / rope.theta ** (torch.arange(0, size, 2, dtype=torch.int64).float() / size)
    if rope.kind == "linear":
        return frequencies / float(rope.scaling["factor"]), 1.0
    if rope.kind == "llama3":
        factor, low, high = (float(rope.scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
        original = float(rope.scaling["original_max_position_embeddings"])
        wavelength = 2 * math.pi / frequencies
        smooth = (original / wavelength - low) / (high - low)
        blended = (1 - smooth) * frequencies / factor + smooth * frequencies
        scaled = torch.where(wavelength > original / low, frequencies / factor, frequencies)
        medium = (wavelength <= original / low) & (wavelength >= original / high)
        return torch.where(medium, blended, scaled), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, size, frequencies, config.context)
    return frequencies, 1.0


def _yarn(rope: Rope, size: int, frequencies: torch.Tensor, context: int) -> tuple[torch.Tensor, float]:
    original = float(rope.scaling.get("original_max_position_embeddings") or context)
    factor = float(rope.scaling.get("factor") or context / original)

    def scale(of: float, weight: float = 1.0) -> float:
        return 1.0 if of <= 1 else 0.1 * weight * math.log(of) + 1.0

    attention = rope.scaling.get("attention_factor")
    if attention is None:
        weight, weight_all = rope.scaling.get("mscale"), rope.scaling.get("mscale_all_dim")
        attention = scale(factor, weight) / scale(factor, weight_all) if weight and weight_all else scale(factor)

    def dimension(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension(float(rope.scaling.get("beta_fast") or 32))
    high = dimension(float(rope.scaling.get("beta_slow") or 1))
    if rope.scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / factor * ramp + frequencies * (1 - ramp), float(attention)
