"""A tokenizer written into metadata and rebuilt from them is the same one, or is refused with what is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_writer import GGUFSpec, bpe_pairs
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from steelyard.checkpoint import gguf_tokenizer, gguf_write
from steelyard.checkpoint.gguf import GGUF
from steelyard.checkpoint.gguf_tokenizer import PRE_TOKENIZERS
from steelyard.checkpoint.gguf_vocabulary import vocabulary
from steelyard.errors import CheckpointError
from steelyard.text.tokenizer import Tokenizer

TEXTS = (
    "The steelyard weighs exactly with one moving weight.",
    "Grüße aus München: 20 °C, ein Stück Käse für 3,50 €, naïve café.",
    "今天天气很好。 Привет, мир! 😀🚀 and so on",
)
CORPUS = [
    *TEXTS,
    "  spaces,\n\n\ttabs  ",
    "a  1234 b'll <|im_end|> x",
    "e\u0301 Ⅷ ½",
    "日本語のテキスト 👩‍👩‍👧",
    "",
]
FILES = ("tokenizer.json", "tokenizer_config.json")


def again(folder: Path, out: Path, rows: int) -> Tokenizer:
    """What is rebuilt of what is written."""
    gguf_write.write(out / "x.gguf", vocabulary(folder, Tokenizer.load(folder), rows), [])
    gguf_tokenizer.write_tokenizer(GGUF(out / "x.gguf"), out, rows, 128)
    return Tokenizer.load(out)


def same(one: Tokenizer, other: Tokenizer) -> None:
    for text in CORPUS:
        for special in (False, True):
            ids = one.encode(text, add_special_tokens=special)
            assert other.encode(text, add_special_tokens=special) == ids, text
            assert other.decode(ids) == one.decode(ids)


@pytest.mark.parametrize("pre", [name for name in PRE_TOKENIZERS if name != "default"])
def test_byte_level(tmp_path: Path, pre: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    GGUFSpec(bpe_pairs(pre)).write(tmp_path / "a.gguf")
    gguf_tokenizer.write_tokenizer(GGUF(tmp_path / "a.gguf"), tmp_path / "a", 262, 128)
    same(Tokenizer.load(tmp_path / "a"), again(tmp_path / "a", tmp_path / "b", 262))
    for name in FILES:
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    assert GGUF(tmp_path / "b" / "x.gguf").metadata["tokenizer.ggml.pre"] == pre


def test_a_trained_one_and_tokens_that_the_embedding_has_more(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    own = Tokenizer.load(tiny_tokenizer_folder)
    found = again(tiny_tokenizer_folder, tmp_path, own.vocabulary + 3)
    same(own, found)
    metadata = GGUF(tmp_path / "x.gguf").metadata
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{own.vocabulary + 2}]"  # type: ignore[index]
    assert metadata["tokenizer.ggml.token_type"][-4:].tolist() == [1, 5, 5, 5]  # type: ignore[index, union-attr]
    assert found.eos_ids == own.eos_ids
    assert found.bos_id == own.bos_id
    assert found.special_tokens == own.special_tokens
    with pytest.raises(CheckpointError, match=f"of {own.vocabulary} tokens for an embedding of {own.vocabulary - 1}"):
        vocabulary(tiny_tokenizer_folder, own, own.vocabulary - 1)


def sentencepiece(folder: Path, prefix: bool = True) -> None:
    """What transformers makes of a SentencePiece model, as Llama 2 has it: pieces by score, merges by piece."""
    pieces = ["▁t", "he", "▁the", "in", "er", "▁th", "ing", "▁w", "ei", "gh", "weigh", "▁weigh", "eigh"]
    letters = sorted({letter for text in CORPUS for letter in text.replace(" ", "▁")} | set("▁theingrw"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    ids = {token: number for number, token in enumerate(tokens)}
    merges = [
        (piece[:at], piece[at:])
        for piece in pieces
        for at in sorted(range(1, len(piece)), key=lambda at: (ids.get(piece[:at], 0), ids.get(piece[at:], 0)))
        if piece[:at] in ids and piece[at:] in ids
    ]
    library = Library(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    library.add_special_tokens([AddedToken(token, normalized=False) for token in tokens[:3]])
    library.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B:1", [("<s>", 1)])
    library.save(str(folder / "tokenizer.json"))
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    sentencepiece(tmp_path, prefix)
    (tmp_path / "b").mkdir()
    own = Tokenizer.load(tmp_path)
    assert "▁weigh" in [own._inner.id_to_token(number) for number in own.encode("weighing")] or not prefix
    same(own, again(tmp_path, tmp_path / "b", own.vocabulary))
    metadata = GGUF(tmp_path / "b" / "x.gguf").metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is prefix
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_eos_token"] is False
    assert metadata["tokenizer.ggml.unknown_token_id"] == 0
    types = np.asarray(metadata["tokenizer.ggml.token_type"])
    assert types[:4].tolist() == [2, 3, 3, 6]


def test_a_second_end_token_is_that_of_a_turn(tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    for name in FILES:
        shutil.copy(tiny_tokenizer_folder / name, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    found = vocabulary(tmp_path, Tokenizer.load(tmp_path), 600)
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.eot_token_id"]) == (2, 0)


def changed(**parts: Any) -> Callable[[Library], Library]:
    def change(library: Library) -> Library:
        for name, value in parts.items():
            setattr(library, name, value)
        return library

    return change


def added(token: AddedToken) -> Callable[[Library], Library]:
    def change(library: Library) -> Library:
        library.add_tokens([token])
        return library

    return change


def with_model(**settings: Any) -> Callable[[Library], Library]:
    def change(library: Library) -> Library:
        state = json.loads(library.to_str())
        state["model"] |= settings
        return Library.from_str(json.dumps(state))

    return change


def around(text: str, *ids: int) -> Callable[[Library], Library]:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special = [(tokens[number], number) for number in ids]
    return changed(post_processor=processors.TemplateProcessing(text, None, special))


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


REFUSED: dict[str, tuple[Callable[[Library], Library], str]] = {
    "another split": (
        changed(pre_tokenizer=split(r"\w+")),
        "splits text by Split, ByteLevel in a way that has no name",
    ),
    "prefix": (changed(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "by ByteLevel in a way"),
    "words": (lambda _: Library(models.WordPiece({"a": 0}, unk_token="a")), "of kind WordPiece"),
    "unigram": (lambda _: Library(models.Unigram([("a", 0.0)], 0, False)), "of kind Unigram"),
    "lower case": (changed(normalizer=normalizers.Lowercase()), "whose normalizers would be read as others"),
    "strips": (added(AddedToken("<x>", lstrip=True)), "whose added tokens would"),
    "dropout": (with_model(dropout=0.5), "whose switches would"),
    "affixes": (with_model(end_of_word_suffix="</w>", vocab={}, merges=[]), "whose affixes would"),
    "whole words": (with_model(ignore_merges=True), "whose switches would"),
    "another first token": (around("<|im_end|> $A", 2), "puts other tokens around a text"),
    "two last tokens": (around("$A <|im_end|> <|im_end|>", 2), "puts other tokens around a text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tiny_tokenizer_folder: Path, tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    library = change(Library.from_file(str(tiny_tokenizer_folder / "tokenizer.json")))
    library.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(tiny_tokenizer_folder / "tokenizer_config.json", tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        vocabulary(tmp_path, tokenizer, 600)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_merges_that_no_scores_give_are_refused(tmp_path: Path) -> None:
    sentencepiece(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["model"]["merges"].remove(["▁", "weigh"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(CheckpointError, match="whose merges would be read as others"):
        vocabulary(tmp_path, tokenizer, 1000)
