"""A CTranslate2 folder of Whisper becomes a checkpoint folder: Hugging Face config, weight names, float16 as it is.

Every tensor of the file must have a place in the model and every place a tensor, of the expected shape. The container
is `ctranslate2.py`'s.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steelyard.checkpoint import manifest, safetensors
from steelyard.checkpoint.ctranslate2 import CTranslate2
from steelyard.errors import ArtifactError

MODEL = "model.bin"
SCALARS = {
    "decoder/activation",
    "decoder/alibi",
    "decoder/alignment_heads",
    "decoder/alignment_layer",
    "decoder/num_heads",
    "decoder/pre_norm",
    "decoder/scale_embeddings",
    "decoder/start_from_zero_embedding",
    "encoder/num_heads",
    "decoder/projection/weight",
}
"""What is a setting, or the embeddings once more; not a weight."""
NAMES = {16: "F16", 32: "F32"}


def convert(source: Path, folder: Path, report: Callable[[str, int, int | None], None] = lambda *_: None) -> None:
    """Write the checkpoint files of the model in `source` into an existing folder.

    Args:
        source: has model.bin, config.json and tokenizer.json.
        folder: gets config.json, generation_config.json, model.safetensors and tokenizer.json.
        report: called with what is done, and the bytes of weights written so far and in all.

    Raises:
        ArtifactError: no CTranslate2 model, not of Whisper, or one whose tensors do not fit each other.
    """
    model = CTranslate2(source / MODEL)
    if model.specification != "WhisperSpec":
        raise ArtifactError(f"'{model.path}' is a {model.specification}; of CTranslate2's models Whisper alone is read")
    if not (source / "tokenizer.json").is_file():
        raise ArtifactError(f"'{source}' has no tokenizer.json")
    places = dict(_places(model))
    for name in model.tensors.keys() - SCALARS - {name for name, _ in places.values()}:
        raise ArtifactError(f"'{model.path}' has a tensor '{name}' that Whisper has no place for")
    total, done = sum(piece.nbytes for _, piece in places.values()), 0

    def content(piece: NDArray[Any]) -> NDArray[Any]:
        nonlocal done
        done += piece.nbytes
        report("convert", done, total)
        return np.ascontiguousarray(piece)

    entries = (
        (name, NAMES[8 * piece.itemsize], piece.shape, lambda piece=piece: content(piece))
        for name, (_, piece) in places.items()
    )
    safetensors.write(folder / "model.safetensors", entries, {"format": "pt"})
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    tokens = {token["content"]: token["id"] for token in _tokens(source)}
    _write_json(folder / "config.json", _config(model, tokens))
    _write_json(folder / "generation_config.json", _generation(source, tokens))


def _config(model: CTranslate2, tokens: dict[str, int]) -> dict[str, Any]:
    vocabulary, width = _tensor(model, "decoder/embeddings/weight", 2).shape
    inner = {side: _tensor(model, f"{side}/layer_0/ffn/linear_0/bias", 1).shape[0] for side in ("encoder", "decoder")}
    heads = {side: int(_tensor(model, f"{side}/num_heads", 0)) for side in ("encoder", "decoder")}
    if min(heads.values()) < 1 or any(width % count for count in heads.values()):
        raise ArtifactError(f"'{model.path}': its heads do not divide its width {width}")
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "vocab_size": vocabulary,
        "num_mel_bins": _tensor(model, "encoder/conv1/weight", 3).shape[1],
        "d_model": width,
        "encoder_layers": _layers(model, "encoder"),
        "decoder_layers": _layers(model, "decoder"),
        "encoder_attention_heads": heads["encoder"],
        "decoder_attention_heads": heads["decoder"],
        "encoder_ffn_dim": inner["encoder"],
        "decoder_ffn_dim": inner["decoder"],
        "max_source_positions": _tensor(model, "encoder/position_encodings/encodings", 2).shape[0],
        "max_target_positions": _tensor(model, "decoder/position_encodings/encodings", 2).shape[0],
        "activation_function": "gelu",
        "scale_embedding": False,
        "eos_token_id": tokens.get("<|endoftext|>"),
        "decoder_start_token_id": tokens.get("<|startoftranscript|>"),
    }


def _generation(source: Path, tokens: dict[str, int]) -> dict[str, Any]:
    """What is said before a transcript, and the tokens that are never a part of one."""
    raw = manifest.read_json(source / "config.json")
    lists = {name: raw.get(name, []) for name in ("suppress_ids", "suppress_ids_begin")}
    for name, values in lists.items():
        if not isinstance(values, list) or not all(isinstance(value, int) and value >= 0 for value in values):
            raise ArtifactError(f"'{source}/config.json': {name} must be a list of token ids")
    return {
        "eos_token_id": tokens.get("<|endoftext|>"),
        "decoder_start_token_id": tokens.get("<|startoftranscript|>"),
        "no_timestamps_token_id": tokens.get("<|notimestamps|>"),
        "suppress_tokens": lists["suppress_ids"],
        "begin_suppress_tokens": lists["suppress_ids_begin"],
    }


def _tokens(source: Path) -> list[dict[str, Any]]:
    added = manifest.read_json(source / "tokenizer.json").get("added_tokens", [])
    whole = isinstance(added, list) and all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and isinstance(token.get("id"), int)
        for token in added
    )
    if not whole:
        raise ArtifactError(f"'{source}/tokenizer.json': added_tokens is no list of tokens")
    return list(added)


def _places(model: CTranslate2) -> Iterator[tuple[str, tuple[str, NDArray[Any]]]]:
    """Hugging Face's name -> CTranslate2's, and the part of that tensor which it is."""
    width = _tensor(model, "decoder/embeddings/weight", 2).shape[1]

    def whole(theirs: str, ours: str, rank: int) -> tuple[str, tuple[str, NDArray[Any]]]:
        return f"model.{ours}", (theirs, _tensor(model, theirs, rank))

    def norm(theirs: str, ours: str) -> Iterator[tuple[str, tuple[str, NDArray[Any]]]]:
        yield whole(f"{theirs}/gamma", f"{ours}.weight", 1)
        yield whole(f"{theirs}/beta", f"{ours}.bias", 1)

    def linear(theirs: str, ours: str) -> Iterator[tuple[str, tuple[str, NDArray[Any]]]]:
        yield whole(f"{theirs}/weight", f"{ours}.weight", 2)
        yield whole(f"{theirs}/bias", f"{ours}.bias", 1)

    def fused(theirs: str, ours: str, parts: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, NDArray[Any]]]]:
        weight, bias = _tensor(model, f"{theirs}/weight", 2), _tensor(model, f"{theirs}/bias", 1)
        if weight.shape != (len(parts) * width, width) or bias.shape != (len(parts) * width,):
            raise ArtifactError(f"'{model.path}' has tensor '{theirs}/weight' of shape {list(weight.shape)}")
        for number, part in enumerate(parts):
            rows = slice(number * width, (number + 1) * width)
            yield f"model.{ours}.{part}.weight", (f"{theirs}/weight", weight[rows])
            if part != "k_proj":  # Whisper's keys have none; there are zeros
                yield f"model.{ours}.{part}.bias", (f"{theirs}/bias", bias[rows])
            elif bias[rows].any():
                raise ArtifactError(f"'{model.path}': '{theirs}/bias' gives keys a bias, which Whisper has not")

    for name in ("conv1", "conv2"):
        yield whole(f"encoder/{name}/weight", f"encoder.{name}.weight", 3)
        yield whole(f"encoder/{name}/bias", f"encoder.{name}.bias", 1)
    yield whole("decoder/embeddings/weight", "decoder.embed_tokens.weight", 2)
    for side in ("encoder", "decoder"):
        yield whole(f"{side}/position_encodings/encodings", f"{side}.embed_positions.weight", 2)
        for number in range(_layers(model, side)):
            theirs, ours = f"{side}/layer_{number}", f"{side}.layers.{number}"
            yield from fused(f"{theirs}/self_attention/linear_0", f"{ours}.self_attn", ("q_proj", "k_proj", "v_proj"))
            yield from linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            yield from norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            if side == "decoder":
                yield from linear(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                yield from fused(f"{theirs}/attention/linear_1", f"{ours}.encoder_attn", ("k_proj", "v_proj"))
                yield from linear(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
                yield from norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
            yield from linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            yield from linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
            yield from norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
        yield from norm(f"{side}/layer_norm", f"{side}.layer_norm")


def _layers(model: CTranslate2, side: str) -> int:
    begins = f"{side}/layer_"
    named = {name.removeprefix(begins).partition("/")[0] for name in model.tensors if name.startswith(begins)}
    begins = f"{side}/layer_"
    named = {name.removeprefix(begins).partition("/")[0] for name in model.tensors if name.startswith(begins)}
    numbers = {int(number) for number in named if number.isdigit()}
    if not numbers or numbers != set(range(len(numbers))):
        raise ArtifactError(f"'{model.path}' lacks layers of its {side}: it is incomplete")
    return len(numbers)


def _tensor(model: CTranslate2, name: str, rank: int) -> NDArray[Any]:
    found = model.tensors.get(name)
    if found is None:
        raise ArtifactError(f"'{model.path}' has no tensor '{name}': it is incomplete")
    if found.ndim != rank or (rank and found.dtype.str not in ("<f2", "<f4")):
        what = f"of shape {list(found.shape)} and type {found.dtype}"
        raise ArtifactError(f"'{model.path}' has tensor '{name}' {what}: only float16 and float32 are read")
    return found


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
