"""Each token is scored once, and as likely as transformers finds it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from steelyard.data.rows import TokenRow
from steelyard.errors import DataError
from steelyard.evaluate.likelihood import negative_log_likelihood, packs, summary, windows
from steelyard.models.opening import open_checkpoint

TEXT = "A model answers the user, the user asks the assistant. Grüße aus München: 20 °C. " * 6


@given(st.integers(2, 200), st.integers(3, 40), st.booleans(), st.data())
def test_windows_score_each_token_once(size: int, context: int, begun: bool, data: st.DataObject) -> None:
    """The first only where something stands before it."""
    stride = data.draw(st.integers(1, context - 1 - begun))
    tokens, beginning = list(range(size)), [-7] * begun
    rows = windows(tokens, context, stride, beginning)
    scored = [token for row in rows for token, counts in zip(row.tokens, row.trained, strict=True) if counts]
    assert scored == tokens[not begun :]
    for row in rows:
        assert len(row.tokens) <= context
        assert row.tokens[:begun] == beginning
        assert row.tokens[begun:] == list(range(row.tokens[begun], row.tokens[-1] + 1))
    for row in rows[1:]:
        assert row.trained.index(True) >= context - stride


def test_a_text_without_two_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="at least two tokens"):
        windows([1], 8, 4)


def test_loss_and_bits_per_byte_equal_transformers(tiny_model: Path) -> None:
    opened = open_checkpoint(tiny_model, torch.float32)
    ids = opened.tokenizer.encode_plain(TEXT)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert 64 < len(ids) <= 512
    with torch.inference_mode():
        loss = float(reference(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    nats, count = negative_log_likelihood(opened.decoder, None, windows(ids, 512, 256))
    found = summary(nats, count, len(TEXT.encode()))
    assert count == len(ids) - 1
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(loss * count / math.log(2) / len(TEXT.encode()), rel=1e-5)


def test_a_row_is_as_likely_among_others_as_alone(tiny_model: Path) -> None:
    decoder = open_checkpoint(tiny_model, torch.float32).decoder
    rows = [TokenRow(tokens=list(range(n, n + n)), trained=[False] * 2 + [True] * (n - 2)) for n in (5, 90, 17)]
    together, count = negative_log_likelihood(decoder, None, rows)
    apart = [negative_log_likelihood(decoder, None, [row]) for row in rows]
    assert count == sum(n for _, n in apart) == 3 + 88 + 15
    assert together == pytest.approx(sum(nats for nats, _ in apart), rel=1e-5)


def test_packs_hold_every_row_once_within_capacity() -> None:
    rows = [TokenRow(tokens=[n] * n, trained=[False] + [True] * (n - 1)) for n in range(2, 20)]
    found = list(packs(rows, 32))
    assert sorted(length for pack in found for length in pack.lengths) == list(range(2, 20))
    assert all(len(pack.token_ids) <= 32 for pack in found)
