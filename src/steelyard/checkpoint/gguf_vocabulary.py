"""A checkpoint's tokenizer becomes GGUF metadata: the other way of `gguf_tokenizer.py`.

What is written is rebuilt as that file would, and compared: a tokenizer that comes back as another one is refused, with
what GGUF has no words for, since a near miss gives other tokens without any error.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from steelyard.checkpoint.gguf import Value
from steelyard.checkpoint.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    rebuilt,
)
from steelyard.errors import ArtifactError, CheckpointError
from steelyard.text.bounded import read_optional_object, token_content
from steelyard.text.tokenizer import Tokenizer

SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Tokens by their Hugging Face name: GGUF's."""
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def vocabulary(folder: Path, tokenizer: Tokenizer, rows: int) -> dict[str, Value]:
    """The keys `tokenizer.*` of a checkpoint, without its chat template.

    Args:
        folder: the checkpoint.
        tokenizer: its tokenizer.
        rows: of the embedding: as many tokens are written, those that the tokenizer has not as unused ones.

    Raises:
        CheckpointError: a tokenizer of a kind that GGUF's readers do not know, or with more tokens than `rows`.
    """
    return _Describer(folder, tokenizer).describe(rows)


class _Describer:
    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.state = tokenizer.state()
        self.added = {token["id"]: token for token in self.state["added_tokens"]}
        self.unknown: str | None = self.state["model"].get("unk_token")

    def refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"'{self.folder}' has a tokenizer {what}, which GGUF cannot say")

    def describe(self, rows: int) -> dict[str, Value]:
        if self.tokenizer.vocabulary > rows:
            self.refuse(f"of {self.tokenizer.vocabulary} tokens for an embedding of {rows}")
        model, pre = self.kind()
        tokens, types = self.tokens(rows, model)
        found: dict[str, Value] = {
            "tokenizer.ggml.model": model,
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
        }
        if model == "gpt2":
            found["tokenizer.ggml.merges"] = [" ".join(merge) for merge in self.state["model"]["merges"]]
        else:
            found["tokenizer.ggml.scores"] = self.scores(tokens)
            steps = _steps(self.state["normalizer"])
            found["tokenizer.ggml.add_space_prefix"] = any(step["type"] == "Prepend" for step in steps)
        found |= self.special()
        found |= self.around(found)
        self.compare(found, rows)
        return found

    def kind(self) -> tuple[str, str]:
        """`tokenizer.ggml.model` and `tokenizer.ggml.pre`."""
        model = self.state["model"]
        if model["type"] != "BPE":
            self.refuse(f"of kind {model['type']}")
        split = _steps(self.state["pre_tokenizer"])
        for name, make in PRE_TOKENIZERS.items():
            if split == _steps(json.loads(make().__getstate__())):
                return "gpt2", name
        if split or not model["byte_fallback"]:
            kinds = ", ".join(step["type"] for step in split) or "nothing"
            self.refuse(f"that splits text by {kinds} in a way that has no name ({', '.join(PRE_TOKENIZERS)} have)")
        return "llama", "default"

    def tokens(self, rows: int, model: str) -> tuple[list[str], np.ndarray[Any, np.dtype[np.int32]]]:
        tokens = [f"[PAD{number}]" for number in range(rows)]
        types = np.full(rows, UNUSED, dtype="<i4")
        for token, number in self.state["model"]["vocab"].items():
            tokens[number] = token
            types[number] = BYTE if model == "llama" and token in BYTES else NORMAL
        for number, token in self.added.items():
            tokens[number] = token["content"]
            types[number] = CONTROL if token["special"] else USER_DEFINED
            if model == "llama" and token["content"] == self.unknown:
                types[number] = UNKNOWN
        return tokens, types

    def scores(self, tokens: list[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """SentencePiece joins what scores highest: so a piece's score falls with the place of its first merge."""
        pieces = dict.fromkeys("".join(merge) for merge in self.state["model"]["merges"])
        places = {piece: place for place, piece in enumerate(pieces)}
        return np.array([-places.get(token, len(places)) for token in tokens], dtype="<f4")

    def special(self) -> dict[str, Value]:
        """Ids of special tokens."""
        found: dict[str, Value] = {}
        settings = read_optional_object(self.folder / "tokenizer_config.json")
        declared: dict[str, Any] = {}
        for name in ("config.json", "generation_config.json"):
            declared |= read_optional_object(self.folder / name)
        for name, key in SPECIAL.items():
            token = token_content(settings.get(f"{name}_token")) or (self.unknown if name == "unk" else None)
            number = declared.get(f"{name}_token_id") if token is None else self.tokenizer.token_id(token)
            number = number[0] if isinstance(number, list) and number else number
            if isinstance(number, int) and 0 <= number < self.tokenizer.vocabulary:
                found[f"tokenizer.ggml.{key}_token_id"] = number
        others = sorted(self.tokenizer.eos_ids - {found.get("tokenizer.ggml.eos_token_id")})
        if others and others[0] < self.tokenizer.vocabulary:
            found["tokenizer.ggml.eot_token_id"] = others[0]
        return found

    def around(self, special: Mapping[str, Value]) -> dict[str, Value]:
        """Which special tokens stand around every text."""
        inner = self.tokenizer.encode("a")
        whole = self.tokenizer.encode("a", add_special_tokens=True)
        begin, end = (special.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
        before = whole[: 1 if whole[:1] == [begin] and begin not in inner else 0]
        after = whole[len(before) + len(inner) :]
        if whole != [*before, *inner, *after] or after not in ([], [end]):
            self.refuse("that puts other tokens around a text than one that begins and one that ends it")
        return {"tokenizer.ggml.add_bos_token": bool(before), "tokenizer.ggml.add_eos_token": bool(after)}

    def compare(self, found: Mapping[str, Value], rows: int) -> None:
        """Whether what is read again is what was written."""
        try:
            again: dict[str, Any] = json.loads(rebuilt(found, rows, f"'{self.folder}'").to_str())
        except ArtifactError as error:
            raise CheckpointError(str(error)) from None
        others = _meaning(again)
        for what, value in _meaning(self.state).items():
            if value != others[what]:
                self.refuse(f"whose {what} would be read as others")
        if not _tokens(self.state).items() <= _tokens(again).items():
            self.refuse("with two tokens of one number")


def _meaning(state: dict[str, Any]) -> dict[str, Any]:
    """What decides about tokens, by what it is called."""
    model = state["model"]
    return {
        "switches": [model[key] or None for key in ("dropout", "ignore_merges", "byte_fallback", "fuse_unk")],
        "affixes": [model[key] or None for key in ("continuing_subword_prefix", "end_of_word_suffix")],
        "normalizers": _steps(state["normalizer"]),
        "pre-tokenizers": _steps(state["pre_tokenizer"]),
        "merges": _merges(state),
        "added tokens": {
            token["id"]: [token[key] for key in ("content", "special", "single_word", "lstrip", "rstrip")]
            for token in state["added_tokens"]
        },
    }


def _steps(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, without what decides about offsets only."""
    if component is None:
        return []
    if component["type"] == "Sequence":
        inner = next(value for value in component.values() if isinstance(value, list))
        return [step for part in inner for step in _steps(part)]
    return [{key: value for key, value in component.items() if key != "trim_offsets"}]


def _tokens(state: dict[str, Any]) -> dict[str, int]:
    return {**state["model"]["vocab"], **{token["content"]: token["id"] for token in state["added_tokens"]}}


def _merges(state: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Pieces in their order, each with the pairs that make it; those that no text has, since they are added tokens,
    not.
    """
    added = {token["content"] for token in state["added_tokens"]}
    groups = itertools.groupby(state["model"]["merges"], "".join)
    return [(piece, sorted(pairs)) for piece, pairs in groups if piece not in added]
