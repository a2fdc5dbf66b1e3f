"""Writes small GGUF files for the tests, with every length in the test's hands. Shares no code with the reader."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: object) -> bytes:
    if kind == STRING:
        assert isinstance(value, str)
        return text(value)
    return struct.pack("<" + FORMS[kind], value)


def pair(key: str, kind: int, value: object) -> bytes:
    return text(key) + struct.pack("<I", kind) + scalar(kind, value)


def array(key: str, kind: int, values: Sequence[object]) -> bytes:
    body = b"".join(scalar(kind, value) for value in values)
    return text(key) + struct.pack("<IIQ", ARRAY, kind, len(values)) + body


@dataclass
class TensorSpec:
    """`shape` is numpy's; the file gets its reverse. `offset` overrides where the data are said to be."""

    name: str
    type: int
    shape: tuple[int, ...]
    data: bytes
    offset: int | None = None


@dataclass
class GGUFSpec:
    pairs: list[bytes] = field(default_factory=list)
    tensors: list[TensorSpec] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    tensor_count: int | None = None
    pair_count: int | None = None

    def sections(self) -> list[bytes]:
        """The file in pieces; their boundaries are where a truncation is likely to be missed."""
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        pairs = len(self.pairs) if self.pair_count is None else self.pair_count
        pieces = [self.magic, struct.pack("<I", self.version), struct.pack("<Q", tensors), struct.pack("<Q", pairs)]
        pieces += self.pairs
        offset = 0
        for tensor in self.tensors:
            place = offset if tensor.offset is None else tensor.offset
            head = text(tensor.name) + struct.pack("<I", len(tensor.shape))
            head += struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
            pieces.append(head + struct.pack("<IQ", tensor.type, place))
            offset += len(tensor.data) + -len(tensor.data) % self.alignment
        pieces.append(b"\0" * (-sum(map(len, pieces)) % self.alignment))
        for number, tensor in enumerate(self.tensors):
            last = number == len(self.tensors) - 1
            pieces.append(tensor.data)
            pieces.append(b"" if last else b"\0" * (-len(tensor.data) % self.alignment))
        return pieces

    def write(self, path: Path) -> Path:
        path.write_bytes(b"".join(self.sections()))
        return path


def f32(name: str, values: np.ndarray) -> TensorSpec:
    return TensorSpec(name, TYPES["F32"], values.shape, values.astype("<f4").tobytes())


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of Q and K rows, as a plain loop: row 2i is i of the first half, row 2i+1 i of the second."""
    size = weights.shape[0] // heads
    out = np.empty_like(weights)
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = weights[head * size + i]
            out[head * size + 2 * i + 1] = weights[head * size + size // 2 + i]
    return out


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def bpe_pairs(pre: str | None = "smollm", merges: Sequence[str] = ("h e", "l l", "Ġ t")) -> list[bytes]:
    """Metadata of a byte-level tokenizer: three control tokens, 256 bytes, one token per merge."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), *(m.replace(" ", "") for m in merges)]
    types = [3, 3, 3] + [1] * (len(tokens) - 3)
    return [
        pair("tokenizer.ggml.model", STRING, "gpt2"),
        *([] if pre is None else [pair("tokenizer.ggml.pre", STRING, pre)]),
        array("tokenizer.ggml.tokens", STRING, tokens),
        array("tokenizer.ggml.token_type", I32, types),
        array("tokenizer.ggml.merges", STRING, list(merges)),
        pair("tokenizer.ggml.bos_token_id", U32, 1),
        pair("tokenizer.ggml.eos_token_id", U32, 2),
        pair("tokenizer.ggml.unknown_token_id", U32, 0),
        pair("tokenizer.ggml.padding_token_id", U32, 2),
        pair("tokenizer.chat_template", STRING, "{% for m in messages %}{{ m.content }}{% endfor %}"),
    ]


VOCABULARY, WIDTH, INNER, LAYERS, HEADS, KEY_HEADS, HEAD = 262, 32, 48, 2, 4, 2, 8
GEMMA_LAYERS = 7
"""The sixth sees everything."""


def layers_of(architecture: str) -> int:
    return GEMMA_LAYERS if architecture == "gemma3" else LAYERS


def model_pairs(architecture: str = "llama") -> list[bytes]:
    """Hyperparameters of a small model."""
    gemma = ("key_length", HEAD), ("value_length", HEAD), ("sliding_window", 7)
    return [
        pair("general.architecture", STRING, architecture),
        pair("general.name", STRING, "Tiny Model"),
        pair(f"{architecture}.block_count", U32, layers_of(architecture)),
        pair(f"{architecture}.context_length", U32, 128),
        pair(f"{architecture}.embedding_length", U32, WIDTH),
        pair(f"{architecture}.feed_forward_length", U32, INNER),
        pair(f"{architecture}.attention.head_count", U32, HEADS),
        pair(f"{architecture}.attention.head_count_kv", U32, KEY_HEADS),
        pair(f"{architecture}.attention.layer_norm_rms_epsilon", F32, 1e-5),
        pair(f"{architecture}.rope.freq_base", F32, 50000.0),
        *(pair(f"gemma3.attention.{key}", U32, value) for key, value in gemma if architecture == "gemma3"),
    ]


def model_weights(architecture: str = "llama", tied: bool = True, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by Hugging Face name, exact in bfloat16 and float16."""
    random = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (random.integers(-64, 64, shape) / 128).astype(np.float32)

    weights = {"model.embed_tokens.weight": draw(VOCABULARY, WIDTH), "model.norm.weight": 1 + draw(WIDTH)}
    for layer in range(layers_of(architecture)):
        at = f"model.layers.{layer}."
        weights |= {
            at + "input_layernorm.weight": 1 + draw(WIDTH),
            at + "self_attn.q_proj.weight": draw(HEADS * HEAD, WIDTH),
            at + "self_attn.k_proj.weight": draw(KEY_HEADS * HEAD, WIDTH),
            at + "self_attn.v_proj.weight": draw(KEY_HEADS * HEAD, WIDTH),
            at + "self_attn.o_proj.weight": draw(WIDTH, HEADS * HEAD),
            at + "post_attention_layernorm.weight": 1 + draw(WIDTH),
            at + "mlp.gate_proj.weight": draw(INNER, WIDTH),
            at + "mlp.up_proj.weight": draw(INNER, WIDTH),
            at + "mlp.down_proj.weight": draw(WIDTH, INNER),
        }
        if architecture == "qwen2":
            for name, rows in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS)):
                weights[f"{at}self_attn.{name}_proj.bias"] = draw(rows * HEAD)
        if architecture == "gemma3":
            weights[at + "pre_feedforward_layernorm.weight"] = 1 + draw(WIDTH)
            weights[at + "post_feedforward_layernorm.weight"] = 1 + draw(WIDTH)
        if architecture in ("qwen3", "gemma3"):
            weights[at + "self_attn.q_norm.weight"] = 1 + draw(HEAD)
            weights[at + "self_attn.k_norm.weight"] = 1 + draw(HEAD)
    if not tied:
        weights["lm_head.weight"] = draw(VOCABULARY, WIDTH)
    return weights


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def model_tensors(weights: dict[str, np.ndarray], architecture: str = "llama") -> list[TensorSpec]:
    specs = []
    gemma = architecture == "gemma3"
    for name, values in weights.items():
        stem, _, kind = name.rpartition(".")
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, layer, stem = stem.split(".", 3)
            prefix = f"blk.{layer}."
        if architecture == "llama" and stem.endswith(("q_proj", "k_proj")):
            values = permute(values, HEADS if stem.endswith("q_proj") else KEY_HEADS)
        if gemma and stem.endswith("norm"):  # as its writer does
            values = values + 1
        specs.append(f32(f"{prefix}{(GEMMA_NAMES if gemma else NAMES)[stem]}.{kind}", values))
    return specs


def tiny_model(
    path: Path, architecture: str = "llama", tied: bool = True, pre: str = "smollm"
) -> dict[str, np.ndarray]:
    """Write a whole small model and return its weights by Hugging Face name."""
    weights = model_weights(architecture, tied)
    pairs = model_pairs(architecture) + bpe_pairs()
    GGUFSpec(pairs, model_tensors(weights, architecture)).write(path)
    return weights
