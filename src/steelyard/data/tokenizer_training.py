"""A tokenizer learnt from texts: byte-level BPE (Sennrich et al. 2016), so that every text has tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

END = "<|end|>"
SMALLEST = 256 + 1
"""Every byte, and the token that ends a text."""


def train(
    texts: Iterable[str],
    vocabulary: int,
    path: Path,
    *,
    lowercase: bool = False,
    exact: bool = False,
    marks: Sequence[str] = (),
) -> int:
    """Learn merges from texts and write `tokenizer.json`; returns how many tokens it has.

    Args:
        texts: what to learn from.
        vocabulary: most tokens; fewer if the texts have not so many pairs.
        path: of the file.
        lowercase: read all letters as small ones.
        exact: keep every byte, so that tokens are their text again; otherwise forms of a letter are one (NFKC).
        marks: tokens besides that no text has.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if not exact:
        steps = [normalizers.NFKC(), *([normalizers.Lowercase()] if lowercase else [])]
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocabulary, SMALLEST),
        min_frequency=2,
        show_progress=False,
        special_tokens=[END, *marks],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
    return tokenizer.get_vocab_size()
