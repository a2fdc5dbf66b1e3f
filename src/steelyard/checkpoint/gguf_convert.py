"""A GGUF file becomes a checkpoint folder: Hugging Face config, weight names and layout, bfloat16, tokenizer.

Knows the decoder architectures that llama.cpp writes as `llama` (Llama, Mistral, SmolLM), `qwen2`, `qwen3` and
`gemma3`; every tensor of the file must have a place in the model and every place a tensor, of the expected shape. The
container is `gguf.py`'s, the tokenizer `gguf_tokenizer.py`'s.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from steelyard.checkpoint import bfloat16, safetensors
from steelyard.checkpoint.gguf import GGUF, GGUFTensor
from steelyard.checkpoint.gguf_config import read_config
from steelyard.checkpoint.gguf_tokenizer import write_tokenizer
from steelyard.errors import ArtifactError

PIECE_VALUES = 1 << 22
"""Values decoded at a time, about: what the conversion holds in memory, whatever the model's size."""


class Place(NamedTuple):
    """Where a GGUF tensor goes: its Hugging Face name and shape, the heads to un-permute (0: none), and what its
    writer has added to it.
    """

    name: str
    shape: tuple[int, ...]
    heads: int = 0
    added: float = 0.0


def convert(path: Path, folder: Path, report: Callable[[str, int, int | None], None] = lambda *_: None) -> None:
    """Write the checkpoint files of the GGUF at `path` into an existing folder.

    Args:
        path: the GGUF file.
        folder: gets config.json, generation_config.json, model.safetensors (bfloat16, rounded to nearest even),
            tokenizer.json, tokenizer_config.json and, if the file has one, chat_template.jinja.
        report: called with what is done, and the bytes of weights written so far and in all.

    Raises:
        ArtifactError: not a GGUF file, or one of an architecture, type or tokenizer that is not read.
    """
    gguf = GGUF(path)
    config = read_config(gguf)
    places = _places(gguf, config)
    _check(gguf, places)
    total = 2 * sum(int(np.prod(place.shape)) for place in places.values())
    done = 0

    def content(tensor: GGUFTensor, place: Place) -> Iterator[NDArray[np.uint16]]:
        nonlocal done
        for piece in _pieces(tensor, place.heads):
            bits = bfloat16.to_bits(piece - np.float32(place.added) if place.added else piece)
            yield bits
            done += bits.nbytes
            report("convert", done, total)

    safetensors.write(
        folder / "model.safetensors",
        (
            (place.name, "BF16", place.shape, functools.partial(content, gguf.tensors[name], place))
            for name, place in places.items()
        ),
        {"format": "pt"},
    )
    write_tokenizer(gguf, folder, config["vocab_size"], config["max_position_embeddings"])
    _write_json(folder / "config.json", config)
    special: dict[str, Any] = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config
    }
    _write_json(folder / "generation_config.json", special)


def unpermute(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo the order in which llama.cpp stores the rows of Llama's Q and K.

    GGUF pairs neighbouring rows of a head for its rotary embedding; Hugging Face pairs row i with row i + half.

    Args:
        rows: `[heads * head_dim, ...]`, whole heads.
        heads: how many heads there are in it.
    """
    paired = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)


def _pieces(tensor: GGUFTensor, heads: int) -> Iterator[NDArray[np.float32]]:
    if len(tensor.shape) == 1:
        yield unpermute(tensor.read(), heads) if heads else tensor.read()
        return
    unit = tensor.shape[0] // heads if heads else 1
    step = max(PIECE_VALUES // tensor.shape[-1] // unit, 1) * unit
    for start in range(0, tensor.rows, step):
        rows = tensor.read_rows(start, start + step)
        yield unpermute(rows, rows.shape[0] // unit) if heads else rows


def _places(gguf: GGUF, config: dict[str, Any]) -> dict[str, Place]:
    """GGUF name -> place, for every tensor that the model of this config has."""
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
    places = {"token_embd.weight": Place("model.embed_tokens.weight", (vocabulary, width))}
    for number in range(config["num_hidden_layers"]):
        for name, place in layer.items():
            places[f"blk.{number}.{name}"] = place._replace(name=f"model.layers.{number}.{place.name}")
    places["output_norm.weight"] = Place("model.norm.weight", (width,))
    if not config["tie_word_embeddings"]:
        places["output.weight"] = Place("lm_head.weight", (vocabulary, width))
    if gemma:  # its norms multiply by 1 + weight, and GGUF's hold that
        places |= {name: place._replace(added=1.0) for name, place in places.items() if name.endswith("norm.weight")}
    return places


def _check(gguf: GGUF, places: dict[str, Place]) -> None:
    for name, place in places.items():
        tensor = gguf.tensors.get(name)
        if tensor is None:
            raise ArtifactError(f"'{gguf.path}' has no tensor '{name}': it is incomplete or only a part of a model")
        if tensor.shape != place.shape:
            shapes = f"{list(tensor.shape)} where its metadata say {list(place.shape)}"
            raise ArtifactError(f"'{gguf.path}' has tensor '{name}' of shape {shapes}")
    # rope_freqs is a function of the config (checked there), not a weight.
    for name in gguf.tensors.keys() - places.keys() - {"rope_freqs.weight"}:
        kind = gguf.metadata["general.architecture"]
        raise ArtifactError(f"'{gguf.path}' has a tensor '{name[:100]!a}' that a {kind} model has no place for")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
