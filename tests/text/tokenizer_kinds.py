"""The real kinds of tokenizers, built small: what the tests of decoding run over."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = (
    "The steelyard weighs exactly with one moving weight. Grüße aus München!",
    "今天天气很好。 Привет, мир! 😀🚀 and   so on, isn't it",
)


def sentencepiece(strip: bool) -> tokenizers.Tokenizer:
    """BPE with byte fallback: as Llama 2 (with `strip`) and Gemma (without) have it."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "t", "h", "e", "s", "a", "é", "天", "th", "the", "▁the", "▁s", "▁▁"]
    vocabulary = {token: id for id, token in enumerate(["<unk>", "<s>", "</s>", *pieces, *words])}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "s"), ("▁", "▁")]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """Unigram with the Metaspace decoder, as T5 and XLM-R have it."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, unk_token="<unk>", special_tokens=["<unk>", "<pad>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def wordpiece() -> tokenizers.Tokenizer:
    """WordPiece, as BERT has it."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


KINDS = {
    "llama2": lambda: sentencepiece(strip=True),
    "gemma": lambda: sentencepiece(strip=False),
    "metaspace": metaspace,
    "wordpiece": wordpiece,
}


def write(kind: str, folder: Path) -> Path:
    """The kind's tokenizer as a checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    KINDS[kind]().save(str(folder / "tokenizer.json"))
    return folder
