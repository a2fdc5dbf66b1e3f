"""Which tensor of a GGUF is which of a Hugging Face model, and in which order its rows stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", bound=np.generic)


class Place(NamedTuple):
    """Of a GGUF tensor: its Hugging Face name and shape, the heads whose rows are in another order (0: none), and what
    its writer has added to it.
    """

    name: str
    shape: tuple[int, ...]
    heads: int = 0
    added: float = 0.0


def places(config: Mapping[str, Any]) -> dict[str, Place]:
    """GGUF name -> place, for every tensor that the model of a config has, as `read_config` makes it."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    queries, keys = config["num_attention_heads"], config["num_key_value_heads"]
    head, vocabulary = config["head_dim"], config["vocab_size"]
    permuted, gemma = config["model_type"] == "llama", config["model_type"] == "gemma3_text"
    feed_forward_norm = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
    layer = {
        "attn_norm.weight": Place("input_layernorm.weight", (width,)),
        "attn_q.weight": Place("self_attn.q_proj.weight", (queries * head, width), queries * permuted),
        "attn_k.weight": Place("self_attn.k_proj.weight", (keys * head, width), keys * permuted),
        "attn_v.weight": Place("self_attn.v_proj.weight", (keys * head, width)),
        "attn_output.weight": Place("self_attn.o_proj.weight", (width, queries * head)),
        "ffn_norm.weight": Place(f"{feed_forward_norm}.weight", (width,)),
        "ffn_gate.weight": Place("mlp.gate_proj.weight", (inner, width)),
        "ffn_up.weight": Place("mlp.up_proj.weight", (inner, width)),
        "ffn_down.weight": Place("mlp.down_proj.weight", (width, inner)),
    }
    if config["model_type"] == "qwen2" or config.get("attention_bias"):
        layer["attn_q.bias"] = Place("self_attn.q_proj.bias", (queries * head,), queries * permuted)
        layer["attn_k.bias"] = Place("self_attn.k_proj.bias", (keys * head,), keys * permuted)
        layer["attn_v.bias"] = Place("self_attn.v_proj.bias", (keys * head,))
    if config.get("attention_bias"):
        layer["attn_output.bias"] = Place("self_attn.o_proj.bias", (width,))
    if gemma:
        layer["post_attention_norm.weight"] = Place("post_attention_layernorm.weight", (width,))
        layer["post_ffw_norm.weight"] = Place("post_feedforward_layernorm.weight", (width,))
    if gemma or config["model_type"] == "qwen3":
        layer["attn_q_norm.weight"] = Place("self_attn.q_norm.weight", (head,))
        layer["attn_k_norm.weight"] = Place("self_attn.k_norm.weight", (head,))
    found = {"token_embd.weight": Place("model.embed_tokens.weight", (vocabulary, width))}
    for number in range(config["num_hidden_layers"]):
        for name, place in layer.items():
            found[f"blk.{number}.{name}"] = place._replace(name=f"model.layers.{number}.{place.name}")
    found["output_norm.weight"] = Place("model.norm.weight", (width,))
    if not config["tie_word_embeddings"]:
        found["output.weight"] = Place("lm_head.weight", (vocabulary, width))
    if gemma:  # its norms multiply by 1 + weight, and GGUF's hold that
        found |= {name: place._replace(added=1.0) for name, place in found.items() if name.endswith("norm.weight")}
    return found


def unpermute(rows: NDArray[T], heads: int) -> NDArray[T]:
    """Undo the order in which llama.cpp stores the rows of Llama's Q and K.

    GGUF pairs neighbouring rows of a head for its rotary embedding; Hugging Face pairs row i with row i + half.

    Args:
        rows: `[heads * head_dim, ...]`, whole heads.
        heads: how many heads there are in it.
    """
    paired = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)


def permute(rows: NDArray[T], heads: int) -> NDArray[T]:
    """The order in which llama.cpp stores the rows of Llama's Q and K; see `unpermute`."""
    paired = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)
