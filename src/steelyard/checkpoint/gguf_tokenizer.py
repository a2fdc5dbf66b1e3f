"""The tokenizer in a GGUF's metadata becomes `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.

Two kinds are rebuilt: byte-level BPE (`gpt2`), whose merges the file lists, and SentencePiece BPE (`llama`), whose
merges follow from the pieces' scores. What splits text before the merges is known by name only; an unknown name is
refused, since a near miss gives other tokens without any error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from steelyard.checkpoint.gguf import GGUF, Value
from steelyard.errors import ArtifactError

MAX_TEMPLATE_BYTES = 1 << 20
MAX_PIECE_CHARACTERS = 512
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# tokenizer.ggml.pre -> how text is split before the merges.
PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _digits,
    "llama-bpe": lambda: _split(LLAMA3_SPLIT),
    "qwen2": lambda: _split(QWEN2_SPLIT),
    "gpt-2": _gpt2,
    "default": _gpt2,
}


def write_tokenizer(gguf: GGUF, folder: Path, vocabulary: int, positions: int) -> None:
    """Write the tokenizer files of a GGUF into a folder.

    Args:
        gguf: the open file.
        folder: gets `tokenizer.json`, `tokenizer_config.json` and, if there is one, `chat_template.jinja`.
        vocabulary: rows of the embedding; a token beyond them is refused.
        positions: the model's context, in tokens.

    Raises:
        ArtifactError: metadata missing or malformed, or a kind of tokenizer that is not rebuilt.
    """
    _Builder(gguf.metadata, vocabulary, f"'{gguf.path}'").write(folder, positions)


def rebuilt(metadata: Mapping[str, Value], vocabulary: int, called: str) -> Tokenizer:
    """The tokenizer in metadata. Raises ArtifactError, which begins with `called`: as `write_tokenizer` does."""
    return _Builder(metadata, vocabulary, called).tokenizer()[0]


class _Builder:
    def __init__(self, metadata: Mapping[str, Value], vocabulary: int, called: str) -> None:
        self.metadata, self.called = metadata, called
        self.tokens: list[str] = self.strings("tokens")
        if len(self.tokens) > vocabulary:
            self.refuse(f"has {len(self.tokens)} tokens for an embedding of {vocabulary}")
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            self.refuse("lists a token twice in 'tokenizer.ggml.tokens'")
        self.types = self.numbers("token_type")
        self.model = self.key("model")
        self.pre = self.key("pre")

    def refuse(self, what: str) -> NoReturn:
        raise ArtifactError(f"{self.called} {what}")

    def key(self, name: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{name}")

    def strings(self, name: str) -> list[str]:
        value = self.key(name)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.refuse(f"has no list of strings 'tokenizer.ggml.{name}': its tokenizer cannot be rebuilt")
        return value

    def numbers(self, name: str) -> Sequence[float]:
        value = self.key(name)
        if not isinstance(value, np.ndarray) or len(value) != len(self.tokens):
            self.refuse(f"has no 'tokenizer.ggml.{name}' with a number for each token")
        numbers: list[float] = value.tolist()
        return numbers

    def flag(self, name: str, default: bool) -> bool:
        value = self.key(name)
        return value if isinstance(value, bool) else default

    def special(self, name: str) -> int | None:
        value = self.key(f"{name}_token_id")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(self.tokens):
            self.refuse(f"has a 'tokenizer.ggml.{name}_token_id' that is no token")
        return value

    def tokenizer(self) -> tuple[Tokenizer, bool, bool]:
        """And whether it begins and ends every text with a token."""
        if self.model == "gpt2":
            tokenizer, add_bos = self.byte_level(), self.flag("add_bos_token", self.pre == "llama-bpe")
        elif self.model == "llama":
            tokenizer, add_bos = self.sentencepiece(), self.flag("add_bos_token", True)
        else:
            self.refuse(f"has a tokenizer of kind {str(self.model)[:40]!a}; gpt2 and llama are rebuilt")
        add_eos = self.flag("add_eos_token", False)
        tokenizer.add_tokens(
            [
                AddedToken(token, normalized=False, special=kind != USER_DEFINED)
                for token, kind in zip(self.tokens, self.types, strict=True)
                if token and kind in (CONTROL, USER_DEFINED, UNKNOWN)
            ]
        )
        self.post_process(tokenizer, add_bos, add_eos)
        return tokenizer, add_bos, add_eos

    def write(self, folder: Path, positions: int) -> None:
        tokenizer, add_bos, add_eos = self.tokenizer()
        tokenizer.save(str(folder / "tokenizer.json"))
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        numbers = {name: self.special(key) for name, key in names.items()}
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": positions,
            "clean_up_tokenization_spaces": False,
            "add_bos_token": add_bos,
            "add_eos_token": add_eos,
            **{f"{name}_token": self.tokens[number] for name, number in numbers.items() if number is not None},
        }
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        self.write_template(folder)

    def write_template(self, folder: Path) -> None:
        template = self.metadata.get("tokenizer.chat_template")
        if template is None:
            return
        if not isinstance(template, str) or len(template.encode()) > MAX_TEMPLATE_BYTES:
            self.refuse(f"has a chat template that is no text of up to {MAX_TEMPLATE_BYTES >> 10} KB")
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    def post_process(self, tokenizer: Tokenizer, add_bos: bool, add_eos: bool) -> None:
        steps: list[Any] = [processors.ByteLevel(trim_offsets=False)] if self.model == "gpt2" else []
        before, after = self.around("bos") if add_bos else [], self.around("eos") if add_eos else []
        if before or after:
            steps.append(
                processors.TemplateProcessing(
                    single=[*before, "$A", *after],
                    pair=[*before, "$A", *after, *before, "$B:1", *after],
                    special_tokens=[(token, self.ids[token]) for token in {*before, *after}],
                )
            )
        if steps:
            tokenizer.post_processor = processors.Sequence(steps)

    def around(self, name: str) -> list[str]:
        number = self.special(name)
        if number is None:
            self.refuse(f"adds a {name} token to every text but does not say which it is")
        return [self.tokens[number]]

    def byte_level(self) -> Tokenizer:
        pre = self.pre
        if pre is None and str(self.metadata.get("general.architecture")).startswith("qwen"):
            pre = "qwen2"
        if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            self.refuse(f"has the pre-tokenizer {str(pre)[:40]!a}, which is not rebuilt; known are {known}")
        merges = []
        for merge in self.strings("merges"):
            # A piece may itself begin with a space, so the separator is looked for after the first character.
            middle = merge.find(" ", 1)
            merges.append((merge[:middle], merge[middle + 1 :]))
        model = self.bpe(merges, ignore_merges=pre == "llama-bpe")
        tokenizer = Tokenizer(model)
        if pre == "qwen2":
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def sentencepiece(self) -> Tokenizer:
        if self.key("precompiled_charsmap") is not None or self.flag("remove_extra_whitespaces", False):
            self.refuse("has a SentencePiece tokenizer that rewrites its text first, which is not rebuilt")
        unknown = self.special("unknown")
        model = self.bpe(
            self.merges_by_score(),
            unk_token=None if unknown is None else self.tokens[unknown],
            fuse_unk=True,
            byte_fallback=all(f"<0x{byte:02X}>" in self.ids for byte in range(256)),
        )
        tokenizer = Tokenizer(model)
        prefix = self.flag("add_space_prefix", True)
        spaces: list[Any] = [normalizers.Prepend("▁")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
        steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
        return tokenizer

    def merges_by_score(self) -> list[tuple[str, str]]:
        """SentencePiece joins the pair whose piece scores highest: so every split of a piece, best piece first."""
        normal = {token for token, kind in zip(self.tokens, self.types, strict=True) if kind == NORMAL}
        scores = self.numbers("scores")
        ranked = []
        for piece in normal:
            if len(piece) > MAX_PIECE_CHARACTERS:
                self.refuse(f"has a token of {len(piece)} characters; at most {MAX_PIECE_CHARACTERS} are read")
            for middle in range(1, len(piece)):
                left, right = piece[:middle], piece[middle:]
                if left in normal and right in normal:
                    ranked.append((-scores[self.ids[piece]], self.ids[left], self.ids[right]))
        return [(self.tokens[left], self.tokens[right]) for _, left, right in sorted(ranked)]

    def bpe(self, merges: list[tuple[str, str]], **settings: Any) -> models.BPE:
        try:
            return models.BPE(vocab=self.ids, merges=merges, **settings)
        except Exception as error:  # the library's Rust side raises plain Exception
            self.refuse(f"has merges that do not fit its tokens: {' '.join(str(error).split())[:200]}")
